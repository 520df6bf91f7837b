"""A layer's inverse as two matrices, applied to the gradients of its parameters where they lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Window
from kronfisher.optim.layer_inverse import LayerInverse
from kronfisher.optim.layerwise.units import seen

__all__ = ["Product", "Products"]

NARROW = 64  # outputs and inputs up to which calls cost more than copies of gradients


@dataclass(frozen=True)
class Product:
    """``B⁻¹ [V v] A⁻¹`` without joining the gradients of weight and bias, and without taking the answer apart.

    Attributes:
        weight: where V lies: whole rows of a parameter, such as one of three that are packed, or all of it in another
            order, as of a transposed convolution.
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
        """None where the layer is no one matrix of adjacent rows or of a whole weight, or its inverse not separable."""
        if one.inverse is None or not one.separable:
            return None
        (block,) = one.blocks
        weight, bias = block.weight, block.bias
        if weight is None or (bias is not None and not bias.adjacent) or len(block.parameters) < len(block.views):
            return None
        if not (weight.adjacent or (weight.row_major and weight.complete)):
            return None
        assert one.inverse.product is not None
        right, left = (factor.tensor[0] for factor in one.inverse.product)
        edge, corner = right[-1, :-1], right[-1, -1]
        inner = right if bias is None else right[:-1, :-1]
        return cls(weight, bias, left[:, None] if one.has_diagonal else left, inner, edge, corner)

    def apply(self, gradients: Mapping[str, Tensor], out: dict[str, Tensor]) -> bool:
        """Write the natural gradient into `out`, ``{name: [*shape]}``; False, and nothing done, if that cannot be."""
        weight, bias, rows = self.weight, self.bias, self.left.shape[0]
        given = gradients.get(weight.parameter)
        shift = given if bias is None else gradients.get(bias.parameter)
        if given is None or shift is None or not given.dtype == shift.dtype == self.left.dtype:
            return False
        middle = self._from_left(_matrix(given, weight, rows))
        if bias is None:
            _put(middle @ self.right, weight, given, out)
            return True
        last = self._from_left(_cut(shift, bias)[:, None])
        _put(torch.addmm(last * self.edge, middle, self.right), weight, given, out)
        _put(torch.addmv(last[:, 0] * self.corner, middle, self.edge), bias, shift, out)
        return True

    @property
    def kind(self) -> tuple[object, ...]:
        """What products have in common that are applied together; `Products` has no use for wide ones."""
        sizes = self.left.shape, self.right.shape
        return *sizes, self.bias is None, self.left.dtype, self.left.device

    @property
    def narrow(self) -> bool:
        return self.weight.adjacent and max(*self.left.shape, *self.right.shape) <= NARROW

    def _from_left(self, matrix: Tensor) -> Tensor:
        return self.left * matrix if self.left.shape[1] == 1 else self.left @ matrix


class Products:
    """Narrow ones of one kind, whose matrices are multiplied together: a network has many of them, and calls add up."""

    def __init__(self, products: Sequence[Product]) -> None:
        self._products = list(products)
        self._left = torch.stack([one.left for one in products])
        self._right = torch.stack([one.right for one in products])
        self._edge = torch.stack([one.edge for one in products])
        self._corner = torch.stack([one.corner for one in products])

    def apply(self, gradients: Mapping[str, Tensor], out: dict[str, Tensor]) -> bool:
        """As `Product.apply`, of all or of none; those without any gradient take part as zeros, and write nothing."""
        windows = [window for one in self._products for window in (one.weight, one.bias) if window is not None]
        found = [gradients.get(window.parameter) for window in windows]
        given = [tensor for tensor in found if tensor is not None]
        if not given or any(tensor.dtype != self._left.dtype for tensor in given):
            return False
        of_each = len(windows) // len(self._products)
        seen = [tensor is not None for tensor in found[::of_each]]
        if of_each == 2 and seen != [tensor is not None for tensor in found[1::2]]:
            return False
        parts = [
            self._left.new_zeros(window.numel) if tensor is None else _cut(tensor, window)
            for tensor, window in zip(found, windows, strict=True)
        ]
        middle = self._from_left(torch.stack(parts[::of_each]).view(len(self._products), self._left.shape[1], -1))
        if of_each == 2:
            last = self._from_left(torch.stack(parts[1::2])[..., None])
            shifts = (last[..., 0] * self._corner[:, None] + (middle @ self._edge[..., None])[..., 0]).unbind()
            values = torch.baddbmm(last * self._edge[:, None], middle, self._right).unbind()
        else:
            values, shifts = (middle @ self._right).unbind(), ()
        for place, one in enumerate(self._products):
            if not seen[place]:
                continue
            _put(values[place], one.weight, gradients[one.weight.parameter], out)
            if one.bias is not None:
                _put(shifts[place], one.bias, gradients[one.bias.parameter], out)
        return True

    def _from_left(self, matrices: Tensor) -> Tensor:
        return self._left * matrices if self._left.shape[2] == 1 else self._left @ matrices


def _matrix(tensor: Tensor, window: Window, rows: int) -> Tensor:
    """The window's elements ``[rows, *]``."""
    if not window.adjacent:
        return seen(window, tensor.contiguous()).reshape(rows, -1)
    if tensor.dim() == 2 and tensor.shape[0] == rows and tensor.numel() == window.numel and tensor.is_contiguous():
        return tensor
    return _cut(tensor, window).view(rows, -1)


def _cut(tensor: Tensor, window: Window) -> Tensor:
    """The window's elements ``[E]``."""
    flat, size = tensor if tensor.dim() == 1 else tensor.reshape(-1), window.numel
    return flat if size == flat.numel() else flat[window.offset : window.offset + size]


def _put(values: Tensor, window: Window, like: Tensor, out: dict[str, Tensor]) -> None:
    """Write elements into the window."""
    name = window.parameter
    if not window.adjacent:
        out[name] = torch.empty_like(like, memory_format=torch.contiguous_format)
        seen(window, out[name]).copy_(values.view(window.size))
        return
    if values.numel() == like.numel():
        out[name] = values if values.shape == like.shape else values.view(like.shape)
        return
    if name not in out:  # windows of other layers, or of none, show the rest
        out[name] = torch.zeros_like(like, memory_format=torch.contiguous_format)
    _cut(out[name], window).copy_(values.view(-1))
