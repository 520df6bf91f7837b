"""Rearranged matrices without samples: a sum of Kronecker products, and sums of any rearranged matrices."""

import torch
from torch import Tensor

from kronfisher.fits.rearrangement.rearranged import Rearranged

__all__ = ["Joint", "Terms"]


class Terms(Rearranged):
    """A sum of Kronecker products ``Σ_r c_r B_r ⊗ A_r``.

    Args:
        A: ``[R, H, I, I]``, or diagonals ``[R, H, I]``.
        B: ``[R, H, O, O]``, or diagonals.
        sign: of all of them: −1 to take them away from others.
    """

    def __init__(self, A: Tensor, B: Tensor, sign: float = 1.0) -> None:
        self.A, self.B, self.sign = A, B, sign
        self.shape = (A.shape[1], B.shape[-1], A.shape[-1])

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(self.A.shape[1:]), tuple(self.B.shape[1:])

    def like(self) -> Tensor:
        return self.A

    def outputs(self, A: Tensor, odd: bool = False) -> Tensor:
        return torch.einsum("rh,rh...->h...", (self.A * A).flatten(2).sum(-1), self.B) * self.sign

    def inputs(self, B: Tensor, odd: bool = False) -> Tensor:
        return torch.einsum("rh,rh...->h...", (self.B * B).flatten(2).sum(-1), self.A) * self.sign


class Joint(Rearranged):
    """The sum of rearranged matrices of any kind."""

    def __init__(self, *parts: Rearranged) -> None:
        self.parts = parts
        self.shape = parts[0].shape

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.parts[0].factor_shapes

    def like(self) -> Tensor:
        return self.parts[0].like()

    def outputs(self, A: Tensor, odd: bool = False) -> Tensor:
        return torch.stack([part.outputs(A, odd) for part in self.parts]).sum(0)

    def inputs(self, B: Tensor, odd: bool = False) -> Tensor:
        return torch.stack([part.inputs(B, odd) for part in self.parts]).sum(0)
