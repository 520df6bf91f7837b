"""Captures the forward passes of loops that call the model themselves."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.capture.capture import Capture
from kronfisher.capture.language_models import shift_labels
from kronfisher.fisher.parameters import unwrapped
from kronfisher.optim.forward_backward import require_outputs
from kronfisher.optim.parts import StepParts

__all__ = ["Attachment"]

CHOOSE = "say which are the outputs: optimizer.attach(outputs=lambda answer: answer[0])"

Targets = Callable[[tuple[Any, ...], dict[str, Any]], Any]


class Attachment:
    """Two hooks on a model: where statistics are due they capture its forward pass and draw labels.

    A copy of it, as in a copy of the model, does nothing.

    Args:
        parts: of the optimiser, whose statistics receive the passes.
        step: gives the number of the step.
        targets: gives the targets of a call, from its positional and keyword arguments.
        outputs: gives the outputs, from what the model returned.
    """

    def __init__(
        self,
        parts: StepParts | None = None,
        step: Callable[[], int] = int,
        targets: Targets | None = None,
        outputs: Callable[[Any], Any] | None = None,
    ) -> None:
        self._parts, self._step, self._targets, self._outputs = parts, step, targets, outputs
        self._open = ExitStack()  # of the pass that is captured now
        self._capture: Capture | None = None
        self._handles: list[Any] = []

    def __reduce__(self) -> Any:
        return Attachment, ()

    @classmethod
    @cache
    def _stay_eager(cls) -> None:
        """Keep hooks from being compiled with the model, once there are any: importing the compiler takes seconds."""
        for name in ("_begin", "_end"):
            setattr(cls, name, torch.compiler.disable(getattr(cls, name)))

    def add_to(self, model: nn.Module) -> None:
        """Register the hooks."""
        self._stay_eager()
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Remove them."""
        self._open.close()
        self._capture = None
        for handle in self._handles:
            handle.remove()

    def _begin(self, model: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self._parts is None or self._parts.forward_backward.running or not torch.is_grad_enabled():
            return
        self._open.close()  # of a pass that was interrupted
        statistics, step = self._parts.statistics, self._step()
        statistics.prepare(step)
        if statistics.is_due(step):
            self._capture = self._open.enter_context(statistics.captured())

    def _end(self, model: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], answer: Any) -> None:
        capture, self._capture = self._capture, None
        self._open.close()
        if capture is None or answer is None or self._parts is None:  # None: the model has raised
            return
        outputs = require_outputs(answer if self._outputs is None else self._outputs(answer), CHOOSE)
        if not outputs.requires_grad:
            return
        if self._targets is not None:
            targets = self._targets(inputs, options)
        elif isinstance(targets := options.get("labels"), Tensor):
            targets = shift_labels(targets, outputs, unwrapped(model))
        else:
            targets = None
        self._parts.forward_backward.saw()
        self._parts.statistics.read(capture, outputs, targets, self._step())
