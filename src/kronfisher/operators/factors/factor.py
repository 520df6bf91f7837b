"""A factor of a Kronecker product, whether it is a matrix per group or only the diagonal of one.

A diagonal stands for a factor too wide to be stored (a vocabulary).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.linalg import stable_norm

__all__ = ["Factor", "by_group"]


@dataclass(frozen=True, eq=False)
class Factor(ABC):
    """A factor A or B of ``blockdiag_h(B_h ⊗ A_h)``, for H groups; make one with `Factor.of`.

    Attributes:
        tensor: ``[H, n, n]``, or ``[H, n]`` for a diagonal. It may be complex, and a triangle or eigenvectors as well.

    Example:
        >>> import torch
        >>> factor = Factor.of(torch.tensor([[4.0, 9.0]]))
        >>> factor.is_diagonal, factor.text
        (True, 'diag(2)')
        >>> factor.cholesky("A").tensor
        tensor([[2., 3.]])
        >>> factor.dense().shape
        torch.Size([1, 2, 2])
    """

    types: ClassVar[dict[int, type["Factor"]]] = {}
    is_diagonal: ClassVar[bool]
    tensor: Tensor

    def __init_subclass__(cls, axes: int, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Factor.types[axes] = cls

    @staticmethod
    def of(tensor: Tensor) -> "Factor":
        """The factor that a tensor stands for; DataError if it has another number of axes."""
        return Factor.type_of(tensor.shape)(tensor)

    @staticmethod
    def type_of(shape: Sequence[int]) -> type["Factor"]:
        """The class of factors of this shape: the one place that tells a matrix from a diagonal by the axes.

        Raises:
            DataError: it is the shape of neither.
        """
        try:
            return Factor.types[len(shape)]
        except KeyError:
            raise DataError(f"a factor is [H, n, n], or [H, n] for a diagonal, not {list(shape)}") from None

    @classmethod
    @abstractmethod
    def identity(cls, shape: Sequence[int], like: Tensor) -> Tensor:
        """The identity of this shape, of the dtype and on the device of `like`; it may be an expanded view."""

    @classmethod
    @abstractmethod
    def dimension(cls, width: int, sign: int) -> int:
        """Of the space of all symmetric (sign 1) or antisymmetric (sign −1) factors of one group."""

    @property
    def groups(self) -> int:
        """H."""
        return self.tensor.shape[0]

    @property
    def width(self) -> int:
        """N."""
        return self.tensor.shape[1]

    @property
    @abstractmethod
    def text(self) -> str:
        """N for reports, marked where the factor is a diagonal."""

    @property
    @abstractmethod
    def mT(self) -> Self:
        """The transpose."""

    @property
    def mH(self) -> Self:
        """The conjugate transpose."""
        return type(self)(self.mT.tensor.conj())

    @abstractmethod
    def diagonal(self) -> Tensor:
        """``[H, n]``."""

    @abstractmethod
    def dense(self) -> Tensor:
        """``[H, n, n]``."""

    def norms(self) -> Tensor:
        """Frobenius norms ``[H]``."""
        return stable_norm(self.tensor.flatten(1))

    # Products ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def left(self, matrix: Tensor) -> Tensor:
        """``F M`` for M ``[H, n, K]``."""

    @abstractmethod
    def right(self, matrix: Tensor) -> Tensor:
        """``M Fᵀ`` for M ``[H, K, n]``."""

    @abstractmethod
    def rotate(self, rows: Tensor) -> Tensor:
        """``x F`` for rows x ``[H, n, T, I]``."""

    @abstractmethod
    def __matmul__(self, other: "Factor") -> "Factor":
        """The product of two factors."""

    def scale(self, scale: Tensor) -> Self:
        """Every group times its scale ``[H]``."""
        return type(self)(self.tensor * scale.view(-1, *[1] * (self.tensor.dim() - 1)))

    @abstractmethod
    def shift(self, shift: Tensor) -> Self:
        """``F + shift·1`` for a shift ``[H]`` of every group."""

    @abstractmethod
    def scale_rows(self, scale: Tensor) -> Self:
        """``diag(scale) F`` for a scale ``[H, n]``."""

    @abstractmethod
    def divide_by(self, root: Tensor) -> Self:
        """``diag(1/root) F diag(1/root)`` for a root ``[H, n]``."""

    def square(self) -> Self:
        """Squared absolute values, entry by entry."""
        return type(self)((self.tensor.abs() if self.tensor.is_complex() else self.tensor).square())

    # Decompositions ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def eigh(self, name: str) -> tuple[Tensor, Self]:
        """Eigenvalues ``[H, n]`` and eigenvectors in columns; those of a diagonal are the identity."""

    @abstractmethod
    def cholesky(self, name: str, *, definite: bool = False) -> Self:
        """The lower Cholesky factor L.

        Raises:
            SingularError: an eigenvalue is numerically zero. Rounding hides that from the factorisation itself as often
                as not, so the condition is estimated too, unless `definite` says that the factor was damped.
        """

    @abstractmethod
    def inverse_root(self, name: str) -> Self:
        """R with ``R Rᵀ = F⁻¹``, from the Cholesky factor alone; SingularError if a pivot is zero."""

    @abstractmethod
    def cholesky_inverse(self) -> Self:
        """``F⁻¹``, of the lower Cholesky factor of F."""

    @abstractmethod
    def cholesky_solve(self, matrix: Tensor, *, whiten: bool = False) -> Tensor:
        """``F⁻¹ M``, of the lower Cholesky factor L of F; `whiten`: ``L⁻ᵀ M``."""

    def cholesky_logdet(self) -> Tensor:
        """``log|F| [H]``, of the lower Cholesky factor of F."""
        return 2 * self.diagonal().log().sum(-1)

    @abstractmethod
    def inverse_transpose(self) -> Self:
        """``F⁻ᵀ``, of any invertible factor."""

    @abstractmethod
    def logabsdet(self) -> Tensor:
        """``log|det F| [H]``, of any factor."""

    @abstractmethod
    def nearest_semidefinite(self, name: str, *, rounded: bool = False) -> Self:
        """Without the negative eigenvalues.

        Where `rounded`, those of rounding may stay: they do no harm in a single product, and to see that there are no
        others is far cheaper than to compute them all.
        """

    # Sums of second moments, of which only upper triangles are computed -----------------------------------------------

    @abstractmethod
    def add_product_(self, x: Tensor, y: Tensor | None = None) -> None:
        """``F += xᵀ y`` in place, for rows ``[H, R, n]`` with a symmetric product; y None: x. See `mirror`."""

    @abstractmethod
    def mirror(self, scale: float | Tensor = 1.0) -> Self:
        """F from its upper triangle, times a scale: one number, or ``[H]``."""

    @abstractmethod
    def complete_(self) -> Self:
        """F from its upper triangle, in place."""

    @abstractmethod
    def part(self, sign: int) -> Self:
        """The symmetric part (sign 1) or the antisymmetric part (sign −1)."""


def by_group(scale: float | Tensor, axes: int) -> float | Tensor:
    """A scale ``[H]`` in the form that multiplies tensors of so many axes; one number as it is."""
    return scale.view(-1, *[1] * (axes - 1)) if isinstance(scale, Tensor) and scale.dim() == 1 else scale
