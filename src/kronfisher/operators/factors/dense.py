"""A factor with one matrix per group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kronfisher.errors import SingularError, require
from kronfisher.linalg import (
    add_symmetric_product_,
    cholesky,
    complete_,
    eigh,
    full_precision,
    mirror,
    multiply_rows,
    negligible,
    singular_message,
)
from kronfisher.operators.factors.factor import Factor, by_group

__all__ = ["DenseFactor"]


@dataclass(frozen=True, eq=False)
class DenseFactor(Factor, axes=3):
    """One matrix per group.

    Attributes:
        tensor: ``[H, n, n]``.
    """

    is_diagonal = False

    @classmethod
    def identity(cls, shape: Sequence[int], like: Tensor) -> Tensor:
        return torch.eye(shape[1], dtype=like.dtype, device=like.device).expand(*shape)

    @classmethod
    def dimension(cls, width: int, sign: int) -> int:
        return width * (width + sign) // 2

    @property
    def text(self) -> str:
        return f"{self.width}"

    @property
    def mT(self) -> Self:
        return type(self)(self.tensor.mT)

    def diagonal(self) -> Tensor:
        return self.tensor.diagonal(dim1=1, dim2=2)

    def dense(self) -> Tensor:
        return self.tensor

    def left(self, matrix: Tensor) -> Tensor:
        return self.tensor @ matrix

    def right(self, matrix: Tensor) -> Tensor:
        return matrix @ self.tensor.mT

    def rotate(self, rows: Tensor) -> Tensor:
        return multiply_rows(rows, self.tensor)

    def __matmul__(self, other: Factor) -> Factor:
        matrix = self.tensor.to(torch.promote_types(self.tensor.dtype, other.tensor.dtype))
        with full_precision(matrix.device.type):
            return DenseFactor(other.mT.right(matrix))

    def shift(self, shift: Tensor) -> Self:
        shifted = self.tensor.clone()
        shifted.diagonal(dim1=1, dim2=2).add_(shift[:, None])
        return type(self)(shifted)

    def scale_rows(self, scale: Tensor) -> Self:
        return type(self)(self.tensor * scale[:, :, None])

    def divide_by(self, root: Tensor) -> Self:
        return type(self)(self.tensor / root[:, :, None] / root[:, None, :])

    def _once(self) -> Self | None:
        """The matrix of one group where all have the same, so that it is decomposed once; else None.

        Whether they have is not asked of a device, which the host would have to wait for.
        """
        first, others = self.tensor[:1], self.tensor[1:]
        if not len(others) or first.device.type != "cpu" or not torch.equal(others, first.expand(others.shape)):
            return None
        return type(self)(first)

    def _for_all(self, one: Self) -> Self:
        return type(self)(one.tensor.repeat(self.groups, 1, 1))

    def eigh(self, name: str) -> tuple[Tensor, Self]:
        if one := self._once():
            values, vectors = one.eigh(name)
            return values.repeat(self.groups, 1), self._for_all(vectors)
        values, vectors = eigh(self.tensor, name)
        return values, type(self)(vectors)

    def cholesky(self, name: str, *, definite: bool = False) -> Self:
        if one := self._once():
            return self._for_all(one.cholesky(name, definite=definite))
        lower = cholesky(self.tensor, name)
        if not definite:
            require(
                ~(_condition(self, lower) * negligible(lower.dtype) >= 1).any(),
                lambda: SingularError(singular_message(name, self.diagonal().mean().item(), lower.dtype)),
            )
        return type(self)(lower)

    def inverse_root(self, name: str) -> Self:
        if one := self._once():
            return self._for_all(one.inverse_root(name))
        lower = cholesky(self.tensor, name)
        identity = self.identity(lower.shape, lower)
        return type(self)(torch.linalg.solve_triangular(lower, identity, upper=False).mT.contiguous())

    def cholesky_inverse(self) -> Self:
        if one := self._once():
            return self._for_all(one.cholesky_inverse())
        return type(self)(torch.cholesky_inverse(self.tensor))

    def cholesky_solve(self, matrix: Tensor, *, whiten: bool = False) -> Tensor:
        if whiten:
            return torch.linalg.solve_triangular(self.tensor.mT, matrix, upper=True)
        return torch.cholesky_solve(matrix, self.tensor)

    def inverse_transpose(self) -> Self:
        return type(self)(torch.linalg.inv(self.tensor).mT)

    def logabsdet(self) -> Tensor:
        return torch.linalg.slogdet(self.tensor).logabsdet

    def nearest_semidefinite(self, name: str, *, rounded: bool = False) -> Self:
        if rounded:
            shifted = self.tensor.clone()
            diagonals = shifted.diagonal(dim1=-2, dim2=-1)
            diagonals += torch.finfo(shifted.dtype).eps * diagonals.sum(-1, keepdim=True)
            if not bool(torch.linalg.cholesky_ex(shifted).info.any()):
                return self
        values, vectors = eigh(self.tensor, name)
        return type(self)((vectors * values.unsqueeze(1)) @ vectors.mT)

    def add_product_(self, x: Tensor, y: Tensor | None = None) -> None:
        add_symmetric_product_(self.tensor, x, y)

    def mirror(self, scale: float | Tensor = 1.0) -> Self:
        return type(self)(mirror(self.tensor, by_group(scale, 3)))

    def complete_(self) -> Self:
        complete_(self.tensor)
        return self

    def part(self, sign: int) -> Self:
        return type(self)((self.tensor + sign * self.tensor.mT) / 2)


def _condition(factor: Factor, lower: Tensor) -> Tensor:
    # [H] estimates of the largest over the smallest eigenvalue, from below and close where they are far apart: power
    # iterations on the matrix and on its inverse, at unit scale so that squares neither vanish nor overflow.
    scale = factor.diagonal().amax(1)[:, None, None]
    matrix, lower = factor.tensor / scale, lower / scale.sqrt()
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(factor.width, 1, generator=generator, dtype=matrix.dtype).to(matrix.device)
    high = low = probe.expand(len(matrix), -1, 1)
    with full_precision(matrix.device.type):
        for _ in range(4):
            high = matrix @ (high / torch.linalg.vector_norm(high, dim=1, keepdim=True))
            low = torch.cholesky_solve(low / torch.linalg.vector_norm(low, dim=1, keepdim=True), lower)
    return torch.linalg.vector_norm(high, dim=(1, 2)) * torch.linalg.vector_norm(low, dim=(1, 2))
