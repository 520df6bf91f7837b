"""What the last batch that brought statistics was like: its rows, the cost of its passes, its distance from data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from kronfisher.capture.capture import Capture

__all__ = ["BatchFigures", "multiplications", "sizes_of_weights"]


def sizes_of_weights(capture: Capture) -> Iterator[tuple[int, int, int, bool]]:
    """For each use of a weight in a forward pass: rows, outputs, inputs, and whether they are looked up.

    Lookups count as products with the whole table. That is too much, and deliberate: what a pass seems to cost is what
    inverses may cost, and with less, those of a vocabulary are made half by half in the first steps, where halves that
    do not belong together cost a GPT much of its progress.
    """
    for call in capture.calls:
        for use in call.uses:
            if use.weight is not None:
                outputs = max(use.weight.size[1], 1)
                yield prod(call.shape) // outputs, outputs, use.weight.numel // outputs, use.looked_up


def multiplications(rows: int, outputs: int, inputs: int) -> float:
    """Of a product with a weight in a forward and backward pass: with inputs, and for both gradients."""
    return 3.0 * rows * outputs * inputs


@dataclass
class BatchFigures:
    """Sums over the parts of one batch, and over ranks.

    Attributes:
        rows: the most rows that a layer had, of all positions of the examples that count; these, where that is more.
        pass_cost: multiplications of a forward and backward pass.
        misfits: the sum of `sum_of_misfits`, ``[3]``; None if any part had no labels. The last number is how far the
            loss that was differentiated can fall, as a sum over parts.
        examples: that count.
        ranks: whose numbers these are.
    """

    rows: float | Tensor = 0.0
    pass_cost: float = 0.0
    misfits: Tensor | None = None
    examples: float | Tensor = 0.0
    ranks: float = 1.0
    _parts: int = field(default=0, init=False, repr=False)
    _settled: tuple[float | Tensor, float] = field(default=(0.0, 0.0), init=False, repr=False)  # alike on all ranks

    @property
    def misfit(self) -> Tensor | None:
        """The mean misfits ``[3]``; None if they are not known."""
        if self.misfits is None or not (isinstance(self.examples, Tensor) or self.examples > 0):
            return None
        own, constant, excess = self.misfits.unbind()
        return torch.stack([own / self.examples, constant / self.examples, excess / self.ranks])

    def begin(self) -> None:
        """Begin with another batch."""
        self.rows = self.pass_cost = self.examples = 0.0
        self.misfits, self._parts, self.ranks = None, 0, 1.0

    def add(self, capture: Capture, counted: float | Tensor, size: int, misfits: Tensor | None) -> None:
        """Add a part of the batch.

        Args:
            capture: of its forward pass.
            counted: examples of it that count.
            size: all of its examples.
            misfits: their sum ``[3]``, if they have labels.
        """
        most = size  # where no weight is treated by layers, as where biases alone are trained
        for rows, outputs, inputs, _ in sizes_of_weights(capture):
            self.pass_cost += multiplications(rows, outputs, inputs)
            most = max(most, rows)
        self.rows = self.rows + most * counted / size
        self.examples = self.examples + counted
        if self._parts:
            misfits = None if self.misfits is None or misfits is None else self.misfits + misfits
        self.misfits, self._parts = misfits, self._parts + 1

    def numbers(self) -> dict[str, float | Tensor]:
        """What ranks add up."""
        own, constant, excess = (float("nan"),) * 3 if self.misfits is None else self.misfits.unbind()
        numbers = {"rows": self.rows, "cost": self.pass_cost, "examples": self.examples, "ranks": 1.0}
        return {**numbers, "misfits": own, "constants": constant, "excesses": excess}

    def settle(self, sums: Mapping[str, float] | None) -> None:
        """Take over the sums of all ranks, or what they were before if there are none."""
        if sums is not None:
            self._settled = sums["rows"], sums["cost"]
            self.misfits = torch.stack([torch.as_tensor(sums[name]) for name in ("misfits", "constants", "excesses")])
            self.examples, self.ranks = sums["examples"], sums["ranks"]
        else:  # some rank had none: what this one saw alone must steer nothing
            self.misfits = None
        self.rows, self.pass_cost = self._settled

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {"rows": self.rows, "pass_cost": self.pass_cost}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._settled = self.rows, self.pass_cost = state["rows"], state.get("pass_cost", 0.0)
