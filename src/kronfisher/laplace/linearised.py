"""What a linearised network does under a posterior: variances of its outputs without any Jacobian ``[n, C, P]``.

One backward pass for each output gives, layer by layer, inputs a and output gradients g with ``J = g aᵀ``. They go
straight into quadratic forms ``J Λ⁻¹ Jᵀ`` by the structure of Λ, through the same capture and streaming that estimates
use: what stands here is a likelihood that asks for the outputs one by one, and fits that sum nothing over data.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.capture.batches import Forward
from kronfisher.capture.isolation import isolated
from kronfisher.errors import DataError, UnsupportedError
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.fisher.blocks import Block, Key
from kronfisher.fits.fit import State
from kronfisher.fits.visitor import Visitor
from kronfisher.laplace.precision import Group, Precision
from kronfisher.layers.activations import Dense
from kronfisher.layers.onehot import Indices
from kronfisher.layers.samples import Samples
from kronfisher.likelihoods import Draws, Likelihood
from kronfisher.linalg import chunks, plain_arithmetic
from kronfisher.operators import KroneckerBasis

__all__ = ["Linearised", "covariances", "directions", "variances"]


class Columns(Likelihood):
    """Back-propagates every output by itself.

    Attributes:
        current: which one is on its way.
        outputs: of the model, once it was run.
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


@dataclass(frozen=True, eq=False)
class PerOutput(Visitor):
    """A fit that makes no operator; a subclass says what becomes of one output's samples.

    Attributes:
        columns: tells which output it is.
        found: output → what was computed of it so far, shared by the fits of all blocks.
        entries: blocks → what is asked about them; blocks that share a parameter are under one fit.
        arrived: blocks and output → data that came so far: gradients of single data come a few at a time.
    """

    columns: Columns
    found: dict[int, Any]
    entries: dict[Group, Any] = field(default_factory=dict)
    arrived: dict[tuple[Group, int], int] = field(default_factory=dict)

    exact = True  # whatever the gradients come from is asked for

    def groups(self, blocks: Sequence[Block], after: Mapping[Key, Key]) -> list[Group]:
        """Those of the posterior."""
        keys = {block.key for block in blocks}
        groups = [group for group in self.entries if keys.issuperset(block.key for block in group)]
        if sum(len(group) for group in groups) != len(keys):
            raise DataError(
                f"{', '.join(block.name for block in blocks)}: the model uses these parameters in another way than "
                "when its Fisher matrix was estimated, or did not use them then; estimate it again for this model."
            )
        return groups

    def add(self, group: Group, value: Tensor) -> None:
        """Add ``[K, n']`` for the next n' data to what was found for the current output."""
        outputs, column = self.columns.outputs, self.columns.current
        assert outputs is not None
        low = self.arrived.get((group, column), 0)
        high = self.arrived[group, column] = low + value.shape[1]
        if column not in self.found:
            self.found[column] = value.new_zeros(len(value), len(outputs))
        self.found[column][:, low:high] += value


class Variances(PerOutput):
    """``J_c Λ⁻¹ J_cᵀ`` for every output c, added to ``found[c] [K, n]`` for K posteriors at once."""

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        """Add what one group contributes to the variance of the current output."""
        parts = [quadratics(samples, precision, state.blocks) for precision in self.entries[state.blocks]]
        self.add(state.blocks, torch.stack(parts))
        return state


class Directions(PerOutput):
    """``J_c δ`` for every output c and S changes δ of the parameters, added to ``found[c] [S, n]``."""

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        """Add what one group contributes to the change of the current output."""
        parts = self.entries[state.blocks].split([block.dim for block in state.blocks], dim=1)
        several = [
            products(use, part.reshape(len(part), *block.shape))
            for block, use, part in zip(state.blocks, samples, parts, strict=True)
        ]
        self.add(state.blocks, torch.stack(several).sum(0))
        return state


class Kept(PerOutput):
    """Keeps the samples of every output c, ``found[c]: blocks → samples``, so that all pairs are at hand afterwards."""

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        """Keep them; the inputs are those of the model, only the output gradients are new."""
        mine = self.found.setdefault(self.columns.current, {})
        before = mine.get(state.blocks)
        mine[state.blocks] = samples if before is None else tuple(map(_one_after_the_other, before, samples))
        return state


def _one_after_the_other(x: Samples, y: Samples) -> Samples:
    activations = Dense(torch.cat([x.activations.dense(), y.activations.dense()], dim=1))
    return replace(x, activations=activations, gradients=torch.cat([x.gradients, y.gradients], dim=1))


