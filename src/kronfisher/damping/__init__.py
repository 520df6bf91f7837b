"""How λ enters an operator."""

from kronfisher.damping.damping import Damping
from kronfisher.damping.factored import FactoredTikhonov
from kronfisher.damping.tikhonov import Tikhonov

__all__ = ["Damping", "FactoredTikhonov", "Tikhonov"]
