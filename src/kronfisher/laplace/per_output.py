"""Visitors that see the samples of every output of a network by itself: its variances, changes and gradients."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.fisher.blocks import Block, Key
from kronfisher.fisher.precision import Group
from kronfisher.fits import State
from kronfisher.fits.quadratic_forms import products, quadratics
from kronfisher.fits.visitor import Visitor
from kronfisher.layers.activations import Dense
from kronfisher.layers.samples import Samples
from kronfisher.likelihoods import Draws, Likelihood

__all__ = ["Columns", "Directions", "Kept", "PerOutput", "Variances"]


class Columns(Likelihood):
    """A likelihood by name only: its exact columns are unit vectors, one for each output.

    Attributes:
        current: the output whose unit vector was sent backwards last.
        outputs: of the model, once it was run, ``[n, ...]``.
    """

    current = 0
    outputs: Tensor | None = None

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError("these are no probabilities")

    def sample(self, outputs: Tensor, draws: Draws) -> Tensor:
        raise NotImplementedError("these are no probabilities")

    def exact(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        """Unit vectors."""
        self.outputs = outputs.detach()
        unit = torch.zeros_like(outputs).unsqueeze(-1).flatten(1)
        for self.current in range(unit.shape[1]):
            vector = unit.clone()
            vector[:, self.current] = 1
            yield vector.reshape(outputs.shape)

    def check(self, outputs: Tensor, targets: Any, where: str = "batch 0", labels: str = "sampled") -> None:
        """As the base class; targets may be anything, as nothing depends on them."""
        super().check(outputs, None, where, labels)


@dataclass(frozen=True, eq=False)
class PerOutput(Visitor):
    """A fit that builds no operator; a subclass computes something from the samples of one output.

    Attributes:
        columns: tells which output it is.
        results: output → the result so far, shared by the fits of all blocks.
        entries: blocks → a question about them, None where another rank answers it; blocks that share a parameter are
            under one fit.
        arrived: blocks and output → examples that came so far: per-example gradients come a few at a time.
    """

    columns: Columns
    results: dict[int, Any]
    entries: dict[Group, Any] = field(default_factory=dict)
    arrived: dict[tuple[Group, int], int] = field(default_factory=dict)

    exact = True  # for any source of gradients, per-example ones included

    def groups(self, blocks: Sequence[Block], after: Mapping[Key, Key]) -> list[Group]:
        """Those of the posterior; blocks that the batch leaves out have gradients of zero."""
        keys = {block.key for block in blocks}
        groups = [group for group in self.entries if any(block.key in keys for block in group)]
        if not keys.issubset(block.key for group in groups for block in group):
            raise DataError(
                f"{', '.join(block.name for block in blocks)}: the model uses these parameters in another way than "
                "when its Fisher matrix was estimated, or did not use them then; estimate it again for this model."
            )
        return groups

    def add(self, group: Group, value: Tensor) -> None:
        """Add ``[K, n']`` for the next n' examples to the result of the current output."""
        outputs, column = self.columns.outputs, self.columns.current
        assert outputs is not None
        low = self.arrived.get((group, column), 0)
        high = self.arrived[group, column] = low + value.shape[1]
        if column not in self.results:
            self.results[column] = value.new_zeros(len(value), len(outputs))
        self.results[column][:, low:high] += value


class Variances(PerOutput):
    """``J_c Λ⁻¹ J_cᵀ`` for every output c, added to ``results[c] [K, n]`` for K posteriors at once."""

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        """Add the contribution of one group to the variance of the current output."""
        if self.entries[state.blocks] is None:
            return state
        parts = [quadratics(samples, precision, state.blocks) for precision in self.entries[state.blocks]]
        self.add(state.blocks, torch.stack(parts))
        return state


class Directions(PerOutput):
    """``J_c δ`` for every output c and S changes δ of the parameters, added to ``results[c] [S, n]``."""

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        """Add the contribution of one group to the change of the current output."""
        parts = self.entries[state.blocks].split([block.dim for block in state.blocks], dim=1)
        changes = [
            products(use, part.reshape(len(part), *block.shape))
            for block, use, part in zip(state.blocks, samples, parts, strict=True)
        ]
        self.add(state.blocks, torch.stack(changes).sum(0))
        return state


class Kept(PerOutput):
    """Keeps the samples of every output c, ``results[c]: blocks → samples``, for all pairs of outputs."""

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        """Keep them; the inputs are those of the model, only the output gradients are new."""
        if self.entries[state.blocks] is None:
            return state
        mine = self.results.setdefault(self.columns.current, {})
        before = mine.get(state.blocks)
        mine[state.blocks] = samples if before is None else tuple(map(_concatenate, before, samples))
        return state


def _concatenate(x: Samples, y: Samples) -> Samples:
    activations = Dense(torch.cat([x.activations.dense(), y.activations.dense()], dim=1))
    return replace(x, activations=activations, gradients=torch.cat([x.gradients, y.gradients], dim=1))
