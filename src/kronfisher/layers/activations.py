"""Inputs of layers ``a [H, n, T, I]`` in compact or dense form, and the contractions that fits need of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from kronfisher.linalg import WORKSPACE, add_symmetric_product_, chunks, mirror_, multiply_rows

__all__ = ["Activations", "Dense", "Masked", "Ones"]

_FEW = 2**14  # numbers that are copied in the time of a few calls
_SHALLOW = 128  # numbers a row, for fewer of which half of the products take less time than the other half's copy


class Activations:
    """Layer inputs ``a [H, n, T, I]``, possibly in a compact form that subclasses define.

    Attributes:
        onehot: rows of the identity, or sums of a few of them: written out they are mostly zeros.
        shape: H, n, T, I; I counts the homogeneous coordinate of a bias.
    """

    onehot: ClassVar[bool] = False

    shape: tuple[int, int, int, int]

    @property
    def numel(self) -> int:
        """The number of stored elements."""
        return prod(self.shape)

    def dense(self, low: int = 0, high: int | None = None) -> Tensor:
        """The inputs of samples low to high, written out: ``[H, high − low, T, I]``."""
        raise NotImplementedError

    def part(self, low: int, high: int) -> "Activations":
        """The inputs of samples low to high, in as compact a form."""
        return Dense(self.dense(low, high))

    def select(self, index: Tensor) -> "Activations":
        """The inputs of some samples ``[m]``, in as compact a form."""
        return Dense(self.dense()[:, index])

    def times(self, matrix: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        """``a M`` of samples low to high for M ``[H, I, R]``: ``[H, high − low, T, R]``."""
        return multiply_rows(self.dense(low, high), matrix)

    def weighted_sums(self, weights: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        """``Σ_t w[k, t] a[k, t]`` of samples low to high for weights ``[H, n', T, R]``: ``[H, n', R, I]``."""
        return weights.mT @ self.dense(low, high)

    def once(self) -> "Activations | None":
        """The inputs of one group where memory shows that all groups have the same; else None."""
        return None

    def copy(self) -> "Activations":
        """A copy in separate memory, for samples that have to outlive their batch."""
        return Dense(self.dense().clone())

    def add_covariance_(self, total: Tensor, workspace: int = WORKSPACE) -> None:
        """``total += Σ_{k,t} a aᵀ``, upper triangle of ``[H, I, I]`` only."""
        groups, n, positions, width = self.shape
        for low, high in chunks(n, groups * positions * width * total.element_size(), workspace):
            rows = self.dense(low, high).to(total.dtype)
            add_symmetric_product_(total, rows.reshape(groups, -1, width))

    def add_squares_(self, total: Tensor, workspace: int = WORKSPACE) -> None:
        """``total += Σ_{k,t} a∘²``, ``[H, I]``: the diagonal of the covariance."""
        groups, n, positions, width = self.shape
        for low, high in chunks(n, groups * positions * width * total.element_size(), workspace):
            total += self.dense(low, high).to(total.dtype).square().sum(dim=(1, 2))

    def add_weighted_(self, total: Tensor, weights: Tensor) -> None:
        """``total += Σ_k w_k a_k a_kᵀ`` for T = 1 and weights ``[H, n]`` of at least zero, upper triangle."""
        add_symmetric_product_(total, self.dense()[:, :, 0] * weights.sqrt()[..., None])

    def sum_with(self, rows: Tensor) -> Tensor:
        """``Σ_k a_k y_kᵀ [H, I, R]`` for T = 1 and rows y ``[H, n, R]``."""
        return (rows.mT @ self.dense()[:, :, 0]).mT

    def lengths(self) -> Tensor:
        """``‖a_k‖ [H, n]`` for T = 1."""
        return torch.linalg.vector_norm(self.dense()[:, :, 0], dim=-1)

    def column_pieces(self, gradients: Tensor, workspace: int) -> Iterator[tuple[Tensor, Tensor]] | None:
        """As `columns`, a few samples at a time."""
        return None

    @staticmethod
    def append(parts: "Sequence[Activations]") -> "Activations":
        """The inputs of all samples of several parts, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        kinds = {type(part) for part in parts}
        compact = kinds.pop().append_alike(parts) if len(kinds) == 1 else None
        return compact or Dense(torch.cat([part.dense() for part in parts], dim=1))

    @classmethod
    def append_alike(cls, parts: "Sequence[Any]") -> "Activations | None":
        """As `append`, where all are of this kind and need not be written out."""
        return None

    def products(self) -> Tensor:
        """``⟨a_k, a_l⟩ [H, n, n]`` for T = 1."""
        return _products(self.dense()[:, :, 0])

    def sum_positions(self, workspace: int = WORKSPACE) -> Tensor:
        """``Σ_t a``: ``[H, n, 1, I]``."""
        groups, n, positions, width = self.shape
        ranges = chunks(n, groups * positions * width * 8, workspace)
        return torch.cat([self.dense(low, high).sum(dim=2, keepdim=True) for low, high in ranges], dim=1)

    def reduce(self, workspace: int = WORKSPACE) -> "Activations":
        """Reduce to inputs of T = 1 by summing positions."""
        one = self.once()
        if one is None:
            return Dense(self.sum_positions(workspace))
        return Dense(one.sum_positions(workspace).expand(self.shape[0], -1, -1, -1))

    def apply_mask(self, mask: Tensor) -> "Activations":
        """Set inputs to zero where ``mask [n, T]`` is zero."""
        return Masked(self, mask)

    def scale(self, factor: Tensor) -> "Activations":
        """``a`` times a vector ``[H, I]``, elementwise."""
        return Dense(self.dense() * factor[:, None, None])

    def squares(self, gradients: Tensor, workspace: int) -> Tensor | None:
        """``Σ_k (g_kᵀ a_k)∘²`` ``[H, O, I]`` if there is a cheaper way than by the gradients of samples; else None."""
        return None

    def columns(self, gradients: Tensor) -> tuple[Tensor, Tensor] | None:
        """The nonzero columns ``[1, R, O]`` of the G_k and their places ``[R]`` in I, if there are few; else None."""
        return None

    @staticmethod
    def join(inputs: "list[Activations]") -> "Activations":
        """Concatenate the positions of all along T."""
        kinds = {type(each) for each in inputs}
        together = kinds.pop().concatenate(inputs) if len(kinds) == 1 else None
        return together or Dense(torch.cat([each.dense() for each in inputs], dim=2))

    @classmethod
    def concatenate(cls, inputs: "list[Any]") -> "Activations | None":
        """As `join`, for inputs that are all of this class; None if they have to be written out."""
        return None


