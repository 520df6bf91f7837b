"""The matrices that the studies of attribution compare."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.estimation.estimate import estimate
from kronfisher.fisher.blocks import Block
from kronfisher.fits import EKFAC, KFAC, KFOC, BlockTridiagonal, Diagonal, Fit, Gram, KroneckerSum, Prototypes
from kronfisher.fits.plan import Plan
from kronfisher.fits.state import State, Total
from kronfisher.influence import Influence
from kronfisher.influence.damping import DampingChoice
from kronfisher.layers.samples import Samples
from kronfisher.likelihoods import Likelihood
from kronfisher.operators import Diagonal as DiagonalOperator

__all__ = ["FITS", "IDENTITY", "WHOLE", "make"]

IDENTITY, WHOLE = "identity", "whole matrix"


@dataclass(kw_only=True)
class _None(State):
    """No sum at all; a zero says which dtype and device there are."""

    zero: Total


@dataclass(frozen=True)
class _Zero(Fit):
    """The zero matrix: with damping, a multiple of the identity."""

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        return Plan(element * sum(block.dim for block in group))

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> _None:
        return _None(group, plan, zero=like.new_zeros(()))

    def update(self, state: _None, samples: tuple[Samples, ...]) -> _None:
        return state

    def finish(self, state: _None) -> DiagonalOperator:
        return DiagonalOperator(torch.zeros_like(state.zero).repeat(state.blocks[0].dim), name=state.name)


FITS: Mapping[str, Fit] = {
    IDENTITY: _Zero(),
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
    """The influence of a model under the fit called `name`; the identity is damping alone, of whatever size.

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
    if name == IDENTITY and damping is None:
        damping = 1.0
    return Influence(model, fisher, likelihood, damping=damping, refine=refine)
