"""The spectrum of rearranged true blocks: the errors of the best sums of Kronecker products.

``‖F − Σ_{r≤R} B_r ⊗ A_r‖² = ‖F‖² − Σ_{r≤R} σ_r²`` for the best sum of R products, σ the singular values of ℛ(F)
(Koroko et al. 2022). Samples are kept, neither F nor ℛ(F) is formed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kronfisher.errors import DataError, MemoryBudgetError, require_integer
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.estimation.assignment import Known
from kronfisher.estimation.groups import Group
from kronfisher.estimation.recipe import Recipe
from kronfisher.fisher import Fisher
from kronfisher.fisher.blocks import Block
from kronfisher.fits import Plan
from kronfisher.fits.quadratic import squared_norm
from kronfisher.fits.rearrangement import Rearranged, cheapest, lanczos, rearrange
from kronfisher.fits.state import State, WaitingState
from kronfisher.fits.visitor import Visitor
from kronfisher.layers.samples import Samples
from kronfisher.linalg import plain_arithmetic
from kronfisher.operators.memory import available_memory

__all__ = ["Spectrum", "leading_spectra"]


@dataclass(frozen=True)
class Spectrum:
    """The leading singular values of one rearranged block.

    Attributes:
        values: ``σ_r / ‖F‖ [R]``, descending, float64 on the CPU. Groups of a convolution have rearrangements of their
            own, and a term of the sum is one product in each: then it is the root of their sum of squares, and F has
            the groups' cross terms, which no product holds.
        antisymmetric: whether both factors of each value are antisymmetric; never without several positions.
        residual: of the triplets, the largest, relative to the first singular value.
        samples: examples times draws or columns.

    Example:
        >>> found = Spectrum(torch.tensor([0.8, 0.6], dtype=torch.float64), (False, True), 1e-9, 10)
        >>> found.errors.tolist()
        [0.6, 0.0]
        >>> print(found)
        1: 0.8000, error 0.6000
        2: 0.6000, error 0.0000, antisymmetric
    """

    values: Tensor
    antisymmetric: tuple[bool, ...]
    residual: float
    samples: int

    @property
    def errors(self) -> Tensor:
        """The relative error ``[R]`` of the best sum of 1, …, R products."""
        return (1 - self.values.square().cumsum(0)).round(decimals=15).clamp_min(0).sqrt()

    def __str__(self) -> str:
        rows = zip(self.values.tolist(), self.errors.tolist(), self.antisymmetric, strict=True)
        return "\n".join(
            f"{r}: {value:.4f}, error {error:.4f}" + (", antisymmetric" if odd else "")
            for r, (value, error, odd) in enumerate(rows, 1)
        )


def leading_spectra(
    fisher: Fisher,
    data: Any,
    recipe: Recipe,
    block: str | None = None,
    rank: int = 8,
    *,
    tolerance: float = 1e-5,
    iterations: int = 200,
    memory_budget: int | None = None,
    progress: bool = False,
) -> dict[str, Spectrum]:
    """The spectra of the true blocks on `data`, with the recipe's labels and seed.

    Args:
        fisher: only the partition into blocks matters, not their approximation.
        data: as for `estimate`.
        recipe: model, likelihood and labels of the truth.
        block: name of one block; None: all blocks that have samples.
        rank: R, how many values.
        tolerance: of the residuals of the triplets, relative to the first singular value.
        iterations: Lanczos steps at most, of each kind.
        memory_budget: bytes for the kept samples; None: the free memory.
        progress: as for `estimate`.

    Raises:
        ValueError: `rank` is no number of values.
        DataError: there is no such block, or it has no samples, only per-example gradients.
        MemoryBudgetError: the samples do not fit; pass fewer examples.
    """
    rank = require_integer("rank", rank, 1, "ask for at least one singular value, by an integer")
    iterations = require_integer("iterations", iterations, 1, "use an integer of at least 1")
    parameters = recipe.parameters(fisher.names)
    known = {each.name: each for blocks, _ in fisher.entries for each in blocks}
    if block is not None and block not in known:
        raise DataError(f"block={block!r}: there is no such block; there are {', '.join(known)}.")
    device = next(iter(parameters.values())).device
    room = Room(available_memory(device) if memory_budget is None else memory_budget)
    wanted = frozenset(known if block is None else [block])
    run = collect_samples(fisher, data, recipe, Keep(wanted, room), progress)

    def spectrum(group: Group) -> Spectrum | None:
        assert isinstance(group.state, WaitingState)
        return _spectrum(group.state.waiting, rank, tolerance, iterations) if group.state.waiting else None

    with plain_arithmetic(device):
        kept = [group for group in run.groups if isinstance(group.state, WaitingState)]
        spectra = run.of(kept, spectrum)
        found = {group.state.name: own for group, own in zip(kept, spectra, strict=True) if own is not None}
    if missing := [name for name in wanted if name not in found and block is not None]:
        raise DataError(
            f"{missing[0]}: no samples of inputs and output gradients are known, because the model does not use the "
            "parameter on this data, or uses it in a way that only per-example gradients cover."
        )
    return found


def collect_samples(fisher: Fisher, data: Any, recipe: Recipe, keep: "Keep", progress: bool) -> Accumulator:
    """An accumulator whose states hold the samples of the blocks of the matrix."""
    fits: dict[str, Keep] = {}
    for blocks, _ in fisher.entries:
        names = {parameter for each in blocks for parameter in each.parameters}
        own = Keep(keep.wanted, keep.room)
        before = [fits[name] for name in names if name in fits]  # blocks that share a parameter come from one fit
        names |= {name for name, fit in fits.items() if any(fit is other for other in before)}
        fits.update(dict.fromkeys(names, own))
    run = Accumulator(replace(recipe, strict=False), fits)
    run.known = Known.of_blocks(blocks for blocks, _ in fisher.entries)
    run.read(data, progress)
    return run


@dataclass
class Room:
    """Bytes that the samples of all blocks may occupy, and those that they do occupy."""

    budget: int
    bytes: int = field(default=0)


@dataclass(frozen=True, eq=False)
class Keep(Visitor):
    """A fit that builds no operator: it keeps the samples of some blocks.

    Attributes:
        wanted: names of these blocks.
        room: memory for all of them.
    """

    wanted: frozenset[str] = field(repr=False)
    room: Room = field(repr=False)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> WaitingState:
        """No samples yet."""
        return WaitingState(group, plan)

    def update(self, state: WaitingState, samples: tuple[Samples, ...]) -> WaitingState:
        """Keep the samples, or raise a MemoryBudgetError."""
        (use,) = samples
        if state.name not in self.wanted:
            return state
        groups, outputs, inputs = use.shape
        directions = (
            3 * groups * (outputs**2 + inputs**2) * use.gradients.element_size()
        )  # the least that Lanczos keeps
        if directions > self.room.budget:
            raise MemoryBudgetError(
                f"{state.name}: the spectrum needs {directions:,} bytes for directions of {inputs:,} x {inputs:,} and "
                f"{outputs:,} x {outputs:,} numbers, more than the {self.room.budget:,} there are. Name other blocks "
                f"in fisher.spectrum(data, block=...), one by one."
            )
        self.room.bytes += use.bytes
        if self.room.bytes > self.room.budget:
            raise MemoryBudgetError(
                f"{state.name}: the spectrum needs {self.room.bytes:,} bytes for the samples so far, more than the "
                f"{self.room.budget:,} there are. Pass fewer examples to fisher.spectrum(...), name one block, or "
                "allow a larger memory_budget."
            )
        state.waiting.append(use.copy())
        return state

    def combine(self, x: Any, y: Any, wx: float = 1.0, wy: float = 1.0) -> State:
        """The samples of both parts of the data, unweighted."""
        both = super().combine(x, y, wx, wy)
        if isinstance(both, WaitingState):
            both.waiting = [*x.waiting, *y.waiting]
        return both


def _spectrum(samples: Sequence[Samples], rank: int, tolerance: float, iterations: int) -> Spectrum:
    n, positions = sum(map(len, samples)), max(use.positions for use in samples)
    route = cheapest(samples[0].shape, n, positions)
    source = rearrange(samples, "weights" if route == "gram" else route)
    assert isinstance(source, Rearranged)
    total = squared_norm(samples).sqrt()
    values, kinds, residual = [], [], 0.0
    for odd in (False, True) if positions > 1 else (False,):
        found = lanczos(source, rank, odd, tolerance, iterations)
        sigma = torch.linalg.vector_norm(found.sigma.double(), dim=1)
        values.append(torch.where(total > 0, sigma / total, 0))
        kinds += [odd] * len(sigma)
        first = torch.cat(values)[0] * total
        share = found.sigma.double().max() / first.clamp_min(torch.finfo(first.dtype).tiny)
        residual = max(residual, float(found.change * share))
    all_values = torch.cat(values)
    order = all_values.argsort(descending=True, stable=True)[:rank]
    antisymmetric = tuple(kinds[k] for k in order.tolist())
    return Spectrum(all_values[order].cpu(), antisymmetric, residual, n)
