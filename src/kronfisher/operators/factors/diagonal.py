"""A factor kept as its diagonal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kronfisher.errors import SingularError, require
from kronfisher.linalg import negligible, singular_message
from kronfisher.operators.factors.factor import Factor, by_group

__all__ = ["DiagonalFactor"]

_PIECE = 2**22  # numbers that are squared at a time


@dataclass(frozen=True, eq=False)
class DiagonalFactor(Factor, axes=2):
    """The diagonal of one matrix per group.

    Attributes:
        tensor: ``[H, n]``.
    """

    is_diagonal = True

    @classmethod
    def identity(cls, shape: Sequence[int], like: Tensor) -> Tensor:
        return like.new_ones(*shape)

    @classmethod
    def dimension(cls, width: int, sign: int) -> int:
        return width * (sign == 1)

    @property
    def text(self) -> str:
        return f"diag({self.width})"

    @property
    def mT(self) -> Self:
        return self

    def diagonal(self) -> Tensor:
        return self.tensor

    def dense(self) -> Tensor:
        return torch.diag_embed(self.tensor)

    def left(self, matrix: Tensor) -> Tensor:
        return self.tensor[..., None] * matrix

    def right(self, matrix: Tensor) -> Tensor:
        return matrix * self.tensor[:, None, :]

    def rotate(self, rows: Tensor) -> Tensor:
        return rows * self.tensor[:, None, None]

    def __matmul__(self, other: Factor) -> Factor:
        return type(other)(self.tensor * other.tensor if other.is_diagonal else self.left(other.tensor))

    def shift(self, shift: Tensor) -> Self:
        return type(self)(self.tensor + shift[:, None])

    def scale_rows(self, scale: Tensor) -> Self:
        return type(self)(self.tensor * scale)

    def divide_by(self, root: Tensor) -> Self:
        return type(self)(self.tensor / root.square())

    def eigh(self, name: str) -> tuple[Tensor, Self]:
        return self.tensor, type(self)(torch.ones_like(self.tensor))

    def cholesky(self, name: str, *, definite: bool = False) -> Self:
        low, high = torch.aminmax(self.tensor, dim=1)
        singular = (low <= 0) if definite else low <= negligible(self.tensor.dtype) * high
        require(
            ~singular.any(), lambda: SingularError(singular_message(name, self.tensor.mean().item(), self.tensor.dtype))
        )
        return type(self)(self.tensor.sqrt())

    def inverse_root(self, name: str) -> Self:
        return type(self)(self.cholesky(name).tensor.reciprocal())

    def cholesky_inverse(self) -> Self:
        return type(self)(self.tensor.square().reciprocal())

    def cholesky_solve(self, matrix: Tensor, *, whiten: bool = False) -> Tensor:
        return matrix / (self.tensor if whiten else self.tensor.square())[..., None]

    def inverse_transpose(self) -> Self:
        return type(self)(self.tensor.reciprocal())

    def logabsdet(self) -> Tensor:
        return self.tensor.abs().log().sum(1)

    def nearest_semidefinite(self, name: str, *, rounded: bool = False) -> Self:
        return type(self)(self.tensor.clamp_min(0))

    def add_product_(self, x: Tensor, y: Tensor | None = None) -> None:
        rows = max(_PIECE // max(self.tensor.numel(), 1), 1)  # at a time: of a vocabulary squares of all would add up
        for left, right in zip(x.split(rows, dim=-2), (x if y is None else y).split(rows, dim=-2), strict=True):
            self.tensor.add_((left.square() if y is None else left * right).sum(-2))

    def mirror(self, scale: float | Tensor = 1.0) -> Self:
        return type(self)(self.tensor * by_group(scale, 2))

    def complete_(self) -> Self:
        return self

    def part(self, sign: int) -> Self:
        return self if sign == 1 else type(self)(torch.zeros_like(self.tensor))
