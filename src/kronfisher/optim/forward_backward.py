"""The first part of a step: forward and backward passes, recorded, with their losses and gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from kronfisher.capture.capture import Capture, Receiver
from kronfisher.capture.forward import find_outputs
from kronfisher.errors import DataError, NumericalError
from kronfisher.likelihoods import Likelihood
from kronfisher.linalg import promote
from kronfisher.optim.replay import ForwardPass, Snapshot
from kronfisher.optim.row_inverse import RowInverse
from kronfisher.optim.statistics import Statistics

__all__ = ["ForwardBackward", "StepPasses", "require_outputs"]

CHOOSE = "pass a function that returns the outputs, such as step(lambda: model(x)[0], y)"
MADE = "give the tensor that the likelihood is of: answer[0], or torch.cat of several beside a loss of your own (loss=)"


@dataclass(frozen=True)
class StepPasses:
    """The passes of one step.

    Attributes:
        passes: those that a backward pass followed.
        opaque: whether a loss was given that cannot be evaluated again.
        seen: whether a backward pass of ours was run, or a captured pass brought statistics.
        rows: of the backward pass, if inverses are to be applied to them.
    """

    passes: list[ForwardPass]
    opaque: bool
    seen: bool
    rows: RowInverse | None

    @property
    def repeatable(self) -> bool:
        """Whether all of the loss can be evaluated again."""
        return bool(self.passes) and not self.opaque and all(one.snapshot is not None for one in self.passes)


class ForwardBackward:
    """Runs a model forward and backward, under capture where statistics are due.

    Args:
        model: unwrapped.
        likelihood: whose loss is differentiated.

    Attributes:
        loss: the last one, detached.
        running: whether a forward pass of ours runs.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood) -> None:
        self.model, self.likelihood = model, likelihood
        self.loss: Tensor | None = None
        self.running = False
        self._rows_pay = False  # whether rows were worth capturing at the last captured pass
        self.forget()

    def forget(self) -> None:
        """Drop forward passes that no step followed."""
        self._passes: list[ForwardPass] = []
        self._opaque = self._seen = False
        self._rows: RowInverse | None = None

    def forget_done(self) -> None:
        """Drop passes whose gradients are no longer there; forward passes stay until the second time."""
        waiting, seen = [one for one in self._passes if one.answer is not None and not one.kept], self._seen
        self.forget()
        for one in waiting:
            one.kept = True
        self._passes, self._seen = waiting, seen

    def saw(self) -> None:
        """Note that a pass of the user's was captured for this step."""
        self._seen = True

    def take(self) -> StepPasses:
        """The passes of this step; they are forgotten here."""
        passes = [one for one in self._passes if one.loss is not None]
        taken = StepPasses(passes, self._opaque, bool(passes) or self._seen, self._rows)
        self.forget()
        return taken

    def mean_loss(self, outputs: Tensor, targets: Any) -> tuple[Tensor, float | Tensor]:
        """The loss in float64, and the number of examples that count."""
        count = self._count(outputs, targets)
        return -self.likelihood.log_prob(outputs, targets).sum(dtype=torch.float64) / count, count

    def _count(self, outputs: Tensor, targets: Any) -> float | Tensor:
        mask = self.likelihood.positions(outputs.detach(), targets)
        if mask is None:
            return float(len(outputs))
        counts = mask.any(dim=1) if mask.shape[1] > 1 else mask
        return counts.sum().clamp_min(1)

    def loss_of(self, outputs: Any, targets: Any) -> Tensor:
        """The loss, in the precision of the outputs but at least float32."""
        outputs = require_outputs(outputs, MADE)
        return _rounded(self.mean_loss(outputs, targets)[0], outputs)

    def change(self, passes: Sequence[ForwardPass]) -> float:
        """By how much the loss has changed since these passes."""
        change = 0.0
        for one in passes:
            assert one.loss is not None
            with torch.enable_grad(), one.repeating():  # the model may differentiate within its forward pass
                outputs = one.forward().detach()
            loss, _ = self.mean_loss(outputs, one.targets)
            change += float(loss) - float(one.loss)
        return change

    # Passes -----------------------------------------------------------------------------------------------------------

    def forward(
        self, function: Callable[[], Any], statistics: Statistics, step: int, *, whole: bool, again: bool
    ) -> Any:
        """What `function` returns: the outputs, an object whose ``logits`` they are, or anything that they are made of.

        Args:
            function: runs the model.
            statistics: captures the pass where statistics are due.
            step: number of the step.
            whole: whether no code of the user's runs between this pass and the step.
            again: whether the pass is going to be repeated.
        """
        statistics.prepare(step)
        snapshot = Snapshot(self.model) if again else None
        captured = statistics.is_due(step) or (whole and self._rows_pay)
        self.running = True
        try:
            with torch.enable_grad(), statistics.captured() if captured else nullcontext() as capture:
                answer = function()
        finally:
            self.running = False
        values = None
        if whole or again or find_outputs(answer) is not None:
            outputs = require_outputs(answer)
            values = outputs.detach() if again else None
        self._passes.append(ForwardPass(lambda: require_outputs(function()), snapshot, capture, answer, values))
        return answer

    @torch.enable_grad()  # as the forward pass, whatever is set around the step
    def backward(
        self,
        outputs: Any,
        targets: Any,
        loss: Tensor | None,
        scale: Callable[[Tensor], Tensor] | None,
        statistics: Statistics,
        step: int,
        *,
        rows: Callable[[Capture], RowInverse | None],
        again: bool,
        spare: bool,
    ) -> Tensor:
        """Fill ``.grad``, and collect statistics where they are due.

        Args:
            outputs: of a pass by `forward`, or made of what it returned.
            targets: as the likelihood takes them; None where a loss is given that needs none.
            loss: differentiated in place of the likelihood's, if given.
            scale: applied to the loss before it is differentiated, if given.
            statistics: receive the captured pass.
            step: number of the step.
            rows: gives the inverses that take rows of the backward pass, if any do.
            again: whether the pass is going to be repeated.
            spare: whether gradients need not be formed where rows take their place.

        Returns:
            The loss, detached.
        """
        record = self._record(outputs, again)
        outputs, due = require_outputs(outputs, MADE), statistics.is_due(step)
        usable = due and statistics.accepts(outputs, targets, step)
        if self.likelihood.labelled(targets):
            own, record.count = self.mean_loss(outputs, targets)
        elif loss is not None:
            own, record.count = loss, self._count(outputs, targets)
        else:
            raise DataError(
                "a step needs targets, or a loss of your own: write optimizer.backward(outputs, y), or "
                "optimizer.backward(outputs, loss=loss); step(lambda: model(x), y) takes the targets, too."
            )
        record.targets, record.loss = targets, own.detach()
        self._opaque |= loss is not None
        if loss is not None and not (isinstance(loss, Tensor) and loss.numel() == 1):
            kind = f"has shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"is a {type(loss).__name__}"
            raise DataError(f"the loss {kind}, and has to be a tensor of one number, as torch makes it: losses.mean().")
        total = own if loss is None else loss
        if not total.requires_grad:
            raise DataError(
                "the loss depends on no parameter that requires a gradient: look for .detach(), torch.no_grad() and "
                "requires_grad_(False) in the model."
            )
        scaled = total if scale is None else scale(total)
        self.loss = record.loss if loss is None else loss.detach()
        capture, record.capture, record.answer = record.capture, None, None
        if capture is None:
            scaled.backward()
        elif statistics.labels == "observed" and loss is None and scale is None:
            with statistics.held():
                self._backward_observed(capture, outputs, targets, scaled, statistics, step, usable)
        else:
            self._rows = rows(capture)
            if loss is None or not usable:
                weighed = nullcontext(1.0)
            else:
                weighed = self._weighed(outputs, targets, record, total.detach(), scaled.detach())
            with weighed as weight, nullcontext() if self._rows is None else capture.listen(self._rows.receive):
                if self._rows is None or due or again or not spare:
                    scaled.backward(retain_graph=due)
                else:
                    self._backward_sparing(scaled, self._rows, capture)
            self._rows_pay = self._rows is not None and self._rows.pay(capture)
            if due:
                with suppress(NumericalError), statistics.held():  # something is not finite: this batch is left out
                    if usable:
                        statistics.absorb(capture, outputs, targets, step, retain=False, weight=weight)
                    else:
                        statistics.miss(step)
        return _rounded(self.loss, outputs)

    def _record(self, outputs: Any, again: bool) -> ForwardPass:
        """The pass that gave these outputs and waits for its backward pass.

        Only those very outputs will do where the pass is run `again`.

        Raises:
            DataError: there is none, or more than one.
        """
        waiting = [one for one in self._passes if one.answer is not None]
        found = [one for one in waiting if outputs is one.answer or outputs is find_outputs(one.answer)]
        if not (found or again):
            found = [one for one in waiting if one.led_to(outputs)]
        if len(found) > 1:
            raise DataError(
                f"the outputs are made of {len(found)} forward passes, and backward takes those of one. Give it the "
                "outputs of any of them, beside the loss of all: optimizer.backward(outputs, loss=loss)."
            )
        if not found:
            same = "exactly as forward returned them" if again else "that forward returned, or that are made of them"
            raise DataError(
                f"backward needs outputs {same}, once, and before the next step: write "
                "outputs = optimizer.forward(x); optimizer.backward(outputs, y); optimizer.step()."
            )
        return found[0]

    @contextmanager
    def _weighed(
        self, outputs: Tensor, targets: Any, record: ForwardPass, total: Tensor, scaled: Tensor
    ) -> Iterator[float | Tensor | None]:
        """How a loss of the caller's compares with the likelihood's, by their gradients at the outputs, 0-dim.

        Known once its backward pass is over; NaN if it does not come by the outputs, or if more than half of it is
        something else, such as a penalty, of which nobody knows how far it can fall. None without labels.
        """
        if not self.likelihood.labelled(targets):
            yield None
            return
        weight = torch.full((), torch.nan, device=outputs.device)
        own = torch.linalg.vector_norm(promote(self.likelihood.observed(outputs.detach(), targets))) / record.count

        def hook(gradient: Tensor) -> None:
            found = torch.linalg.vector_norm(promote(gradient)) * (total / scaled) / own
            rest = (total - found * record.loss).abs()
            weight.copy_(torch.where(rest <= total.abs() / 2, found, torch.nan))

        handle = outputs.register_hook(hook)
        try:
            yield weight
        finally:
            handle.remove()

    def _backward_observed(
        self,
        capture: Capture,
        outputs: Tensor,
        targets: Any,
        loss: Tensor,
        statistics: Statistics,
        step: int,
        usable: bool,
    ) -> None:
        """Fill ``.grad`` and collect statistics in one backward pass; neither if the outputs are not finite."""
        ran = False

        def listen(receive: Receiver, count: float | Tensor) -> None:
            nonlocal ran
            ran = True
            with capture.listen(lambda call, gradient: receive(call, gradient * count)):
                loss.backward(retain_graph=statistics.needs_second_backward(step))

        with suppress(NumericalError):
            if usable:
                return statistics.absorb(capture, outputs, targets, step, retain=False, own=listen, weight=1.0)
        if statistics.shared:  # others wait for this rank's gradients, and leave theirs out with these
            if not ran:
                loss.backward()
            if not usable:
                statistics.miss(step)
            return
        self.forget()
        self._seen = True
        for parameter in statistics.parameters.values():
            parameter.grad = None

    def _backward_sparing(self, loss: Tensor, rows: RowInverse, capture: Capture) -> None:
        """Fill ``.grad`` except of parameters whose step is made from rows; another optimiser's are filled, too."""
        spared = rows.spare(capture)
        wanted = [p for name, p in self.model.named_parameters() if name not in spared and p.requires_grad]
        sources: list[Tensor | GradientEdge] = [*rows.edges, *wanted]
        gradients = torch.autograd.grad(loss, sources, allow_unused=True)[len(rows.edges) :]  # pyright: ignore
        for parameter, gradient in zip(wanted, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        return {"rows_pay": self._rows_pay}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._rows_pay = state["rows_pay"]


def _rounded(loss: Tensor, outputs: Tensor) -> Tensor:
    """A loss in the precision of the outputs, but at least float32."""
    return loss.to(torch.promote_types(outputs.dtype, torch.float32))


def require_outputs(answer: Any, choose: str = CHOOSE) -> Tensor:
    """The outputs of a model: what it returned, or the ``logits`` of that.

    Args:
        answer: what it returned.
        choose: what to do where the outputs are only a part of it.

    Raises:
        DataError: there are none, or they are those of no example.
    """
    outputs = find_outputs(answer)
    if outputs is None:
        if isinstance(answer, Mapping) and answer:
            choose = choose.replace("[0]", f"[{next(iter(answer))!r}]")
        kind = type(answer).__name__
        raise DataError(f"the model returned {kind}, neither a tensor nor an object with `logits`; {choose}")
    if outputs.dim() == 0:
        raise DataError("the outputs are a single number; step(lambda: model(x), y) takes the outputs, not the loss")
    if len(outputs) == 0:
        raise DataError(f"the batch is empty: the outputs have shape {list(outputs.shape)}. Drop empty batches.")
    return outputs
