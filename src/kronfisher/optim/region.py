"""Where the quadratic model is trusted: the damping λ as it stands, and how it answers to comparisons."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch

from kronfisher.optim.damping_schedule import LevenbergMarquardt, Trust

__all__ = ["Region"]


@dataclass
class Region:
    """λ while a model is trained.

    Attributes:
        trust: the rule.
        damping: λ; None before the first statistics.
        first_mean: the mean eigenvalue of the Fisher matrix at the start.
        ratio: the change of the loss over the change that the model promised, at the last comparison.
    """

    trust: Trust
    damping: float | None = None
    first_mean: float = 0.0
    ratio: float | None = None

    def at(self, step: int, measure: Callable[[], float]) -> float:
        """λ of a step; `measure` gives the mean eigenvalue at the first."""
        if self.damping is None:
            self.first_mean = max(measure(), torch.finfo(torch.float32).tiny)
            self.damping = self.trust.start(self.first_mean)
        self.damping = self.trust.at(step, self.damping)
        return self.damping

    def compared(self, change: float, promised: float, step: int) -> bool:
        """Adapt λ to a comparison; whether the step is to be undone."""
        self.ratio = change / promised if promised < 0 else float("nan")
        undone = not isfinite(change)
        if isinstance(self.trust, LevenbergMarquardt):
            assert self.damping is not None
            undone = undone or change > self.trust.reject * max(-promised, 0.0)
            old = self.damping
            self._set(self.trust.refused(old) if undone else self.trust.adapted(old, self.ratio, step))
        return undone

    def solved(self, step_size: float) -> None:
        """Trust the model less where even the exact one takes next to nothing of the direction."""
        if isinstance(self.trust, LevenbergMarquardt) and self.damping is not None and 0 < step_size < self.trust.least:
            self._set(10 * self.damping)

    def refuse(self) -> None:
        """Trust the model less, because a step was taken back."""
        if self.damping is not None and isinstance(self.trust, LevenbergMarquardt):
            self._set(self.trust.refused(self.damping))

    def _set(self, value: float) -> None:
        assert isinstance(self.trust, LevenbergMarquardt)
        self.damping = self.trust.bounded(value, self.first_mean)

    def warnings(self) -> Iterable[str]:
        """What a user should know, in words."""
        if self.damping is not None and isinstance(self.trust, LevenbergMarquardt):
            if self.damping <= self.trust.floor * self.first_mean * 1.0001:
                yield "λ is at its floor: the model is trusted as far as allowed; a lower floor may train faster"
            if self.damping >= self.trust.ceiling * self.first_mean / 1.0001:
                yield "λ is at its ceiling: steps are those of plain gradient descent; look at the loss and the data"
        if self.ratio is not None and not self.ratio > 0:
            yield "the model ratio is negative: the loss rose where a fall was promised; the batch may be too small"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {"damping": self.damping, "first_mean": self.first_mean, "ratio": self.ratio}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.damping, self.first_mean, self.ratio = state["damping"], state["first_mean"], state["ratio"]
