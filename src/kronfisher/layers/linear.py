"""Affine maps of the last axis: ``linear``, products with a matrix from either side, ``addmm``, ``bilinear``."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kronfisher.fisher.blocks import Window
from kronfisher.layers.activations import Activations, Dense, Ones
from kronfisher.layers.einsum import products
from kronfisher.layers.row_order import RowOrder
from kronfisher.layers.use import Use, Windows, handles

__all__ = ["RowUse", "grouped"]


class RowUse(Use):
    """``y[..., :] = W x[..., :] + b``; `transposed` where the rows of y are its last axis (``W @ x``)."""

    transposed = False
    pads = remakes = True

    def _rows(self, tensor: Tensor) -> Tensor:
        tensor = tensor.mT if self.transposed else tensor
        return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor

    def lead(self, output: tuple[int, ...]) -> tuple[int, ...]:
        lead = (*output[:-2], output[-1]) if self.transposed else output[:-1]
        return tuple(lead) or (1,)

    def rows(self, gradient: Tensor) -> Tensor:
        return self._rows(gradient)

    def gradients(self, order: RowOrder, gradient: Tensor) -> Tensor:
        rows = self._rows(gradient)
        return order.stack(rows, rows.dim() - 1)

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        if not weight:
            groups, samples, positions, _ = self.gradients(order, gradient).shape
            return Ones(gradient, (groups, samples, positions))
        rows = self._rows(self.cast_inputs())
        return Dense(order.stack(rows, rows.dim() - 1), bias)


def grouped(window: Window | None) -> Window | None:
    """A window with a leading axis for H."""
    return window.grouped if window else None


@handles(F.linear)
def linear(view: Windows, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Use]:
    """``F.linear(x [..., I], W [O, I], b [O])`` with any leading axes; a weight ``[I]`` has one output."""
    matrix, vector = view(weight), view(bias)
    if weight.dim() != 2 or not (matrix or vector) or (vector and vector.size != weight.shape[:1]):
        return
    yield RowUse(
        grouped(matrix),
        grouped(vector),
        input if matrix else None,
    )


@handles(torch.mm, Tensor.mm)
def mm(view: Windows, input: Tensor, mat2: Tensor) -> Iterator[Use]:
    """As `matmul`, whose second argument has another name."""
    yield from matmul(view, input, mat2)


@handles(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def matmul(view: Windows, input: Tensor, other: Tensor) -> Iterator[Use]:
    """``x [..., I] @ M [I, O]`` and ``M [O, I] @ x [..., I, n]``, where M is a window on a parameter, or several."""
    left, right = view(input), view(other)
    if bool(left) == bool(right):
        return
    matrix, x = (right, input) if right else (left, other)
    assert matrix is not None
    if len(matrix.size) != 2 or (left and x.dim() < 2):
        yield from products(view, input, other)
        return
    use = RowUse(
        (matrix.permuted(1, 0) if right else matrix).reshaped(1, *(matrix.size[::-1] if right else matrix.size)),
        None,
        x,
    )
    use.transposed = left is not None
    yield use


@handles(torch.addmm, Tensor.addmm)
def addmm(
    view: Windows, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Iterator[Use]:
    """``b [O] + x [n, I] @ M [I, O]``."""
    matrix, vector = view(mat2), view(input)
    if beta != 1 or alpha != 1 or not (matrix or vector) or (vector and vector.size != mat2.shape[1:]):
        return
    yield RowUse(_columns(matrix), vector.reshaped(1, -1) if vector else None, mat1 if matrix else None)


def _columns(matrix: Window | None) -> Window | None:
    return matrix.permuted(1, 0).reshaped(1, *matrix.size[::-1]) if matrix else None


@handles(F.bilinear)
def bilinear(
    view: Windows, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Iterator[Use]:
    """``y_o = x1ᵀ W_o x2 + b_o``: a linear map of all products of the two inputs."""
    window, shift = view(weight), view(bias)
    if not (window or shift) or any(view(each) for each in (input1, input2)):
        return
    outputs = len(weight)
    pairs = (input1.detach().unsqueeze(-1) * input2.detach().unsqueeze(-2)).flatten(-2) if window else None
    try:
        matrix = window.reshaped(1, outputs, -1) if window else None
    except RuntimeError:
        return
    use = RowUse(matrix, shift.reshaped(1, outputs) if shift else None, pairs)
    use.reads_data = input1.grad_fn is None and input2.grad_fn is None
    yield use