# What is asked of a model -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linearised:
    """A network and the parameters in which it is taken to be linear.

    Attributes:
        model: unwrapped.
        names: of the parameters.
        forward: as for `estimate`.
    """

    model: nn.Module
    names: tuple[str, ...]
    forward: Forward | None = None

    def run(self, make: type[PerOutput], batch: Any, entries: Mapping[Group, Any]) -> tuple[Tensor, dict[int, Any]]:
        """One batch under capture: the outputs, and what was found for each of them."""
        parameters = {name: p for name, p in self.model.named_parameters() if name in self.names}
        if frozen := [name for name, p in parameters.items() if not p.requires_grad]:
            raise DataError(
                f"{', '.join(frozen)}: frozen now, but part of the posterior; call requires_grad_(True) on them."
            )
        columns, found = Columns(), {}
        fits: dict[str, PerOutput] = {}
        for group, asked in entries.items():
            fit = make(columns, found, {group: asked})
            names = {name for block in group for name in block.parameters}
            for other in {id(fits[name]): fits[name] for name in names if name in fits}.values():
                fit.entries.update(other.entries)
                names |= {name for name, of in fits.items() if of is other}
            fits.update(dict.fromkeys(names, fit))
        run = Accumulator(self.model, parameters, columns, fits, "exact", forward=self.forward, exact_limit=sys.maxsize)
        with isolated(self.model, 0):
            run.add(batch, "the batch to predict")
        assert columns.outputs is not None
        if strange := [group for group in run.groups if not isinstance(group.fit, PerOutput)]:
            raise UnsupportedError(f"{strange[0].state.name}: no variance can be told for these parameters.")
        return columns.outputs, found


def variances(network: Linearised, batch: Any, entries: Mapping[Group, Sequence[Precision]]) -> tuple[Tensor, Tensor]:
    """Outputs ``[n, ...]`` and their variances ``[K, n, ...]`` under K posteriors."""
    outputs, found = network.run(Variances, batch, entries)
    return outputs, _joined(outputs, found, len(next(iter(entries.values()))))


