"""Which fit treats which parameter in a batch: a pure function of the batch, the fits, and what is known before it."""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from math import prod
from weakref import WeakKeyDictionary

from torch import nn

from kronfisher.capture.memory import recall
from kronfisher.capture.observation import Observation
from kronfisher.capture.parts import Part
from kronfisher.capture.per_sample import FALLBACK, per_sample_block
from kronfisher.capture.refusals import unclaimed_use_message
from kronfisher.capture.row_orders import RowOrders, row_orders
from kronfisher.estimation.groups import Fits, Group, Planned, plan_groups
from kronfisher.estimation.neighbours import Neighbours, find_neighbours
from kronfisher.estimation.side_blocks import dear_blocks
from kronfisher.fisher.blocks import Block, Key, Window
from kronfisher.fisher.windows import settle
from kronfisher.layers import RowOrder
from kronfisher.layers.row_order import mixed_rows_message

__all__ = ["Assignment", "Known", "Refusals", "assign", "find_parts"]

# Model → graphs in which examples are known to stay apart where they meet the parameters that the fallback treats.
_APART: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Known:
    """The assignment of earlier batches: later ones may only add to it.

    Attributes:
        groups: of blocks, in the order of their first batches.
        fallback: parameter → reason why only its per-example gradients cover it.
        apart: names of weights and biases that have several partners and are treated separately.
        mixed: in training, names of blocks whose rows mix examples.
        neighbours: which block follows which.
        dear: parameter that has a diagonal only → why, with the price of a dense factor.
        examined: in training, (block, sorted by example) whose rows are used as they come, whatever they mix.
        foreseen: blocks that later batches use, so that fits can treat them together from the first batch on.
    """

    groups: tuple[Group, ...] = ()
    fallback: Mapping[str, str] = field(default_factory=dict)
    apart: frozenset[str] = frozenset()
    mixed: frozenset[str] = frozenset()
    neighbours: Neighbours = field(default_factory=Neighbours)
    dear: Mapping[str, str] = field(default_factory=dict)
    examined: frozenset[tuple[Key, bool]] = frozenset()
    foreseen: tuple[Block, ...] = ()

    @property
    def blocks(self) -> dict[Key, Block]:
        """Those of all groups."""
        return {block.key: block for group in self.groups for block in group.blocks}

    @classmethod
    def of_blocks(cls, groups: Iterable[tuple[Block, ...]]) -> "Known":
        """What to know beforehand so that blocks come out in the form of these."""
        blocks = [block for group in groups for block in group]
        alone = frozenset(block.parameters[0] for block in blocks if len(block.views) == 1)
        joined = {name for block in blocks if len(block.views) > 1 for name in block.parameters}
        fallback = {block.name: f"{block.name}: treated so before" for block in blocks if block.operator == FALLBACK}
        return cls(fallback=fallback, apart=alone - joined - fallback.keys())

    @classmethod
    def restore(
        cls,
        fallback: Mapping[str, str],
        apart: set[str],
        mixed: set[str],
        groups: Iterable[tuple[Block, ...]],
        dear: Mapping[str, str],
    ) -> "Known":
        """The knowledge of a saved run, before its groups have states again."""
        after = {x.key: y.key for blocks in groups for x, y in pairwise(blocks)}  # fits that form no chains ignore it
        return cls((), dict(fallback), frozenset(apart), frozenset(mixed), Neighbours(after), dear=dict(dear))


@dataclass(frozen=True)
class Refusals:
    """Why a batch cannot be treated: block or parameter → reason.

    Attributes:
        problems: the reasons.
        anew: what to know from the first batch on, if this batch could be treated had it been the first.
    """

    problems: Mapping[str, str]
    anew: Known | None = None


@dataclass(frozen=True)
class Assignment:
    """How one batch is treated.

    Attributes:
        parts: index of a call → contributions of its uses to blocks.
        orders: (index of a call, number of the part) → which example each row belongs to.
        singles: parameter that the fallback treats → its block.
        new: groups of blocks that occur for the first time, with their plans.
        known: the assignment that later batches have to agree with, without the new groups.
        proved: whether the orders are those of every batch with the same graph.
    """

    parts: Mapping[int, list[Part]]
    orders: Mapping[tuple[int, int], RowOrder]
    singles: Mapping[str, Block]
    new: tuple[Planned, ...]
    known: Known
    proved: bool = False


