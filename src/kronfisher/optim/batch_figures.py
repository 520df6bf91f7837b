"""What the last batch that brought statistics was like: its rows, the cost of its passes, its distance from data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from kronfisher.capture.capture import Capture

__all__ = ["BatchFigures"]


@dataclass
class BatchFigures:
    """Sums over the parts of one batch, and over ranks.

    Attributes:
        rows: the most rows that a layer had, of all positions of the examples that count.
        pass_cost: multiplications of a forward and backward pass.
        misfits: the sum of `sum_of_misfits`; None if any part had no labels.
        examples: that count.
    """

    rows: float | Tensor = 0.0
    pass_cost: float = 0.0
    misfits: float | Tensor | None = 0.0
    examples: float | Tensor = 0.0
    _settled: tuple[float | Tensor, float] = field(default=(0.0, 0.0), init=False, repr=False)  # alike on all ranks

    @property
    def misfit(self) -> float | Tensor | None:
        """The mean misfit; None if it is not known."""
        if self.misfits is None or not (isinstance(self.examples, Tensor) or self.examples > 0):
            return None
        return self.misfits / self.examples

    def begin(self) -> None:
        """Begin with another batch."""
        self.rows = self.pass_cost = self.misfits = self.examples = 0.0

    def add(self, capture: Capture, counted: float | Tensor, size: int, misfits: Tensor | None) -> None:
        """Add a part of the batch.

        Args:
            capture: of its forward pass.
            counted: examples of it that count.
            size: all of its examples.
            misfits: their sum, if they have labels.
        """
        most = 0
        for call in capture.calls:
            for use in call.uses:
                if use.weight is not None:
                    outputs, inputs = use.weight.size[1], use.weight.numel // max(use.weight.size[1], 1)
                    rows = prod(call.shape) // max(outputs, 1)
                    self.pass_cost += 3.0 * rows * outputs * inputs
                    most = max(most, rows)
        self.rows = self.rows + most * counted / size
        self.examples = self.examples + counted
        self.misfits = None if self.misfits is None or misfits is None else self.misfits + misfits

    def numbers(self) -> dict[str, float | Tensor]:
        """What ranks add up."""
        misfits = float("nan") if self.misfits is None else self.misfits
        return {"rows": self.rows, "cost": self.pass_cost, "misfits": misfits, "examples": self.examples}

    def settle(self, sums: Mapping[str, float] | None) -> None:
        """Take over the sums of all ranks, or what they were before if there are none."""
        if sums is not None:
            self._settled = sums["rows"], sums["cost"]
            self.misfits, self.examples = sums["misfits"], sums["examples"]
        self.rows, self.pass_cost = self._settled

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {"rows": self.rows, "pass_cost": self.pass_cost}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._settled = self.rows, self.pass_cost = state["rows"], state.get("pass_cost", 0.0)
