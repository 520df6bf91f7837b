"""Ranks of a process group put together what each has read: once a pass, after they have agreed on what it is."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kronfisher.capture.per_sample import FALLBACK
from kronfisher.distributed import OTHER_ORDERS, Parcel, Ranks, Sum, buckets, describe, owners
from kronfisher.errors import RankError
from kronfisher.estimation.assignment import Known
from kronfisher.estimation.groups import Fits, Group, Groups, Planned
from kronfisher.estimation.recipe import Recipe
from kronfisher.fisher.blocks import Block, Key
from kronfisher.fisher.info import BlockInfo
from kronfisher.fisher.parameters import fingerprint
from kronfisher.fits import State
from kronfisher.fits.state import WaitingState
from kronfisher.linalg import promote
from kronfisher.operators import Operator, Outline, Owned

__all__ = ["Entry", "LateKnowledge", "Meeting", "Said", "facts_of", "union"]


class LateKnowledge(Exception):
    """The ranks treated parameters in different ways: all begin again with what each of them found."""

    def __init__(self, known: Known, reason: str, again: bool) -> None:
        super().__init__(reason)
        self.known, self.again = known, again


@dataclass(frozen=True)
class Entry:
    """What ranks have to agree on about a group of blocks.

    Attributes:
        blocks: of the group.
        facts: what has to be the same, by name.
        frame: of the parcel of a state that does not add.
        rows: positions that counted so far.
    """

    blocks: tuple[Block, ...]
    facts: Mapping[str, Any]
    frame: bytes | None = None
    rows: float = 0.0


@dataclass(frozen=True)
class Said:
    """What one rank says at a meeting.

    Attributes:
        facts: what has to be the same on all ranks, by name.
        error: what went wrong on it.
        again: whether its data can be read again.
        late: what it wants to know from the first batch on.
        known: how it treated its batches.
        count: N of its data.
        score: the sum of their log likelihood, if they have targets.
        outputs: how many numbers of the outputs that covers.
        batches: how many it read.
        targets: what was taken for targets, in words.
        order: of all batches, if its data were dealt out.
        brought: whether it has anything to put together.
        remarks: what it noted about blocks, by name, as answers to fixed questions.
        entries: its groups.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    again: bool = True
    late: Known | None = None
    known: Known = field(default_factory=Known)
    count: float = 0.0
    score: float | None = None
    outputs: int = 0
    batches: int = 0
    targets: str = ""
    order: str = ""
    brought: bool = True
    remarks: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()


