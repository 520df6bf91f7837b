"""The Frobenius distance of an approximation from the true blocks, without writing these out.

``‖F − X‖² = ‖F‖² − 2⟨F, X⟩ + ‖X‖²`` with ``‖F‖² = Σ_{k,l} ⟨G_k, G_l⟩² / N²`` and
``⟨F, X⟩ = Σ_k vec(G_k)ᵀ X vec(G_k) / N``. The first needs all pairs of samples, so that samples are kept; small blocks
are written out, which is cheaper and more precise for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import hypot, inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from kronfisher.distributed import whole
from kronfisher.errors import DataError, MemoryBudgetError
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.estimation.assignment import Known
from kronfisher.estimation.groups import Group
from kronfisher.estimation.recipe import Recipe
from kronfisher.estimation.spectrum import Spectrum, leading_spectra
from kronfisher.fisher import Fisher
from kronfisher.fisher.blocks import Block, Key
from kronfisher.fits import Fit, Plan, State
from kronfisher.fits.full import Full
from kronfisher.fits.quadratic import joint_quadratic
from kronfisher.fits.state import Total, reciprocal
from kronfisher.layers.activations import Dense
from kronfisher.layers.samples import Samples
from kronfisher.linalg import WORKSPACE, chunks, mirror, plain_arithmetic, promote
from kronfisher.operators import Operator
from kronfisher.operators.memory import available_memory
from kronfisher.operators.owned import Owned

__all__ = ["Distance", "Origin", "measure"]

_WRITTEN_OUT = 2048  # blocks up to this dimension are compared as dense matrices


@dataclass(frozen=True)
class Distance:
    """Frobenius distances from the true blocks; in float32 relative ones below 5e-4 are noise for large blocks.

    Attributes:
        distances: block name → ``‖F − X‖`` (mean or sum over examples, as the matrix measured).
        norms: block name → ``‖F‖`` of the true block.
        count: N, the number of examples in the true blocks.

    Example:
        >>> import torch, kronfisher as kf
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(20, 3)
        >>> found = kf.estimate(model, x, kf.Categorical(), fit="full", labels="exact").error(x)
        >>> list(found.blocks), found.relative < 1e-3
        (['weight'], True)
    """

    distances: Mapping[str, float]
    norms: Mapping[str, float]
    count: float

    @property
    def blocks(self) -> dict[str, float]:
        """Block name → relative error ``‖F − X‖ / ‖F‖``; zero where both vanish, infinite where only F does."""
        return {name: _ratio(distance, self.norms[name]) for name, distance in self.distances.items()}

    @property
    def relative(self) -> float:
        """The relative error of all blocks together, against the block-diagonal truth."""
        return _ratio(hypot(*self.distances.values()), hypot(*self.norms.values()))

    def __str__(self) -> str:
        width = max(3, *(len(name) for name in self.blocks))
        lines = [f"{name:<{width}}  {error:.4f}" for name, error in self.blocks.items()]
        return "\n".join([*lines, f"{'all':<{width}}  {self.relative:.4f}"])


@dataclass(frozen=True)
class Origin:
    """The recipe of a Fisher matrix, so that its ``error(data)`` and ``spectrum(data)`` use the same labels."""

    recipe: Recipe

    def error(self, fisher: Fisher, data: Any, **options: Any) -> Distance:
        """See `measure`."""
        with whole(self.recipe.model):
            return measure(fisher, data, self.recipe, **options)

    def spectrum(
        self, fisher: Fisher, data: Any, block: str | None = None, rank: int = 8, **options: Any
    ) -> dict[str, Spectrum]:
        """See `kronfisher.estimation.spectrum.leading_spectra`."""
        with whole(self.recipe.model):
            return leading_spectra(fisher, data, self.recipe, block, rank, **options)


def measure(
    fisher: Fisher, data: Any, recipe: Recipe, *, memory_budget: int | None = None, progress: bool = False
) -> Distance:
    """The error of a Fisher matrix against the true blocks on `data`, with the recipe's labels and seed.

    Args:
        fisher: the approximation.
        data: as for `estimate`; the same loader gives exactly the samples of the estimate.
        recipe: model, likelihood and labels of the truth.
        memory_budget: bytes for the kept samples; None: the free memory.
        progress: as for `estimate`.

    Raises:
        MemoryBudgetError: the samples do not fit; pass fewer examples.
        DataError: the matrix is not an approximation of F but an inverse or a root, or the model's uses of its
            parameters are not those of the matrix.
    """
    if odd := {"inverse", "sqrt", "inverse sqrt"} & set(fisher.info.changes):
        raise DataError(f"this matrix is no longer an approximation of the Fisher matrix ({', '.join(sorted(odd))}).")
    parameters = recipe.parameters(fisher.names)
    device = next(iter(parameters.values())).device
    kept = Kept(available_memory(device) if memory_budget is None else memory_budget)
    groups = [blocks for blocks, _ in fisher.entries]
    fits: dict[str, CrossTerms] = {}
    for group, (_, operator) in zip(groups, fisher.entries, strict=True):
        names = {parameter for block in group for parameter in block.parameters}
        scaled = operator / fisher.count if fisher.reduction == "sum" else operator
        own = scaled.to(device, promote(parameters[group[0].parameters[0]].detach().new_empty(0)).dtype)
        joined = CrossTerms({group: own}, kept)
        for other in {id(fits[name]): fits[name] for name in names if name in fits}.values():
            joined.operators.update(other.operators)  # blocks that share a parameter come from one fit
            names |= {name for name, fit in fits.items() if fit is other}
        fits.update(dict.fromkeys(names, joined))
    run = Accumulator(replace(recipe, memory_budget=memory_budget, strict=False), fits)
    run.known = Known.of_blocks(groups)
    for group, (_, operator) in zip(groups, fisher.entries, strict=True):
        if isinstance(operator, Owned) and run.meeting is not None:
            run.meeting.hold(group, operator.owner)
    run.read(data, progress)
    count = float(run.count)

    def measured(group: Group) -> tuple[float, float]:
        return fits[group.blocks[0].parameters[0]].norms(group.blocks, group.state)

    with plain_arithmetic(device):
        found = dict(zip((group.blocks for group in run.groups), run.of(run.groups, measured), strict=True))
        none = {group: fits[group[0].parameters[0]].norms(group, None) for group in groups if group not in found}
    scale = count if fisher.reduction == "sum" else 1.0
    distances, norms = {}, {}
    for name, group in zip(fisher.blocks, groups, strict=True):
        norm, distance = found[group] if group in found else none[group]
        distances[name], norms[name] = distance * scale, norm * scale
    return Distance(distances, norms, count)


def _ratio(distance: float, norm: float) -> float:
    return distance / norm if norm else (inf if distance else 0.0)


Rows = tuple[tuple[Tensor, ...], ...]  # of every block, see `_rows`


@dataclass
class Kept:
    """Samples of large blocks, until all their pairs have been multiplied.

    Attributes:
        budget: bytes that they may occupy.
        bytes: that they occupy.
    """

    budget: int
    bytes: int = 0

    def add(self, state: "CrossSums", rows: Rows) -> None:
        """Keep some more samples, or raise a MemoryBudgetError."""
        kept = state.kept
        last = {tensor.untyped_storage().data_ptr() for entry in kept[-1:] for part in entry for tensor in part}
        new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for part in rows for t in part}
        self.bytes += sum(size for place, size in new.items() if place not in last)  # parts of one batch share storage
        if self.bytes > self.budget:
            raise MemoryBudgetError(
                f"{state.name}: the exact error needs {self.bytes:,} bytes for the samples so far, more than the "
                f"{self.budget:,} there are. Pass fewer examples to fisher.error(...), or a larger memory_budget."
            )
        kept.append(rows)


@dataclass(kw_only=True)
class CrossSums(State):
    """``‖F‖²`` and ``⟨F, X⟩`` of the samples so far, which are kept: those of other parts of the data meet them.

    Attributes:
        norm: ``‖F‖²``.
        cross: ``⟨F, X⟩``, unless one rank alone holds X.
        kept: samples, some at a time, in the form of `_rows`.
    """

    adds: ClassVar[bool] = False

    norm: Total
    cross: Total
    kept: list[Rows] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class CrossTerms(Fit):
    """A fit that builds no operator: it sums the terms of the distances from given operators.

    Attributes:
        operators: blocks → X, of the mean over examples; all these blocks share parameters.
        kept: samples of all blocks.
    """

    operators: dict[tuple[Block, ...], Operator] = field(repr=False)
    kept: "Kept" = field(repr=False)
    exact = True

    def groups(self, blocks: Sequence[Block], after: Mapping[Key, Key]) -> list[tuple[Block, ...]]:
        """The operators' own groups."""
        keys = {block.key for block in blocks}
        groups = [group for group in self.operators if keys.issuperset(block.key for block in group)]
        if sum(len(group) for group in groups) != len(keys):
            names = ", ".join(block.name for block in blocks)
            raise DataError(
                f"{names}: the model uses these parameters in another way than when the matrix was estimated, or did "
                "not use them then."
            )
        return groups

    def _written_out(self, group: tuple[Block, ...]) -> bool:
        operator = self.operators[group]
        return operator.dim <= _WRITTEN_OUT or (len(group) > 1 and not operator.spans_layers)

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        """Dense where small, else two scalars and the samples."""
        return Plan(4 * element * self.operators[group].dim ** 2 if self._written_out(group) else 0)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> State:
        """Empty sums."""
        if self._written_out(group):
            return Full().init(group, plan, like)
        zero = like.new_zeros((), dtype=torch.float64)
        return CrossSums(group, plan, norm=zero, cross=zero.clone())

    def update(self, state: Any, samples: tuple[Samples, ...]) -> State:
        """Add ⟨F, X⟩ of new samples, and their products with all samples before them."""
        if self._written_out(state.blocks):
            return Full().update(state, samples)
        if not isinstance(operator := self.operators[state.blocks], Owned):
            state.cross += joint_quadratic(samples, operator)
        for rows in _rows(samples):
            state.norm += _squared_products(rows, rows)
            for others in state.kept:
                state.norm += 2 * _squared_products(rows, others)
            self.kept.add(state, rows)
        return state

    def combine(self, x: Any, y: Any, wx: float = 1.0, wy: float = 1.0) -> State:
        """Of two parts of the data, with the products of the samples of one with those of the other."""
        both = super().combine(x, y, wx, wy)
        if isinstance(both, CrossSums):
            both.norm = wx**2 * x.norm + wy**2 * y.norm
            for mine, theirs in product(x.kept, y.kept):
                both.norm += 2 * wx * wy * _squared_products(mine, theirs)
            both.kept = [*x.kept, *y.kept]
        return both

    def norms(self, group: tuple[Block, ...], state: Any) -> tuple[float, float]:
        """``‖F‖`` and ``‖F − X‖`` of the mean over examples; F is zero if there is no state.

        Where one rank alone holds X, that is where a state is.
        """
        operator = self.operators[group]
        if state is None:
            return 0.0, float(operator.frobenius_norm().double())
        state.check()
        deferred = isinstance(operator, Owned)
        operator = operator.held if isinstance(operator, Owned) else operator
        own = float(operator.frobenius_norm().double())
        if self._written_out(group):
            truth = mirror(state.products, reciprocal(state.count)).double()
            return float(truth.norm()), float((truth - operator.to_dense().double()).norm())
        scale = float(reciprocal(state.count))
        cross = sum(float(_quadratic(rows, operator)) for rows in state.kept) if deferred else float(state.cross)
        norm, cross = float(state.norm) * scale**2, cross * scale
        return norm**0.5, max(norm - 2 * cross + own**2, 0.0) ** 0.5


