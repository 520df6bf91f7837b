"""Inner products of vectors over the parameters of a model."""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["inner"]


def inner(
    left: Mapping[str, Tensor], right: Mapping[str, Tensor], weights: Mapping[str, float] | None = None
) -> Tensor:
    """``Σ wₙ ⟨leftₙ, rightₙ⟩`` over common names, in float64."""
    terms = []
    for name, value in left.items():
        if name in right:
            product = torch.dot(value.flatten(), right[name].flatten().to(value.dtype)).double()
            terms.append(product if weights is None else product * weights[name])
    return torch.stack(terms).sum()