def assign(
    observation: Observation, fits: Fits, known: Known, *, masked: bool = False, batches: int = 1
) -> Assignment | Refusals:
    """Decide how a batch is treated, without side effects.

    Each round leaves more parameters to the fallback or treats more biases separately, so that the loop terminates.

    Args:
        observation: of the batch's forward pass.
        fits: the fit of every parameter.
        known: by earlier batches.
        masked: whether positions will be masked, so that rows have to be sorted by example.
        batches: in a pass over the data, as far as that is known.
    """
    graph, before, fits = observation.graph, known.blocks, replace(fits, dear=known.dear.keys())
    counted = {name for block in before.values() for name in block.parameters}
    fallback, apart, mixed = dict(known.fallback), set(known.apart), set(known.mixed)
    examined, dear, tables = set(known.examined), dict(known.dear), dict[str, str]()

    def give_up(problems: Mapping[str, str]) -> dict[str, str]:
        """Leave parameters to the fallback; return those that earlier batches treated in another way, with reasons."""
        new = {name: reason for name, reason in problems.items() if name not in fallback}
        fallback.update(new)
        return {name: f"{reason}. {_LATE}" for name, reason in new.items() if name in counted}

    def refuse(late: Mapping[str, str], blocks: Iterable[Block] = ()) -> Refusals:
        foreseen = {block.key: block for block in (*known.foreseen, *blocks)}
        begin = Known(fallback=dict(fallback), apart=frozenset(apart), dear=dear, foreseen=tuple(foreseen.values()))
        return Refusals(late, begin)

    if late := give_up({name: unclaimed_use_message(name, operators) for name, operators in graph.unclaimed.items()}):
        return refuse(late)
    while True:
        parts = find_parts(observation, fits, fallback, apart)
        blocks = _blocks(parts)
        if not blocks.keys() <= before.keys():
            claims = settle({**before, **blocks}.values(), fits.whole)
            joined = {name for block in before.values() if len(block.views) > 1 for name in block.parameters}
            apart |= claims.apart
            if late := joined & claims.apart:
                return refuse({name: f"{name} {_PARTNERS}" for name in late})
            if late := give_up(claims.problems):
                return refuse(late)
            if claims.apart or claims.problems:
                continue
        singles = _singles(fits, fallback)
        blocks |= {block.key: block for block in singles.values()}
        blocks |= {block.key: block for block in known.foreseen if _holds(block, fallback, apart)}
        new = [block for key, block in blocks.items() if key not in before]
        priced = dear_blocks(observation, parts, {block.key for block in new}, fits, batches)
        dear = {**priced, **tables, **known.dear}
        if dear.keys() != fits.dear:
            fits = replace(fits, dear=dear.keys())
        looked_up = {block.weight.parameter for block in new if block.weight is not None}
        if bags := {name: reason for name, reason in priced.items() if name in looked_up}:
            tables |= bags
            continue
        planned = plan_groups(new, fits, known.groups, known.neighbours.after)
        if isinstance(planned, str):
            return refuse({"": planned}, {**before, **blocks}.values())
        rows = _row_orders(observation, fits, known, parts, planned, examined, masked)
        mixed |= rows.mixed
        examined |= rows.examined
        if rows.refused:
            return Refusals(rows.refused)
        if not rows.problems:
            break
        if late := give_up(rows.problems):
            return refuse(late)
    if reason := _mixing_reason(observation, fits, fallback):
        return Refusals({"": reason})
    neighbours = find_neighbours(observation, parts, rows.orders, fits, known.neighbours, before)
    if not isinstance(neighbours, Neighbours):
        return Refusals(neighbours)
    if neighbours.after != known.neighbours.after:
        planned = plan_groups(new, fits, known.groups, neighbours.after)
        if isinstance(planned, str):
            return refuse({"": planned}, {**before, **blocks}.values())
    return Assignment(
        parts,
        rows.orders,
        singles,
        tuple(planned),
        replace(
            known,
            fallback=fallback,
            apart=frozenset(apart),
            mixed=frozenset(mixed),
            neighbours=neighbours,
            dear=dear,
            examined=frozenset(examined),
        ),
        rows.proved,
    )


_LATE = (
    "Earlier batches used it in another way and are already accumulated: put a batch like this one first, or freeze "
    "the parameter with requires_grad_(False)."
)
_PARTNERS = (
    "is used with another bias than in earlier batches, or without one; its gradients there are already accumulated "
    "together with that bias. Put a batch first that uses it in all these ways."
)


