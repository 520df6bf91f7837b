"""One candidate of `Auto` on the samples that were kept of a layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from kronfisher.fits.fit import Fit
from kronfisher.fits.state import State, reciprocal
from kronfisher.layers.activations import Dense
from kronfisher.layers.samples import Samples

__all__ = ["Trial", "join_parts", "try_fit"]


@dataclass(frozen=True)
class Trial:
    """One candidate on the samples kept.

    Attributes:
        candidate: its place in `Auto.candidates`.
        error: relative, against the true block of these samples.
        bytes: of its operator.
    """

    candidate: int
    error: float
    bytes: int


def try_fit(
    fit: Fit, candidate: int, state: State, samples: Sequence[Samples], count: float | Tensor, squared: Tensor
) -> Trial:
    """Fit some samples and compare the operator with their true block.

    Args:
        fit: the candidate.
        candidate: its place.
        state: an empty one of the fit.
        samples: those kept.
        count: examples that they stand for.
        squared: ``‖F‖²`` of the sum over these samples.
    """
    following: State | None = state
    while following is not None:
        state = following
        for part in samples:
            state = fit.update(state, (part,))
        state.count = count
        following = fit.next_pass(state)
    operator = fit.finish(state)
    scale = reciprocal(state.count)
    cross = sum(operator.quadratic(part) for part in samples) * scale
    whole = squared * scale**2
    missed = whole - 2 * cross + operator.frobenius_norm().double() ** 2
    error = float(missed.clamp_min(0).sqrt() / whole.sqrt()) if float(whole) > 0 else 0.0
    return Trial(candidate, error, operator.bytes)


def join_parts(samples: list[Samples]) -> list[Samples]:
    """All in one, inputs written out, where that takes little room: every candidate reads them many times."""
    size = sum(prod(each.activations.shape) for each in samples) * samples[0].gradients.element_size()
    alike = len({(each.positions, each.mask is None) for each in samples}) == 1
    if not alike or size > samples[0].workspace or any(each.activations.onehot for each in samples):
        return samples
    activations = Dense(torch.cat([each.activations.dense() for each in samples], dim=1))
    mask = None if samples[0].mask is None else torch.cat([each.mask for each in samples if each.mask is not None])
    gradients = torch.cat([each.gradients for each in samples], dim=1)
    return [replace(samples[0], activations=activations, gradients=gradients, mask=mask)]
