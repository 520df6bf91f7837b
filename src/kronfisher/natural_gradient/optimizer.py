"""The optimiser: natural gradient, momentum and step size from a quadratic model, damping from its success."""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from kronfisher.accumulate import Labels
from kronfisher.capture import Receiver
from kronfisher.damping import Damping, FactoredTikhonov
from kronfisher.errors import DataError, NumericalError, UnsupportedError
from kronfisher.fits import Choice
from kronfisher.isolation import trainable
from kronfisher.likelihoods import Likelihood
from kronfisher.models import unwrapped
from kronfisher.natural_gradient.curvature import Curvature, require_outputs
from kronfisher.natural_gradient.refresh import Refresh
from kronfisher.natural_gradient.replay import Pass, Snapshot
from kronfisher.natural_gradient.report import TrainingReport
from kronfisher.natural_gradient.rows import Rows
from kronfisher.natural_gradient.search import Problem, Search, inner
from kronfisher.trust import Constant, LevenbergMarquardt, Trust

__all__ = ["DEFAULT_FIT", "NaturalGradient"]

DEFAULT_FIT = "kfac"
JUMP = 20.0  # a loss that rises by so many times its usual change from batch to batch has exploded
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
        momentum: ``"exact"``, or a number: then the step is ``−lr·s·(F̆ + λ)⁻¹∇h + momentum·δ₀`` with ``s ≤ 1`` as
            `kl_limit` wants it.
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
        self._passes: list[Pass] = []
        self._whole = False  # whether a step does everything, so that nobody else touches the gradient
        self._rows: Rows | None = None
        self._rows_pay = False  # whether rows were cheaper at the last step with statistics
        self._opaque = False  # whether a loss that cannot be evaluated again was given
        self._damping: float | None = None
        self._first_mean = 0.0
        self.search = Search(momentum, kl_limit, refresh.model)
        self._level = (0.0, 0.0, 0)  # the last loss, the mean change from batch to batch, and how many
        self._failures = 0  # batches in a row whose loss is not finite or exploded
        self._ratio: float | None = None
        self._loss: Tensor | None = None
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
            self._whole = True
            try:
                loss = self.backward(self._forward(closure), targets)
            finally:
                self._whole = False
        self._update()
        return loss

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """The model's outputs, watched where statistics are due."""
        return self._forward(lambda: self._wrapped(*inputs, **options))

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """The mean negative log-likelihood of a datum, differentiable."""
        return self._mean_loss(outputs, targets)[0].to(outputs.dtype)

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
        done = next((one for one in self._passes if one.outputs is outputs), None)
        if done is None:
            raise DataError("backward needs the outputs exactly as forward returned them, once.")
        if loss is not None and isinstance(self.trust, LevenbergMarquardt):
            raise UnsupportedError(
                "LevenbergMarquardt compares the loss before and after a step, and a loss that was computed outside "
                "cannot be evaluated again. Use trust=kf.Constant(λ) or kf.Schedule(...), or leave `loss` out."
            )
        own, done.count = self._mean_loss(outputs, targets)
        done.targets, done.loss = targets, own.detach()
        self._opaque |= loss is not None
        total = own if loss is None else loss
        scaled = total if scale is None else scale(total)
        self._loss = done.loss if loss is None else loss.detach()
        capture, done.capture, done.outputs = done.capture, None, None
        if capture is None:
            scaled.backward()
        elif self.curvature.labels == "observed" and loss is None and scale is None:
            self._collect(capture, outputs, targets, own=lambda *given: self._listen(capture, scaled, *given))
        else:
            due = self.curvature.due
            self._rows = self._watched(capture)
            with nullcontext() if self._rows is None else capture.listening(self._rows.receive):
                if self._rows is None or due or self._again():
                    scaled.backward(retain_graph=due)
                else:
                    self._backward_sparing(scaled, self._rows, capture)
            self._rows_pay = self._rows is not None and bool(self._rows.found)
            if due:
                self._collect(capture, outputs, targets)
        self._seconds["forward and backward"] += time.perf_counter() - began
        return self._loss.to(outputs.dtype)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in any optimiser; forward passes that no step followed are forgotten."""
        self._passes, self._opaque, self._rows = [], False, None
        super().zero_grad(set_to_none)

    def report(self) -> TrainingReport:
        """How training goes."""
        curvature = self.curvature
        seconds = {**self._seconds, **curvature.seconds}
        seconds["forward and backward"] -= curvature.seconds["statistics"]
        return TrainingReport(
            step=curvature.step,
            loss=None if self._loss is None else float(self._loss),
            damping=self._damping,
            step_size=self.search.step_size,
            momentum=self.search.used,
            ratio=self._ratio,
            seconds=seconds,
            dropped=curvature.dropped,
            stale={c.name: curvature.step - c.due for c in curvature.layers if c.due < curvature.step},
            troubles={c.name: c.trouble for c in curvature.layers if c.trouble},
            uncovered=curvature.uncovered,
            coupled=tuple(curvature.coupled),
            cuts=tuple(curvature.cuts),
            warnings=tuple(self._warnings()),
            **self._counts,
        )

    # Forward and backward ---------------------------------------------------------------------------------------------

    def _forward(self, function: Callable[[], Any]) -> Tensor:
        began = time.perf_counter()
        curvature = self.curvature
        curvature.prepare()
        snapshot = Snapshot(self._model) if self._again() else None
        with torch.enable_grad():
            if curvature.due or (self._whole and self._rows_pay):
                with curvature.captured() as capture:
                    outputs = function()
            else:
                capture, outputs = None, function()
        require_outputs(outputs)
        self._passes.append(Pass(function, snapshot, capture, outputs))
        self._seconds["forward and backward"] += time.perf_counter() - began
        return outputs

    def _backward_sparing(self, loss: Tensor, rows: Rows, capture: Any) -> None:
        """Fill ``.grad`` of the parameters that need it; the others' steps are made from rows."""
        spared = rows.spare(capture)
        wanted = [p for name, p in self._parameters().items() if name not in spared and p.requires_grad]
        sources: list[Tensor | GradientEdge] = [*rows.edges, *wanted]
        found = torch.autograd.grad(loss, sources, allow_unused=True)[len(rows.edges) :]  # pyright: ignore
        for parameter, gradient in zip(wanted, found, strict=True):
            parameter.grad = gradient

    def _watched(self, capture: Any) -> Rows | None:
        """What keeps rows of the loss's own backward pass, where nobody else has a hand in the gradient."""
        if not self._whole or any(group["weight_decay"] for group in self.param_groups):
            return None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return None
        for parameter in self._parameters().values():
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                return None
        rows = Rows.of(self.curvature.layers)
        rows.watch(capture)
        return rows

    def _mean_loss(self, outputs: Tensor, targets: Any) -> tuple[Tensor, float | Tensor]:
        """In float64, and the number of data that count."""
        mask = self.likelihood.positions(outputs.detach(), targets)
        count = float(len(outputs)) if mask is None else mask.any(dim=1).sum().clamp_min(1)
        return -self.likelihood.log_prob(outputs, targets).sum(dtype=torch.float64) / count, count

    def _listen(self, capture: Any, loss: Tensor, receive: Receiver, count: float | Tensor) -> None:
        with capture.listening(lambda call, gradient: receive(call, gradient * count)):
            loss.backward(retain_graph=self.curvature.turns)

    def _collect(self, capture: Any, outputs: Tensor, targets: Any, own: Any = None) -> None:
        try:
            self.curvature.absorb(capture, outputs, targets, retain=False, own=own)
        except NumericalError:  # outputs that are not finite
            self.curvature.discard()
            if own is not None:
                self.zero_grad()

    # The step ---------------------------------------------------------------------------------------------------------

    def _again(self) -> bool:
        """Whether this step runs the forward pass again, for the model or to compare."""
        step = self.curvature.step
        return self.trust.compares(step) or self.search.solves(step)

    @torch.no_grad()
    def _update(self) -> None:
        curvature, parameters = self.curvature, self._parameters()
        passes, self._passes = [one for one in self._passes if one.loss is not None], []
        opaque, self._opaque = self._opaque, False
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        rows, self._rows = self._rows, None
        curvature.merge()
        if not (gradients or (rows and rows.found)) or not curvature.ready:
            if gradients and not curvature.dropped:
                raise UnsupportedError(
                    "There is no curvature yet: call step(lambda: model(x), y), or outputs = optimizer.forward(x) and "
                    "optimizer.backward(outputs, y) before optimizer.step()."
                )
            self._skip()
            return
        if self._exploded(passes):
            self._undo_last()
            self._skip()
            return
        value = self._choose_damping()
        curvature.renew(value)
        began = time.perf_counter()
        decays = self._options("weight_decay")
        gradients = {n: g.add(parameters[n], alpha=decays[n]) if decays[n] else g for n, g in gradients.items()}
        if rows:
            rows.form_missing(gradients, parameters)
        natural = curvature.precondition(gradients, value, rows)
        slope = self._slope(natural, gradients, rows)
        rate = self._scale_rates(natural)
        if slope.device.type == "cpu" and not isfinite(float(slope)):
            self._skip()
            return
        last = {n: self.state[parameters[n]]["update"] for n in natural if "update" in self.state[parameters[n]]}
        self._seconds["update"] += time.perf_counter() - began
        promised = None
        if self._again() and passes and not opaque and all(one.snapshot is not None for one in passes):
            began = time.perf_counter()
            weights = {name: value + decays[name] for name in natural}
            problem = Problem(self._model, self.likelihood, passes, natural, last, gradients, slope, weights)
            along, again, promised = self.search.solve(problem, curvature.step, rate)
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
        self._seconds["update"] += time.perf_counter() - began
        if promised is not None and compares:
            self._compare(passes, parameters, saved, promised)
        curvature.step += 1

    def _skip(self) -> None:
        """Leave out a step whose loss or gradient is not finite, or whose loss exploded."""
        self._counts["skipped"] += 1
        self.curvature.step += 1

    def _choose_damping(self) -> float:
        if self._damping is None:
            self._first_mean = max(self.curvature.measure(), torch.finfo(torch.float32).tiny)
            self._damping = self.trust.start(self._first_mean)
        self._damping = self.trust.at(self.curvature.step, self._damping)
        return self._damping

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

    def _exploded(self, passes: list[Pass]) -> bool:
        """Whether the last step made the loss explode, as this batch shows."""
        if not passes or any(one.loss is None or one.loss.device.type != "cpu" for one in passes):
            return False  # elsewhere it would take a synchronisation
        loss = sum(float(one.loss) for one in passes if one.loss is not None)
        level, spread, seen = self._level
        if not isfinite(loss):  # perhaps only the batch: the weights are to blame if it happens again
            self._failures += 1
            return self._failures > 1
        jump = loss - level
        if seen > 5 and jump > JUMP * spread and self._failures == 0:
            self._failures += 1
            return True
        self._failures = 0
        keep = 0.9 if seen else 0.0
        self._level = (loss, keep * spread + (1 - keep) * abs(jump if seen else 0.0), seen + 1)
        return False

    def _undo_last(self) -> None:
        """Take the last step back and trust the model less."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if (update := self.state[parameter].pop("update", None)) is not None:
                    parameter.sub_(update)
        self._counts["rejected"] += 1
        self.search.due = self.curvature.step + 1
        if self._damping is not None and isinstance(self.trust, LevenbergMarquardt):
            self._set_damping(self.trust.refused(self._damping))

    def _set_damping(self, value: float) -> None:
        assert isinstance(self.trust, LevenbergMarquardt)
        self._damping = self.trust.bounded(value, self._first_mean)

    def _compare(
        self, passes: list[Pass], parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor], promised: float
    ) -> None:
        """Evaluate the loss again, adapt λ, and undo the step if the loss rose beyond the model."""
        began = time.perf_counter()
        decays = self._options("weight_decay")
        change = 0.0
        for one in passes:
            assert one.loss is not None
            with one.again():
                loss, _ = self._mean_loss(one.forward(), one.targets)
            change += float(loss) - float(one.loss)
        for name, old in saved.items():
            if decays[name]:
                squares = parameters[name].square().sum(dtype=torch.float64) - old.square().sum(dtype=torch.float64)
                change += decays[name] / 2 * float(squares)
        self._ratio = change / promised if promised < 0 else float("nan")
        undone = not isfinite(change)
        if isinstance(self.trust, LevenbergMarquardt):
            assert self._damping is not None
            undone = undone or change > self.trust.reject * max(-promised, 0.0)
            step, old = self.curvature.step, self._damping
            self._set_damping(self.trust.refused(old) if undone else self.trust.adapted(old, self._ratio, step))
        if undone:
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

    def state_dict(self) -> dict[str, Any]:
        """Of the optimiser and its curvature; resumed with the same number of threads, training gives the same bits."""
        own = {
            "damping": self._damping,
            "first_mean": self._first_mean,
            "search": self.search.state_dict(),
            "level": self._level,
            "failures": self._failures,
            "ratio": self._ratio,
            "counts": dict(self._counts),
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
        self._damping, self._first_mean, self._ratio = own["damping"], own["first_mean"], own["ratio"]
        self.search.load_state_dict(own["search"])
        self._level, self._failures = tuple(own["level"]), own["failures"]
        self._counts = dict(own["counts"])

    def _warnings(self) -> Iterable[str]:
        if self._damping is not None and isinstance(self.trust, LevenbergMarquardt):
            if self._damping <= self.trust.floor * self._first_mean * 1.0001:
                yield "λ is at its floor: the model is trusted as far as allowed; a lower floor may train faster"
            if self._damping >= self.trust.ceiling * self._first_mean / 1.0001:
                yield "λ is at its ceiling: steps are those of plain gradient descent; look at the loss and the data"
        if self._ratio is not None and not self._ratio > 0:
            yield "the model ratio is negative: the loss rose where a fall was promised; the batch may be too small"
