"""The five parts of a step, and a step composed of them."""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any

from torch import Tensor, nn

from kronfisher.capture.capture import Capture
from kronfisher.distributed import Ranks
from kronfisher.errors import NumericalWarning, RankError
from kronfisher.optim.direction import Direction
from kronfisher.optim.forward_backward import ForwardBackward, StepPasses
from kronfisher.optim.judge import Judge
from kronfisher.optim.replay import ForwardPass
from kronfisher.optim.report import TrainingReport
from kronfisher.optim.row_inverse import RowInverse
from kronfisher.optim.statistics import Statistics
from kronfisher.optim.step_size import StepInputs, StepLength, StepSize
from kronfisher.optim.trained_parameters import TrainedParameters
from kronfisher.optim.watch import Watch, no_curvature_error

__all__ = ["Parts", "StepParts"]

CALL = (
    "call step(lambda: model(x), y); or outputs = optimizer.forward(x) and optimizer.backward(outputs, y) before "
    "optimizer.step(); or, in a loop that calls the model itself, optimizer.attach() before it"
)


@dataclass
class StepParts(ABC):
    """The parts that make a step. Each owns its state, and can be replaced by an object with the same methods.

    Attributes:
        forward_backward: runs and records passes.
        statistics: averages the curvature.
        watch: tells the user what goes wrong.
        seconds: spent in a step outside statistics and inverses, by phase.
    """

    forward_backward: ForwardBackward
    statistics: Statistics
    watch: Watch = field(default_factory=Watch, kw_only=True)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"forward and backward": 0.0, "model": 0.0, "update": 0.0}, kw_only=True
    )

    @property
    def compares_losses(self) -> bool:
        """Whether the loss has to be one that can be evaluated again."""
        return False

    @property
    def uncovered_step(self) -> str:
        """What parameters outside every fit take."""
        return "plain momentum steps"

    @property
    def spares(self) -> bool:
        """Whether gradients need not be formed where inverses are applied to rows."""
        return True

    @abstractmethod
    def repeats(self, step: int) -> bool:
        """Whether this step runs the forward pass again."""

    @abstractmethod
    def row_inverse(self, capture: Capture, rates: Mapping[str, float]) -> RowInverse | None:
        """To be given rows of a step's backward pass; None where gradients alone will do."""

    @abstractmethod
    def make_step(self, model: nn.Module, trained: TrainedParameters, step: int, *, whole: bool) -> None:
        """One step after the backward pass.

        Args:
            model: unwrapped.
            trained: the parameters to change.
            step: number of the step.
            whole: whether no other code touched the gradient.

        Raises:
            UnsupportedError: there is no curvature because no forward pass of ours was run.
        """

    @property
    def evaluating(self) -> bool:
        """Whether the model holds weights to evaluate, not those to train."""
        return False

    def evaluate(self, evaluating: bool, parameters: Mapping[str, nn.Parameter]) -> None:  # noqa: B027
        """Exchange the weights to train and those to evaluate, where they differ."""

    @abstractmethod
    def extend(self, parameters: dict[str, nn.Parameter]) -> None:
        """Treat these parameters from now on."""

    @abstractmethod
    def report(self, step: int) -> TrainingReport:
        """The state of training after so many steps."""

    @staticmethod
    @abstractmethod
    def names() -> tuple[str, ...]:
        """The keys of the state."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs, by part."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            DataError: it was saved for other parameters or other fits.
        """

    def forward(self, function: Callable[[], Any], step: int, *, whole: bool) -> Any:
        """What `function` returns; `whole`: no code of the user's runs between this pass and the step."""
        with self._timed("forward and backward"):
            return self.forward_backward.forward(function, self.statistics, step, whole=whole, again=self.repeats(step))

    def backward(
        self,
        outputs: Any,
        targets: Any,
        loss: Tensor | None,
        scale: Callable[[Tensor], Tensor] | None,
        step: int,
        *,
        rates: Mapping[str, float] | None,
    ) -> Tensor:
        """Fill ``.grad`` and collect statistics; the loss, detached.

        Args:
            outputs: as `forward` returned them.
            targets: as the likelihood takes them.
            loss: another loss to differentiate.
            scale: applied to the loss before it is differentiated.
            step: number of the step.
            rates: name → learning rate, if no other code touches the gradient, so that steps may be made from rows.
        """

        def rows(capture: Capture) -> RowInverse | None:
            return None if rates is None else self.row_inverse(capture, rates)

        with self._timed("forward and backward"):
            return self.forward_backward.backward(
                outputs,
                targets,
                loss,
                scale,
                self.statistics,
                step,
                rows=rows,
                again=self.repeats(step),
                spare=self.spares,
            )

    def take(self, gradients: Mapping[str, Tensor], step: int) -> StepPasses:
        """The passes of a step, with their statistics merged; the user is told if any are missing.

        Raises:
            UnsupportedError: there is no curvature because no forward pass of ours was run.
        """
        taken, ready = self.forward_backward.take(), self.statistics.ready or self.statistics.examined
        if gradients and not (taken.seen or ready):
            raise no_curvature_error(CALL)
        due, loss = self.statistics.is_due(step), self.forward_backward.loss
        if taken.passes and loss is not None:
            self.watch.follow(loss)
        self.statistics.merge(step)
        if due and taken.seen:  # values are read here anyway
            self.watch.judge()
            sizes = {name: parameter.numel() for name, parameter in self.statistics.parameters.items()}
            self.watch.uncovered(self.statistics.uncovered, sizes, self.uncovered_step)
        if gradients and ready and self.statistics.is_due(step):
            self.watch.late(step, seen=taken.seen, call=CALL)
        return taken

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began


