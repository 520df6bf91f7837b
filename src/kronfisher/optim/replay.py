"""Repeats a forward pass: dropout masks are replayed, buffers and modules' attributes are left alone."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kronfisher.capture.capture import Capture
from kronfisher.capture.containers import tensors_in
from kronfisher.capture.isolation import replace_contents, without_weight_cache

__all__ = ["ForwardPass", "Snapshot"]


class Snapshot:
    """Random state, buffers, modules' attributes and autocast as they are before a forward pass.

    Args:
        model: whose buffers and devices count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            (module._buffers, {name: b if b is None else b.detach().clone() for name, b in module._buffers.items()})
            for module in model.modules()
            if module._buffers
        ]
        self._attributes = [(module.__dict__, dict(module.__dict__)) for module in model.modules()]
        devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
        self._random = _random_state(devices)
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in {"cpu", *(device.type for device in devices)}
            if torch.is_autocast_enabled(kind)
        ]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Restore that state; the present one is put back at the end."""
        present = _random_state(set(self._random[3]))
        with ExitStack() as stack:
            stack.enter_context(without_weight_cache())  # it may hold the weights as they were before a step
            for attributes, values in self._attributes:
                stack.enter_context(replace_contents([attributes], values))
            for kind, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            if "torch._dynamo" in sys.modules:  # otherwise nothing can be compiled, and importing it takes seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for buffers, values in self._buffers:
                copies = {name: value if value is None else value.clone() for name, value in values.items()}
                stack.enter_context(replace_contents([buffers], copies))
            _set_random_state(self._random)
            try:
                yield
            finally:
                _set_random_state(present)


@dataclass
class ForwardPass:
    """One forward pass of a training step.

    Attributes:
        forward: the function that was called.
        snapshot: the state before it, if it is going to be repeated.
        capture: of the layers' calls, if statistics are due.
        answer: what the model returned, until the backward pass.
        values: the outputs without their graph, if the pass is going to be repeated.
        targets: as the likelihood takes them.
        loss: the mean negative log-likelihood, in float64.
        count: the number of examples that count.
        kept: whether gradients were set to zero between this pass and its backward pass.
    """

    forward: Callable[[], Tensor]
    snapshot: Snapshot | None = None
    capture: Capture | None = None
    answer: Any = None
    values: Tensor | None = None
    targets: Any = None
    loss: Tensor | None = None
    count: float | Tensor = field(default=0.0)
    kept: bool = False

    def led_to(self, outputs: Any) -> bool:
        """Whether these outputs are among what the model returned, or were computed from that."""
        return isinstance(outputs, Tensor) and _depends(outputs, list(tensors_in(self.answer)))

    @property
    def low_precision(self) -> bool:
        """Whether autocast was on, so that outputs have few digits."""
        return self.snapshot is not None and bool(self.snapshot.autocast)

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """A context in which `forward` gives the same outputs once more."""
        assert self.snapshot is not None
        with self.snapshot.replayed():
            yield


def _depends(tensor: Tensor, sources: list[Tensor]) -> bool:
    """Whether a tensor is one of these, or was computed from them."""
    if any(tensor is source for source in sources):
        return True
    ends = {source.grad_fn for source in sources if source.grad_fn is not None}
    stack, seen = [tensor.grad_fn], set()
    while ends and stack:
        if (node := stack.pop()) in ends:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            stack += [child for child, _ in node.next_functions]
    return False


RandomState = tuple[Any, Any, Tensor, dict[torch.device, Tensor]]


def _random_state(devices: set[torch.device]) -> RandomState:
    states = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state(), states


def _set_random_state(state: RandomState) -> None:
    python, arrays, cpu, devices = state
    random.setstate(python)
    np.random.set_state(arrays)
    torch.default_generator.set_state(cpu)
    for device, own in devices.items():
        torch.get_device_module(device).set_rng_state(own, device)
