"""Whether training has gone wrong, as the losses of successive batches show."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from kronfisher.optim.replay import Pass

__all__ = ["Watch"]

JUMP = 20.0  # a loss that rises by so many times its usual change from batch to batch has exploded


@dataclass
class Watch:
    """The usual course of the loss.

    Attributes:
        loss: the last one.
        spread: the mean change from batch to batch.
        seen: how many there were.
        failures: batches in a row whose loss is not finite or exploded.
    """

    loss: float = 0.0
    spread: float = 0.0
    seen: int = 0
    failures: int = 0

    def exploded(self, passes: Sequence[Pass]) -> bool:
        """Whether the last step made the loss explode, as this batch shows."""
        if not passes or any(one.loss is None or one.loss.device.type != "cpu" for one in passes):
            return False  # elsewhere it would take a synchronisation
        loss = sum(float(one.loss) for one in passes if one.loss is not None)
        if not isfinite(loss):  # perhaps only the batch: the weights are to blame if it happens again
            self.failures += 1
            return self.failures > 1
        jump = loss - self.loss
        if self.seen > 5 and jump > JUMP * self.spread and self.failures == 0:
            self.failures += 1
            return True
        self.failures = 0
        keep = 0.9 if self.seen else 0.0
        self.spread = keep * self.spread + (1 - keep) * abs(jump if self.seen else 0.0)
        self.loss, self.seen = loss, self.seen + 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        vars(self).update(state)
