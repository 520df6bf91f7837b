"""The optimiser: natural gradient, momentum and step size from a quadratic model, damping from its success."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kronfisher.capture.capture import Capture
from kronfisher.errors import DataError, NumericalWarning, UnsupportedError
from kronfisher.estimation.accumulator import Labels
from kronfisher.fisher.damping import Damping, FactoredTikhonov
from kronfisher.fisher.parameters import trainable, unwrapped
from kronfisher.fits import Choice
from kronfisher.likelihoods import Likelihood
from kronfisher.optim import update
from kronfisher.optim.damping_schedule import Constant, DampingSchedule, LevenbergMarquardt
from kronfisher.optim.direction import Direction
from kronfisher.optim.forward_backward import ForwardBackward, StepPasses
from kronfisher.optim.intervals import Refresh
from kronfisher.optim.judge import Judge
from kronfisher.optim.report import TrainingReport
from kronfisher.optim.row_inverse import RowInverse
from kronfisher.optim.statistics import Statistics
from kronfisher.optim.step_size import StepInputs, StepLength, StepSize

__all__ = ["DEFAULT_FIT", "NaturalGradient"]

DEFAULT_FIT = "kfac"
_MISSING: Any = object()
_PARTS = ("forward_backward", "statistics", "direction", "step_size", "judge")


class NaturalGradient(torch.optim.Optimizer):
    """Natural gradient descent with any fit of the Fisher matrix (Martens & Grosse 2015).

    A step is ``δ = α Δ + μ δ₀`` with the natural gradient ``Δ = −(F̆ + λ)⁻¹ ∇h``, the last step δ₀, and the loss h: the
    negative log-likelihood of an example, summed over its positions and averaged over the batch. F̆ is a moving average
    in the structure of `fit`. α and μ minimise the quadratic model of h whose curvature is the *exact* Fisher matrix of
    the batch, plus λ; λ is chosen by `trust`.

    Either ``step(lambda: model(x), y)`` does everything, or a loop calls ``forward``, ``backward`` and ``step``, and
    can accumulate and clip gradients, scale losses and add loss terms between them.

    Args:
        model: any module. DDP and ``torch.compile`` wrappers may stay around it.
        likelihood: the distribution that the outputs parametrise, such as ``kf.Categorical()``; it defines the loss.
        fit: the structure of the curvature, as in `estimate`.
        damping: how λ enters the curvature. One with a λ of its own sets where `trust` starts.
        trust: the damping schedule, which chooses λ; a number keeps it constant.
        momentum: ``"exact"`` (networks without an exact quadratic model get a fixed rate, with a warning), or a number:
            then the step is ``−lr·s·(F̆ + λ)⁻¹∇h + momentum·δ₀`` with ``s ≤ 1`` so that `kl_limit` holds.
        lr: multiplies the step; schedulers may change it. With exact momentum 1.0 is the quadratic model's own step.
        weight_decay: η; ``½ η ‖θ‖²`` is added to the loss, and η to the curvature of the quadratic model.
        refresh: how often statistics, inverses and the quadratic model are renewed.
        params: parameters to train, as in any optimiser, with options per group; None: all that require a gradient.
        labels: ``"sampled"``: one more backward pass where statistics are due; ``"observed"``: none (the empirical
            Fisher, which is another matrix); ``"exact"``: one for each column.
        samples: label draws per example.
        kl_limit: largest ``lr² ∇hᵀ(F̆ + λ)⁻¹∇h`` of a step of fixed rate, about twice its KL divergence in nats.
        seed: of the label draws.

    Attributes:
        steps: the number of steps made, undone and skipped ones included.
        forward_backward, statistics, direction, step_size, judge: the parts of a step, in their order. Each owns its
            state, and can be replaced by another object with the same methods.

    Raises:
        ValueError: an option is out of range.
        UnsupportedError: at the first step, no parameter is in a layer that blocks can cover.

    Example:
        >>> import torch, kronfisher as kf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
        >>> optimizer = kf.NaturalGradient(model, kf.Categorical())
        >>> losses = [optimizer.step(lambda: model(x), y).item() for _ in range(10)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        fit: Choice = DEFAULT_FIT,
        damping: Damping = FactoredTikhonov(),  # noqa: B008 (frozen)
        trust: DampingSchedule | float | None = None,
        momentum: float | Literal["exact"] = "exact",
        lr: float = 1.0,
        weight_decay: float = 0.0,
        refresh: Refresh = Refresh(),  # noqa: B008 (frozen)
        params: Iterable[Any] | None = None,
        labels: Labels = "sampled",
        samples: int = 1,
        kl_limit: float = 1e-2,
        seed: int = 0,
    ) -> None:
        if momentum != "exact" and not 0 <= momentum < 1:
            raise ValueError(f'momentum={momentum!r}: use "exact" or a number in [0, 1).')
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("kl_limit", kl_limit)):
            if not value >= 0:
                raise ValueError(f"{name}={value!r} must not be negative.")
        self._wrapped, self._model = model, unwrapped(model)
        self.likelihood = likelihood
        if trust is None:
            trust = LevenbergMarquardt(initial=damping.value) if momentum == "exact" else Constant(damping.value)
        self.trust = Constant(trust) if isinstance(trust, int | float) else trust
        self._names = {id(p): name for name, p in self._model.named_parameters()}
        super().__init__(
            trainable(self._model).values() if params is None else params, {"lr": lr, "weight_decay": weight_decay}
        )
        self.steps = 0
        parameters = self._parameters()
        self.forward_backward = ForwardBackward(self._model, likelihood)
        self.statistics = Statistics(
            self._model,
            parameters,
            likelihood,
            fit=fit,
            refresh=refresh,
            labels=labels,
            samples=samples,
            seed=seed,
        )
        self.direction = Direction(parameters, damping, refresh)
        self.step_size = StepSize(momentum, kl_limit, refresh)
        self.judge = Judge(self.trust)
        self._seconds = {"forward and backward": 0.0, "model": 0.0, "update": 0.0}

    # The two interfaces -----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None, targets: Any = _MISSING) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of training.

        Args:
            closure: with `targets`, a function that returns the model's outputs. Without, a function that calls
                `forward` and `backward` and returns the loss. None: both were called before.
            targets: as the likelihood takes them.

        Returns:
            The loss before the step; None without a closure. With `targets`, ``.grad`` of layers whose step is made
            from rows of inputs and output gradients stays None.

        Raises:
            NumericalError: a layer's curvature cannot be factorised at all.
            DataError: the outputs or targets do not fit the likelihood.
        """
        loss, whole = None, closure is not None and targets is not _MISSING
        if closure is not None and whole:
            self.zero_grad()
            outputs = self._forward(closure, whole=True)
            loss = self._backward(outputs, targets, whole=True)
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._make_step(whole=whole)
        self.steps += 1
        return loss

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """The model's outputs, captured where statistics are due."""
        return self._forward(lambda: self._wrapped(*inputs, **options), whole=False)

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """The mean negative log-likelihood of an example, differentiable."""
        return self.forward_backward.mean_loss(outputs, targets)[0].to(outputs.dtype)

    def backward(
        self,
        outputs: Tensor,
        targets: Any,
        loss: Tensor | None = None,
        *,
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Add the gradient of the loss to ``.grad``, and collect statistics where they are due.

        Args:
            outputs: as `forward` returned them.
            targets: as the likelihood takes them.
            loss: another loss to differentiate, such as ``optimizer.loss(outputs, y) / 4 + penalty``. It cannot be
                evaluated again, so that `LevenbergMarquardt` refuses it.
            scale: applied to the loss before it is differentiated (``GradScaler.scale``); unscale before `step`.

        Returns:
            The loss, detached.

        Raises:
            DataError: `outputs` are not the ones that `forward` returned.
            UnsupportedError: a loss that cannot be evaluated again, with a damping schedule that compares losses.
        """
        return self._backward(outputs, targets, loss, scale, whole=False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in any optimiser; forward passes that no step followed are forgotten."""
        self.forward_backward.forget()
        super().zero_grad(set_to_none)

    def report(self) -> TrainingReport:
        """The state of training."""
        statistics, judge, loss = self.statistics, self.judge, self.forward_backward.loss
        seconds = {**self._seconds, "statistics": statistics.seconds, "inverses": self.direction.seconds}
        seconds["forward and backward"] -= statistics.seconds_in_backward
        refusal = self.step_size.refusal
        return TrainingReport(
            step=self.steps,
            loss=None if loss is None else float(loss),
            damping=judge.damping.value,
            step_size=self.step_size.step_size,
            momentum=self.step_size.used,
            ratio=judge.damping.ratio,
            rejected=judge.rejected,
            skipped=judge.skipped,
            dropped=statistics.dropped,
            seconds=seconds,
            stale=self.direction.overdue(self.steps),
            troubles=self.direction.troubles,
            uncovered=statistics.uncovered,
            coupled=tuple(statistics.coupled),
            cuts=tuple(statistics.cuts),
            warnings=(*([refusal] if refusal else []), *judge.warnings()),
        )

    # The step ---------------------------------------------------------------------------------------------------------

    def _forward(self, function: Callable[[], Any], *, whole: bool) -> Tensor:
        with self._timed("forward and backward"):
            return self.forward_backward.forward(
                function, self.statistics, self.steps, whole=whole, again=self._repeats()
            )

    def _backward(
        self,
        outputs: Tensor,
        targets: Any,
        loss: Tensor | None = None,
        scale: Callable[[Tensor], Tensor] | None = None,
        *,
        whole: bool,
    ) -> Tensor:
        if loss is not None and self.judge.compares_losses:
            raise UnsupportedError(
                f"{type(self.trust).__name__} compares the loss before and after a step, and a loss that was computed "
                "outside cannot be evaluated again. Use trust=kf.Constant(λ) or kf.Schedule(...), or leave `loss` out."
            )
        decayed = any(group["weight_decay"] for group in self.param_groups)

        def rows(capture: Capture) -> RowInverse | None:  # only where no other code touches the gradient
            return self.direction.row_inverse(capture, self._options("lr")) if whole and not decayed else None

        with self._timed("forward and backward"):
            return self.forward_backward.backward(
                outputs, targets, loss, scale, self.statistics, self.steps, rows=rows, again=self._repeats()
            )

    def _repeats(self) -> bool:
        """Whether this step runs the forward pass again, for the quadratic model or to compare losses."""
        return not self.step_size.refusal and (self.judge.compares(self.steps) or self.step_size.solves(self.steps))

    @torch.no_grad()
    def _make_step(self, *, whole: bool) -> None:
        """Compose the parts: statistics, direction, length, update, comparison."""
        step, parameters = self.steps, self._parameters()
        taken = self.forward_backward.take()
        gradients = {name: _dense(p.grad) for name, p in parameters.items() if p.grad is not None}
        self.statistics.merge(step)
        self.direction.follow(self.statistics.layers, step)
        if not self._can_step(gradients, taken):
            self.judge.skip()
            return
        if self.judge.exploded(taken.passes):
            update.take_back(self.state, (p for group in self.param_groups for p in group["params"]))
            self.step_size.solve_next(step + 1)
            self.judge.skip()
            return
        damping = self.judge.damping_at(step, self.direction.measure)
        self.direction.renew(damping, step)
        self.statistics.schedule_bases(self.direction.due)
        with self._timed("update"):
            decays = self._options("weight_decay")
            gradients = {n: g.add(parameters[n], alpha=decays[n]) if decays[n] else g for n, g in gradients.items()}
            descent = self.direction.descend(gradients, damping, self._options("lr"), taken.rows)
            solve = self._repeats() and taken.repeatable
            if (solve or descent.slope.device.type == "cpu") and not isfinite(float(descent.slope)):
                self.judge.skip()
                return
            last = update.last_steps(self.state, parameters, descent.natural)
        own = {name: decays[name] for name in descent.natural}
        inputs = StepInputs(self._model, self.likelihood, taken.passes, descent, last, damping, own, whole)
        length = self._choose_length(inputs, solve)
        compares = length.predicted is not None and self.judge.compares(step)
        with self._timed("update"):
            copies = {name: parameters[name].clone() for name in descent.natural} if compares else {}
            update.apply(self.state, parameters, descent, last, length)
        if length.predicted is not None and compares:
            with self._timed("model"):
                change = update.add_penalty(self.forward_backward.change(taken.passes), parameters, copies, decays)
                if self.judge.rejects(change, length.predicted, step):
                    update.restore(self.state, parameters, copies)
                    self.step_size.solve_next(step + 1)

    def _can_step(self, gradients: Mapping[str, Tensor], taken: StepPasses) -> bool:
        """Whether there are gradients and curvature.

        Raises:
            UnsupportedError: there is no curvature because no forward pass of ours was run.
        """
        if gradients and not self.statistics.started:
            raise UnsupportedError(
                "There is no curvature yet: call step(lambda: model(x), y), or outputs = optimizer.forward(x) and "
                "optimizer.backward(outputs, y) before optimizer.step()."
            )
        return bool(gradients or (taken.rows is not None and taken.rows.rows)) and self.statistics.ready

    def _choose_length(self, inputs: StepInputs, solve: bool) -> StepLength:
        """The length of the step; λ answers to it."""
        exact = self.step_size.exact
        with self._timed("model" if solve else "update"):
            length = self.step_size.choose(inputs, self.steps, solve=solve, longest=self.judge.longest(self.steps))
        if length.predicted is not None and self.step_size.exact:
            self.judge.check_step_size(self.step_size.step_size)
        if exact and not self.step_size.exact:  # there is no exact model: take the λ that a fixed rate starts from
            self.judge.raise_for_fixed_rate()
            warnings.warn(
                f"{self.step_size.refusal} Training continues at a fixed rate.", NumericalWarning, stacklevel=6
            )
        return length

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - began

    # Parameters, options, state ---------------------------------------------------------------------------------------

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter of all groups.

        Raises:
            ValueError: one is not the model's.
        """
        named = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in self._names:
                    raise ValueError(f"a parameter of shape {list(parameter.shape)} in `params` is not the model's")
                named[self._names[id(parameter)]] = parameter
        return named

    def _options(self, key: str) -> dict[str, float]:
        return {self._names[id(p)]: float(group[key]) for group in self.param_groups for p in group["params"]}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in any optimiser; the new parameters get curvature from the next statistics on."""
        super().add_param_group(param_group)
        if hasattr(self, "statistics"):
            self.statistics.extend(self._parameters())
            self.direction.extend(self._parameters())

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a NaturalGradient belongs to its model; copy or save optimizer.state_dict() and the model's")

    def state_dict(self) -> dict[str, Any]:
        """All state of training but the model's; resumed with the same number of threads, it gives the same bits."""
        own = {"steps": self.steps, **{part: getattr(self, part).state_dict() for part in _PARTS}}
        return {**super().state_dict(), "natural_gradient": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            DataError: it was saved for other parameters or other fits, or by a version that kept its state otherwise.
        """
        rest = dict(state_dict)
        own = rest.pop("natural_gradient", {})
        if own and "curvature" in rest:
            raise DataError(
                "the state was saved by an earlier version of kronfisher, which kept it in another form. Load the "
                "model's weights, and continue with a new optimiser."
            )
        if own.keys() != {"steps", *_PARTS}:
            raise DataError("this is not the state of a NaturalGradient; it lacks the curvature")
        self.statistics.load_state_dict(own["statistics"])
        super().load_state_dict(rest)
        self.direction.load_state_dict(own["direction"], self.statistics.layers)
        self.forward_backward.load_state_dict(own["forward_backward"])
        self.step_size.load_state_dict(own["step_size"])
        self.judge.load_state_dict(own["judge"])
        self.steps = own["steps"]


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout is torch.strided else gradient.to_dense()
