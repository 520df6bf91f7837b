"""Detects that training diverges, from the losses of successive batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

__all__ = ["Divergence"]

JUMP = 20.0  # a loss that rises by this many times its mean change between batches has exploded


@dataclass
class Divergence:
    """The losses of training so far, summarised.

    Attributes:
        loss: the last one.
        spread: the mean change from batch to batch.
        seen: the number of losses.
        failures: batches in a row whose loss is not finite or exploded.
    """

    loss: float = 0.0
    spread: float = 0.0
    seen: int = 0
    failures: int = 0

    def exploded(self, loss: float) -> bool:
        """Whether the loss of this batch shows that the last step made it explode."""
        if not isfinite(loss):  # the batch may be the cause; a second one in a row is blamed on the weights
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
        """Everything that a resumed training needs."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        vars(self).update(state)
