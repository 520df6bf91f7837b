"""A layer's inverse as two matrices, applied to the gradients of its parameters where they lie."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Window
from kronfisher.optim.layer_inverse import LayerInverse

__all__ = ["Product"]


@dataclass(frozen=True)
class Product:
    """``B⁻¹ [V v] A⁻¹`` without joining the gradients of weight and bias, and without taking the answer apart.

    Attributes:
        weight: where V lies: whole rows of a parameter, such as one of three that are packed.
        bias: where v lies, if there is one.
        left: B⁻¹ ``[O, O]``, or its diagonal ``[O, 1]``.
        right: A⁻¹ ``[I, I]`` without the row and column of the bias.
        edge: that column, without its last number.
        corner: its last number, 0-dim.
    """

    weight: Window
    bias: Window | None
    left: Tensor
    right: Tensor
    edge: Tensor
    corner: Tensor

    @classmethod
    def of(cls, one: LayerInverse) -> "Product | None":
        """None where the layer is no one matrix of adjacent rows, or its inverse no separable product."""
        if one.inverse is None or not one.separable:
            return None
        (block,) = one.blocks
        if (
            block.weight is None
            or not all(view.adjacent for view in block.views)
            or len(block.parameters) < len(block.views)
        ):
            return None
        assert one.inverse.product is not None
        right, left = (factor.tensor[0] for factor in one.inverse.product)
        edge, corner = right[-1, :-1], right[-1, -1]
        inner = right if block.bias is None else right[:-1, :-1]
        return cls(block.weight, block.bias, left[:, None] if one.has_diagonal else left, inner, edge, corner)

    def apply(self, gradients: Mapping[str, Tensor], out: dict[str, Tensor]) -> bool:
        """Write the natural gradient into `out`, ``{name: [*shape]}``; False, and nothing done, if that cannot be."""
        weight, bias, rows = self.weight, self.bias, self.left.shape[0]
        given = gradients.get(weight.parameter)
        shift = given if bias is None else gradients.get(bias.parameter)
        if given is None or shift is None or not given.dtype == shift.dtype == self.left.dtype:
            return False
        middle = self._from_left(_cut(given, weight).view(rows, -1))
        if bias is None:
            _put(middle @ self.right, weight, given, out)
            return True
        last = self._from_left(_cut(shift, bias)[:, None])[:, 0]
        _put(torch.addmm(torch.outer(last, self.edge), middle, self.right), weight, given, out)
        _put(torch.addmv(last * self.corner, middle, self.edge), bias, shift, out)
        return True

    def _from_left(self, matrix: Tensor) -> Tensor:
        return self.left * matrix if self.left.shape[1] == 1 else self.left @ matrix


def _cut(tensor: Tensor, window: Window) -> Tensor:
    """The window's elements ``[E]``."""
    flat, size = tensor.reshape(-1), window.numel
    return flat if size == flat.numel() else flat[window.offset : window.offset + size]


def _put(values: Tensor, window: Window, like: Tensor, out: dict[str, Tensor]) -> None:
    """Write elements into the window."""
    name = window.parameter
    if values.numel() == like.numel():
        out[name] = values.view(like.shape)
        return
    if name not in out:  # windows of other layers, or of none, show the rest
        out[name] = torch.zeros_like(like, memory_format=torch.contiguous_format)
    _cut(out[name], window).copy_(values.view(-1))
