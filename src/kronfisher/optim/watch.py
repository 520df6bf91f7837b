"""Tells the user what goes wrong while a model is trained: each kind of trouble once, with what to do."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kronfisher.errors import NumericalWarning, UnsupportedError

__all__ = ["Watch", "no_curvature_error", "require_one_process"]


@dataclass
class Watch:
    """What was seen, and what the user was told.

    Attributes:
        overdue: steps that ran on statistics older than promised.
        told: kinds of trouble that were told, with the message.
    """

    overdue: int = 0
    told: dict[str, str] = field(default_factory=dict)

    def tell(self, kind: str, message: str) -> None:
        """Warn, unless this kind of trouble was told before."""
        if kind not in self.told:
            self.told[kind] = message
            warnings.warn(message, NumericalWarning, stacklevel=6)

    def late(self, step: int, *, seen: bool, call: str) -> None:
        """Count a step that runs on statistics older than promised.

        Args:
            step: its number.
            seen: whether a forward pass of ours was run for it.
            call: what to write for one.
        """
        self.overdue += 1
        if seen:
            why = "the batch's statistics were not finite and were left out: check the loss and the data"
        else:
            why = f"no forward pass was captured where they were due: {call}"
        self.tell("overdue", f"Step {step} runs on curvature older than `refresh` promises, because {why}.")

    def idle(self, step: int, *, seen: bool) -> None:
        """Tell of a step that moves nothing, for want of gradients or of statistics."""
        if seen:
            why = "no batch so far gave any curvature: check for targets that are all ignored, and for NaN or Inf"
        else:
            why = "no trained parameter has a gradient: run the backward pass between zero_grad() and step()"
        self.tell(f"idle, {seen}", f"Step {step} moves nothing, because {why}.")

    def unchanged(self, step: int, *, gradients: bool) -> None:
        """Tell of gradients that stay as they are, for want of statistics, or that are not there."""
        if gradients:
            why = "no batch so far gave any curvature: check for targets that are all ignored, and for NaN or Inf"
        else:
            why = "no parameter has a gradient: run the backward pass between zero_grad() and preconditioner.step()"
        self.tell(f"unchanged, {gradients}", f"Step {step} preconditions nothing, because {why}.")

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        return {"overdue": self.overdue, "told": dict(self.told)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.overdue, self.told = state["overdue"], dict(state["told"])


def no_curvature_error(call: str) -> UnsupportedError:
    """The error for a first step without a forward pass of ours; `call` is what to write."""
    return UnsupportedError(f"There is no curvature yet: {call}.")


def require_one_process() -> None:
    """UnsupportedError in a process group of several ranks, whose curvature would differ from rank to rank."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise UnsupportedError(
            f"Training in a process group of {distributed.get_world_size()} ranks is not supported yet: each rank "
            "would precondition with its own curvature, and the weights would drift apart. Train in one process, or "
            "use another optimiser there."
        )
