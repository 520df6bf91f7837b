"""Samples of an ordinary scale, for what does not depend on it and would leave the range of numbers."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kronfisher.layers.samples import Samples

__all__ = ["moderate"]


def moderate(samples: Sequence[Samples]) -> list[Samples]:
    """The same samples times a power of two, the same for all, so that largest inputs and gradients are about one.

    Powers of squares, as in norms of blocks, leave the range of numbers long before the samples do. A power of two
    changes no digit. Zeros stay.
    """
    some = [use for use in samples if use.gradients.numel()]
    gradients = max((_largest(use.gradients) for use in some), default=0.0)
    inputs = max((_largest(use.activations.dense()) for use in some if not use.activations.onehot), default=0.0)
    left, right = (_power(size) for size in (gradients, inputs))
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


def _power(size: float) -> float:
    """The power of two that brings a number of more than zero to about one."""
    return 2.0 ** -torch.frexp(torch.tensor(size, dtype=torch.float64)).exponent.item() if size > 0 else 1.0
