"""What the input side of K-FAC is worth alone: a fit whose output factors are multiples of the identity."""

from dataclasses import dataclass

from kronfisher.fits.kfac import KFAC
from kronfisher.fits.state import FactorSums
from kronfisher.operators import Kronecker

__all__ = ["WHITENING", "Whitening"]

WHITENING = "inputs"
"""Its name in the settings of the suite."""


@dataclass(frozen=True, repr=False)
class Whitening(KFAC):
    """K-FAC with the mean of the output factor's diagonal in the place of the output factor.

    Example:
        >>> import torch, kronfisher as kf
        >>> layer, x = torch.nn.Linear(2, 3), torch.randn(50, 2)
        >>> kfac, inputs = (kf.estimate(layer, x, kf.Gaussian(), fit=fit) for fit in (KFAC(), Whitening()))
        >>> bool(torch.isclose(kfac["weight"].trace(), inputs["weight"].trace()))
        True
    """

    def finish(self, state: FactorSums) -> Kronecker:
        operator = super().finish(state)
        dense = operator.B.dim() == 3
        diagonal = operator.B.diagonal(dim1=1, dim2=2) if dense else operator.B
        mean = diagonal.mean(1, keepdim=True).expand_as(diagonal).contiguous()
        return Kronecker(operator.A, mean.diag_embed() if dense else mean, name=operator.name)
