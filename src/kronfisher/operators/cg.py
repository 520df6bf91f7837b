"""Conjugate gradients for many right-hand sides at once, with information on their convergence."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kronfisher.errors import IndefiniteError, NumericalError, NumericalWarning, SingularError
from kronfisher.linalg import singular_message, stable_norm

__all__ = ["Convergence", "Iterative", "conjugate_gradients"]

Rows = Callable[[Tensor], Tensor]

ITERATIONS = 1000
_RESTARTS = 3  # the residual that is carried along drifts from the true one; it is measured anew as often as this
_POOR = 1e-2  # a residual too large to accept, even if the precision allows no better
_STRIDE = 8  # iterations between two checks of the residual where a check waits for the device


@dataclass(frozen=True)
class Convergence:
    """Convergence of the last solution.

    Attributes:
        iterations: products with the matrix, of the slowest right-hand side.
        residual: the largest ``‖v − X x‖ / ‖v‖``.
        converged: it is as small as asked for, or as the precision allows.
    """

    iterations: int
    residual: float
    converged: bool

    def __str__(self) -> str:
        state = "" if self.converged else "not converged, "
        return f"solved by conjugate gradients: {state}{self.iterations} iterations, residual {self.residual:.1e}"


class Iterative:
    """What operators that are solved by conjugate gradients tell of their last solution."""

    @property
    def notes(self) -> str:
        """Convergence of the last solution."""
        return str(self.convergence or "")

    @property
    def convergence(self) -> Convergence | None:
        """Of the last solution by conjugate gradients; None if there was none."""
        return vars(self).get("_convergence")

    def remember(self, convergence: Convergence) -> None:
        """Keep it for reports; operators are immutable otherwise."""
        vars(self)["_convergence"] = convergence


def conjugate_gradients(
    multiply: Rows, precondition: Rows, rows: Tensor, *, scale: float, floor: float, name: str
) -> tuple[Tensor, Convergence]:
    """``X⁻¹ v`` for K rows v ``[K, D]``, for a positive definite X.

    A right-hand side is done when ``‖r‖ ≤ τ‖v‖``, or when rounding allows no less: ``‖r‖ ≤ ε ‖X‖ ‖x‖``. τ is 1e-12
    in float64, 1e-6 in float32.

    Args:
        multiply: X times rows.
        precondition: an approximation of ``X⁻¹``, positive definite, times rows.
        rows: ``[K, D]``.
        scale: about the largest eigenvalue of X.
        floor: a Rayleigh quotient up to this cannot be told from zero.
        name: what X belongs to, for messages.

    Returns:
        ``[K, D]``, and how they converged.

    Raises:
        IndefiniteError: some pᵀXp is negative: X has a negative eigenvalue.
        SingularError: some pᵀXp is zero to working precision.
        NumericalError: NaN or Inf.

    Warns:
        NumericalWarning: `ITERATIONS` or the precision were not enough; the answer has the residual that the warning
            tells.
    """
    norms = stable_norm(rows)[:, None]
    units = rows / torch.where(norms > 0, norms, 1)
    answer, iterations = torch.zeros_like(units), 0
    tolerance = 1e-12 if rows.dtype == torch.float64 else 1e-6
    slack = torch.finfo(rows.dtype).eps * scale

    def excess(residual: Tensor) -> Tensor:  # [K, 1], at most zero where a right-hand side is done
        return stable_norm(residual)[:, None] - (slack * stable_norm(answer)[:, None]).clamp_min(tolerance)

    residual = units
    for _ in range(_RESTARTS):
        active = ~(excess(residual) <= 0)
        if iterations >= ITERATIONS or not bool(active.any()):
            break
        preconditioned = precondition(residual)
        direction, product = preconditioned, (residual * preconditioned).sum(1, keepdim=True)
        stride = 1 if rows.device.type == "cpu" else _STRIDE
        bad = torch.zeros_like(active)
        lowest = torch.full_like(product, torch.inf)
        while iterations < ITERATIONS:
            image = multiply(direction)
            length = stable_norm(direction)[:, None]
            curvature = (direction * image).sum(1, keepdim=True)
            quotient = curvature / torch.where(length > 0, length, 1) / torch.where(length > 0, length, 1)
            bad = bad | (active & ~(quotient > floor))
            lowest = torch.where(active, torch.minimum(lowest, quotient), lowest)
            step = torch.where(active & ~bad, product / curvature, 0)
            answer = answer + step * direction
            residual = residual - step * image
            active = active & ~(excess(residual) <= 0)
            preconditioned = precondition(residual)
            new = (residual * preconditioned).sum(1, keepdim=True)
            direction = preconditioned + torch.where(active, new / product, 0) * direction
            product = new
            iterations += 1
            if iterations % stride == 0:
                stop, more = torch.stack([bad.any(), active.any()]).tolist()
                if stop:
                    raise _failure(float(lowest.min()), scale, name, rows.dtype, iterations)
                if not more:
                    break
        if bool(bad.any()):
            raise _failure(float(lowest.min()), scale, name, rows.dtype, iterations)
        residual = units - multiply(answer)
    missing = torch.stack([stable_norm(residual).max(), excess(residual).max()]).tolist() if len(rows) else [0.0, 0.0]
    if not missing[0] < torch.inf:
        raise NumericalError(f"{name}: the solution by conjugate gradients is NaN or Inf; use float64 or more damping.")
    done = missing[0] <= 10 * tolerance or (missing[1] <= 0 and missing[0] <= _POOR)
    convergence = Convergence(iterations, missing[0], done)
    if not convergence.converged:
        warnings.warn(
            f"{name}: conjugate gradients stopped after {iterations} iterations with a relative residual of "
            f"{convergence.residual:.1e}. Add damping, or use float64.",
            NumericalWarning,
            stacklevel=4,
        )
    return answer * norms, convergence


def _failure(quotient: float, scale: float, name: str, dtype: torch.dtype, iterations: int) -> NumericalError:
    noise = 10 * torch.finfo(dtype).eps * scale
    if quotient < -noise:
        return IndefiniteError(
            f"{name} is indefinite: after {iterations} iterations conjugate gradients met a direction p with "
            f"pᵀXp / pᵀp = {quotient:.3g}, and its smallest eigenvalue is lower still. Add damping of several times "
            f"{-quotient:.3g}, choose a fit whose terms are all positive semidefinite, or change its spectrum "
            "explicitly: .clamped(floor) or .absolute()."
        )
    if quotient == quotient:
        return SingularError(singular_message(name, scale, dtype, "largest eigenvalue is about"))
    return NumericalError(f"{name}: conjugate gradients met NaN or Inf; look at the data and the weights.")
