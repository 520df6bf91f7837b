"""The forward and backward passes of one step, and what is collected on the way."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from kronfisher.capture.capture import Receiver
from kronfisher.errors import DataError, NumericalError
from kronfisher.likelihoods import Likelihood
from kronfisher.optim.curvature import Curvature, require_outputs
from kronfisher.optim.replay import Pass, Snapshot
from kronfisher.optim.row_inverse import Rows

__all__ = ["Evaluation"]


class Evaluation:
    """Runs a model forward and backward, under capture where something is to be collected.

    Args:
        model: unwrapped.
        likelihood: whose loss is differentiated.
        curvature: which gets the statistics.
        parameters: gives name → parameter, all that are trained.
        rates: gives name → learning rate.

    Attributes:
        passes: of the step in hand.
        opaque: whether a loss that cannot be evaluated again was given.
        whole: whether a step does everything, so that nobody else touches the gradient.
        rows: what gradients are made of, if inverses are to be applied to that.
        rows_pay: whether they were cheaper at the last step with statistics.
        loss: the last one, detached.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        curvature: Curvature,
        parameters: Callable[[], Mapping[str, nn.Parameter]],
        rates: Callable[[], Mapping[str, float]],
    ) -> None:
        self.model, self.likelihood, self.curvature = model, likelihood, curvature
        self._parameters, self._rates = parameters, rates
        self.passes: list[Pass] = []
        self.opaque = self.whole = False
        self.rows: Rows | None = None
        self.loss: Tensor | None = None
        self.rows_pay = False

    def forget(self) -> None:
        """Drop forward passes that no step followed."""
        self.passes, self.opaque, self.rows = [], False, None

    def taken(self) -> tuple[list[Pass], bool, Rows | None]:
        """The complete passes, whether a loss was opaque, and rows; they are forgotten here."""
        found = [one for one in self.passes if one.loss is not None], self.opaque, self.rows
        self.forget()
        return found

    def mean_loss(self, outputs: Tensor, targets: Any) -> tuple[Tensor, float | Tensor]:
        """The loss in float64, and the number of data that count."""
        mask = self.likelihood.positions(outputs.detach(), targets)
        count = float(len(outputs)) if mask is None else mask.any(dim=1).sum().clamp_min(1)
        return -self.likelihood.log_prob(outputs, targets).sum(dtype=torch.float64) / count, count

    def change(self, passes: list[Pass]) -> float:
        """By how much the loss has changed since these passes."""
        change = 0.0
        for one in passes:
            assert one.loss is not None
            with one.again():
                loss, _ = self.mean_loss(one.forward(), one.targets)
            change += float(loss) - float(one.loss)
        return change

    def forward(self, function: Callable[[], Any], *, again: bool) -> Tensor:
        """The outputs that `function` returns; `again`: it will be called again."""
        curvature = self.curvature
        curvature.prepare()
        snapshot = Snapshot(self.model) if again else None
        with torch.enable_grad():
            if curvature.due or (self.whole and self.rows_pay):
                with curvature.captured() as capture:
                    outputs = function()
            else:
                capture, outputs = None, function()
        require_outputs(outputs)
        self.passes.append(Pass(function, snapshot, capture, outputs, outputs.detach() if again else None))
        return outputs

    def backward(
        self,
        outputs: Tensor,
        targets: Any,
        loss: Tensor | None,
        scale: Callable[[Tensor], Tensor] | None,
        *,
        again: bool,
        decayed: bool,
    ) -> Tensor:
        """Fill ``.grad``, collect statistics where they are due; the loss, detached."""
        done = next((one for one in self.passes if one.outputs is outputs), None)
        if done is None:
            raise DataError("backward needs the outputs exactly as forward returned them, once.")
        if self.curvature.due:  # reads values, so that it waits for a device
            with suppress(NumericalError):  # then the loss tells
                self.likelihood.check(outputs.detach(), targets, f"step {self.curvature.step}", self.curvature.labels)
        own, done.count = self.mean_loss(outputs, targets)
        done.targets, done.loss = targets, own.detach()
        self.opaque |= loss is not None
        total = own if loss is None else loss
        scaled = total if scale is None else scale(total)
        self.loss = done.loss if loss is None else loss.detach()
        capture, done.capture, done.outputs = done.capture, None, None
        if capture is None:
            scaled.backward()
        elif self.curvature.labels == "observed" and loss is None and scale is None:
            self._collect(capture, outputs, targets, own=lambda *given: self._listen(capture, scaled, *given))
        else:
            due = self.curvature.due
            self.rows = self._watched(capture, decayed)
            with nullcontext() if self.rows is None else capture.listening(self.rows.receive):
                if self.rows is None or due or again:
                    scaled.backward(retain_graph=due)
                else:
                    self._backward_sparing(scaled, self.rows, capture)
            self.rows_pay = self.rows is not None and bool(self.rows.found)
            if due:
                self._collect(capture, outputs, targets)
        return self.loss.to(outputs.dtype)

    def _backward_sparing(self, loss: Tensor, rows: Rows, capture: Any) -> None:
        """Fill ``.grad`` of the parameters that need it, another optimiser's too; others' steps are made from rows."""
        spared = rows.spare(capture)
        wanted = [p for name, p in self.model.named_parameters() if name not in spared and p.requires_grad]
        sources: list[Tensor | GradientEdge] = [*rows.edges, *wanted]
        found = torch.autograd.grad(loss, sources, allow_unused=True)[len(rows.edges) :]  # pyright: ignore
        for parameter, gradient in zip(wanted, found, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _watched(self, capture: Any, decayed: bool) -> Rows | None:
        """What keeps rows of the loss's own backward pass, where nobody else has a hand in the gradient."""
        if not self.whole or decayed:
            return None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return None
        for parameter in self._parameters().values():
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                return None
        rows = Rows.of(self.curvature.layers, self._rates())
        rows.watch(capture)
        return rows

    def _listen(self, capture: Any, loss: Tensor, receive: Receiver, count: float | Tensor) -> None:
        with capture.listening(lambda call, gradient: receive(call, gradient * count)):
            loss.backward(retain_graph=self.curvature.turns)

    def _collect(self, capture: Any, outputs: Tensor, targets: Any, own: Any = None) -> None:
        try:
            self.curvature.absorb(capture, outputs, targets, retain=False, own=own)
        except NumericalError:  # outputs that are not finite
            if own is not None:
                self.forget()
                for parameter in self._parameters().values():
                    parameter.grad = None
