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

from kronfisher.accumulate import Accumulator
from kronfisher.batches import Forward
from kronfisher.blocks import Block
from kronfisher.errors import DataError
from kronfisher.fits.fit import Fit, Plan, State
from kronfisher.isolation import isolated
from kronfisher.laplace.precision import Precision
from kronfisher.likelihoods import Draws, Likelihood
from kronfisher.operators import KroneckerBasis
from kronfisher.passes import plain_arithmetic
from kronfisher.samples import Dense, Samples, chunks, turned

__all__ = ["Group", "Linearised", "covariances", "directions", "variances"]

Group = tuple[Block, ...]


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
class PerOutput(Fit):
    """A fit that makes no operator; a subclass says what becomes of one output's samples.

    Attributes:
        columns: tells which output it is.
        found: output → what was computed of it so far, shared by the fits of all blocks.
        entries: blocks → what is asked about them; blocks that share a parameter are under one fit.
    """

    columns: Columns
    found: dict[int, Any]
    entries: dict[Group, Any] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def groups(self, blocks: Sequence[Block]) -> list[Group]:
        """Those of the posterior."""
        keys = {block.key for block in blocks}
        groups = [group for group in self.entries if keys.issuperset(block.key for block in group)]
        if sum(len(group) for group in groups) != len(keys):
            raise DataError(
                f"{', '.join(block.name for block in blocks)}: the model uses these parameters in another way than "
                "when its Fisher matrix was estimated, or did not use them then; estimate it again for this model."
            )
        return groups

    def plan(self, group: Group, element: int) -> Plan:
        """Nothing is kept; rows are sorted by sample."""
        return Plan(0)

    def init(self, group: Group, plan: Plan, like: Tensor) -> State:
        """Empty."""
        return State(group, plan, {})


class Variances(PerOutput):
    """``J_c Λ⁻¹ J_cᵀ`` for every output c, added to ``found[c] [K, n]`` for K posteriors at once."""

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        """Add what one group contributes to the variance of the current output."""
        parts = [quadratics(samples, precision, state.blocks) for precision in self.entries[state.blocks]]
        _add(self.found, self.columns.current, torch.stack(parts))
        return state


class Directions(PerOutput):
    """``J_c δ`` for every output c and S changes δ of the parameters, added to ``found[c] [S, n]``."""

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        """Add what one group contributes to the change of the current output."""
        rows: Tensor = self.entries[state.blocks]
        dims = [block.dim for block in state.blocks]
        for block, use, part in zip(state.blocks, samples, rows.split(dims, dim=1), strict=True):
            _add(self.found, self.columns.current, products(use, part.reshape(len(part), *block.shape)))
        return state


class Kept(PerOutput):
    """Keeps the samples of every output c, ``found[c]: blocks → samples``, so that all pairs are at hand afterwards."""

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        """Keep them; the inputs are those of the model, only the output gradients are new."""
        self.found.setdefault(self.columns.current, {})[state.blocks] = samples
        return state


def _add(found: dict[int, Any], column: int, value: Tensor) -> None:
    found[column] = found[column] + value if column in found else value


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
    if (found := _factored(precision, blocks)) is not None:
        basis, weights = found
        (use,) = samples
        parts = []
        for piece in _turned(use, basis):
            a, g = piece.activations.dense(), piece.gradients
            if piece.positions == 1:
                parts.append(((g[:, :, 0].square() @ weights) * a[:, :, 0].square()).sum(dim=(0, 2)))
            else:
                parts.append(((g.mT @ a).square() * weights[:, None]).sum(dim=(0, 2, 3)))
        return torch.cat(parts)
    parts = []
    for rows in _rows([samples], precision.operator.dim):
        rows = rows[:, 0].to(precision.operator.dtype)
        parts.append((rows * precision.solves(rows)).sum(1))
    return torch.cat(parts)


def pairs(kept: list[tuple[Samples, ...]], precision: Precision, blocks: Group) -> Tensor:
    """``vec(G_kc)ᵀ Λ⁻¹ vec(G_kd)`` for all outputs c, d of every sample k, ``[n, C, C]``."""
    if (found := _factored(precision, blocks)) is not None and kept[0][0].positions == 1:
        basis, weights = found
        a = next(_turned(kept[0][0], basis, whole=True)).activations.dense()[:, :, 0].square()  # [H, n, I]
        middle = a @ weights.mT  # [H, n, O]
        g = torch.stack([use.gradients[:, :, 0] for (use,) in kept], dim=2)  # [H, n, C, O]
        g = turned(g, basis.B)
        return ((g * middle[:, :, None]) @ g.mT).sum(0)
    parts = []
    for rows in _rows(kept, precision.operator.dim):
        n, width, _ = rows.shape
        flat = rows.reshape(n * width, -1).to(precision.operator.dtype)
        parts.append(flat.reshape(n, width, -1) @ precision.solves(flat).reshape(n, width, -1).mT)
    return torch.cat(parts)


def products(samples: Samples, matrices: Tensor) -> Tensor:
    """``⟨G_k, W_s⟩`` for every sample k and S matrices ``[S, H, O, I]``: ``[S, n]``, by ``Σ_t g · (W a)``."""
    heads, n, positions, _ = samples.gradients.shape
    size = len(matrices) * heads * positions * (samples.shape[1] + samples.shape[2]) * samples.gradients.element_size()
    parts = []
    for low, high in chunks(n, size, samples.workspace):
        a, g = samples.activations.dense(low, high), samples.gradients[:, low:high]
        outputs = a.flatten(1, 2) @ matrices.to(a).mT  # [S, H, n'·T, O]
        outputs = outputs.reshape(len(matrices), heads, high - low, positions, -1)
        parts.append((outputs * g).sum(dim=(1, 3, 4)))
    return torch.cat(parts, dim=1)


def _factored(precision: Precision, blocks: Group) -> tuple[KroneckerBasis, Tensor] | None:
    """K and 1/v ``[H, O, I]`` with ``Λ⁻¹ = K diag(1/v) Kᵀ``, for one block; a diagonal has the identity for K."""
    if len(blocks) > 1:
        return None
    if (found := precision.factored) is not None:
        return found[0], 1 / found[1]
    if (diagonal := precision.variances()) is not None:
        heads, outputs, inputs = blocks[0].shape
        basis = KroneckerBasis(diagonal.new_ones(heads, inputs), diagonal.new_ones(heads, outputs))
        return basis, diagonal.reshape(blocks[0].shape)
    return None


def _turned(samples: Samples, basis: KroneckerBasis, *, whole: bool = False) -> Iterator[Samples]:
    """Samples of ``K_Bᵀ G_k K_A``, a few at a time or all at once."""
    heads, outputs, width = samples.shape
    size = samples.gradients.element_size() * heads * (samples.positions * 2 * (width + outputs))
    if samples.positions > 1:
        size += samples.gradients.element_size() * heads * outputs * width * 2
    workspace = size * len(samples) if whole else samples.workspace
    for low, high in chunks(len(samples), size, workspace):
        a = turned(samples.activations.dense(low, high).to(basis.A.dtype), basis.A)
        g = turned(samples.gradients[:, low:high].to(basis.B.dtype), basis.B)
        yield replace(samples, activations=Dense(a), gradients=g, mask=None)


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
