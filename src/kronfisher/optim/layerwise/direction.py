"""Natural gradients of layers, each from an inverse relative to the layer's own mean eigenvalue."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_not
from typing import Any

from torch import Tensor, nn

from kronfisher.fisher.damping import Damping
from kronfisher.operators import Operator
from kronfisher.optim.intervals import Refresh
from kronfisher.optim.inverses import Inverses
from kronfisher.optim.largest_factor import CHOLESKY, EIGENVECTORS
from kronfisher.optim.layer_inverse import LayerInverse
from kronfisher.optim.layer_statistics import LayerStatistics
from kronfisher.optim.layerwise.alike_inverses import Turn, gather_alike, make_alike
from kronfisher.optim.layerwise.output_changes import OutputChanges
from kronfisher.optim.layerwise.product import Product, Products
from kronfisher.optim.ownership import Ownership

__all__ = ["RelativeDirection", "Shares"]

AFFORDABLE = 0.1  # of the arithmetic of forward and backward passes, for inverses, before their period is lengthened
AFFORDABLE_EARLY = 0.5  # the same while the period grows with the steps so far
LONGEST = 50  # period, in steps, that inverses are put off for that; early, half of the steps so far
RARE = 5  # periods after which the inverse of an input factor of data is renewed where it is dear: data do not change
DEAR = 3.0  # passes: inverses of layers beyond are made half by half
EVEN = 0.1  # the share of each half, at the least: others are no cheaper apart, and both read both factors
LEAST = 0.05  # of the damping, which falls with the root of the share of the data that is left to fit

_Group = tuple[Products | None, list[tuple[LayerInverse, Product | None]]]


@dataclass(frozen=True)
class Shares(Damping):
    """Each factor damped by a share of its own mean eigenvalue, and the whole divided by its mean eigenvalue.

    Attributes:
        value: multiplies both shares.
        inputs: of the input factor.
        outputs: of the output factor.
    """

    inputs: float | Tensor = 0.05
    outputs: float | Tensor = 0.05

    def damp(self, operator: Operator, value: float) -> Operator:
        return operator.normalized(value * self.inputs, value * self.outputs)


class RelativeDirection(Inverses):
    """Inverses of all layers, renewed one after the other within a budget of arithmetic per step.

    Args:
        parameters: name → parameter, all that may be trained.
        refresh: periods.
        share: the damping, as a share of each factor's mean eigenvalue, while all is left to fit.
        data_share: that of the input factor of layers whose inputs are data, by its width.
        ownership: as in `Inverses`.

    Attributes:
        inverses: one for each layer, in the order of the layers.
        changes: evens what updates change in outputs; it meets layers as their inverses are made.
        seconds: spent on making inverses.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        refresh: Refresh,
        share: float,
        data_share: float,
        ownership: Ownership | None = None,
    ) -> None:
        super().__init__(parameters, refresh, ownership)
        self.share, self.data_share = share, data_share
        self.changes = OutputChanges(share)
        self._applied: list[Operator | None] = []  # inverses, and how they are applied
        self._groups: list[_Group] = []

    def renew(self, step: int, pass_cost: float, unfitted: float | Tensor = 1.0, *, wait: bool = False) -> None:
        """Make the inverses that are due, the oldest first, until as much is spent as a forward and backward pass.

        A layer that is dearer than three of them has its two factors inverted in different steps.

        Args:
            step: number of the step.
            pass_cost: multiplications of a forward and backward pass over a batch.
            unfitted: u, the share of the data that is left to fit (`Misfit`), 0-dim. Dampings fall with its root, down
                to a twentieth: where hardly anything is left, gradients have little noise, and what remains lies in the
                directions that damping holds back.
            wait: put inverses that are due off to the next step, because this one collected statistics and that will
                not, so that no step is much longer than others; those that are missing are made.
        """
        began = time.perf_counter()
        self._assign()
        self.changes.follow(self.inverses, pass_cost)
        ready = [one for one in self.inverses if one.ready]
        missing = [one for one in ready if one.made < 0]
        due = sorted((one for one in ready if one.made >= 0 and one.due <= step), key=_age)
        if wait:
            alone = [one for one in due if one.layer.passes == 1]  # others go with their bases
            due = [one for one in due if one.layer.passes > 1]
            for one in alone:
                one.due += one.due == step  # not overdue
        if not (missing or due):
            return
        self._applied, self._groups = [], []  # they hold the inverses of before
        whole = sum(map(_cost, ready))
        dear = whole / (AFFORDABLE * pass_cost) if pass_cost else 0.0
        late = max(self.refresh.inverse, math.ceil(min(dear, LONGEST)))
        early = min(step // 2, math.ceil(dear * AFFORDABLE / AFFORDABLE_EARLY))
        period = max(self.refresh.after(step, late) - step, min(early, late))
        left = max(pass_cost, whole / late)
        chosen: list[Turn] = []
        for one in [*missing, *due]:
            if one.made >= 0 and left <= 0:
                break
            chosen.append(Turn(one, _half(one, step, pass_cost)))
            left -= _cost(one, chosen[-1].outputs)
        fall = unfitted.sqrt().clamp(min=LEAST) if isinstance(unfitted, Tensor) else max(unfitted**0.5, LEAST)
        with self._arithmetic():
            for group in gather_alike(chosen):
                self._make(group, step, fall)
                for one, outputs in group:
                    kept = _keeps_inputs(one, step, pass_cost)
                    one.begun = outputs is True and not kept
                    if not one.begun:
                        one.due = step + period + (outputs is None and _is_lopsided(one, pass_cost))
                        one.inputs_due = one.inputs_due if kept else step + RARE * period
        self.seconds += time.perf_counter() - began

    def _make(self, group: Sequence[Turn], step: int, fall: float | Tensor) -> None:
        for one, _ in group:
            one.read()
            if one.operator is not None:
                self.changes.note(one, one.operator)
        damping, halves = self._damping(group[0].one, fall), {id(one): outputs for one, outputs in group}
        with self._making([one for one, _ in group], 1.0, step) as own:
            if len(own) > 1 and make_alike(own, (damping.inputs, damping.outputs), step):
                return
            for one in own:
                one.make(damping, 1.0, step, outputs=halves[id(one)])
                one.operator = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs, as tensors, numbers and strings."""
        return {**super().state_dict(), "changes": self.changes.state_dict(self.inverses)}

    def load_state_dict(self, state: Mapping[str, Any], layers: Sequence[LayerStatistics]) -> None:
        """Take over what `state_dict` gave, for these layers."""
        super().load_state_dict(state, layers)
        device = next(iter(self._parameters.values())).device
        self.changes.load_state_dict(state.get("changes", {}), self.inverses, device)

    def _damping(self, one: LayerInverse, fall: float | Tensor) -> Shares:
        inputs = self.share
        if one.layer.reads_data:
            inputs = max(self.share, self.data_share * max(block.shape[2] for block in one.blocks))
        return Shares(inputs=inputs * fall, outputs=self.share * fall)

    def _apply_directly(
        self, ones: Sequence[LayerInverse], gradients: Mapping[str, Tensor], out: dict[str, Tensor]
    ) -> list[LayerInverse]:
        inverses = [one.inverse for one in ones]
        if len(inverses) != len(self._applied) or any(map(is_not, inverses, self._applied)):
            self._applied, self._groups = inverses, _grouped(ones)
        left: list[LayerInverse] = []
        for together, group in self._groups:
            if together is None or not together.apply(gradients, out):
                left += [one for one, alone in group if alone is None or not alone.apply(gradients, out)]
        return left


def _grouped(ones: Sequence[LayerInverse]) -> list[_Group]:
    """Layers that are applied together, as what they are: narrow products of one kind, others alone."""
    groups: dict[object, list[tuple[LayerInverse, Product | None]]] = {}
    for one in ones:
        product = Product.of(one)
        kind = id(one) if product is None or not product.narrow else product.kind
        groups.setdefault(kind, []).append((one, product))
    made: list[_Group] = []
    for group in groups.values():
        products = [product for _, product in group if product is not None]
        made.append((Products(products) if len(products) > 1 else None, group))
    return made


def _age(one: LayerInverse) -> tuple[bool, int]:
    """Smaller for inverses that are to be made earlier: those of which half is made, then the oldest."""
    return not one.begun, one.made


def _half(one: LayerInverse, step: int, pass_cost: float) -> bool | None:
    """Which factor is inverted now: that of the outputs (True), of the inputs (False), or both (None)."""
    if one.layer.passes > 1 or not one.halves:
        return None
    if one.begun:
        return False
    apart = _is_dear(one, pass_cost) and not _is_lopsided(one, pass_cost)
    return True if apart or _keeps_inputs(one, step, pass_cost) else None


def _is_dear(one: LayerInverse, pass_cost: float) -> bool:
    """Whether the inverses of both factors are too much for one step."""
    return not one.has_diagonal and _cost(one) > DEAR * pass_cost


def _is_lopsided(one: LayerInverse, pass_cost: float) -> bool:
    """Whether one factor is nearly all of a dear layer; its inverse is due as if the other's took a step of its own."""
    share = _cost(one, outputs=True) / _cost(one)
    return one.halves and _is_dear(one, pass_cost) and not EVEN < share < 1 - EVEN


def _keeps_inputs(one: LayerInverse, step: int, pass_cost: float) -> bool:
    """Whether the input factor is one of data, dear, and was inverted not long ago."""
    dear = _cost(one, outputs=False) > AFFORDABLE * pass_cost
    return one.layer.reads_data and dear and one.inputs_due > step


def _cost(one: LayerInverse, outputs: bool | None = None) -> float:
    """Multiplications that are as dear as making the inverse, or that of one factor, from the sizes alone."""
    each = EIGENVECTORS if one.layer.passes > 1 or one.other is not None else CHOLESKY
    sides = [side for side, own in ((1, True), (2, False)) if outputs in (None, own) and not (own and one.has_diagonal)]
    return each * sum(block.shape[0] * block.shape[side] ** 3 for block in one.blocks for side in sides)
