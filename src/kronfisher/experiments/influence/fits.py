"""The matrices that the studies of attribution compare."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from kronfisher.estimation.estimate import estimate
from kronfisher.fits import EKFAC, KFAC, KFOC, BlockTridiagonal, Diagonal, Fit, Gram, KroneckerSum, Prototypes
from kronfisher.influence import Influence
from kronfisher.influence.damping import DampingChoice
from kronfisher.likelihoods import Likelihood

__all__ = ["FITS", "IDENTITY", "WHOLE", "make"]

IDENTITY, WHOLE = "identity", "whole matrix"
FITS: Mapping[str, Fit] = {
    IDENTITY: Diagonal(),
    "diagonal": Diagonal(),
    "K-FAC": KFAC(),
    "EKFAC": EKFAC(),
    "K-FOC": KFOC("exact"),
    "EKFAC on K-FOC": EKFAC(KFOC("exact")),
    "two terms": KroneckerSum(rank=2, method="nonnegative"),
    "prototypes": Prototypes(),
    "block-tridiagonal": BlockTridiagonal(),
    WHOLE: Gram(),  # in the space of samples, so that labels should be sampled
}
_LARGE = 1e6  # times the mean eigenvalue: the matrix is a multiple of the identity


def make(
    name: str,
    model: nn.Module,
    batches: Any,
    likelihood: Likelihood,
    damping: DampingChoice | None = None,
    *,
    labels: Any = "exact",
    samples: int = 1,
    refine: int = 0,
) -> Influence:
    """The influence of a model under the fit called `name`; the identity is a damping that leaves nothing else.

    Args:
        name: one of `FITS`.
        model: trained.
        batches: the training data.
        likelihood: of the targets.
        damping: as for `Influence`.
        labels: as for `estimate`.
        samples: as for `estimate`.
        refine: as for `Influence`.
    """
    fisher = estimate(model, batches, likelihood, fit=FITS[name], labels=labels, samples=samples)
    if name == IDENTITY:
        damping = _LARGE * max(float(fisher.trace()) / fisher.dim, 1e-30)
    return Influence(model, fisher, likelihood, damping=damping, refine=refine)
