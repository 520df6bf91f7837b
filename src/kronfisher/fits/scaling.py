"""Samples of an ordinary scale, for what does not depend on it and would leave the range of numbers."""

from collections.abc import Sequence
from dataclasses import replace
from math import frexp

import torch
from torch import Tensor

from kronfisher.layers.samples import Samples

__all__ = ["level", "moderate"]


def moderate(samples: Sequence[Samples]) -> list[Samples]:
    """The same samples times a power of two, the same for all, so that largest inputs and gradients are about one.

    Powers of squares, as in norms of blocks, leave the range of numbers long before the samples do. A power of two
    changes no digit. Zeros stay.
    """
    left, right = (2.0**-size for size in _exponents(samples))
    return _scale(samples, left, right)


def level(samples: Sequence[Samples]) -> list[Samples]:
    """The same gradients of samples from inputs and output gradients of one size: ``g aᵀ = (s g)(a/s)ᵀ``.

    Where inputs are as small as output gradients are large, or the other way round, squares of either leave the range
    of numbers though their products are ordinary.
    """
    gradients, inputs = _exponents(samples)
    shift = (inputs - gradients) // 2
    return _scale(samples, 2.0**shift, 2.0**-shift)


def _scale(samples: Sequence[Samples], left: float, right: float) -> list[Samples]:
    """Output gradients times one number, inputs times another."""
    return [
        replace(
            use,
            gradients=use.gradients * left,
            activations=use.activations if right == 1 else use.activations.scale(_line(use, right)),
        )
        for use in samples
    ]


def _line(use: Samples, value: float) -> Tensor:
    """``[H, I]``."""
    return use.gradients.new_full((use.shape[0], use.shape[2]), value)


def _largest(numbers: Tensor) -> float:
    return float(torch.stack(numbers.aminmax()).abs().max())


def _exponents(samples: Sequence[Samples]) -> tuple[int, int]:
    """Of the powers of two that the largest output gradients and inputs are; zero where there are none."""
    some = [use for use in samples if use.gradients.numel()]
    gradients = max((_largest(use.gradients) for use in some), default=0.0)
    inputs = max((_largest(use.activations.dense()) for use in some if not use.activations.onehot), default=0.0)
    return frexp(gradients)[1], frexp(inputs)[1]
