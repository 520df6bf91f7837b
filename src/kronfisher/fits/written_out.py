"""Samples that wait as their gradients, where these take less memory than inputs and output gradients.

Of a small convolution ``G_k [O, I]`` has fewer numbers than images and their gradients, and half steps are on G_k in
any case. In the canonical form every input coordinate is a position of its own: ``G_k = Σ_i (column i of G_k) e_iᵀ``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronfisher.layers.activations import Activations
from kronfisher.layers.samples import Samples

__all__ = ["Identity", "WrittenOut", "write_out"]


@dataclass(frozen=True)
class Identity(Activations):
    """Inputs of samples with one position for each coordinate, ``T = I``: a diagonal matrix, the same for all.

    Attributes:
        diagonal: ``[H, I]``.
        samples: n.
        scaled: whether it is anything but ones.
    """

    diagonal: Tensor
    samples: int
    scaled: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        groups, width = self.diagonal.shape
        return groups, self.samples, width, width

    @property
    def numel(self) -> int:
        return self.diagonal.numel()

    def dense(self, low: int = 0, high: int | None = None) -> Tensor:
        return torch.diag_embed(self.diagonal)[:, None].expand(-1, len(range(self.samples)[low:high]), -1, -1)

    def part(self, low: int, high: int) -> "Identity":
        return replace(self, samples=high - low)

    def select(self, index: Tensor) -> "Identity":
        return replace(self, samples=len(index))

    def weighted_sums(self, weights: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        return weights.mT * self.diagonal[:, None, None] if self.scaled else weights.mT

    def copy(self) -> "Identity":
        return self

    def scale(self, factor: Tensor) -> "Identity":
        return replace(self, diagonal=self.diagonal * factor, scaled=True)


@dataclass(frozen=True)
class WrittenOut(Samples):
    """Samples whose output gradients are the columns of ``G_k``: ``[H, n, I, O]``, over identities as inputs."""

    @property
    def bytes(self) -> int:
        return self.gradients.nbytes

    def per_sample(self, room: int = 0) -> Iterator[Tensor]:
        """All of them at once: they are there."""
        yield self.activations.weighted_sums(self.gradients)


def write_out(use: Samples) -> WrittenOut | None:
    """The same samples with their gradients written out, in memory of their own; None where that takes more of it."""
    groups, outputs, width = use.shape
    if groups * outputs * width * len(use) * use.gradients.element_size() > use.bytes:
        return None
    rows = use.gradients.new_empty(groups, outputs, len(use), width)  # as half steps read them
    low = 0
    for gradients in use.per_sample():
        rows[:, :, low : low + gradients.shape[1]] = gradients.transpose(1, 2)
        low += gradients.shape[1]
    identity = Identity(rows.new_ones(groups, width), len(use))
    return WrittenOut(identity, rows.permute(0, 2, 3, 1), use.first, workspace=use.workspace, batch=use.batch)