class Meeting:
    """The meetings of one estimate.

    Args:
        ranks: of the process group.
        device: of the model.

    Attributes:
        planned: bytes of sums that all ranks give in all passes, as the shapes tell that they agreed on beforehand.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        self.planned = 0
        self._owner: dict[tuple[Key, ...], int] = {}
        self._parts: dict[tuple[Key, ...], list[State]] = {}

    def agree(self, said: Said, groups: Groups, *, pack: bool = True) -> tuple[list[Said], list[Parcel | None]]:
        """Gather what all ranks say.

        Args:
            said: by this rank.
            groups: its groups.
            pack: whether to pack states that do not add, for `merge`.

        Raises:
            RankError: a rank failed, or they differ; on all ranks.
            LateKnowledge: they treated parameters in different ways; on all ranks.
        """
        parcels: list[Parcel | None] = []
        entries = []
        for group in () if said.error or said.late or not said.brought else groups:
            parcel = None if group.done or group.state.adds or not pack else Parcel.of(group.state, self.ranks.device)
            parcels.append(parcel)
            entries.append(_entry(group, parcel))
        return self.compare(replace(said, entries=tuple(entries)), "puts together what it has read"), parcels

    def compare(self, said: Said, call: str) -> list[Said]:
        """Gather what all ranks say, its groups among it, and require that it is of one kind.

        Args:
            said: by this rank.
            call: as in `Ranks.gather`.

        Raises:
            RankError: a rank failed, or they differ; on all ranks.
            LateKnowledge: they treated parameters in different ways; on all ranks.
        """
        plain = replace(said.known, groups=())
        all_said: list[Said] = self.ranks.gather(replace(said, known=plain), call)
        for rank, other in enumerate(all_said):
            if other.error:
                raise RankError(f"rank {rank}: {other.error}")
        for name in dict.fromkeys(name for other in all_said for name in other.facts):
            advice = next((text for kind, text in _ADVICE.items() if name.startswith(kind)), "")
            _require_same(f"{name}: ", [other.facts.get(name) for other in all_said], advice)
        orders = {other.order for other in all_said if other.order}
        if len(orders) > 1:
            _require_same("", [other.order for other in all_said], OTHER_ORDERS)
        _require_one_treatment(all_said)
        return all_said

    def complete(self, said: list[Said], fits: Fits, groups: Groups, count: float | Tensor) -> Known:
        """Make empty states for groups that other ranks have, in one order everywhere; what all of them know."""
        known = union([other.known for other in said])
        fits = replace(fits, dear=known.dear.keys())
        own = {tuple(block.key for block in group.blocks) for group in groups}
        order: dict[tuple[Key, ...], Entry] = {}
        for entry in (entry for other in said for entry in other.entries):
            order.setdefault(tuple(block.key for block in entry.blocks), entry)
        missing = [entry.blocks for keys, entry in order.items() if keys not in own]
        planned = []
        for blocks in missing:
            fit = fits.of(blocks[0])
            like = promote(fits.parameters[blocks[0].parameters[0]].detach().new_empty(0))
            planned.append(Planned(fit, blocks, fit.plan(blocks, like.element_size()), like))
        groups.add(planned, None, count)
        groups.order(list(order))
        if new := [keys for keys in order if keys not in self._owner]:
            costs = [sum(float(sum(size**3 for size in block.shape)) for block in order[keys].blocks) for keys in new]
            self._owner.update(zip(new, owners(costs, self.ranks.size), strict=True))
        for group in groups:
            group.owner = self._owner[tuple(block.key for block in group.blocks)]
        return replace(known, groups=tuple(groups))

    def hold(self, blocks: Iterable[Block], owner: int) -> None:
        """Let this rank be the owner of a group, wherever it would be by its cost."""
        self._owner[tuple(block.key for block in blocks)] = owner

    def merge(self, said: list[Said], parcels: list[Parcel | None], groups: Groups) -> None:
        """Put the states of every group that reads data together, at its owner; elsewhere their sums are let go of."""
        entries = [{tuple(block.key for block in entry.blocks): entry for entry in other.entries} for other in said]
        own = dict(zip(entries[self.ranks.rank], parcels, strict=True))
        reading = [group for group in groups if not group.done]
        adding = [group for group in reading if group.state.adds]
        sums = [one for group in adding for one in _sums(group.state, group.owner)]
        self.planned += self.ranks.size * sum(bucket.nbytes for bucket in buckets(sums))
        self.ranks.sum_(sums)
        for group in reading:
            keys = tuple(block.key for block in group.blocks)
            there = [(rank, of_rank[keys]) for rank, of_rank in enumerate(entries) if keys in of_rank]
            if group.state.adds:
                group.state.count = sum(other.count for other in said)
                group.state.rows = sum(entry.rows for _, entry in there)
            else:
                frames = [of_rank[keys].frame if keys in of_rank else None for of_rank in entries]
                frames = [frame or _NOTHING.frame for frame in frames]
                self.planned += sum(Parcel.size(frame) for rank, frame in enumerate(frames) if rank != group.owner)
                states = self.ranks.collect(own.get(keys) or _NOTHING, frames, group.owner, self.device)
                self._parts[keys] = [replace(state, blocks=group.blocks) for state in states if state is not None]
            if group.owner != self.ranks.rank:
                group.state.release()

    def merge_everywhere(self, groups: Iterable[Group], numbers: Tensor) -> None:
        """Put the states of groups together at all ranks, to the same bits; counts and rows of those that add apart.

        Args:
            groups: alike on all ranks.
            numbers: others to be summed, float64; in place.
        """
        groups = list(groups)
        adding = [group.state for group in groups if group.state.adds]
        self.ranks.sum_([Sum(numbers), *(one for state in adding for one in _sums(state))])
        if others := [group for group in groups if not group.state.adds]:
            everywhere = self.ranks.share([group.state for group in others], "sums statistics", self.device, anew=True)
            for group, *parts in zip(others, *everywhere, strict=True):
                merged = parts[0]
                for part in parts[1:]:
                    merged = group.fit.combine(merged, part)
                group.state = replace(merged, blocks=group.blocks)

    def _whole(self, group: Group) -> Group:
        """A group of this rank's own, after states that do not add were merged: what waits, in the order of batches."""
        if parts := self._parts.pop(tuple(block.key for block in group.blocks), []):
            group.state = parts[0]
            for part in parts[1:]:
                group.state = group.fit.combine(group.state, part)
            if isinstance(group.state, WaitingState):
                group.state.order_batches()
        return group

    def at_owners(self, groups: Iterable[Group], function: Callable[[Group], Any]) -> list[Any]:
        """The function of every group, computed by its owner and known to all.

        Raises:
            RankError: it failed at one of them; on the other ranks.
        """
        groups, error, own = list(groups), None, {}
        try:
            for place, group in enumerate(groups):
                if group.owner == self.ranks.rank:
                    own[place] = function(self._whole(group))
        except Exception as problem:
            error = problem
        values: dict[int, Any] = {}
        for rank, (failure, found) in enumerate(
            self.ranks.share((describe(error), own), "finishes blocks", self.device)
        ):
            if failure:
                raise error if rank == self.ranks.rank and error else RankError(f"rank {rank}: {failure}")
            values.update(found)
        return [values[place] for place in range(len(groups))]

    def kept_by_owners(
        self, groups: Iterable[Group], finish: Callable[[Group], tuple[Operator, BlockInfo]]
    ) -> list[tuple[Operator, BlockInfo]]:
        """What each owner makes of its groups: the operators stay there, and all know what they are and multiply.

        Raises:
            RankError: as in `at_owners`.
        """
        groups, made = list(groups), {}

        def outlined(group: Group) -> tuple[Outline, BlockInfo]:
            operator, info = finish(group)
            made[id(group)] = operator
            return Outline.of(operator), info

        found = zip(groups, self.at_owners(groups, outlined), strict=True)
        return [
            (Owned(made.get(id(group)), group.owner, self.ranks, outline, self.device), info)
            for group, (outline, info) in found
        ]


