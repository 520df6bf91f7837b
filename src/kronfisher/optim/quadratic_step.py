"""The papers' step: step size, momentum and damping from the exact quadratic model (Martens & Grosse 2015)."""

from dataclasses import dataclass
from typing import Literal

from kronfisher.errors import require_kind
from kronfisher.fisher.damping import Damping, FactoredTikhonov
from kronfisher.optim.damping_schedule import Constant, DampingSchedule, LevenbergMarquardt

__all__ = ["DAMPING", "TRUST", "QuadraticModel"]

DAMPING = "give how λ enters, such as kf.FactoredTikhonov(); λ itself, a number or a schedule, goes to `trust`"
TRUST = "give λ, or a schedule of it such as kf.Constant(1e-3)"


@dataclass(frozen=True)
class QuadraticModel:
    """Steps ``δ = α Δ + μ δ₀`` along the natural gradient ``Δ = −(F̆ + λ)⁻¹ ∇h`` and the last step δ₀.

    α and μ minimise the quadratic model of the loss whose curvature is the *exact* Fisher matrix of the batch, plus λ.
    For large batches, and for losses that go to zero.

    Args:
        damping: how λ enters the curvature. One with a λ of its own sets where `trust` starts.
        trust: the damping schedule, which chooses λ; a number keeps it constant. None: `LevenbergMarquardt` with exact
            momentum, `Constant` otherwise.
        momentum: ``"exact"`` (networks without an exact quadratic model get a fixed rate, with a warning), or a number:
            then the step is ``−lr·s·(F̆ + λ)⁻¹∇h + momentum·δ₀`` with ``s ≤ 1`` so that `kl_limit` holds.
        kl_limit: largest ``lr² ∇hᵀ(F̆ + λ)⁻¹∇h`` of a step of fixed rate, about twice its KL divergence in nats.

    Raises:
        ValueError: an option is out of range.
        TypeError: an option is of another kind, such as a number for `damping`.

    Example:
        >>> import torch, kronfisher as kf
        >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(64, 4), torch.randint(3, (64,))
        >>> optimizer = kf.NaturalGradient(model, kf.Categorical(), step=kf.QuadraticModel())
        >>> losses = [optimizer.step(lambda: model(x), y).item() for _ in range(10)]
        >>> losses[-1] < losses[0]
        True
    """

    damping: Damping = FactoredTikhonov()  # noqa: RUF009 (frozen)
    trust: DampingSchedule | float | None = None
    momentum: float | Literal["exact"] = "exact"
    kl_limit: float = 1e-2

    def __post_init__(self) -> None:
        require_kind("damping", self.damping, Damping, DAMPING)
        require_kind("trust", self.trust, (DampingSchedule, float, int, type(None)), TRUST)
        if self.momentum != "exact" and not (isinstance(self.momentum, float | int) and 0 <= self.momentum < 1):
            raise ValueError(f'momentum={self.momentum!r}: use "exact" or a number in [0, 1).')
        if not self.kl_limit >= 0:
            raise ValueError(f"kl_limit={self.kl_limit!r} must not be negative.")

    @property
    def schedule(self) -> DampingSchedule:
        """The damping schedule in use."""
        if self.trust is None:
            initial = self.damping.value
            return LevenbergMarquardt(initial=initial) if self.momentum == "exact" else Constant(initial)
        return Constant(self.trust) if isinstance(self.trust, int | float) else self.trust
