"""Groups of blocks that fits treat together: planned by static cost, checked against the memory, and filled."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from kronfisher.capture.observation import Observation
from kronfisher.capture.parts import Part
from kronfisher.capture.per_sample import FALLBACK
from kronfisher.errors import MemoryBudgetError
from kronfisher.fisher.blocks import Block, Key
from kronfisher.fits import Diagonal, Fit, Plan, State
from kronfisher.linalg import WORKSPACE, promote
from kronfisher.operators.memory import available_memory
from kronfisher.tables import size

__all__ = ["Fits", "Group", "Groups", "Planned", "plan_groups", "rows_of_example"]


@dataclass(frozen=True, eq=False)
class Fits:
    """The fit of every parameter.

    Blocks are treated together only if they have the same fit object; equal but distinct fits stay separate.

    Attributes:
        given: parameter → fit.
        parameters: name → trainable parameter.
        training: leave out parameters that only the fallback can treat.
        fallback: for parameters whose own fit cannot use per-example gradients, or would be too dear.
        asked: parameters whose fit was given by name, and is kept at any price.
        dear: parameters for which a dense factor would be too dear.
        by_rows: fits that depend on the gradients of single examples alone take them where nothing else is known, as of
            residuals, whose derivatives meet most weights again; else the fallback's fit does.
    """

    given: Mapping[str, Fit]
    parameters: Mapping[str, Tensor]
    training: bool = False
    fallback: Fit = field(default_factory=Diagonal)
    asked: AbstractSet[str] = frozenset()
    dear: AbstractSet[str] = frozenset()
    by_rows: bool = False

    @cached_property
    def chained(self) -> bool:
        """Whether any of them treats neighbours together."""
        return any(fit.chained for fit in {id(fit): fit for fit in (*self.given.values(), self.fallback)}.values())

    def of(self, block: Block) -> Fit:
        """The fit of the block's parameters, or the fallback's fit if that cannot treat the block."""
        fit = self.given[block.parameters[0]]
        if block.operator == FALLBACK:
            return fit if fit.exact or (self.by_rows and fit.of_gradients) else self.fallback
        dear = block.weight is None and block.parameters[0] in self.dear
        return self.fallback if dear and not fit.exact else fit

    @property
    def whole(self) -> list[str]:
        """Parameters whose elements must each occur in one block only: they may not have two roles."""
        return [name for name, fit in self.given.items() if not fit.adds_roles]

    def joins(self, weight: str, bias: str, apart: AbstractSet[str]) -> bool:
        """Whether a weight and its bias form one block."""
        return self.given[weight] is self.given[bias] and not apart & {weight, bias}

    def why_apart(self, earlier: Block, later: Block) -> str:
        """Why no fit treats two neighbours together; empty if one does."""
        first, second = self.of(earlier), self.of(later)
        if first is not second:
            return f"{earlier.name} has another fit"
        if not first.chained:
            return "their fit treats layers independently"
        dtypes = [self.parameters[block.parameters[0]].dtype for block in (earlier, later)]
        if dtypes[0] != dtypes[1]:
            return f"{earlier.name} is {dtypes[0]}, {later.name} {dtypes[1]}"
        return first.alone(earlier) or first.alone(later)


@dataclass
class Group:
    """Blocks that one fit treats together, with its state and the seconds spent on it.

    Attributes:
        done: whether it reads no more data.
        owner: the rank of a process group that computes with the sums of all ranks.
    """

    fit: Fit
    blocks: tuple[Block, ...]
    state: State
    seconds: float = 0.0
    done: bool = False
    owner: int = 0


@dataclass(frozen=True)
class Planned:
    """A group that a fit is going to treat.

    Attributes:
        like: an empty tensor with the dtype and device of the sums.
    """

    fit: Fit
    blocks: tuple[Block, ...]
    plan: Plan
    like: Tensor


def plan_groups(
    blocks: Iterable[Block], fits: Fits, begun: Sequence[Group], after: Mapping[Key, Key]
) -> list[Planned] | str:
    """Plan groups for blocks that occur for the first time, or say why they cannot be added to existing groups.

    Args:
        blocks: the new ones.
        fits: which fit treats which block.
        begun: groups that earlier batches contributed to.
        after: key of a block → key of the one after it.
    """
    new: dict[int, tuple[Fit, list[Block]]] = {}
    for block in blocks:
        fit = fits.of(block)
        new.setdefault(id(fit), (fit, []))[1].append(block)
    planned = []
    for fit, members in new.values():
        filled = [group.blocks for group in begun if group.fit is fit]
        groups = fit.groups([*(block for group in filled for block in group), *members], after)
        if any(group not in groups for group in filled):
            return (
                f"{', '.join(block.name for block in members)} is used here for the first time, and {fit!r} treats it "
                "together with layers that earlier batches already contributed to. Put a batch that uses every "
                "parameter first, or choose a fit that treats layers independently."
            )
        for group in groups:
            if group not in filled:
                like = promote(fits.parameters[group[0].parameters[0]].detach().new_empty(0))
                planned.append(Planned(fit, group, fit.plan(group, like.element_size()), like))
    return planned


class Groups:
    """All groups with their states, in the order of their first batches.

    Args:
        device: of the model.
        memory_budget: bytes for states and temporaries; None: what is free.
    """

    def __init__(self, device: torch.device, memory_budget: int | None) -> None:
        self.device, self.memory_budget = device, memory_budget
        self._groups: list[Group] = []
        self._places: dict[Key, tuple[Group, int]] = {}

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    @contextmanager
    def only(self, chosen: Iterable[Group]) -> Iterator[None]:
        """Let only the chosen groups read data within the context; afterwards all groups do."""
        reading = {id(group) for group in chosen}
        for group in self._groups:
            group.done = id(group) not in reading
        try:
            yield
        finally:
            for group in self._groups:
                group.done = False

    def open(
        self, parts: Mapping[int, list[Part]], singles: Mapping[str, Block]
    ) -> tuple[dict[int, list[tuple[Part, Group, int]]], dict[str, tuple[Group, int]]]:
        """The parts of a batch whose groups still read data, with the group and the block's place in it.

        Args:
            parts: index of a call → its blocks.
            singles: parameter that the fallback treats → its block.
        """
        entries = {}
        for index, own in parts.items():
            placed = [(part, *self._places[part.block.key]) for part in own]
            if wanted := [(part, group, position) for part, group, position in placed if not group.done]:
                entries[index] = wanted
        places = {name: self._places[block.key] for name, block in singles.items()}
        return entries, {name: place for name, place in places.items() if not place[0].done}

    def add(
        self, planned: Iterable[Planned], rows: Mapping[Key, int] | None = None, count: float | Tensor = 0.0
    ) -> None:
        """Create states for groups that occur for the first time.

        Args:
            planned: the groups.
            rows: block → approximate number of its rows per example.
            count: examples before this batch, which did not use the blocks.

        Raises:
            MemoryBudgetError: they do not fit.
        """
        planned = [_with_sample(entry, rows or {}) for entry in planned]
        if not planned:
            return
        workspace = self._workspace([*(group.state.plan for group in self._groups), *(one.plan for one in planned)])
        for entry in planned:
            plan = replace(entry.plan, workspace=workspace, budget=self.memory_budget)
            group = Group(entry.fit, entry.blocks, entry.fit.init(entry.blocks, plan, entry.like))
            group.state.count = count
            self._groups.append(group)
            self._places.update({block.key: (group, position) for position, block in enumerate(entry.blocks)})

    def order(self, keys: Sequence[tuple[Key, ...]]) -> None:
        """Bring the groups into an order, that of the keys of their blocks."""
        place = {key: number for number, key in enumerate(keys)}
        self._groups.sort(key=lambda group: place[tuple(block.key for block in group.blocks)])

    def _workspace(self, plans: Sequence[Plan]) -> int:
        """Bytes left for temporaries after matrices and waiting samples."""
        standing = sum(plan.standing for plan in plans) + max(plan.temporary for plan in plans)
        needed = sum(plan.standing for plan in plans) + max(plan.least for plan in plans)
        limit = available_memory(self.device) if self.memory_budget is None else self.memory_budget
        if needed > limit:
            raise MemoryBudgetError(
                f"The estimate needs {needed:,} bytes ({size(needed)}) for its matrices and one example, "
                f"more than the {'free memory' if self.memory_budget is None else 'memory_budget'} of {limit:,} bytes "
                f"({size(limit)}). Use a smaller structure for the largest layers, for example "
                "fit={'name.of.layer*': 'diagonal', '*': 'kfac'}."
            )
        return WORKSPACE if self.memory_budget is None else max(min(WORKSPACE, limit - standing), 1)


def rows_of_example(observation: Observation, parts: Mapping[int, list[Part]]) -> dict[Key, int]:
    """Block → positions per example times groups, over all its uses, from the sizes of their outputs."""
    rows: dict[Key, int] = {}
    for index, own in parts.items():
        for part in own:
            each = -(-prod(observation.calls[index].shape) // (part.block.shape[1] * len(observation)))
            rows[part.block.key] = rows.get(part.block.key, 0) + each
    return rows


def _with_sample(entry: Planned, rows: Mapping[Key, int]) -> Planned:
    """Add the bytes that an example takes to the plan."""
    widths = {b.key: b.shape[1] if b.onehot else b.shape[1] + b.shape[2] for b in entry.blocks}
    numbers = sum(rows.get(key, 1) * width for key, width in widths.items())
    return replace(entry, plan=replace(entry.plan, sample=entry.like.element_size() * numbers))