_NOTHING = Parcel.of(None)
_ADVICE = {
    "buffer ": "under DDP every rank keeps running statistics of its own batches until the next forward pass. Give all "
    "of them those of rank 0 before: for buffer in model.buffers(): torch.distributed.broadcast(buffer, 0).",
    "parameter ": "ranks have to hold the same weights. While they train, DistributedDataParallel(model) "
    "gives all of them those of rank 0 and averages their gradients, as fully_shard(model) does.",
}
_TREATMENT = "ranks treated it in different ways; give data that can be read again, so that all can begin anew."


def facts_of(recipe: Recipe, parameters: Mapping[str, Tensor], *, buffers: bool = True) -> dict[str, Any]:
    """What has to be the same on all ranks before anything is summed, by name.

    Args:
        recipe: of the estimate.
        parameters: of the model, by name.
        buffers: whether the model's buffers have to be.
    """
    facts: dict[str, Any] = {"the likelihood": repr(recipe.likelihood)}
    facts |= {name: getattr(recipe, name) for name in ("labels", "samples", "seed", "strict")}
    tensors = [("parameter", name, p) for name, p in parameters.items()]
    tensors += [("buffer", name, b) for name, b in recipe.model.named_buffers() if buffers]
    for kind, name, tensor in tensors:
        facts[f"{kind} {name}"] = f"{list(tensor.shape)} {tensor.dtype} {fingerprint({name: tensor})[:12]}"
    return facts


