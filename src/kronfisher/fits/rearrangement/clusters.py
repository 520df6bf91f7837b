"""Samples whose gradients point alike, together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kronfisher.layers.samples import Samples

__all__ = ["clusters"]

_SKETCH = 16  # rows and columns to which gradients are projected to compare them


def clusters(samples: Sequence[Samples], number: int) -> list[list[Samples]]:
    """At most `number` parts of some samples, by ``⟨G_k, G_l⟩² / (‖G_k‖² ‖G_l‖²)`` of sketches, the same at every call.

    Seeds are far from one another and the samples go to the nearest; groups of a convolution are parted alike.
    """
    rows = torch.cat([_sketch(use) for use in samples], dim=1)
    products = (rows @ rows.mT).square().sum(0)
    size = products.diagonal().sqrt()
    near = products / (size[:, None] * size).clamp_min(torch.finfo(size.dtype).tiny)
    seeds = [size.argmax()]
    closest = near[seeds[0]]
    for _ in range(min(number, len(size)) - 1):
        seeds.append(((1 - closest).clamp_min(0) * size).argmax())
        closest = torch.maximum(closest, near[seeds[-1]])
    nearest = near[torch.stack(seeds)].argmax(0)
    parts = []
    for label in nearest.unique().tolist():
        part, offset = [], 0
        for use in samples:
            index = (nearest[offset : offset + len(use)] == label).nonzero()[:, 0]
            offset += len(use)
            if len(index):
                part.append(use.select(index))
        parts.append(part)
    return parts


def _sketch(samples: Samples) -> Tensor:
    """``[H, n, ·]`` in float64: gradients, projected at random from left and right where they are wide."""
    groups, outputs, width = samples.shape
    projections = (_projection(groups, size, samples.gradients) for size in (width, outputs))
    return torch.cat(
        [part.flatten(2) for piece in samples.rotate(*projections) for part in piece.per_sample()], 1
    ).double()


def _projection(groups: int, size: int, like: Tensor) -> Tensor | None:
    if size <= _SKETCH:
        return None
    noise = torch.randn(size, _SKETCH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise.to(like).expand(groups, -1, -1)
