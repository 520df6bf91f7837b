"""A block read as a precision, ``Λ = c·X + diag(p)``: of a posterior, or damped. Solutions, draws, determinant."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kronfisher.errors import IndefiniteError, SingularError, UnsupportedError
from kronfisher.fisher.blocks import Block
from kronfisher.linalg import indefinite_message, negligible
from kronfisher.operators import KroneckerBasis, Operator
from kronfisher.operators.factors import separate
from kronfisher.operators.operator import DENSE_LIMIT

__all__ = ["Group", "Precision", "logdet"]

Group = tuple[Block, ...]
"""The blocks that one part of the precision covers."""


@dataclass(frozen=True, eq=False)
class Precision:
    """``Λ = c·X + diag(p)``: the inverse covariance of a block's parameters under a posterior, or X damped.

    Where p is one number, Λ shares the eigenvectors of X. Where it is not, ``Λ = R (c·X̃ + 1) R`` with
    ``R = diag(√p)`` and ``X̃ = R⁻¹ X R⁻¹``, which has the structure of X if that is diagonal or small enough to be
    written out, or a Kronecker product with ``p = r ⊗ d`` (another precision for biases, for each input, for each
    output). For anything else there is no exact inverse, and it is refused.

    Attributes:
        operator: X, positive semidefinite.
        scale: c, of at least 0.
        prior: p, 0-dim or ``[D]``.
        name: of the block, for messages.
        checked: the prior is known to be possible.

    Raises:
        UnsupportedError: p varies in a way that the structure of X does not allow.

    Example:
        >>> from kronfisher.operators import Kronecker
        >>> X = Kronecker(A=torch.eye(2)[None], B=torch.tensor([[[3.0]]]))
        >>> Precision(X, 2.0, torch.tensor(4.0)).solves(torch.ones(1, 2))
        tensor([[0.1000, 0.1000]])
    """

    operator: Operator
    scale: float
    prior: Tensor
    name: str = ""
    checked: bool = False

    def __post_init__(self) -> None:
        if not (self.uniform or self.checked):
            _ = self.whitened  # an impossible prior is refused now, not at the first prediction

    @property
    def uniform(self) -> bool:
        """Whether the prior is one number."""
        return self.prior.dim() == 0

    @cached_property
    def root(self) -> Tensor | None:
        """``√p`` ``[D]``; None where p is one number."""
        return None if self.uniform else self.prior.detach().sqrt()

    @cached_property
    def whitened(self) -> Operator:
        """X, or X̃ where the prior is not one number."""
        return self.operator if self.uniform else _whiten(self.operator, self.prior.detach(), self.name)

    @cached_property
    def damped(self) -> Operator:
        """``c·X + p``, or ``c·X̃ + 1``."""
        shift = self.prior.item() if self.uniform else 1.0
        scaled = self.whitened.scaled(self.scale)
        if shift == 0 or self.whitened.determined:
            return scaled.shifted(shift)
        try:
            spectral = self.whitened.spectral()
        except UnsupportedError:  # solved by other means
            return scaled.shifted(shift)
        return spectral.scaled(self.scale).shifted(shift)

    @cached_property
    def factored(self) -> tuple[KroneckerBasis, Tensor] | None:
        """``K, v`` with ``Λ⁻¹ = K diag(1/v) Kᵀ`` and K a Kronecker product (perhaps of diagonals), or None.

        v is ``[H, O, I]``. K is never written out: a gradient ``g aᵀ`` is rotated factor by factor.
        """
        operator = self.damped
        if operator.product_basis is not None:
            (A, B), values = operator.product_basis, operator.spectral().checked().values
            shape = (A.groups, B.width, A.width)
            if self.root is None:
                return KroneckerBasis(A.tensor, B.tensor), values.reshape(shape)
            parts = separate(self.root.reshape(shape))
            assert parts is not None  # or it would not have been whitened into a Kronecker product
            outputs, inputs = parts
            basis = KroneckerBasis(A.scale_rows(1 / inputs).tensor, B.scale_rows(1 / outputs).tensor)
            return basis, values.reshape(shape)
        return None

    def variances(self) -> Tensor | None:
        """``diag(Λ⁻¹)`` where Λ is diagonal, else None."""
        if self.damped.diagonal_values is not None:
            values = self.damped.spectral().checked().values
            return 1 / values if self.root is None else 1 / (values * self.prior.detach())
        return None

    def solves(self, rows: Tensor) -> Tensor:
        """``Λ⁻¹`` times K rows ``[K, D]``."""
        if self.root is None:
            return self.damped.solves(rows)
        return self.damped.solves(rows / self.root) / self.root

    def where_held(self, function: Callable[["Precision"], Any]) -> Any:
        """What a function makes of the precision, computed by the rank that holds it if there are several."""
        return function(self)

    def noise_dim(self) -> int:
        """How many numbers a draw takes."""
        return self.damped.noise_dim()

    def colour(self, noise: Tensor) -> Tensor:
        """White noise ``[n, noise_dim()]`` to draws from ``N(0, Λ⁻¹)``."""
        draws = self.damped.colour(noise)
        return draws if self.root is None else draws / self.root

    def inverse_diagonal(self) -> Tensor:
        """``diag(Λ⁻¹)``, ``[D]``."""
        diagonal = self.damped.inverse().diagonal()
        return diagonal if self.root is None else diagonal / self.prior.detach()

    @cached_property
    def flat_directions(self) -> int | None:
        """The number of directions without any curvature, where the posterior is the prior; None if it is unknown."""
        try:
            return self.whitened.nullity()
        except UnsupportedError:  # a sum that is too large for eigenvalues
            return None

    def logdet(self, scale: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        """``log |c·X + f·diag(p)|`` to differentiate by c and f; default: its own c, and one. 0-dim, float64."""
        c = self._number(self.scale if scale is None else scale)
        f = self._number(1.0 if factor is None else factor)
        if self.uniform:
            return logdet(self.operator, c, self.prior.double() * f, self.name)
        return logdet(self.whitened, c, f, self.name) + self.prior.double().log().sum()

    def times(self, factor: float) -> "Precision":
        """The same with the prior times a factor."""
        changed = replace(self, prior=self.prior * factor, checked=True)
        if not self.uniform:
            vars(changed)["whitened"] = self.whitened.spectral().scaled(1 / factor)
        return changed

    def with_scale(self, scale: float) -> "Precision":
        """The same with another c."""
        changed = replace(self, scale=scale, checked=True)
        if not self.uniform:
            vars(changed)["whitened"] = self.whitened
        return changed

    def _number(self, value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device=self.prior.device)


def logdet(operator: Operator, scale: Tensor, prior: Tensor, name: str) -> Tensor:
    """``log |c·X + diag(p)|``, differentiable by c (0-dim) and by p (0-dim or ``[D]``); 0-dim, float64.

    Raises:
        SingularError: it is not positive definite.
    """
    prior = prior.double()
    if prior.dim() == 0:
        implicit = Precision(operator, float(scale.detach()), prior.detach(), name)
        if operator.determined:
            return _LogDet.apply(scale, prior, implicit)
        try:
            values = operator.spectral().values.double()
        except UnsupportedError:  # a sum that has a determinant, but no eigenvectors
            return _LogDet.apply(scale, prior, implicit)
        total = scale * values + prior
        low, high = (float(end) for end in torch.aminmax(total.detach()))
        if low < -negligible(operator.dtype) * high:
            raise IndefiniteError(indefinite_message(f"{name}: the posterior precision", low, high))
        if low <= 0:
            raise SingularError(
                f"{name}: the posterior precision is singular: there are directions without curvature, and a prior "
                "precision of zero leaves them open. Give it a positive one."
            )
        return total.log().sum()
    own = prior.detach().to(operator.dtype)
    return _LogDet.apply(scale, prior, Precision(operator, float(scale.detach()), own, name))


class _LogDet(Function):
    """``log |c·X + diag(p)|``: its derivative by p is ``diag(Λ⁻¹)``, by c ``(D − Σ p diag(Λ⁻¹)) / c``."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, prior: Tensor, precision: Precision) -> Tensor:
        value = precision.damped.logdet().double()
        if precision.root is not None:
            value = value + precision.root.double().log().sum() * 2
        ctx.save_for_backward(scale, prior)
        ctx.precision = precision
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        scale, prior = ctx.saved_tensors
        precision = ctx.precision
        own = precision.inverse_diagonal() if prior.dim() else precision.damped.inverse().trace()
        by_prior = own.double()
        by_scale = (precision.operator.dim - (prior * by_prior).sum()) / scale
        return grads[0] * by_scale, grads[0] * by_prior, None


def _whiten(operator: Operator, prior: Tensor, name: str) -> Operator:
    if bool((prior <= 0).any()):
        raise SingularError(
            f"{name}: a prior precision that varies within a block must be positive everywhere; "
            "give the parameters that should have none a small one."
        )
    try:
        return operator.relative_to(prior)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{name} ({operator.structure}): its prior precision varies from parameter to parameter in a way that this "
            f"structure has no exact inverse for, and it is too large to be written out (over {DENSE_LIMIT} rows). "
            "Give one number for the block, or for a Kronecker product one that is a product of a number for each "
            "output and one for each input (such as another one for the bias), or use the diagonal fit for this layer."
        ) from error
