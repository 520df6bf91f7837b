"""Damping rules: the ways in which λ enters an operator."""

from kronfisher.fisher.damping.damping import Damping
from kronfisher.fisher.damping.factored import FactoredTikhonov
from kronfisher.fisher.damping.tikhonov import Tikhonov

__all__ = ["Damping", "FactoredTikhonov", "Tikhonov"]