def directions(network: Linearised, batch: Any, entries: Mapping[Group, Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs ``[n, ...]`` and their first-order changes ``[S, n, ...]`` along S changes of the parameters."""
    outputs, found = network.run(Directions, batch, entries)
    return outputs, _joined(outputs, found, len(next(iter(entries.values()))))


def covariances(network: Linearised, batch: Any, entries: Mapping[Group, Sequence[Precision]]) -> tuple[Tensor, Tensor]:
    """Outputs ``[n, ...]`` and the covariances ``[K, n, C, C]`` of the C outputs of each datum under K posteriors."""
    outputs, found = network.run(Kept, batch, entries)
    width, count = outputs[0].numel(), len(next(iter(entries.values())))
    total = _wide(outputs).new_zeros(count, len(outputs), width, width)
    with plain_arithmetic(outputs.device):
        for group, precisions in entries.items():
            columns = [c for c in sorted(found) if group in found[c]]
            if not columns:
                continue
            kept = [found[c].pop(group) for c in columns]
            index = torch.tensor(columns, device=outputs.device)
            for k, precision in enumerate(precisions):
                total[k][:, index[:, None], index] += pairs(kept, precision, group).to(total.dtype)
    return outputs, total


def _wide(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _joined(outputs: Tensor, found: Mapping[int, Tensor], count: int) -> Tensor:
    zero = _wide(outputs).new_zeros(count, len(outputs))
    columns = [found.get(c, zero).to(zero.dtype) for c in range(outputs[0].numel())]
    return torch.stack(columns, dim=-1).reshape(count, *outputs.shape)


# Quadratic forms of samples -----------------------------------------------------------------------------------------


def quadratics(samples: tuple[Samples, ...], precision: Precision, blocks: Group) -> Tensor:
    """``vec(G_k)ᵀ Λ⁻¹ vec(G_k)`` of every sample k, ``[n]``."""
    parts: list[Tensor] = []
    if (found := _factored(precision, blocks, samples[0])) is None:
        for rows in _rows([samples], precision.operator.dim):
            rows = rows[:, 0].to(precision.operator.dtype)
            parts.append((rows * precision.solves(rows)).sum(1))
        return torch.cat(parts)
    basis, weights = found
    for piece in samples[0].rotated(basis.A, basis.B):
        if _lookup(piece):
            parts.append(_lookup_pairs([piece.gradients], piece, weights)[:, 0, 0])
        elif piece.positions == 1:
            a, g = piece.activations.dense()[:, :, 0].square(), piece.gradients[:, :, 0].square()
            parts.append(((g @ weights) * a).sum(dim=(0, 2)))
        else:
            parts.extend((G.square() * weights[:, None]).sum(dim=(0, 2, 3)) for G in piece.per_sample())
    return torch.cat(parts)


def pairs(kept: list[tuple[Samples, ...]], precision: Precision, blocks: Group) -> Tensor:
    """``vec(G_kc)ᵀ Λ⁻¹ vec(G_kd)`` for all outputs c, d of every sample k, ``[n, C, C]``."""
    first = kept[0][0]
    found = _factored(precision, blocks, first)
    if found is not None and (first.positions == 1 or _lookup(first)):
        basis, weights = found
        gradients = [basis.output_factor.rotate(use.gradients) for (use,) in kept]
        if _lookup(first) and basis.input_factor.is_diagonal:
            scaled = replace(first, activations=first.activations.scaled(basis.A))
            return _lookup_pairs(gradients, scaled, weights)
        if first.positions == 1:
            pieces = [piece.activations.dense()[:, :, 0].square() for piece in first.rotated(basis.A, None)]
            middle = torch.cat(pieces, dim=1) @ weights.mT  # [H, n, O]
            g = torch.cat(gradients, dim=2)  # [H, n, C, O]
            return ((g * middle[:, :, None]) @ g.mT).sum(0)
    parts = []
    for rows in _rows(kept, precision.operator.dim):
        flat = rows.flatten(0, 1).to(precision.operator.dtype)
        solved = precision.solves(flat).reshape(rows.shape)
        parts.append(flat.reshape(rows.shape) @ solved.mT)
    return torch.cat(parts)


def _lookup(samples: Samples) -> bool:
    """Whether each input is one row of a table."""
    return isinstance(samples.activations, Indices) and samples.activations.values.shape[2] == 1


def _lookup_pairs(gradients: list[Tensor], samples: Samples, weights: Tensor) -> Tensor:
    """As `pairs` where inputs are single rows i of a table, and never as wide as it: only equal rows meet."""
    inputs = samples.activations
    assert isinstance(inputs, Indices)
    index, size = inputs.values[..., 0], inputs.weights[..., 0].to(weights.dtype)
    meet = (index[:, :, None] == index[:, None, :]).to(weights.dtype)  # [n, T, T]
    each = weights[0].mT[index]  # [n, T, O]
    g = torch.stack([rows[0] * size[..., None] for rows in gradients], dim=1)  # [n, C, T, O]
    other = meet[:, None] @ g
    return (g * each[:, None]).flatten(2) @ other.flatten(2).mT


def products(samples: Samples, matrices: Tensor) -> Tensor:
    """``⟨G_k, W_s⟩`` for every sample k and S matrices ``[S, H, O, I]``: ``[S, n]``, by ``Σ_t g · (W a)``."""
    groups, _, positions, outputs = samples.gradients.shape
    size = groups * positions * (samples.shape[2] + outputs) * samples.gradients.element_size()
    parts = []
    for low, high in chunks(len(samples), size, samples.workspace):
        g = samples.gradients[:, low:high]
        several = [(samples.activations.times(W.mT.to(g), low, high) * g).sum(dim=(0, 2, 3)) for W in matrices]
        parts.append(torch.stack(several))
    return torch.cat(parts, dim=1)


def _factored(precision: Precision, blocks: Group, samples: Samples) -> tuple[KroneckerBasis, Tensor] | None:
    """K and 1/v ``[H, O, I]`` with ``Λ⁻¹ = K diag(1/v) Kᵀ``, for one block; a diagonal has the identity for K."""
    if len(blocks) > 1:
        return None
    like = samples.gradients
    if (found := precision.factored) is not None:
        basis, values = found
        return KroneckerBasis(basis.A.to(like), basis.B.to(like)), (1 / values).to(like)
    if (diagonal := precision.variances()) is not None:
        groups, outputs, inputs = samples.shape
        basis = KroneckerBasis(like.new_ones(groups, inputs), like.new_ones(groups, outputs))
        return basis, diagonal.to(like).reshape(samples.shape)
    return None


def _rows(kept: Sequence[tuple[Samples, ...]], dim: int) -> Iterator[Tensor]:
    """Gradients written out in canonical order, ``[n', C, D]`` for a few samples at a time and C outputs."""
    first = kept[0][0]
    size = 3 * len(kept) * dim * first.gradients.element_size()
    for low, high in chunks(len(first), size, first.workspace):
        columns = [torch.cat([_written_out(use, low, high) for use in samples], dim=1) for samples in kept]
        yield torch.stack(columns, dim=1)


def _written_out(samples: Samples, low: int, high: int) -> Tensor:
    a, g = samples.activations.dense(low, high), samples.gradients[:, low:high]
    return (g.mT @ a).transpose(0, 1).flatten(1)
