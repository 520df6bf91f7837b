"""Writes a step into the parameters, and takes it back. The last step is kept in the state of torch's optimiser."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kronfisher.optim.direction import Descent
from kronfisher.optim.step_size import StepLength

__all__ = ["add_penalty", "apply", "last_steps", "restore", "take_back"]

State = Mapping[Any, dict[str, Any]]  # parameter → what torch's optimiser keeps for it


def last_steps(state: State, parameters: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Name → last step δ₀, for the parameters that made one."""
    return {n: state[parameters[n]]["update"] for n in names if "update" in state[parameters[n]]}


def apply(
    state: State,
    parameters: Mapping[str, Tensor],
    descent: Descent,
    last: Mapping[str, Tensor],
    length: StepLength,
) -> None:
    """Add ``−along·natural + again·last`` to the parameters; `descent` and `last` are used up."""
    along, slope = length.along, descent.slope
    for name, direction in descent.natural.items():
        if isinstance(along, Tensor):
            direction.mul_(along)
        step = last[name].mul_(length.again) if name in last else torch.zeros_like(direction)
        step.add_(direction, alpha=-1.0 if isinstance(along, Tensor) else -along)
        if slope.device.type != "cpu":  # without waiting for the device: nothing moves if anything is not finite
            step = torch.where(torch.isfinite(slope), step, torch.zeros_like(step))
        parameters[name].add_(step)
        state[parameters[name]]["update"] = step
    torch.clear_autocast_cache()  # it may hold the weights as they were


def restore(state: State, parameters: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> None:
    """Undo a step bit for bit, from copies of the parameters before it."""
    for name, old in copies.items():
        parameters[name].copy_(old)
        state[parameters[name]].pop("update", None)


def take_back(state: State, parameters: Iterable[Tensor]) -> None:
    """Subtract the last step from the parameters."""
    for parameter in parameters:
        if (update := state[parameter].pop("update", None)) is not None:
            parameter.sub_(update)


def add_penalty(
    change: float, parameters: Mapping[str, Tensor], copies: Mapping[str, Tensor], decays: Mapping[str, float]
) -> float:
    """A change of the loss, with that of weight decay's ``½ η ‖θ‖²`` since the copies were made."""
    for name, old in copies.items():
        if decays[name]:
            squares = parameters[name].square().sum(dtype=torch.float64) - old.square().sum(dtype=torch.float64)
            change += decays[name] / 2 * float(squares)
    return change
