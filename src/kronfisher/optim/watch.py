"""Tells the user what goes wrong while a model is trained: each kind of trouble once, with what to do."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from kronfisher.capture.graph import UNSEEN
from kronfisher.errors import NumericalWarning, UnsupportedError
from kronfisher.tables import together

OUTSIDE = 0.5  # the share of parameters outside every fit that is told
MEMORY = 0.05  # the weight of the newest loss in its average
FIRST = 10  # losses whose mean is the loss at the start
PATIENCE = 100  # steps before a loss above its start or a low rate is told, and the least for which a loss has grown
UNDONE = 5  # steps undone in a row
UNREAD = 1000  # losses that are kept apart
SMALL = 0.01  # a factor on an optimiser's own step below which lr looks like the rate of another optimiser
CERTAIN = 3.0  # standard errors of an average by which it must have risen: losses of single examples are mostly noise

LEAVE_OUT = (
    "multiplies the optimiser's own step, which needs no learning rate, and the weights will hardly move: leave lr "
    "out, or let a scheduler start from 1.0"
)

__all__ = ["Watch", "no_curvature_error", "require_one_process", "require_rate"]


@dataclass
class Watch:
    """What was seen, and what the user was told.

    Losses are kept as tensors until they are read, where statistics are renewed.

    Attributes:
        overdue: steps that ran on statistics older than promised.
        told: kinds of trouble that were told, with the message.
        losses: how many were followed.
        undone: compared steps in a row that were undone.
        rate: the highest lr so far.
        course: average of the loss now, at the start, at its lowest, the number of losses until then, how many were
            not finite, and their variance about the average.
    """

    overdue: int = 0
    told: dict[str, str] = field(default_factory=dict)
    losses: int = 0
    undone: int = 0
    rate: float = 0.0
    course: list[float] | None = None
    _unread: list[Tensor] = field(default_factory=list, repr=False)

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
            why = (
                "no trained parameter has a gradient: run the backward pass between zero_grad() and step(), or give "
                "step() the outputs and the targets, step(lambda: model(x), y)"
            )
        self.tell(f"idle, {seen}", f"Step {step} moves nothing, because {why}.")

    def unchanged(self, step: int, *, gradients: bool) -> None:
        """Tell of gradients that stay as they are, for want of statistics, or that are not there."""
        if gradients:
            why = "no batch so far gave any curvature: check for targets that are all ignored, and for NaN or Inf"
        else:
            why = "no parameter has a gradient: run the backward pass between zero_grad() and preconditioner.step()"
        self.tell(f"unchanged, {gradients}", f"Step {step} preconditions nothing, because {why}.")

    def beyond(self, step: int, total: int, share: float) -> None:
        """Tell of steps after the last that was announced, at whose end the rate fell to this share."""
        self.tell(
            "beyond",
            f"Step {step + 1} comes after total_steps={total}, at whose end the rate fell to {share:.0%} of its size, "
            "where it stays. Give total_steps= the calls of optimizer.step in all of the "
            "training (epochs times batches, over the number of batches that are accumulated), or leave it out.",
        )

    def rated(self, step: int, rates: Iterable[float]) -> None:
        """Tell of rates that were never high, as groups and schedulers for other optimisers give them."""
        self.rate = max(self.rate, *rates)
        if step + 1 >= PATIENCE and 0 < self.rate < SMALL:
            self.tell(
                "rate",
                f"After {step + 1} steps lr was never above {self.rate:.3g}. It {LEAVE_OUT} (in all groups, too).",
            )

    def untrained(self, names: Iterable[str]) -> None:
        """Tell of parameters that require a gradient and are in no group."""
        if names := list(names):
            self.tell(
                f"untrained, {names}",
                f"{', '.join(names)}: in the model, but in no group of the optimiser, so that nothing moves them. They "
                "were unfrozen, added or replaced after it was made: optimizer.add_param_group({'params': ...}) trains "
                "them, and a new optimiser what took the place of others.",
            )

    def follow(self, loss: Tensor) -> None:
        """Take the loss of a step into its course, without waiting for a device: it is read by `judge`."""
        self._unread.append(loss.detach().reshape(1))
        if len(self._unread) == UNREAD:
            self._unread = [torch.cat([some.double() for some in self._unread])]

    def _read(self) -> None:
        """Follow the losses that wait."""
        losses = torch.cat([some.double() for some in self._unread]).tolist() if self._unread else []
        self._unread.clear()
        now, start, low, at, bad, variance = self.course or (0.0,) * 6
        for loss in losses:
            self.losses += 1
            if isfinite(loss):
                share, change = max(1 / self.losses, MEMORY), loss - now
                now += share * change
                variance = (1 - share) * (variance + share * change**2)
            else:
                bad += 1
            start = now if self.losses <= FIRST else start
            if now < low or self.losses <= FIRST:
                low, at = now, self.losses
            self.course = [now, start, low, float(at), bad, variance]

    def judge(self) -> None:
        """Tell of a loss that is not finite, above its start, or growing for long."""
        self._read()
        if self.course is None:
            return
        now, start, low, at, bad, variance = self.course
        noise, first = (CERTAIN * (variance * share) ** 0.5 for share in (MEMORY / 2, 1 / FIRST))  # of both averages
        if bad:
            self.tell(
                "not finite",
                "The loss was not finite, and such steps move nothing: check the batch for NaN, Inf and targets out of "
                "range, and the network for overflow; a lower lr or float32 in place of half precision may help.",
            )
        if self.losses < PATIENCE:
            return
        if now > start + (noise**2 + first**2) ** 0.5:
            self.tell(
                "above",
                f"After {self.losses} steps the loss is above its start ({now:.4g}, at first {start:.4g}): lower "
                "lr, use larger batches, or scale inputs and targets to about one.",
            )
        elif self.losses - at > max(PATIENCE, self.losses / 2) and now > low + max((start - low) / 2, noise):
            self.tell(
                "growing",
                f"The loss has grown for {self.losses - int(at)} steps ({now:.4g}, at best {low:.4g}): lower lr, or "
                "let it fall with total_steps= or a scheduler.",
            )

    def uncovered(self, names: Mapping[str, str], sizes: Mapping[str, int], step: str) -> None:
        """Tell if much of the network is outside every fit: name → why; `step` is what it takes instead."""
        outside = sum(sizes.get(name, 0) for name in names) / max(sum(sizes.values()), 1)
        if outside > OUTSIDE:
            reasons = "; ".join(together(names))
            if any(UNSEEN in reason for reason in names.values()):
                reasons += (
                    ". Out of sight are models that ran before they were captured (run them within the function that "
                    "is given to step: step(lambda: model(x), y)), in another thread, in torch.func or in compiled code"
                )
            self.tell("uncovered", f"{outside:.0%} of the parameters are outside every fit and take {step}: {reasons}.")

    def compared(self, *, undone: bool) -> None:
        """Count compared steps in a row that were undone."""
        self.undone = self.undone + 1 if undone else 0
        if self.undone >= UNDONE:
            self.tell(
                "undone",
                f"{self.undone} compared steps in a row were undone, and the weights stand still: use larger batches "
                "or the default step, step=kf.LayerwiseStep().",
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        self._read()
        own = {name: value for name, value in vars(self).items() if name != "_unread"}
        return {**own, "told": dict(self.told)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        course = state["course"]
        course = course.tolist() if isinstance(course, Tensor) else course
        course = course and [*course, 0.0][:6]  # an earlier version kept no variance
        vars(self).update({**state, "told": dict(state["told"]), "course": course})
        self._unread.clear()


def no_curvature_error(call: str) -> UnsupportedError:
    """The error for a first step without a forward pass of ours; `call` is what to write."""
    return UnsupportedError(f"There is no curvature yet: {call}.")


def require_one_process() -> None:
    """UnsupportedError where several ranks are initialised, whose curvature would differ from rank to rank."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise UnsupportedError(
            f"Training in a process group of {distributed.get_world_size()} ranks without group=: each rank would "
            "precondition with its own curvature, and the weights would drift apart. Give the optimiser "
            "group=torch.distributed.group.WORLD, or a group of this process alone where it trains a model of its own."
        )


def require_rate(lr: float, *, stacklevel: int) -> None:
    """Warn of a factor on the step that looks like the learning rate of another optimiser.

    Args:
        lr: as it was given.
        stacklevel: of the caller of the optimiser.

    Raises:
        ValueError: it is negative.
    """
    if not lr >= 0:
        raise ValueError(f"lr={lr!r} must not be negative.")
    if 0 < lr < SMALL:
        warnings.warn(
            f"lr={lr!r} {LEAVE_OUT}.",
            NumericalWarning,
            stacklevel=stacklevel,
        )
