"""How often statistics, inverses and the quadratic model are renewed."""

from dataclasses import dataclass, replace

from kronfisher.errors import keep_integer

__all__ = ["LAYERWISE", "Refresh"]

BASES = 4.0  # the least `early` of fits whose eigenvalues belong to a basis


@dataclass(frozen=True)
class Refresh:
    """Periods, in steps. Early on, when everything changes quickly, they are shorter: half of the steps so far.

    `LayerwiseStep` has defaults of its own (`LAYERWISE`: ``Refresh(20, 20, average=0.8, early=6)``), because steps
    of one size, which no model of the loss shortens, need matrices of the present network; where factorisations
    outweigh a tenth of the passes, it lengthens their period, up to 50.

    Fits that measure eigenvalues in a basis that goes stale (EKFAC) take a quarter for statistics and inverses: with
    half of the steps they fall behind within the first hundred.

    Args:
        statistics: between batches whose curvature is averaged; each costs one more backward pass.
        inverse: between factorisations of one layer; the layers are renewed round-robin.
        model: between solutions of the exact quadratic model for step size and momentum, kept in between. It is solved
            where `LevenbergMarquardt(every=…)` compares, too.
        average: the factor of the old sums when new statistics are added.
        early: early periods are the steps so far over this.

    Raises:
        ValueError: a period or `early` is below 1, or the average is not in [0, 1).

    Example:
        >>> Refresh(statistics=10).after(0, 10), Refresh(statistics=10).after(200, 10)
        (1, 210)
    """

    statistics: int = 10
    inverse: int = 50
    model: int | None = None
    average: float = 0.95
    early: float = 2.0

    def __post_init__(self) -> None:
        for name in ("statistics", "inverse", *(["model"] if self.model is not None else [])):
            keep_integer(self, name, 1, "a period is an integer of at least 1")
        if not self.early >= 1 or not 0 <= self.average < 1:
            raise ValueError(f"{self}: `early` is at least 1 and the average lies in [0, 1).")

    def after(self, step: int, period: int) -> int:
        """The step at which anything renewed at `step` is due again."""
        return step + min(period, max(1, int(step / self.early)))

    def careful(self) -> "Refresh":
        """For fits whose bases go stale."""
        return replace(self, early=max(self.early, BASES))

    def turn(self, step: int, place: int, layers: int) -> int:
        """The step at which the inverse of layer `place` is due again; round-robin once the period is reached."""
        due = self.after(step, self.inverse)
        if due - step < self.inverse:
            return due
        own = place * self.inverse // max(layers, 1)
        return step + 1 + (own - step - 1) % self.inverse


LAYERWISE = Refresh(statistics=20, inverse=20, average=0.8, early=6)
"""The default of `LayerwiseStep`."""
