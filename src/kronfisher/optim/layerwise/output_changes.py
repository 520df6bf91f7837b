"""Updates of weights that change a layer's outputs by about as much in every direction."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from kronfisher.fisher.blocks import Window
from kronfisher.linalg import plain_arithmetic
from kronfisher.operators import Operator
from kronfisher.optim.layer_inverse import LayerInverse
from kronfisher.optim.layerwise.matrix_roots import (
    CALLS_OF_ROOT,
    Alike,
    Known,
    cost_of_product,
    cost_of_root,
    least,
)
from kronfisher.optim.layerwise.units import is_matrix

__all__ = ["OutputChanges"]

AFFORDABLE = 0.1  # of forward and backward passes, for roots, and again for their products
EVERY = 4  # steps that a root serves, at the least: updates are averages of ten, whose covariance changes slowly
CALLS = 2e6  # multiplications that take as long as the small operations of such products with weights of one shape


class OutputChanges:
    """Multiplies the updates of weights, so that what they change in outputs has more nearly equal variances.

    An update ``U [O, I]`` changes outputs by U a, with the covariance ``C = U A Uᵀ`` over the data, A being the damped
    covariance of inputs. It becomes ``(C + .3 c)^(−1/2) U`` with c the mean variance, and keeps its length. Roots are
    made anew every four steps as far as a tenth of what the passes cost allows, the oldest first.

    With A = 1 and no .3 c that is Muon's orthogonal step (2024, Jordan et al.), of natural gradients. A rule of this
    library's own. Layers that make the outputs are left as they are: what these may change by is known exactly. So are
    layers that read data: small directions are those by which examples are learnt by heart.

    Args:
        share: of its mean eigenvalue, by which A is damped.
    """

    def __init__(self, share: float) -> None:
        self._damping = share
        self._known: dict[Window, Known] = {}
        self._together: list[Alike] = []
        self._followed: Sequence[LayerInverse] | None = None
        self._wanted: list[Window] = []
        self._pass_cost = self._budget = self._left = 0.0
        self._step = 0

    def follow(self, inverses: Sequence[LayerInverse], pass_cost: float) -> None:
        """Treat these layers from now on, the cheapest first, as far as what the passes cost allows."""
        if self._followed is inverses and self._pass_cost == pass_cost:
            return
        layers = {window: one.layer for one in inverses if (window := _weight(one)) is not None}
        self._budget = AFFORDABLE * pass_cost
        self._wanted, left = [], self._budget
        shapes = set()
        for window in sorted(layers, key=cost_of_product):
            left -= cost_of_product(window) + CALLS * (window.size not in shapes)
            if left < 0:
                break
            self._wanted.append(window)
            shapes.add(window.size)
        self._followed, self._pass_cost, self._together = inverses, pass_cost, []
        self._known = {window: self._known[window] for window in self._wanted if window in self._known}
        for window, known in self._known.items():
            known.layer = layers[window]

    def note(self, one: LayerInverse, operator: Operator) -> None:
        """See a layer, when its inverse is renewed from this undamped curvature."""
        window, layer = _weight(one), one.layer
        if window is None or window not in self._wanted:
            return
        moments, copy = layer.input_sums, None
        if moments is None:  # most fits keep none
            if operator.product is None or operator.product[0].is_diagonal:
                return
            moments = copy = operator.product[0].tensor.clone()
        if len(moments) != window.size[0]:  # one factor serves several groups
            return
        if window not in self._known:
            self._known[window], self._together = Known(layer, copy, one.blocks[0].bias is not None), []
        self._known[window].inputs = copy

    def even(self, updates: Mapping[str, Tensor]) -> None:
        """Multiply updates ``{name: [*shape]}`` in place; of parameters that are not there nothing is done."""
        self._step += 1
        if not (self._known and updates):
            return
        self._together = self._together or list(self._grouped())
        self._left = min(self._left + self._budget, max(self._pass_cost, self._budget))
        with plain_arithmetic(next(iter(updates.values())).device):
            for group in sorted(self._together, key=lambda group: group.made):
                old = self._step - group.made >= EVERY
                if renew := group.made < 0 or (old and self._left > 0):
                    self._left -= group.cost
                group.even(updates, self._step, renew=renew)

    def _grouped(self) -> Iterator[Alike]:
        """Weights of one shape together, but no more than may be renewed in one step."""
        shapes: dict[Any, list[Window]] = {}
        known = [window for window in self._wanted if window in self._known]
        for window in known:
            shapes.setdefault((window.size, *self._known[window].alike), []).append(window)
        for windows in shapes.values():
            most = max(int((self._budget - CALLS_OF_ROOT) / cost_of_root(windows[0])), 1)
            for low in range(0, len(windows), most):
                some = {window: self._known[window] for window in windows[low : low + most]}
                yield Alike(some, self._damping)

    def state_dict(self, inverses: Sequence[LayerInverse]) -> dict[str, Any]:
        """Everything that a resumed training needs; one place for each layer."""
        known = [None if (window := _weight(one)) is None else self._known.get(window) for one in inverses]
        own = [None if one is None else [*map(_copied, (one.inputs, one.root)), one.made] for one in known]
        return {"known": own, "pass_cost": self._pass_cost, "left": self._left, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any], inverses: Sequence[LayerInverse], device: Any) -> None:
        """Take over what `state_dict` gave; earlier versions gave nothing."""
        self.__init__(self._damping)
        if not state:
            return
        self.follow(inverses, state["pass_cost"])
        self._left, self._step = state["left"], state["step"]
        for one, known in zip(inverses, state["known"], strict=True):
            if (window := _weight(one)) is not None and known is not None:
                *tensors, made = known
                inputs, root = (None if tensor is None else tensor.to(device) for tensor in tensors)
                self._known[window] = Known(one.layer, inputs, one.blocks[0].bias is not None, root, made)


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _weight(one: LayerInverse) -> Window | None:
    """The weight of a layer that is one matrix between others.

    Of the outputs themselves B is exact, and to even what it weighs lets rates of counts explode.
    """
    block, *others = one.blocks
    if one.layer.reads_data or one.layer.makes_outputs or others or one.other is not None or not is_matrix(block):
        return None
    window = block.weight
    return window if window is not None and not window.overlaps and least(window) > 1 else None