def find_parts(
    observation: Observation, fits: Fits, fallback: Mapping[str, str], apart: AbstractSet[str]
) -> dict[int, list[Part]]:
    """Index of a call → parts of its uses: weight and bias together if one fit treats both, else each alone."""
    parts: dict[int, list[Part]] = {}
    for index in sorted(observation.graph.alive):
        call = observation.calls[index]
        if not prod(call.shape):
            continue  # no positions: it contributes nothing
        own = parts.setdefault(index, [])
        for use in call.uses:
            if use.name in fits.dear:
                use = use.entries_apart() or use
            if fits.given[use.name].positions_apart:
                use = use.positions_apart() or use
            weight, bias = (v if v and v.parameter not in fallback else None for v in (use.weight, use.bias))
            if weight and bias and fits.joins(weight.parameter, bias.parameter, apart):
                own.append(Part(use, _block(call.operator, weight, bias, use.onehot), True, True))
                continue
            if weight:
                own.append(Part(use, _block(call.operator, weight, None, use.onehot), True, False))
            if bias:
                own.append(Part(use, _block(call.operator, None, bias), False, True))
    return parts


@lru_cache(maxsize=4096)  # the same in every batch, with what is known of it
def _block(operator: str, weight: Window | None, bias: Window | None, onehot: bool = False) -> Block:
    name = next(view.label for view in (weight, bias) if view)
    return Block(name, operator, weight, bias, onehot)


def _blocks(parts: Mapping[int, list[Part]]) -> dict[Key, Block]:
    return {part.block.key: part.block for own in parts.values() for part in own}


def _holds(block: Block, fallback: Mapping[str, str], apart: set[str]) -> bool:
    """Whether a block of another batch has the form that its parameters have now."""
    own = set(block.parameters)
    return block.operator == FALLBACK or not (own & fallback.keys() or (len(own) > 1 and own & apart))


def _singles(fits: Fits, fallback: Mapping[str, str]) -> dict[str, Block]:
    """Parameter that the fallback treats → its block."""
    if fits.training:
        return {}
    return {name: per_sample_block(name, p) for name, p in fits.parameters.items() if name in fallback}


def _row_orders(
    observation: Observation,
    fits: Fits,
    known: Known,
    parts: Mapping[int, list[Part]],
    planned: Iterable[Planned],
    examined: AbstractSet[tuple[Key, bool]],
    masked: bool,
) -> RowOrders:
    """Which example each row belongs to; rows are sorted if the fit, the mask or the use needs it."""
    plans = [
        *((group.blocks, group.state.plan) for group in known.groups),
        *((entry.blocks, entry.plan) for entry in planned),
    ]
    by_example = {block.key for blocks, plan in plans if plan.by_example for block in blocks}

    def sorts(part: Part) -> bool:
        return part.use.summing or masked or part.block.key in by_example

    def pads(part: Part) -> bool:
        fit = fits.of(part.block)  # chains pair rows with rows; positions that are asked for are not those of padding
        return part.use.pads and not fit.chained and not fit.positions_apart

    return row_orders(observation, parts, sorts, pads, examined, training=fits.training, by_rows=fits.by_rows)


def _mixing_reason(observation: Observation, fits: Fits, fallback: Mapping[str, str]) -> str:
    """Why per-example gradients do not exist: an operator mixes examples where they meet a parameter; or empty."""
    if not fallback or fits.training or fits.by_rows or len(observation) == 1:
        return ""
    graph = observation.graph
    fine = _APART.setdefault(observation.model, {})
    if fine.get(graph.signature):
        return ""
    met = list(graph.meetings)
    for index in graph.alive:
        call = observation.calls[index]
        if not call.constant and any(use.name in fallback for use in call.uses):
            met.append((call.operator, call.anchor))
    if places := observation.mixing_places([anchor for _, anchor in met]) if met else []:
        names = ", ".join(sorted({met[place][0] for place in places}))
        return mixed_rows_message(f"{names} (with {', '.join(fallback)})")
    proved = observation.separated
    if all((anchor.edge.node, anchor.edge.output_nr) in proved for _, anchor in met):  # else values may decide
        recall(fine, graph.signature, lambda: True)
    return ""
