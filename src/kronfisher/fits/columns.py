"""Samples that wait together: further columns of the same examples share their inputs.

With exact labels an example comes once for every column of the output Hessian's root, each time with the same input.
Where a layer has few outputs, what half steps need of an example is its input and the sum ``Σ_c g_c g_cᵀ`` over its
columns, so that pieces of the samples are counted in examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kronfisher.layers.samples import Samples

__all__ = ["Columns", "alike", "joined", "shares_columns", "spread"]

MOST = 32  # columns that are joined
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

    def spread(self) -> Samples:
        """The same samples, one by one, each with an input of its own."""
        examples = torch.arange(len(self), device=self.gradients.device).repeat_interleave(self.columns)
        gradients = self.gradients.flatten(1, 2).unsqueeze(2)
        activations = self.activations.select(examples)
        return Samples(activations, gradients, self.first, workspace=self.workspace, batch=self.batch)


def joined(before: Samples, use: Samples) -> Samples | None:
    """Columns that wait, with one more of the same examples, or None where they are too many already."""
    if before.columns >= MOST or before.positions > 1 or use.positions > 1:
        return None
    gradients = torch.cat([before.gradients, use.gradients], dim=2)
    if isinstance(before, Columns):
        return replace(before, gradients=gradients)
    return Columns(before.activations, gradients, before.first, workspace=before.workspace, batch=before.batch)


def spread(samples: Sequence[Samples]) -> list[Samples]:
    """Samples one by one."""
    return [use.spread() if isinstance(use, Columns) else use for use in samples]


def alike(samples: Sequence[Samples]) -> list[Samples]:
    """The same samples, one by one where some of them have several positions: those are not taken with columns."""
    return spread(samples) if any(use.positions > 1 for use in samples) else list(samples)
