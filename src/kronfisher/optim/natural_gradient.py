"""The optimiser: natural gradient, momentum and step size from a quadratic model, damping from its success."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kronfisher.errors import DataError, NumericalWarning, UnsupportedError
from kronfisher.estimation.accumulator import Labels
from kronfisher.fisher.damping import Damping, FactoredTikhonov
from kronfisher.fisher.parameters import trainable, unwrapped
from kronfisher.fits import Choice
from kronfisher.likelihoods import Likelihood
from kronfisher.optim.curvature import Curvature
from kronfisher.optim.damping_schedule import Constant, LevenbergMarquardt, Trust
from kronfisher.optim.divergence import Watch
from kronfisher.optim.forward_backward import Evaluation
from kronfisher.optim.intervals import Refresh
from kronfisher.optim.region import Region
from kronfisher.optim.replay import Pass
from kronfisher.optim.report import TrainingReport
from kronfisher.optim.row_inverse import Rows
from kronfisher.optim.step_size import Problem, Search, inner

__all__ = ["DEFAULT_FIT", "NaturalGradient"]

DEFAULT_FIT = "kfac"
_MISSING: Any = object()


class NaturalGradient(torch.optim.Optimizer):
    """Natural gradient descent with any fit of the Fisher matrix (Martens & Grosse 2015).

    A step is ``δ = α Δ + μ δ₀`` with the natural gradient ``Δ = −(F̆ + λ)⁻¹ ∇h``, the last step δ₀, and the loss h: the
    negative log-likelihood of a datum, summed over its positions and averaged over the batch. F̆ is a moving average in
    the structure of `fit`. α and μ minimise the quadratic model of h whose curvature is the *exact* Fisher matrix of
    the batch, plus λ; λ is chosen by `trust`.

    Either ``step(lambda: model(x), y)`` does everything, or ``forward``, ``backward`` and ``step`` make room for what
    else a loop does between them: accumulating and clipping gradients, scaling losses, more loss terms.

    Args:
        model: any module. DDP and ``torch.compile`` wrappers may stay around it.
        likelihood: what the outputs mean, such as ``kf.Categorical()``; it makes the loss.
        fit: the structure of the curvature, as in `estimate`.
        damping: how λ enters the curvature. One with a λ of its own sets where `trust` starts.
        trust: who chooses λ; a number keeps it constant.
        momentum: ``"exact"`` (models that have no exact model get a fixed rate, with a warning), or a number: then the
            step is ``−lr·s·(F̆ + λ)⁻¹∇h + momentum·δ₀`` with ``s ≤ 1`` as `kl_limit` wants it.
        lr: multiplies the step; schedulers may change it. With exact momentum 1.0 is the model's own step.
        weight_decay: η; ``½ η ‖θ‖²`` is added to the loss, and η to the curvature of the quadratic model.
        refresh: how often statistics, inverses and the quadratic model are renewed.
        params: what to train, as in any optimiser, with options per group; None: all that require a gradient.
        labels: ``"sampled"``: one more backward pass where statistics are due; ``"observed"``: none (the empirical
            Fisher, which is another matrix); ``"exact"``: one for each column.
        samples: label draws per datum.
        kl_limit: largest ``lr² ∇hᵀ(F̆ + λ)⁻¹∇h`` of a step of fixed rate, about twice its KL divergence in nats.
        seed: of the label draws.

    Raises:
        ValueError: an option makes no sense.
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
        trust: Trust | float | None = None,
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
        self.curvature = Curvature(
            self._model,
            self._parameters(),
            likelihood,
            fit=fit,
            damping=damping,
            refresh=refresh,
            labels=labels,
            samples=samples,
            seed=seed,
        )
        self._fit: Choice = fit
        self.evaluation = Evaluation(
            self._model, likelihood, self.curvature, self._parameters, lambda: self._options("lr")
        )
        self.search = Search(momentum, kl_limit, refresh)
        self.region, self.watch = Region(self.trust), Watch()
        self._counts = {"rejected": 0, "skipped": 0}
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
        loss = None
        if closure is not None and targets is _MISSING:
            with torch.enable_grad():
                loss = closure()
        elif closure is not None:
            self.zero_grad()
            self.evaluation.whole = True
            try:
                loss = self.backward(self._forward(closure), targets)
            finally:
                self.evaluation.whole = False
        self._update(whole=closure is not None and targets is not _MISSING)
        return loss

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """The model's outputs, watched where statistics are due."""
        return self._forward(lambda: self._wrapped(*inputs, **options))

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """The mean negative log-likelihood of a datum, differentiable."""
        return self.evaluation.mean_loss(outputs, targets)[0].to(outputs.dtype)

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
            DataError: `outputs` are not what `forward` returned.
            UnsupportedError: a loss that cannot be evaluated again meets a trust that has to.
        """
        began = time.perf_counter()
        if loss is not None and isinstance(self.trust, LevenbergMarquardt):
            raise UnsupportedError(
                "LevenbergMarquardt compares the loss before and after a step, and a loss that was computed outside "
                "cannot be evaluated again. Use trust=kf.Constant(λ) or kf.Schedule(...), or leave `loss` out."
            )
        decayed = any(group["weight_decay"] for group in self.param_groups)
        found = self.evaluation.backward(outputs, targets, loss, scale, again=self._again(), decayed=decayed)
        self._seconds["forward and backward"] += time.perf_counter() - began
        return found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in any optimiser; forward passes that no step followed are forgotten."""
        self.evaluation.forget()
        super().zero_grad(set_to_none)

    def report(self) -> TrainingReport:
        """How training goes."""
        curvature = self.curvature
        seconds = {**self._seconds, **curvature.seconds}
        seconds["forward and backward"] -= curvature.absorbing
        return TrainingReport(
            step=curvature.step,
            loss=None if self.evaluation.loss is None else float(self.evaluation.loss),
            damping=self.region.damping,
            step_size=self.search.step_size,
            momentum=self.search.used,
            ratio=self.region.ratio,
            seconds=seconds,
            dropped=curvature.dropped,
            stale={c.name: curvature.step - c.due for c in curvature.layers if c.due < curvature.step},
            troubles={c.name: c.trouble for c in curvature.layers if c.trouble},
            uncovered=curvature.uncovered,
            coupled=tuple(curvature.coupled),
            cuts=tuple(curvature.cuts),
            warnings=(*([self.search.refusal] if self.search.refusal else []), *self.region.warnings()),
            **self._counts,
        )

    # The step ---------------------------------------------------------------------------------------------------------

    def _forward(self, function: Callable[[], Any]) -> Tensor:
        began = time.perf_counter()
        outputs = self.evaluation.forward(function, again=self._again())
        self._seconds["forward and backward"] += time.perf_counter() - began
        return outputs

    def _again(self) -> bool:
        """Whether this step runs the forward pass again, for the model or to compare."""
        step = self.curvature.step
        return not self.search.refusal and (self.trust.compares(step) or self.search.solves(step))

    @torch.no_grad()
    def _update(self, *, whole: bool) -> None:
        curvature, parameters = self.curvature, self._parameters()
        passes, opaque, rows = self.evaluation.taken()
        gradients = {name: _dense(p.grad) for name, p in parameters.items() if p.grad is not None}
        curvature.merge()
        if not (gradients or (rows and rows.found)) or not curvature.ready:
            if gradients and curvature.run is None:
                raise UnsupportedError(
                    "There is no curvature yet: call step(lambda: model(x), y), or outputs = optimizer.forward(x) and "
                    "optimizer.backward(outputs, y) before optimizer.step()."
                )
            self._skip()
            return
        if self.watch.exploded(passes):
            self._undo_last()
            self._skip()
            return
        value = self.region.at(curvature.step, curvature.measure)
        curvature.renew(value)
        began = time.perf_counter()
        decays = self._options("weight_decay")
        gradients = {n: g.add(parameters[n], alpha=decays[n]) if decays[n] else g for n, g in gradients.items()}
        if rows:
            rows.form_missing(gradients, parameters)
        natural = curvature.precondition(gradients, value, rows)
        slope = self._slope(natural, gradients, rows)
        rate = self._scale_rates(natural)
        solves = self._again() and bool(passes) and not opaque and all(one.snapshot is not None for one in passes)
        if (solves or slope.device.type == "cpu") and not isfinite(float(slope)):
            self._skip()
            return
        last = {n: self.state[parameters[n]]["update"] for n in natural if "update" in self.state[parameters[n]]}
        self._seconds["update"] += time.perf_counter() - began
        promised = None
        if solves:
            began = time.perf_counter()
            decay = {name: decays[name] for name in natural}
            problem = Problem(
                self._model, self.likelihood, passes, natural, last, gradients, slope, value, decay, whole
            )
            try:
                along, again, promised = self._solve(problem, rate)
            except UnsupportedError as error:
                self._give_up(str(error))
                along, again = self.search.reuse(slope, rate)
            self._seconds["model"] += time.perf_counter() - began
        else:
            along, again = self.search.reuse(slope, rate)
        began = time.perf_counter()
        compares = promised is not None and self.trust.compares(curvature.step)
        saved = {name: parameters[name].clone() for name in natural} if compares else {}
        for name, direction in natural.items():
            if isinstance(along, Tensor):
                direction.mul_(along)
            step = last[name].mul_(again) if name in last else torch.zeros_like(direction)
            step.add_(direction, alpha=-1.0 if isinstance(along, Tensor) else -along)
            if slope.device.type != "cpu":  # without a synchronisation: nothing moves where something is not finite
                step = torch.where(torch.isfinite(slope), step, torch.zeros_like(step))
            parameters[name].add_(step)
            self.state[parameters[name]]["update"] = step
        torch.clear_autocast_cache()  # it may hold the weights as they were
        self._seconds["update"] += time.perf_counter() - began
        if promised is not None and compares:
            self._compare(passes, parameters, saved, promised)
        curvature.step += 1

    def _solve(self, problem: Problem, rate: float) -> tuple[float | Tensor, float, float]:
        step = self.curvature.step
        found = self.search.solve(problem, step, rate, self.trust.longest(step))
        if self.search.exact:
            self.region.solved(self.search.step_size)
        return found

    def _give_up(self, reason: str) -> None:
        """Go on at a fixed rate where the exact model cannot be had, with the λ that such a rate starts from."""
        if not self.search.exact:
            raise UnsupportedError(reason)
        self.search.refusal = reason
        self.region.damping = max(self.region.damping or 0.0, Constant().start(self.region.first_mean))
        warnings.warn(f"{reason} Training goes on so.", NumericalWarning, stacklevel=4)

    def _skip(self) -> None:
        """Leave out a step whose loss or gradient is not finite, or whose loss exploded."""
        self._counts["skipped"] += 1
        self.curvature.step += 1

    def _slope(self, natural: Mapping[str, Tensor], gradients: Mapping[str, Tensor], rows: Rows | None) -> Tensor:
        """``naturalᵀ ∇h``, whether a layer's part of ∇h was formed or not."""
        rates = self._options("lr")
        top = max(rates[name] for name in natural) or 1.0
        slope = inner(natural, gradients, {name: rates[name] / top for name in natural}) if gradients else None
        slopes = {} if rows is None else rows.slopes
        for layer in self.curvature.layers:
            name = layer.blocks[0].parameters[0]
            if layer.name in slopes and name not in gradients:
                part = slopes[layer.name] * (rates[name] / top)
                slope = part if slope is None else slope + part
        assert slope is not None
        return slope

    def _scale_rates(self, natural: Mapping[str, Tensor]) -> float:
        """Scale every group's direction by its share of the largest rate, which is returned."""
        rates = self._options("lr")
        top = max(rates[name] for name in natural)
        for name, direction in natural.items():
            if top and rates[name] != top:
                direction.mul_(rates[name] / top)
        return top

    def _undo_last(self) -> None:
        """Take the last step back and trust the model less."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if (update := self.state[parameter].pop("update", None)) is not None:
                    parameter.sub_(update)
        self._counts["rejected"] += 1
        self.search.due = self.curvature.step + 1
        self.region.refuse()

    def _compare(
        self, passes: list[Pass], parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor], promised: float
    ) -> None:
        """Evaluate the loss again, adapt λ, and undo the step if the loss rose beyond the model."""
        began = time.perf_counter()
        decays = self._options("weight_decay")
        change = self.evaluation.change(passes)
        for name, old in saved.items():
            if decays[name]:
                squares = parameters[name].square().sum(dtype=torch.float64) - old.square().sum(dtype=torch.float64)
                change += decays[name] / 2 * float(squares)
        if self.region.compared(change, promised, self.curvature.step):
            self._counts["rejected"] += 1
            for name, old in saved.items():
                parameters[name].copy_(old)
                self.state[parameters[name]].pop("update", None)
            self.search.due = self.curvature.step + 1
        self._seconds["model"] += time.perf_counter() - began

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
        if hasattr(self, "curvature"):
            self.curvature.extend(self._parameters(), self._fit)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a NaturalGradient belongs to its model; copy or save optimizer.state_dict() and the model's")

    def state_dict(self) -> dict[str, Any]:
        """Of the optimiser and its curvature; resumed with the same number of threads, training gives the same bits."""
        own = {
            "region": self.region.state_dict(),
            "search": self.search.state_dict(),
            "watch": self.watch.state_dict(),
            "counts": dict(self._counts),
            "rows pay": self.evaluation.rows_pay,
        }
        return {**super().state_dict(), "natural_gradient": own, "curvature": self.curvature.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            DataError: it was saved for other parameters or other fits.
        """
        rest = {key: value for key, value in state_dict.items() if key not in ("natural_gradient", "curvature")}
        if len(rest) + 2 != len(state_dict):
            raise DataError("this is not the state of a NaturalGradient; it lacks the curvature")
        self.curvature.load_state_dict(state_dict["curvature"])
        super().load_state_dict(rest)
        own = state_dict["natural_gradient"]
        for part, name in ((self.region, "region"), (self.search, "search"), (self.watch, "watch")):
            part.load_state_dict(own[name])
        self._counts, self.evaluation.rows_pay = dict(own["counts"]), own["rows pay"]


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout is torch.strided else gradient.to_dense()