def _rows(samples: tuple[Samples, ...]) -> list[Rows]:
    """Samples of all blocks in the smaller of two forms, 512 at a time.

    Inputs and gradients (T = 1, one group), or the products G_k written out.
    """
    parts: list[tuple[Tensor, ...]] = []
    for use in samples:
        if use.positions == 1 and use.shape[0] == 1:
            parts.append((use.activations.dense()[0, :, 0], use.gradients[0, :, 0]))
        else:
            written = [part.transpose(0, 1).flatten(1) for part in use.per_sample()]
            parts.append((torch.cat(written) if len(written) > 1 else written[0],))
    lows = range(0, len(samples[0]), 512)
    return [tuple(tuple(tensor[low : low + 512] for tensor in part) for part in parts) for low in lows]


def _quadratic(rows: Rows, operator: Operator) -> Tensor:
    """``Σ_k v_kᵀ X v_k`` of kept samples."""
    if len(rows) == 1 and len(rows[0]) == 2:
        inputs, gradients = rows[0]
        return joint_quadratic((Samples(Dense(inputs[None, :, None]), gradients[None, :, None]),), operator)
    total = rows[0][0].new_zeros((), dtype=torch.float64)
    for low, high in chunks(len(rows[0][0]), 4 * operator.dim * rows[0][0].element_size(), WORKSPACE):
        parts = [tuple(tensor[low:high] for tensor in part) for part in rows]
        written = [p[0] if len(p) == 1 else (p[1][:, :, None] * p[0][:, None]).flatten(1) for p in parts]
        vectors = torch.cat(written, dim=1)
        total += (vectors * operator.matvecs(vectors)).sum(dtype=torch.float64)
    return total


def _squared_products(x: Rows, y: Rows) -> Tensor:
    """``Σ_{k,l} ⟨G_k, G_l⟩²`` over k in x and l in y, inner products over all blocks."""
    total = None
    for mine, theirs in zip(x, y, strict=True):
        products = mine[0] @ theirs[0].mT
        for left, right in zip(mine[1:], theirs[1:], strict=True):
            products = products * (left @ right.mT)
        total = products if total is None else total + products
    assert total is not None
    return total.square().sum(dtype=torch.float64)