def _sums(state: State, owner: int = -1) -> list[Sum]:
    """Those of a state, as they travel."""
    triangles = state.triangles
    return [Sum(tensor, owner, name in triangles) for name, tensor in state.sums.items()]


def _entry(group: Group, parcel: Parcel | None) -> Entry:
    state, facts = group.state, {}
    if not group.done:
        facts = {"fit": repr(group.fit), "kind of sums": type(state).__name__, "pass": state.phase}
        facts["passes"] = state.plan.passes
        if state.adds:
            facts |= {f"the {name}": (tuple(x.shape), str(x.dtype)) for name, x in state.sums.items()}
    frame = None if parcel is None else parcel.frame
    return Entry(group.blocks, facts, frame, float(state.rows))


def _require_same(what: str, values: list[Any], advice: str) -> None:
    """RankError, on all ranks, that names the first rank that differs from rank 0."""
    for rank, value in enumerate(values):
        if value != values[0]:
            text = f"{what}rank 0 has {_short(values[0])}, rank {rank} {_short(value)}"
            raise RankError(f"{text}{'; ' if advice else '.'}{advice}")


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) < 200 else text[:200] + "…"


def _require_one_treatment(said: list[Said]) -> None:
    """Every block is treated alike by all ranks that have it.

    Raises:
        RankError: they differ in a way that beginning again does not mend.
        LateKnowledge: they need not, if all begin with what each of them found.
    """
    joint, again = union([other.known for other in said]), all(other.again for other in said)
    blocks = {b.key: b for other in said for entry in other.entries for b in entry.blocks}
    anew = replace(joint, neighbours=Known().neighbours, foreseen=tuple(blocks.values()))
    if any(other.late for other in said):
        late = union([other.late or other.known for other in said])
        foreseen = {b.key: b for other in said if other.late for b in other.late.foreseen} | blocks
        raise LateKnowledge(replace(late, foreseen=tuple(foreseen.values())), _TREATMENT, again)
    placed: dict[Key, tuple[tuple[Block, ...], int]] = {}
    for rank, other in enumerate(said):
        for entry in other.entries:
            for block in entry.blocks:
                names = set(block.parameters)
                if block.operator != FALLBACK and (
                    names & joint.fallback.keys() or (len(names) > 1 and names & joint.apart)
                ):
                    raise LateKnowledge(anew, f"{block.name}: {_TREATMENT}", again)
                if not block.onehot and names & (joint.dear.keys() - other.known.dear.keys()):
                    raise LateKnowledge(anew, f"{block.name}: {_TREATMENT}", again)
                before, first = placed.setdefault(block.key, (entry.blocks, rank))
                if [b.key for b in before] != [b.key for b in entry.blocks]:
                    raise LateKnowledge(anew, f"{block.name}: {_TREATMENT}", again)
    first_facts: dict[tuple[Key, ...], tuple[int, Mapping[str, Any]]] = {}
    for rank, other in enumerate(said):
        for entry in other.entries:
            keys = tuple(block.key for block in entry.blocks)
            first, facts = first_facts.setdefault(keys, (rank, entry.facts))
            for name in dict.fromkeys([*facts, *entry.facts]):
                if facts.get(name) != entry.facts.get(name):
                    names = ", ".join(block.name for block in entry.blocks)
                    raise RankError(
                        f"{names}: {name} is {_short(facts.get(name))} on rank {first} and "
                        f"{_short(entry.facts.get(name))} on rank {rank}."
                    )


def union(known: list[Known]) -> Known:
    """What any rank knows."""
    fallback, dear, after, cuts = {}, {}, {}, {}
    for each in reversed(known):
        fallback |= each.fallback
        dear |= each.dear
        after |= each.neighbours.after
        cuts |= each.neighbours.cuts
    first = known[0]
    return replace(
        first,
        groups=(),
        fallback=dict(sorted(fallback.items())),
        apart=frozenset().union(*(each.apart for each in known)),
        mixed=frozenset().union(*(each.mixed for each in known)),
        neighbours=replace(first.neighbours, after=after, cuts=cuts),
        dear=dict(sorted(dear.items())),
    )
