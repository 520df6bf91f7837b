"""Which example each row of each use belongs to, according to shapes known from earlier batches, or else a probe."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from math import prod
from weakref import WeakKeyDictionary

from torch import nn

from kronfisher.capture.graph import Call
from kronfisher.capture.observation import Observation
from kronfisher.capture.parts import Part
from kronfisher.layers import RowOrder, Use
from kronfisher.layers.row_order import irregular_rows_message, mixed_rows_message

__all__ = ["Guesses", "Place", "RowOrders", "row_orders"]

Place = tuple[int, int]  # index of a call, number of the part
Guesses = Mapping[int, Mapping[tuple, RowOrder]]  # graph → (call, block, sorted by example) → rule

# Model → graph → (call, block, sorted by example) → rule. Rules are dropped together with their model.
_RULES: WeakKeyDictionary[nn.Module, dict[int, dict[tuple, RowOrder]]] = WeakKeyDictionary()


@dataclass
class RowOrders:
    """The row orders of one forward pass.

    Attributes:
        orders: (index of a call, number of the part) → which example each row belongs to.
        refused: block → why its examples have no gradients of their own.
        problems: parameter → why per-example gradients exist, but not row by row.
        mixed: in training, names of blocks whose rows mix examples and are used regardless.
        guesses: rules based only on the shape of a use without any gradient; they are valid for this estimate alone.
    """

    orders: dict[Place, RowOrder] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    mixed: set[str] = field(default_factory=set)
    guesses: dict[tuple, RowOrder] = field(default_factory=dict)


def row_orders(
    observation: Observation,
    parts: Mapping[int, list[Part]],
    sorts: Callable[[Part], bool],
    guesses: Mapping[tuple, RowOrder],
    *,
    training: bool,
) -> RowOrders:
    """The order of the rows of every part.

    A probe examines every use once; its result is valid for the same graph of the same model, in later estimates too.
    Rows that need not be sorted by example are treated one by one, if each belongs to a single example.

    Args:
        observation: of the forward pass.
        parts: index of a call → its blocks.
        sorts: whether a part's rows have to be sorted by example.
        guesses: of earlier batches with the same graph.
        training: rows that mix examples are used regardless if a fit treats rows independently.
    """
    graph, examples = observation.graph, len(observation)
    answer = RowOrders(guesses=dict(guesses))
    rules = _RULES.setdefault(observation.model, {}).setdefault(graph.signature, {})
    doubtful: dict[tuple[int, Hashable], Use] = {}
    for index, parts_of_call in parts.items():
        shape = observation.calls[index].shape
        for number, part in enumerate(parts_of_call):
            sort = sorts(part)
            rule = rules.get(key := (index, part.block.key, sort)) or guesses.get(key)
            if (sort and graph.gathers) or (graph.combines and (sort or not training)):
                rule = None  # the next batch may come in another order, or combine other rows
            if order := _without_probe(rule, part.use.lead(shape), examples, sort):
                answer.orders[index, number] = order
            else:
                doubtful[index, number] = part.use
    for (index, number), rows in (observation.examples_of_rows(doubtful) if doubtful else {}).items():
        call, part = observation.calls[index], parts[index][number]
        sort = sorts(part)
        key = index, part.block.key, sort
        if rows is None:
            _note_mixed(answer, call, part, (index, number), key, examples, training=training, sort=sort)
            continue
        rule, sure = RowOrder.by_examples(rows, examples) if sort else (RowOrder(rows.numel()), True)
        if rule is None:
            reason = irregular_rows_message(_describe(call, part), tuple(rows.shape), examples)
            answer.problems |= dict.fromkeys(part.block.parameters, reason)
            continue
        answer.orders[index, number] = rule
        if sure:
            (rules if bool((rows >= 0).any()) else answer.guesses)[key] = rule
    return answer


def _note_mixed(
    answer: RowOrders,
    call: Call,
    part: Part,
    place: Place,
    key: tuple,
    examples: int,
    *,
    training: bool,
    sort: bool,
) -> None:
    """Refuse rows that belong to several examples, leave them to the fallback, or use them regardless."""
    block, reason = part.block, mixed_rows_message(_describe(call, part))
    if call.constant:
        for name in block.parameters:
            answer.problems[name] = f"{name}: used by {call.operator} before any data enter"
    elif not training:
        answer.refused[block.name] = reason
    elif part.use.summing and (rules := RowOrder.candidates(part.use.lead(call.shape), examples)):
        answer.mixed.add(block.name)
        answer.orders[place] = answer.guesses[key] = rules[0]  # rows are summed as if they were their example's own
    elif sort:
        answer.problems |= dict.fromkeys(block.parameters, reason)
    else:
        answer.mixed.add(block.name)
        answer.orders[place] = answer.guesses[key] = RowOrder(prod(part.use.lead(call.shape)))


def _describe(call: Call, part: Part) -> str:
    return f"{part.block.name} (used by {call.operator})"


def _without_probe(rule: RowOrder | None, lead: tuple[int, ...], examples: int, sort: bool) -> RowOrder | None:
    """The order of rows if it is known without a probe."""
    if examples == 1:
        return RowOrder(1)
    if rule is None:
        return None
    return rule.adapt(lead, examples) if sort else RowOrder(prod(lead))
