"""The fifth part of a step: the damping λ, and whether a step is compared, undone or left out."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kronfisher.optim.damping_schedule import DampingSchedule, ScheduledDamping
from kronfisher.optim.divergence import Divergence

__all__ = ["Judge"]


class Judge:
    """Chooses λ, and decides which steps are compared, undone or left out; the optimiser carries that out.

    Args:
        schedule: the rule for λ.

    Attributes:
        damping: λ and the last comparison.
        divergence: the losses so far.
        rejected: the number of steps that were undone.
        skipped: the number of steps that were left out.
    """

    def __init__(self, schedule: DampingSchedule) -> None:
        self.damping, self.divergence = ScheduledDamping(schedule), Divergence()
        self.rejected = self.skipped = 0

    @property
    def compares_losses(self) -> bool:
        """Whether losses have to be such that they can be evaluated again."""
        return self.damping.schedule.compares_losses

    def compares(self, step: int) -> bool:
        """Whether the loss is evaluated again after this step."""
        return self.damping.schedule.compares(step)

    def longest(self, step: int) -> float:
        """The largest ``‖αΔ‖ / ‖W‖`` of a weight matrix W at this step."""
        return self.damping.schedule.longest(step)

    def damping_at(self, step: int, measure: Callable[[], float]) -> float:
        """λ of a step; `measure` gives the mean eigenvalue of the Fisher matrix at the first."""
        return self.damping.at(step, measure)

    def exploded(self, loss: float) -> bool:
        """Whether the last step made the loss explode, so that it is to be undone; λ rises then."""
        if not self.divergence.exploded(loss):
            return False
        self.rejected += 1
        self.damping.refuse()
        return True

    def rejects(self, change: float, predicted: float, step: int) -> bool:
        """Compare the change of the loss with the predicted one and adapt λ; whether the step is to be undone."""
        undone = self.damping.compare(change, predicted, step)
        self.rejected += undone
        return undone

    def skip(self) -> None:
        """Count a step that was left out."""
        self.skipped += 1

    def check_step_size(self, step_size: float) -> None:
        """Adapt λ to the step size α that the exact quadratic model has chosen."""
        self.damping.check_step_size(step_size)

    def raise_for_fixed_rate(self) -> None:
        """Raise λ to that of a fixed rate, because there is no exact quadratic model."""
        self.damping.raise_for_fixed_rate()

    def warnings(self) -> Iterable[str]:
        """Messages to the user."""
        return self.damping.warnings()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        return {
            "damping": self.damping.state_dict(),
            "divergence": self.divergence.state_dict(),
            "rejected": self.rejected,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.damping.load_state_dict(state["damping"])
        self.divergence.load_state_dict(state["divergence"])
        self.rejected, self.skipped = state["rejected"], state["skipped"]
