"""Parts of the samples that represent all of them in a search for directions, and random directions."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from kronfisher.layers.samples import Samples

__all__ = ["DIRECTIONS", "largest", "noise", "share", "subset"]

DIRECTIONS = 16
_LARGE = 4  # so many times fewer are there besides, for their size
_MANY, _SHARE = 128, 4  # of so many samples at least, one of so many is among the largest


def share(number: int, total: int) -> int:
    """The number of samples that a part takes of `number` of a `total`: of heavy-tailed gradients few decide."""
    return -(-number // _SHARE) if total >= _MANY else number


def largest(samples: Sequence[Samples]) -> list[Samples]:
    """Those with the largest gradients, about."""
    total = sum(map(len, samples))
    return [use.select(sizes(use).topk(share(len(use), total)).indices) for use in samples]


def subset(samples: Sequence[Samples], number: int) -> list[Samples]:
    """The largest of the samples, and about so many of the others, evenly spread over sizes and standing for them all.

    Of heavy-tailed gradients a few decide on the leading pair, and directions that miss these miss it.
    """
    step = max(1, sum(map(len, samples)) // number)
    if step == 1:
        return list(samples)
    parts = []
    for use in samples:
        order = sizes(use).argsort(descending=True, stable=True)
        large, rest = order.tensor_split([-(-len(order) // (step * _LARGE))])
        spread = rest[::step]
        part = use.select(torch.cat([large, spread]))
        weights = part.gradients.new_ones(len(part), 1, 1)
        weights[len(large) :] = (len(rest) / max(len(spread), 1)) ** 0.5
        parts.append(replace(part, gradients=part.gradients * weights))
    return parts


def sizes(samples: Samples) -> Tensor:
    """About ``‖g_k‖ ‖a_k‖ [n]``, over all groups; where positions are many, the inputs in a random direction tell."""
    a, g = samples.activations, samples.gradients
    if samples.positions == 1:
        inputs = a.lengths()
    else:
        inputs = torch.linalg.vector_norm(a.times(noise(g, a.shape[-1])[..., :1].contiguous()), dim=(2, 3))
    outputs = torch.linalg.vector_norm(g, dim=(2, 3))
    return torch.linalg.vector_norm(inputs * outputs, dim=0)


def noise(like: Tensor, width: int) -> Tensor:
    """Random directions ``[H, D, ρ]``, the same at every call."""
    return _random(len(like), width, like.dtype, like.device)


@lru_cache(maxsize=64)
def _random(groups: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    shape = (groups, width, min(DIRECTIONS, width))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        device, dtype, non_blocking=True
    )
