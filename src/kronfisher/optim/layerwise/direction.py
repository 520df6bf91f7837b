"""Natural gradients of layers, each from an inverse relative to the layer's own mean eigenvalue."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.capture.capture import Capture
from kronfisher.fisher.damping import Damping
from kronfisher.linalg import plain_arithmetic
from kronfisher.operators import Operator
from kronfisher.optim.intervals import Refresh
from kronfisher.optim.layer_inverse import LayerInverse
from kronfisher.optim.layer_statistics import LayerStatistics
from kronfisher.optim.row_inverse import RowInverse

__all__ = ["RelativeDirection", "Shares"]

CHOLESKY, EIGENVECTORS = 1.5, 20.0  # products as dear as factorising n × n, over n³, from their measured speeds


@dataclass(frozen=True)
class Shares(Damping):
    """Each factor damped by a share of its own mean eigenvalue, and the whole divided by its mean eigenvalue.

    Attributes:
        value: multiplies both shares.
        inputs: of the input factor.
        outputs: of the output factor.
    """

    inputs: float = 0.05
    outputs: float = 0.05

    def damp(self, operator: Operator, value: float) -> Operator:
        return operator.normalized(value * self.inputs, value * self.outputs)


class RelativeDirection:
    """Inverses of all layers, renewed one after the other within a budget of arithmetic per step.

    Args:
        parameters: name → parameter, all that may be trained.
        refresh: periods.
        share: the damping, as a share of each factor's mean eigenvalue.
        data_share: that of the input factor of layers whose inputs are data, by its width.

    Attributes:
        inverses: one for each layer, in the order of the layers.
        seconds: spent on making inverses.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], refresh: Refresh, share: float, data_share: float) -> None:
        self.refresh, self.share, self.data_share = refresh, share, data_share
        self.inverses: list[LayerInverse] = []
        self.seconds = 0.0
        self.extend(parameters)

    def extend(self, parameters: dict[str, nn.Parameter]) -> None:
        """Treat these parameters from now on."""
        self._parameters = parameters

    def follow(self, layers: Sequence[LayerStatistics], step: int) -> None:
        """Keep one inverse for each layer; those of new layers are due at once."""
        if [one.layer for one in self.inverses] != list(layers):
            known = {one.layer: one for one in self.inverses}
            self.inverses = [known.get(layer) or LayerInverse(layer, due=step) for layer in layers]

    @property
    def due(self) -> dict[LayerStatistics, int]:
        """Layer → the step at which its inverse is to be made again."""
        return {one.layer: one.due for one in self.inverses}

    def renew(self, step: int, pass_cost: float) -> None:
        """Make the inverses that are due, the oldest first, until as much is spent as a forward and backward pass.

        Args:
            step: number of the step.
            pass_cost: multiplications of a forward and backward pass over a batch.
        """
        began = time.perf_counter()
        period = self.refresh.after(step, self.refresh.inverse) - step
        ready = [one for one in self.inverses if one.layer.average is not None]
        missing = [one for one in ready if one.inverse is None]
        due = sorted((one for one in ready if one.inverse is not None and one.due <= step), key=lambda one: one.made)
        left = max(pass_cost, sum(map(_cost, ready)) / self.refresh.inverse)
        with self._arithmetic():
            for one in [*missing, *due]:
                if one.inverse is not None and left <= 0:
                    break
                left -= _cost(one)
                one.operator = one.layer.operator()
                one.make(self._damping(one), 1.0, step)
                one.operator = None
                one.due = step + period
        self.seconds += time.perf_counter() - began

    def _damping(self, one: LayerInverse) -> Shares:
        inputs = self.share
        if one.layer.reads_data:
            inputs = max(self.share, self.data_share * max(block.shape[2] for block in one.blocks))
        return Shares(inputs=inputs, outputs=self.share)

    def row_inverse(self, capture: Capture, rates: Mapping[str, float]) -> RowInverse | None:
        """To be given rows of a step's backward pass."""
        return RowInverse.of(self.inverses, rates, capture)

    def precondition(self, gradients: Mapping[str, Tensor], rows: RowInverse | None = None) -> dict[str, Tensor]:
        """Natural gradients by parameter name, of all parameters that an inverse covers."""
        rows = rows or RowInverse({})
        with self._arithmetic():
            answers: dict[str, Tensor] = {}
            out: dict[str, Tensor] = {}
            for one in self.inverses:
                names = [name for block in one.blocks for name in block.parameters if name in gradients]
                if one.inverse is None or not names:
                    continue
                if not rows.holds(one) and _is_plain(one, gradients):
                    answers |= _apply_plainly(one, gradients)
                    continue
                for name in names:
                    if name not in out:
                        like = self._parameters[name].unsqueeze(0)
                        out[name] = torch.zeros_like(like, memory_format=torch.contiguous_format)
                if rows.holds(one):
                    rows.apply(one, out)
                else:
                    one.apply({name: gradients[name][None] for name in names}, out)
            return answers | {name: tensor[0] for name, tensor in out.items()}

    def _arithmetic(self) -> AbstractContextManager[None]:
        return plain_arithmetic(next(iter(self._parameters.values())).device)

    def overdue(self, step: int) -> dict[str, int]:
        """Layer's name → steps by which its inverse is overdue."""
        return {one.name: step - one.due for one in self.inverses if one.due < step}

    @property
    def troubles(self) -> dict[str, str]:
        """Layer's name → what went wrong with its last inverse."""
        return {one.name: one.trouble for one in self.inverses if one.trouble}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs, as tensors, numbers and strings."""
        return {"layers": [one.state_dict() for one in self.inverses]}

    def load_state_dict(self, state: Mapping[str, Any], layers: Sequence[LayerStatistics]) -> None:
        """Take over what `state_dict` gave, for these layers."""
        device = next(iter(self._parameters.values())).device
        self.inverses = [LayerInverse(layer) for layer in layers]
        for one, saved in zip(self.inverses, state["layers"], strict=True):
            one.load_state_dict(saved, device)


def _cost(one: LayerInverse) -> float:
    """Multiplications that are as dear as making the inverse, from the sizes alone."""
    each = EIGENVECTORS if one.layer.passes > 1 else CHOLESKY
    return each * sum(block.shape[0] * (block.shape[1] ** 3 + block.shape[2] ** 3) for block in one.blocks)


def _is_plain(one: LayerInverse, gradients: Mapping[str, Tensor]) -> bool:
    """Whether the layer is one matrix of whole parameters, and its inverse a product of dense factors."""
    if one.inverse is None or not one.separable:
        return False
    (block,) = one.layer.blocks
    views = block.views
    return (
        block.weight is not None
        and all(view.whole and view.parameter in gradients for view in views)
        and len(block.parameters) == len(views)
        and gradients[block.weight.parameter].dtype == one.inverse.dtype
    )


def _apply_plainly(one: LayerInverse, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``B⁻¹ [V v] A⁻¹`` without joining the gradients of weight and bias, and without taking the answer apart."""
    (block,) = one.blocks
    assert one.inverse is not None and one.inverse.product is not None and block.weight is not None
    right, left = (factor.tensor[0] for factor in one.inverse.product)
    weight = block.weight.parameter
    given = gradients[weight]
    middle = left @ given.reshape(len(left), -1)
    if block.bias is None:
        return {weight: (middle @ right).view(given.shape)}
    bias = block.bias.parameter
    last = left @ gradients[bias].reshape(-1)
    matrix = torch.addmm(torch.outer(last, right[-1, :-1]), middle, right[:-1, :-1])
    vector = torch.addmv(last * right[-1, -1], middle, right[:-1, -1])
    return {weight: matrix.view(given.shape), bias: vector.view(gradients[bias].shape)}