@dataclass
class Parts(StepParts):
    """The parts of the papers' step.

    Attributes:
        direction: makes natural gradients from gradients.
        step_size: chooses the length of the step.
        judge: chooses λ, and decides which steps are undone or skipped.
        ranks: which train together, each on batches of its own; None: this process alone.
    """

    direction: Direction
    step_size: StepSize
    judge: Judge
    ranks: Ranks | None = field(default=None, kw_only=True)

    @property
    def compares_losses(self) -> bool:
        return self.judge.compares_losses

    def row_inverse(self, capture: Capture, rates: Mapping[str, float]) -> RowInverse | None:
        return self.direction.row_inverse(capture, rates)

    def repeats(self, step: int) -> bool:
        """Whether this step runs the forward pass again, for the quadratic model or to compare losses."""
        return not self.step_size.refusal and (self.judge.compares(step) or self.step_size.solves(step))

    # The step ---------------------------------------------------------------------------------------------------------

    def make_step(self, model: nn.Module, trained: TrainedParameters, step: int, *, whole: bool) -> None:
        """One step after the backward pass: statistics, direction, length, update, comparison.

        Args:
            model: unwrapped.
            trained: the parameters to change.
            step: number of the step.
            whole: whether no other code touched the gradient.

        Raises:
            UnsupportedError: there is no curvature because no forward pass of ours was run.
        """
        gradients = trained.gradients()
        taken = self.take(gradients, step)
        self.direction.follow(self.statistics.layers, step)
        found = bool(gradients or (taken.rows is not None and taken.rows.rows))
        if not (found and self.statistics.ready):
            self.judge.skip()
            self.watch.idle(step, seen=found or taken.seen)
            return
        loss = self._loss(taken.passes)
        if loss is not None and self.judge.exploded(loss):
            trained.take_back()
            self.step_size.solve_next(step + 1)
            self.judge.skip()
            return
        damping = self.judge.damping_at(step, self.direction.measure)
        self.direction.renew(damping, step)
        self.statistics.schedule_bases(self.direction.due)
        with self._timed("update"):
            descent = self.direction.descend(trained.add_decay(gradients), damping, trained.rates, taken.rows)
            solve = self.repeats(step) and taken.repeatable
            if not isfinite(float(descent.slope)):
                self.judge.skip()
                return
            last = trained.last_steps(descent.natural)
        decays = {name: trained.decays[name] for name in descent.natural}
        likelihood = self.forward_backward.likelihood
        inputs = StepInputs(model, likelihood, taken.passes, descent, last, damping, decays, whole)
        if self.step_size.solves(step) and taken.opaque:
            self.watch.tell(
                "opaque",
                "A loss of your own cannot be evaluated again, so that there is no exact quadratic model: steps are "
                "made at the fixed rate lr within kl_limit.",
            )
        length = self._choose_length(inputs, step, solve)
        compares = length.predicted is not None and self.judge.compares(step)
        with self._timed("update"):
            copies = trained.copies(descent.natural) if compares else {}
            trained.apply(descent, last, length)
        if length.predicted is not None and compares:
            with self._timed("model"):
                try:
                    change = self._mean(lambda: [self.forward_backward.change(taken.passes)])[0]
                    change = trained.add_penalty(change, copies)
                except BaseException:  # an error or an interruption of the model: a step that raises moves nothing
                    trained.restore(copies)
                    raise
                undone = self.judge.rejects(change, length.predicted, step)
                self.watch.compared(undone=undone)
                if undone:
                    trained.restore(copies)
                    self.step_size.solve_next(step + 1)

    def _loss(self, passes: Sequence[ForwardPass]) -> float | None:
        """That of this step over all ranks; None without a pass.

        Raises:
            RankError: ranks ran other numbers of passes; on all of them.
        """
        number = float(len(passes))
        own = sum(float(one.loss) for one in passes if one.loss is not None)
        loss, mean, square = self._mean(lambda: [own, number, number * number])
        if square != mean * mean:
            raise RankError(
                f"this rank ran {len(passes)} forward and backward passes before step(), and another rank more or "
                "fewer; the papers' step (kf.QuadraticModel) repeats them on all ranks together."
            )
        return loss if passes else None

    def _mean(self, read: Callable[[], Sequence[float]]) -> Sequence[float]:
        """Numbers of this rank's batch, averaged over ranks, as their gradients are: the same steers all of them."""
        return (
            read()
            if self.ranks is None
            else [value / self.ranks.size for value in self.ranks.added(read, "averages losses")]
        )

    def _choose_length(self, inputs: StepInputs, step: int, solve: bool) -> StepLength:
        """The length of the step, with λ adapted to it."""
        exact = self.step_size.exact
        with self._timed("model" if solve else "update"):
            length = self.step_size.choose(inputs, step, solve=solve, longest=self.judge.longest(step))
        if length.predicted is not None and self.step_size.exact:
            self.judge.check_step_size(self.step_size.step_size)
        if exact and not self.step_size.exact:  # there is no exact model: take the λ that a fixed rate starts from
            self.judge.raise_for_fixed_rate()
            warnings.warn(
                f"{self.step_size.refusal} Training continues at a fixed rate.", NumericalWarning, stacklevel=5
            )
        return length

    # Reports and state ------------------------------------------------------------------------------------------------

    def extend(self, parameters: dict[str, nn.Parameter]) -> None:
        """Treat these parameters from now on."""
        self.statistics.extend(parameters)
        self.direction.extend(parameters)

    def report(self, step: int) -> TrainingReport:
        """The state of training after so many steps."""
        statistics, judge, loss = self.statistics, self.judge, self.forward_backward.loss
        seconds = {**self.seconds, "statistics": statistics.seconds, "inverses": self.direction.seconds}
        seconds["forward and backward"] -= statistics.seconds_in_backward
        refusal = self.step_size.refusal
        return TrainingReport(
            step=step,
            loss=None if loss is None else float(loss),
            damping=judge.damping.value,
            step_size=self.step_size.step_size,
            momentum=self.step_size.used,
            ratio=judge.damping.ratio,
            rejected=judge.rejected,
            skipped=judge.skipped,
            dropped=statistics.dropped,
            seconds=seconds,
            stale=self.direction.overdue(step),
            troubles=self.direction.troubles,
            uncovered=statistics.uncovered,
            uncovered_step=self.uncovered_step,
            coupled=tuple(statistics.coupled),
            cuts=tuple(statistics.cuts),
            warnings=(*([refusal] if refusal else []), *judge.warnings(), *self.watch.told.values()),
            overdue=self.watch.overdue,
            sent=statistics.sent,
            collectives=statistics.collectives,
        )

    @staticmethod
    def names() -> tuple[str, ...]:
        """The parts, in the order of a step."""
        return tuple(each.name for each in fields(Parts) if each.name not in ("seconds", "ranks"))

    def state_dict(self) -> dict[str, Any]:
        """By part, everything that a resumed training needs."""
        return {name: getattr(self, name).state_dict() for name in self.names()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            DataError: it was saved for other parameters or other fits.
        """
        self.statistics.load_state_dict(state["statistics"])  # the first: it refuses what does not belong
        self.direction.load_state_dict(state["direction"], self.statistics.layers)
        self.forward_backward.load_state_dict(state["forward_backward"])
        self.step_size.load_state_dict(state["step_size"])
        self.judge.load_state_dict(state["judge"])
        self.watch.load_state_dict(state["watch"])