@dataclass(frozen=True)
class Dense(Activations):
    """Inputs stored as a tensor.

    Attributes:
        values: ``[H, n, T, I]`` without the bias coordinate.
        bias: whether a last coordinate of one is appended.
    """

    values: Tensor
    bias: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        groups, n, positions, width = self.values.shape
        return groups, n, positions, width + self.bias

    @property
    def numel(self) -> int:
        return self.values.numel()

    def dense(self, low: int = 0, high: int | None = None) -> Tensor:
        values = self.values[:, low:high]
        return torch.cat([values, values.new_ones(()).expand(*values.shape[:3], 1)], dim=-1) if self.bias else values

    def part(self, low: int, high: int) -> "Dense":
        return replace(self, values=self.values[:, low:high])

    def select(self, index: Tensor) -> "Dense":
        return replace(self, values=self.values[:, index])

    def once(self) -> "Dense | None":
        same = len(self.values) > 1 and self.values.stride(0) == 0
        return replace(self, values=self.values[:1]) if same else None

    def times(self, matrix: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        width = self.values.shape[-1]
        product = multiply_rows(self.values[:, low:high], matrix[:, :width])
        return product.add_(matrix[:, None, width:]) if self.bias else product  # without copying the rest

    def weighted_sums(self, weights: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        if weights.shape[2] < weights.shape[3]:  # fewer positions than rows: a column of ones is cheaper before
            return weights.mT @ self.dense(low, high)
        product = weights.mT @ self.values[:, low:high]
        return torch.cat([product, weights.sum(2).unsqueeze(-1)], dim=-1) if self.bias else product

    def copy(self) -> "Dense":
        return replace(self, values=self.values.clone())

    def add_covariance_(self, total: Tensor, workspace: int = WORKSPACE) -> None:
        rows = self.values.to(total.dtype).flatten(1, 2)
        width = rows.shape[-1]
        if self.bias and rows.numel() < _FEW:  # fewer calls count for more than a copy
            add_symmetric_product_(total, torch.constant_pad_nd(rows, (0, 1), 1.0))
            return
        add_symmetric_product_(total[:, :width, :width], rows)
        if self.bias:  # the last column, without a copy of the rest
            column = total.select(2, width)
            column.narrow(1, 0, width).add_(rows.sum(dim=1))
            column.select(1, width).add_(rows.shape[1])

    def add_weighted_(self, total: Tensor, weights: Tensor) -> None:
        root, width = weights.sqrt()[..., None], self.values.shape[-1]
        rows = self.values[:, :, 0] * root
        add_symmetric_product_(total[:, :width, :width], rows)
        if self.bias:
            total[:, :width, width:].add_(torch.bmm(rows.mT, root))
            total[:, width, width].add_(weights.sum(1))

    def sum_with(self, rows: Tensor) -> Tensor:
        # Few rows on the left: the other way round takes half as long again.
        product = rows.mT @ self.values[:, :, 0]
        return (torch.cat([product, rows.sum(1).unsqueeze(-1)], dim=-1) if self.bias else product).mT

    def lengths(self) -> Tensor:
        lengths = torch.linalg.vector_norm(self.values[:, :, 0], dim=-1)
        return torch.hypot(lengths, lengths.new_ones(())) if self.bias else lengths

    @classmethod
    def append_alike(cls, parts: "Sequence[Dense]") -> "Dense":
        return replace(parts[0], values=torch.cat([part.values for part in parts], dim=1))

    def products(self) -> Tensor:
        products = _products(self.values[:, :, 0])
        return products.add_(1) if self.bias else products

    def sum_positions(self, workspace: int = WORKSPACE) -> Tensor:
        values = self.values.sum(dim=2, keepdim=True)
        positions = values.new_full((), self.values.shape[2]).expand(*values.shape[:3], 1)
        return torch.cat([values, positions], dim=-1) if self.bias else values


@dataclass(frozen=True)
class Ones(Activations):
    """The constant input of a bias or of an elementwise scale: I = 1.

    Attributes:
        like: a tensor with the dtype and device.
        sizes: H, n, T.
    """

    like: Tensor
    sizes: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (*self.sizes, 1)

    @property
    def numel(self) -> int:
        return 0

    def dense(self, low: int = 0, high: int | None = None) -> Tensor:
        groups, n, positions = self.sizes
        return self.like.new_ones(()).expand(groups, len(range(n)[low:high]), positions, 1)

    def part(self, low: int, high: int) -> "Ones":
        return replace(self, sizes=(self.sizes[0], high - low, self.sizes[2]))

    def select(self, index: Tensor) -> "Ones":
        return replace(self, sizes=(self.sizes[0], len(index), self.sizes[2]))

    def copy(self) -> "Ones":
        return replace(self, like=self.like.new_empty(0))

    def add_covariance_(self, total: Tensor, workspace: int = WORKSPACE) -> None:
        total += self.sizes[1] * self.sizes[2]

    def add_squares_(self, total: Tensor, workspace: int = WORKSPACE) -> None:
        total += self.sizes[1] * self.sizes[2]


@dataclass(frozen=True)
class Masked(Activations):
    """Inputs with positions that do not count, which are zero there, including the bias coordinate.

    Attributes:
        inner: the inputs without a mask.
        mask: ``[n, T]``, one where the position counts.
    """

    inner: Activations
    mask: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.inner.shape

    def dense(self, low: int = 0, high: int | None = None) -> Tensor:
        return self.inner.dense(low, high) * self.mask[low:high, :, None]

    def once(self) -> "Masked | None":
        one = self.inner.once()
        return None if one is None else replace(self, inner=one)


def _products(rows: Tensor) -> Tensor:
    """``⟨x_k, x_l⟩ [H, n, n]`` of rows ``[H, n, D]``."""
    if len(rows) > 1 or rows.shape[-1] < _SHALLOW:
        return torch.bmm(rows, rows.mT)
    return mirror_(add_symmetric_product_(rows.new_zeros(len(rows), *2 * rows.shape[1:2]), rows.mT))
