"""Which example each row of each use belongs to, according to a probe, or to what is proved of the graph."""

from collections import Counter
from collections.abc import Callable, Container, Hashable, Mapping
from dataclasses import dataclass, field
from math import prod
from weakref import WeakKeyDictionary

from torch import nn

from kronfisher.capture.graph import Call
from kronfisher.capture.memory import recall
from kronfisher.capture.observation import Observation
from kronfisher.capture.parts import Part
from kronfisher.fisher.blocks import Key
from kronfisher.layers import RowOrder, Use
from kronfisher.layers.row_order import irregular_rows_message, mixed_rows_message

__all__ = ["Place", "RowOrders", "row_orders"]

Place = tuple[int, int]  # index of a call, number of the part
Rules = dict[tuple, RowOrder]  # (call, block, which of the call's parts of it, sorted by example) → rule

# Model → graph → rules. They are dropped together with their model.
_RULES: WeakKeyDictionary[nn.Module, dict[int, Rules]] = WeakKeyDictionary()


@dataclass
class RowOrders:
    """The row orders of one forward pass.

    Attributes:
        orders: (index of a call, number of the part) → which example each row belongs to.
        refused: block → why its examples have no gradients of their own.
        problems: parameter → why per-example gradients exist, but not row by row.
        mixed: in training, names of blocks whose rows mix examples and are used regardless.
        examined: in training, (block, sorted by example) whose rows are used as they come, whatever they mix.
        proved: whether all orders are those of any batch with the same graph.
    """

    orders: dict[Place, RowOrder] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    mixed: set[str] = field(default_factory=set)
    examined: set[tuple[Key, bool]] = field(default_factory=set)
    proved: bool = True


def row_orders(
    observation: Observation,
    parts: Mapping[int, list[Part]],
    sorts: Callable[[Part], bool],
    pads: Callable[[Part], bool],
    examined: Container[tuple[Key, bool]],
    *,
    training: bool,
    by_rows: bool = False,
) -> RowOrders:
    """The order of the rows of every part.

    A probe examines every use. Its result is valid for the same graph of the same model, in later estimates too, where
    examples are proved to stay apart whatever the values (`kronfisher.capture.separation`); elsewhere every batch is
    examined. Rows that need not be sorted by example are treated one by one, if each belongs to a single example.

    Args:
        observation: of the forward pass.
        parts: index of a call → its blocks.
        sorts: whether a part's rows have to be sorted by example.
        pads: whether examples may have unequal numbers of a part's rows then.
        examined: in training, blocks of earlier batches; see `RowOrders`.
        training: rows that mix examples are used regardless, sorted by the axis that is likely the examples'.
        by_rows: every number of the outputs has a gradient of its own, whatever it shares with others (residuals).
    """
    graph, examples, answer = observation.graph, len(observation), RowOrders()
    rules = recall(_RULES.setdefault(observation.model, {}), graph.signature, dict)
    doubtful: dict[tuple[int, Hashable], Use] = {}
    places: dict[Place, tuple] = {}
    for index, parts_of_call in parts.items():
        shape, before = observation.calls[index].shape, Counter()
        for number, part in enumerate(parts_of_call):
            sort, key = sorts(part), part.block.key
            before[key] += 1  # pieces of one table that are joined stand for all of it, each with rows of its own
            place = places[index, number] = (index, key, before[key], sort)
            rule = RowOrder(1) if examples == 1 else rules.get(place)
            if rule is None and training and (key, sort) in examined:
                answer.proved = False
                likely = RowOrder.candidates(part.use.lead(shape), examples)
                rule = next(iter(likely), None) if sort else _one_by_one(part, shape)
            if rule is not None:
                answer.orders[index, number] = rule
            else:
                doubtful[index, number] = part.use
    for (index, number), rows in (observation.examples_of_rows(doubtful) if doubtful else {}).items():
        call, part = observation.calls[index], parts[index][number]
        sort = sorts(part)
        if training and not sort:
            answer.examined.add((part.block.key, sort))
        if rows is None:
            if by_rows:  # a network is run once for several terms
                reason = f"{_describe(call, part)}: its rows have a part in several residuals each"
                answer.problems |= dict.fromkeys(part.block.parameters, reason)
                continue
            _note_mixed(answer, call, part, (index, number), examples, training=training, sort=sort)
            continue
        proved = observation.proved_examples(call, part.use)
        if proved is not None and not bool(((rows < 0) | (rows == proved)).all()):
            proved = None
        rows = rows if proved is None else proved
        rule = RowOrder(rows.numel())
        if sort:
            rule, _ = RowOrder.by_examples(rows, examples, pads=pads(part))
        if rule is None:
            reason = irregular_rows_message(_describe(call, part), tuple(rows.shape), examples)
            answer.problems |= dict.fromkeys(part.block.parameters, reason)
            continue
        answer.orders[index, number] = rule
        if proved is not None:
            rules[places[index, number]] = rule
    answer.proved = answer.proved and all(place in rules or examples == 1 for place in places.values())
    return answer


def _note_mixed(
    answer: RowOrders, call: Call, part: Part, place: Place, examples: int, *, training: bool, sort: bool
) -> None:
    """Refuse rows that belong to several examples, leave them to the fallback, or use them regardless."""
    block, reason = part.block, mixed_rows_message(_describe(call, part))
    if call.constant:
        for name in block.parameters:
            answer.problems[name] = f"{name}: used by {call.operator} before any data enter"
    elif not training:
        answer.refused[block.name] = reason
    elif not sort:
        answer.mixed.add(block.name)
        answer.orders[place] = _one_by_one(part, call.shape)
    elif rules := RowOrder.candidates(part.use.lead(call.shape), examples):
        answer.mixed.add(block.name)
        answer.examined.add((block.key, sort))
        answer.orders[place] = rules[0]  # as if rows were their example's own
    else:
        answer.problems |= dict.fromkeys(block.parameters, reason)


def _one_by_one(part: Part, shape: tuple[int, ...]) -> RowOrder:
    return RowOrder(prod(part.use.lead(shape)))


def _describe(call: Call, part: Part) -> str:
    return f"{part.block.name} (used by {call.operator})"
