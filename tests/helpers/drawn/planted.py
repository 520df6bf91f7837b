"""Errors to be planted in the library, one at a time: random networks have to find every one of them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from pytest import MonkeyPatch
from torch import Tensor

from kronfisher.capture import observation, separation
from kronfisher.capture.capture import Capture
from kronfisher.capture.graph import Call, Graph, Recording
from kronfisher.capture.observation import Observation
from kronfisher.capture.parts import Part
from kronfisher.capture.row_orders import RowOrders
from kronfisher.estimation import assignment, groups, repeated, routing
from kronfisher.layers import OPERATORS, RowOrder, expressions, masks
from kronfisher.layers import convolution as convolutions
from kronfisher.layers.activations import Dense
from kronfisher.layers.elementwise import ElementwiseUse
from kronfisher.layers.joined import PartUse
from kronfisher.layers.linear import RowUse
from kronfisher.layers.use import Use, Windows

__all__ = ["PLANTED"]

PLANTED: dict[str, Callable[[MonkeyPatch], None]] = {}
"""What is wrong → plants it."""


def plant(words: str) -> Callable[[Callable[[MonkeyPatch], None]], Callable[[MonkeyPatch], None]]:
    def register(planted: Callable[[MonkeyPatch], None]) -> Callable[[MonkeyPatch], None]:
        PLANTED[words] = planted
        return planted

    return register


@plant("capture: the offset of a window on a parameter is forgotten")
def _offset(patch: MonkeyPatch) -> None:
    view = Capture.view
    patch.setattr(Capture, "view", lambda self, tensor: (w := view(self, tensor)) and replace(w, offset=0))


@plant("capture: parameters in operators that are not understood count as unused")
def _unclaimed(patch: MonkeyPatch) -> None:
    walk = observation.walk

    def walked(recording: Recording, outputs: Tensor) -> Graph:
        graph = walk(recording, outputs)
        graph.unclaimed.clear()
        return graph

    patch.setattr(observation, "walk", walked)


@plant("capture: what a probe saw in one batch is remembered for others with the same graph")
def _remembered(patch: MonkeyPatch) -> None:
    def seen(self: Observation, call: Call, use: Use) -> Tensor | None:
        return self.examples_of_rows({(call.index, 0): use})[call.index, 0]

    patch.setattr(Observation, "proved_examples", seen)


@plant("capture: rolled rows count as apart, along whatever axis")
def _rolled(patch: MonkeyPatch) -> None:
    patch.setitem(separation._RULES, "Roll", separation._elementwise)


@plant("layers: the input of one that stands for the bias is zero")
def _bias(patch: MonkeyPatch) -> None:
    activations = RowUse.activations

    def biased(self: RowUse, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> object:
        found = activations(self, order, gradient, weight, bias)
        if not (weight and bias):
            return found
        rows = found.dense().clone()
        rows[..., -1] = 0
        return Dense(rows)

    patch.setattr(RowUse, "activations", biased)


@plant("layers: a square matrix on the right is not transposed")
def _right(patch: MonkeyPatch) -> None:
    matmul = OPERATORS[torch.matmul]

    def turned(view: Windows, input: Tensor, other: Tensor) -> Iterator[Use]:
        for use in matmul(view, input, other):
            if use.weight and view(other) and use.weight.size[1] == use.weight.size[2]:
                use.weight = use.weight.permuted(0, 2, 1)
            yield use

    for operator in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
        patch.setitem(OPERATORS, operator, turned)


@plant("layers: the stride of a convolution is ignored")
def _stride(patch: MonkeyPatch) -> None:
    def windows(self: convolutions.Geometry, images: Tensor) -> Tensor:
        steps = self.steps(images.shape[2:])
        images = self.pad(images)
        for axis, (size, count, spread) in enumerate(zip(self.kernel, steps, self.dilation, strict=True)):
            images = images.unfold(axis + 2, (size - 1) * spread + 1, 1)[..., ::spread].narrow(axis + 2, 0, count)
        return images

    patch.setattr(convolutions.Geometry, "windows", windows)


@plant("layers: the factor of a scale is forgotten")
def _factor(patch: MonkeyPatch) -> None:
    init = ElementwiseUse.__post_init__
    patch.setattr(ElementwiseUse, "__post_init__", lambda self: (init(self), setattr(self, "factor", None))[0])


@plant("layers: a subtracted parameter counts as an added one")
def _sign(patch: MonkeyPatch) -> None:
    init = ElementwiseUse.__post_init__
    patch.setattr(ElementwiseUse, "__post_init__", lambda self: (init(self), setattr(self, "sign", 1.0))[0])


@plant("layers: the index that is padding counts")
def _padding(patch: MonkeyPatch) -> None:
    def without(handler: Any) -> Any:
        def handle(*args: Any, **kwargs: Any) -> Any:
            given = signature(handler).bind(*args, **kwargs)
            given.arguments.pop("padding_idx", None)
            return handler(**given.arguments)

        return handle

    for operator in (F.embedding, F.embedding_bag):
        patch.setitem(OPERATORS, operator, without(OPERATORS[operator]))


@plant("layers: rows belong to examples as the shape suggests first")
def _owner(patch: MonkeyPatch) -> None:
    def first(examples: Tensor, samples: int, *, pads: bool = False) -> tuple[RowOrder | None, bool]:
        rules = RowOrder.candidates(tuple(examples.shape), samples)
        return (rules[0] if rules else None), True

    patch.setattr(RowOrder, "by_examples", staticmethod(first))


@plant("layers: what fills up examples with fewer rows is the last row")
def _filled(patch: MonkeyPatch) -> None:
    patch.setattr(RowOrder, "padded", False)


@plant("layers: every part of a weight that was joined has the first one's output")
def _parts_of_output(patch: MonkeyPatch) -> None:
    init = PartUse.__post_init__
    patch.setattr(PartUse, "__post_init__", lambda self: (init(self), setattr(self, "start", 0))[0])


@plant("layers: elements of a weight that are masked count")
def _masked(patch: MonkeyPatch) -> None:
    for module in (expressions, masks):
        patch.setattr(module, "masked", lambda record, value, mask: record.terms(value))


@plant("assignment: only the first of several uses of a weight counts")
def _first_use(patch: MonkeyPatch) -> None:
    patch.setattr(routing, "join", lambda uses: uses[0])


@plant("assignment: shifts that stand alone have no part")
def _shifts(patch: MonkeyPatch) -> None:
    parts = assignment.find_parts

    def without(*args: Any) -> dict[int, list[Part]]:
        return {index: [part for part in own if part.weight] for index, own in parts(*args).items()}

    for module in (assignment, repeated):
        patch.setattr(module, "find_parts", without)


@plant("assignment: rows are sorted by example only where they are summed")
def _sorted(patch: MonkeyPatch) -> None:
    orders = assignment.row_orders

    def unsorted(
        observation: Observation, parts: Any, sorts: Any, pads: Any, examined: Any, **options: bool
    ) -> RowOrders:
        return orders(observation, parts, lambda part: part.use.summing, pads, examined, **options)

    patch.setattr(assignment, "row_orders", unsorted)


@plant("assignment: a block that comes in a later batch has not seen the examples before")
def _late(patch: MonkeyPatch) -> None:
    add = groups.Groups.add
    patch.setattr(groups.Groups, "add", lambda self, planned, rows=None, count=0.0: add(self, planned, rows, 0.0))
