"""The groups of blocks that fits treat together: planned by static cost, afforded, and filled."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from kronfisher.capture.capture import Capture
from kronfisher.capture.parts import Part
from kronfisher.errors import MemoryBudgetError, UnsupportedError
from kronfisher.estimation.assignment import Treatment
from kronfisher.estimation.neighbours import Following
from kronfisher.fisher.blocks import Block, Key
from kronfisher.fits import Fit, Plan, State
from kronfisher.linalg import WORKSPACE, promote
from kronfisher.operators.memory import available_memory

__all__ = ["Group", "Groups", "Planned", "rows_each"]


@dataclass
class Group:
    """Blocks that one fit treats together, with its state and the seconds spent on it."""

    fit: Fit
    blocks: tuple[Block, ...]
    state: State
    seconds: float = 0.0
    done: bool = False


@dataclass(frozen=True)
class Planned:
    """A group that a fit is going to treat."""

    fit: Fit
    blocks: tuple[Block, ...]
    plan: Plan
    like: Tensor


class Groups:
    """All groups with their states, in the order in which batches brought them.

    Args:
        treatment: which fit treats which block.
        following: which block comes after which.
        memory_budget: bytes for states and temporaries; None: what is free.
    """

    def __init__(self, treatment: Treatment, following: Following, memory_budget: int | None) -> None:
        self.treatment, self.following, self.memory_budget = treatment, following, memory_budget
        self.device = next(iter(treatment.parameters.values())).device
        self._groups: list[Group] = []
        self._places: dict[Key, tuple[Group, int]] = {}

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def wanting(
        self, parts: Mapping[int, list[Part]], alone: Mapping[str, Block]
    ) -> tuple[dict[int, list[tuple[Part, Group, int]]], dict[str, tuple[Group, int]]]:
        """What of a batch goes to groups that still read data, with the group and the block's place in it.

        Args:
            parts: index of a call → its blocks.
            alone: parameter that the fallback treats → its block.
        """
        entries = {}
        for index, several in parts.items():
            placed = [(part, *self._places[part.block.key]) for part in several]
            if wanted := [(part, group, position) for part, group, position in placed if not group.done]:
                entries[index] = wanted
        singles = {name: self._places[block.key] for name, block in alone.items()}
        return entries, {name: place for name, place in singles.items() if not place[0].done}

    @property
    def blocks(self) -> dict[Key, Block]:
        """Those of all groups."""
        return {block.key: block for group in self._groups for block in group.blocks}

    def planned(self, blocks: Iterable[Block], where: str) -> list[Planned]:
        """Groups for the blocks that are seen for the first time.

        Raises:
            UnsupportedError: a fit would have to change a group that it has begun to fill.
        """
        new: dict[Fit, list[Block]] = {}
        for block in blocks:
            new.setdefault(self.treatment.fit_of(block), []).append(block)
        planned = []
        for fit, members in new.items():
            begun = [group.blocks for group in self._groups if group.fit == fit]
            groups = fit.groups([*(block for group in begun for block in group), *members], self.following.after)
            if any(group not in groups for group in begun):
                raise UnsupportedError(
                    f"{where}: {', '.join(block.name for block in members)} is used here for the first time, and "
                    f"{fit!r} treats it together with layers that earlier batches have been counted for. Put a batch "
                    "that uses every parameter first, or choose a fit that treats layers apart."
                )
            for group in groups:
                if group not in begun:
                    like = promote(self.treatment.parameters[group[0].parameters[0]].detach().new_empty(0))
                    planned.append(Planned(fit, group, fit.plan(group, like.element_size()), like))
        return planned

    def owned(self, planned: Iterable[Planned]) -> set[Key]:
        """Keys of blocks whose rows have to be sorted by sample, those that are going to be treated among them."""
        plans = [*((group.blocks, group.state.plan) for group in self._groups), *((p.blocks, p.plan) for p in planned)]
        return {block.key for blocks, plan in plans if plan.by_example for block in blocks}

    def add(
        self, blocks: Iterable[Block], where: str, rows: Mapping[Key, int] | None = None, count: float | Tensor = 0.0
    ) -> None:
        """Make states for blocks seen for the first time.

        Args:
            blocks: of a batch.
            where: the batch's name in messages.
            rows: block → rows that a datum has of it, about.
            count: data before this batch, in which the blocks had no part.

        Raises:
            MemoryBudgetError: they do not fit.
            UnsupportedError: as for `planned`.
        """
        new = {block.key: block for block in blocks if block.key not in self._places}
        if not new:
            return
        planned = [_with_sample(entry, rows or {}) for entry in self.planned(new.values(), where)]
        workspace = self._afford([*(group.state.plan for group in self._groups), *(entry.plan for entry in planned)])
        for entry in planned:
            plan = replace(entry.plan, workspace=workspace)
            group = Group(entry.fit, entry.blocks, entry.fit.init(entry.blocks, plan, entry.like))
            group.state.count = count
            self._groups.append(group)
            self._places.update({block.key: (group, position) for position, block in enumerate(entry.blocks)})

    def _afford(self, plans: Sequence[Plan]) -> int:
        """Bytes left for temporaries, once matrices and samples that wait have theirs."""
        standing = sum(plan.standing for plan in plans) + max(plan.temporary for plan in plans)
        needed = sum(plan.standing for plan in plans) + max(plan.least for plan in plans)
        limit = available_memory(self.device) if self.memory_budget is None else self.memory_budget
        if needed > limit:
            raise MemoryBudgetError(
                f"The estimate needs {needed:,} bytes ({needed / 2**30:.2f} GiB) for its matrices and one datum, more "
                f"than the {'free memory' if self.memory_budget is None else 'memory_budget'} of {limit:,} bytes "
                f"({limit / 2**30:.2f} GiB). Use a smaller structure for the largest layers, for example "
                "fit={'name.of.layer*': 'diagonal', '*': 'kfac'}."
            )
        return WORKSPACE if self.memory_budget is None else max(min(WORKSPACE, limit - standing), 1)

    def resume(self, groups: Iterable[tuple[Block, ...]], where: str) -> None:
        """Empty states for the groups of an earlier run, in their order."""
        order = {blocks: position for position, blocks in enumerate(groups)}
        self.add([block for blocks in order for block in blocks], where)
        self._groups.sort(key=lambda group: order[group.blocks])


def rows_each(capture: Capture, parts: Mapping[int, list[Part]], samples: int) -> dict[Key, int]:
    """Block → positions of a datum times groups, over all uses of it, by the sizes of their outputs."""
    found: dict[Key, int] = {}
    for index, several in parts.items():
        for part in several:
            rows = -(-prod(capture.calls[index].shape) // (part.block.shape[1] * samples))
            found[part.block.key] = found.get(part.block.key, 0) + rows
    return found


def _with_sample(entry: Planned, rows: Mapping[Key, int]) -> Planned:
    """With the bytes that a datum takes."""
    widths = {b.key: b.shape[1] if b.onehot else b.shape[1] + b.shape[2] for b in entry.blocks}
    numbers = sum(rows.get(key, 1) * width for key, width in widths.items())
    return replace(entry, plan=replace(entry.plan, sample=entry.like.element_size() * numbers))
