"""Samples that come together: further columns of the same examples share their inputs.

With exact labels an example comes once for every column of the output Hessian's root, each time with the same input.
Where a layer has few outputs, what half steps need of an example is its input and the sum ``Σ_c g_c g_cᵀ`` over its
columns, so that pieces of the samples are counted in examples. Second moments of columns are one product in place of
as many small ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronfisher.layers.samples import Samples

__all__ = ["MOST", "Columns", "alike", "shares_columns", "spread", "together"]

MOST = 32  # columns that come together
_NARROW, _FLAT = 1024, 8  # numbers of a symmetric factor of the outputs that are few: as such, or for a wide layer


def shares_columns(shape: tuple[int, int, int]) -> bool:
    """Whether columns of the same examples are to be treated together, for a layer of H, O, I and one position.

    Example:
        >>> shares_columns((1, 10, 400)), shares_columns((1, 1000, 400))
        (True, False)
    """
    groups, outputs, width = shape
    return groups == 1 and outputs * (outputs + 1) // 2 <= max(_NARROW, _FLAT * (outputs + width))


@dataclass(frozen=True)
class Columns(Samples):
    """Several output gradients ``[1, n, C, O]`` for each of n inputs ``[1, n, 1, I]``."""

    @property
    def positions(self) -> int:
        return 1

    @property
    def columns(self) -> int:
        return self.gradients.shape[2]

    def squares(self) -> Tensor:
        """``Σ_k G_k∘²`` over all columns; see `Samples`."""
        return self.gradients.square().sum(2).mT @ self.activations.dense().squeeze(2).square()

    def apart(self) -> Iterator[Samples]:
        """The columns one by one, as backward passes brought them."""
        for column, gradients in enumerate(self.gradients.split(1, dim=2)):
            first = self.first and not column
            yield Samples(self.activations, gradients, first, self.mask, self.workspace, batch=self.batch)

    def spread(self) -> Samples:
        """The same samples, one by one, each with an input of its own."""
        examples = torch.arange(len(self), device=self.gradients.device).repeat_interleave(self.columns)
        gradients = self.gradients.flatten(1, 2).unsqueeze(2)
        activations = self.activations.select(examples)
        return Samples(activations, gradients, self.first, workspace=self.workspace, batch=self.batch)


def together(first: Samples, further: Sequence[Tensor]) -> Samples:
    """Samples with one position each, and the output gradients of further columns of the same examples."""
    if not further:
        return first
    gradients = torch.cat([first.gradients, *further], dim=2)
    return Columns(first.activations, gradients, first.first, first.mask, first.workspace, batch=first.batch)


def spread(samples: Sequence[Samples]) -> list[Samples]:
    """Samples one by one."""
    return [use.spread() if isinstance(use, Columns) else use for use in samples]


def alike(samples: Sequence[Samples]) -> list[Samples]:
    """The same samples, one by one where some of them have several positions: those are not taken with columns."""
    return spread(samples) if any(use.positions > 1 for use in samples) else list(samples)
