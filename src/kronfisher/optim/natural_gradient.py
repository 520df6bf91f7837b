"""The optimiser: natural gradient, momentum and step size from a quadratic model, damping from its success."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kronfisher.distributed import ProcessGroup, Spread, ranks_of, whole
from kronfisher.errors import DataError, UnsupportedError, require_integer, require_kind
from kronfisher.estimation.recipe import Labels
from kronfisher.fisher.damping import Damping
from kronfisher.fisher.parameters import trainable, unwrapped
from kronfisher.fits import Choice, Gram
from kronfisher.likelihoods import Likelihood, Residuals
from kronfisher.optim.attachment import Attachment
from kronfisher.optim.damping_schedule import DampingSchedule
from kronfisher.optim.direction import Direction
from kronfisher.optim.exact_fisher import FisherProducts
from kronfisher.optim.forward_backward import ForwardBackward
from kronfisher.optim.intervals import LAYERWISE, Refresh
from kronfisher.optim.judge import Judge
from kronfisher.optim.layerwise import LayerwiseStep
from kronfisher.optim.layerwise.average import Average
from kronfisher.optim.layerwise.direction import RelativeDirection
from kronfisher.optim.layerwise.motion import Motion
from kronfisher.optim.layerwise.step import LayerwiseParts
from kronfisher.optim.layerwise.units import is_matrix
from kronfisher.optim.ownership import Ownership, Share, require_share
from kronfisher.optim.parts import Parts, StepParts
from kronfisher.optim.quadratic_step import QuadraticModel
from kronfisher.optim.report import TrainingReport
from kronfisher.optim.sample_space import SampleSpaceGradient
from kronfisher.optim.statistics import Statistics
from kronfisher.optim.step_size import StepSize
from kronfisher.optim.trained_parameters import TrainedParameters
from kronfisher.optim.watch import Watch, require_rate

__all__ = ["DEFAULT_FIT", "NaturalGradient"]

DEFAULT_FIT = "kfac"
_MISSING: Any = object()


class NaturalGradient(torch.optim.Optimizer):
    """Natural gradient descent with any fit of the Fisher matrix (Martens & Grosse 2015).

    There is no learning rate to find: by default (`LayerwiseStep`) every layer moves along a momentum of its natural
    gradient ``(F̆ + λ)⁻¹ ∇h``, at a size of its own that evidence from later batches adapts. F̆ is a moving average in
    the structure of `fit`; the loss h is the negative log-likelihood of an example, summed over its positions and
    averaged over the batch. ``step=kf.QuadraticModel()`` is the optimiser of the papers, for large batches.

    Either ``step(lambda: model(x), y)`` does everything, or a loop calls ``forward``, ``backward`` and ``step``, and
    can accumulate and clip gradients, scale losses and add loss terms between them.

    Args:
        model: any module. DDP and ``torch.compile`` wrappers may stay around it; ``fully_shard`` may have spread all
            its parameters over the ranks of `group`.
        likelihood: the distribution that the outputs parametrise, such as ``kf.Categorical()``; it defines the loss.
        fit: the structure of the curvature, as in `estimate`; ``"gram"`` steps in the space of samples.
        step: the rule of the step, `LayerwiseStep` or `QuadraticModel`; None: the first, unless an option below belongs
            to the second alone.
        lr: multiplies the step, of which 1.0 is the whole; schedulers may change it. A rate as of other optimisers
            (below .01) gets a warning.
        weight_decay: η. `LayerwiseStep` shrinks weights by ``lr · rate · f · η`` a step, as AdamW does;
            `QuadraticModel` adds ``½ η ‖θ‖²`` to the loss.
        total_steps: the number of steps, if it is known: the rate then falls over the last 30 % of them, to a
            fifth, at which steps beyond it go on with a warning. Only for `LayerwiseStep`.
        refresh: how often statistics and inverses are renewed.
        params: parameters to train, as in any optimiser, with options per group; None: all that require a gradient.
        labels: ``"sampled"``: one more backward pass where statistics are due; ``"observed"``: none (the empirical
            Fisher, which is another matrix); ``"exact"``: one for each column.
        samples: label draws per example.
        seed: of the label draws.
        damping: an option of `QuadraticModel`, which it selects; so are the others below.
        trust: likewise.
        momentum: ``"exact"`` likewise; a number is β of either rule.
        kl_limit: likewise.
        group: the processes that train together under DDP or ``fully_shard``, each on batches of its own, as a process
            group of torch.distributed or a one-dimensional device mesh. None: this process alone.
        share: ``"all"``: every process makes and keeps the inverses of all layers; ``"owned"``: one process those of a
            layer, and all get its natural gradients by one collective a step. Then all of them call `state_dict`. Not
            for `QuadraticModel` and ``fit="gram"``.

    Attributes:
        steps: the number of steps made, undone and skipped ones included.
        parts: the parts of a step; each can be replaced alone.

    Raises:
        ValueError: an option is out of range.
        UnsupportedError: residuals and another fit than ``"gram"``, or settings of `Gram`; at the first step, no
            parameter is in a layer that blocks can cover; or ``fully_shard`` and `QuadraticModel` or
            ``fit="gram"``; or parameters are spread over processes in another way.
        RankError: in a step, ranks have different weights, settings or layers.

    Example:
        >>> import torch, kronfisher as kf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
        >>> optimizer = kf.NaturalGradient(model, kf.Categorical())
        >>> losses = [optimizer.step(lambda: model(x), y).item() for _ in range(10)]
        >>> losses[-1] < losses[0]
        True
    """

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """With ``fit="gram"`` a `SampleSpaceGradient`, which has parts and options of its own."""
        if options.get("fit") == "gram" or isinstance(options.get("fit"), Gram):
            if options["fit"] not in ("gram", Gram()):
                raise UnsupportedError(
                    f"fit={options['fit']}: steps choose the rows of large batches themselves and refuse none; give "
                    "fit='gram'. Settings are for estimates."
                )
            if options.get("share", "all") != "all":
                require_share(options["share"])
                raise UnsupportedError(
                    "share='owned' with fit='gram': steps in the space of samples have one system for all layers, and "
                    "no inverse of any that a rank could own. Leave share out."
                )
            others = {name: value for name, value in options.items() if name not in ("fit", "share")}
            return SampleSpaceGradient(*args, **others)
        return super().__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        fit: Choice = DEFAULT_FIT,
        step: LayerwiseStep | QuadraticModel | None = None,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        total_steps: int | None = None,
        refresh: Refresh | None = None,
        params: Iterable[Any] | None = None,
        labels: Labels = "sampled",
        samples: int = 1,
        seed: int = 0,
        damping: Damping | None = None,
        trust: DampingSchedule | float | None = None,
        momentum: float | Literal["exact"] | None = None,
        kl_limit: float | None = None,
        group: ProcessGroup = None,
        share: Share = "all",
    ) -> None:
        require_share(share)
        if isinstance(likelihood, Residuals):
            raise UnsupportedError(
                "residuals are trained in the space of samples: kf.NaturalGradient(model, likelihood, fit='gram')."
            )
        ranks = ranks_of(group)
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay={weight_decay!r} must not be negative.")
        require_rate(lr, stacklevel=3)
        self._wrapped, self._model = model, unwrapped(model)
        self.likelihood = likelihood
        self.rule = _rule(
            step, refresh, {"damping": damping, "trust": trust, "momentum": momentum, "kl_limit": kl_limit}
        )
        if total_steps is not None:
            remedy = "the horizon of `LayerwiseStep` is an integer of at least 1, the calls of `step`"
            total_steps = require_integer("total_steps", total_steps, 1, remedy)
            if isinstance(self.rule, QuadraticModel):
                raise ValueError(
                    f"total_steps={total_steps!r}: `QuadraticModel` has no horizon, because it finds the length of "
                    "every step."
                )
        self._spread = Spread.of(self._model, ranks)
        own = dict(self._model.named_parameters())
        self._names = {id(p): name for name, p in own.items()}
        self._all = params is None
        if params is None:
            with whole(self._model):
                params = [own[name] for name in trainable(self._model)]
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        if (top := max(group["lr"] for group in self.param_groups)) != lr:
            require_rate(top, stacklevel=3)
        self.steps, self._attachment = 0, Attachment()
        parameters = self.trained()
        passes = ForwardBackward(self._model, likelihood)
        settings: dict[str, Any] = {"fit": fit, "labels": labels, "samples": samples, "seed": seed}
        settings |= {"ranks": ranks, "alone": group is not None, "spread": self._spread}
        if isinstance(self.rule, QuadraticModel):
            if share == "owned":
                raise UnsupportedError(
                    "share='owned' with step=kf.QuadraticModel(...): its λ changes with every comparison of losses, "
                    "and all ranks make inverses anew for it. Use the default, step=kf.LayerwiseStep(), or "
                    "kf.Preconditioner; or leave share out."
                )
            if self._spread is not None:
                raise UnsupportedError(
                    "step=kf.QuadraticModel(...) runs the forward pass again with other tensors in place of "
                    "parameters, and fully_shard puts its own there. Use the default, step=kf.LayerwiseStep(), or "
                    "kf.Preconditioner; or train under DistributedDataParallel."
                )
            refresh = refresh or Refresh()
            self.parts: StepParts = Parts(
                passes,
                Statistics(self._model, parameters, likelihood, refresh=refresh, **settings),
                Direction(parameters, self.rule.damping, refresh),
                StepSize(self.rule.momentum, self.rule.kl_limit, refresh, products=FisherProducts(ranks=ranks)),
                Judge(self.rule.schedule),
                ranks=ranks,
            )
        else:
            refresh = refresh or LAYERWISE
            rule = self.rule
            self.parts = LayerwiseParts(
                passes,
                Statistics(
                    self._model,
                    parameters,
                    likelihood,
                    refresh=refresh,
                    treats=is_matrix,
                    misfit=True,
                    partly=True,
                    bounds=True,
                    **settings,
                ),
                options=rule,
                direction=RelativeDirection(
                    parameters, refresh, rule.damping, rule.data_damping, Ownership.of(ranks, share)
                ),
                motion=Motion(rule.momentum, rule.adaptive),
                average=Average(),
                total_steps=total_steps,
            )

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
            RankError: ranks differ, or one of them has ended.
        """
        self._require_training()
        if not (closure is None or callable(closure)):
            raise TypeError(
                f"step was given {type(closure).__name__}, and takes a function that runs the model: "
                "step(lambda: model(x), y). A loop that runs it before calls step() without arguments, after "
                "outputs = optimizer.forward(x) and optimizer.backward(outputs, y)."
            )
        with self.parts.statistics.watched():
            return self._step(closure, targets)

    def _step(self, closure: Callable[[], Any] | None, targets: Any) -> Any:
        loss, whole = None, closure is not None and targets is not _MISSING
        if self._all and self._spread is None and self.parts.statistics.is_due(self.steps):
            self.parts.watch.untrained(self._untrained())
        if closure is not None and whole:
            self.zero_grad()
            outputs = self.parts.forward(closure, self.steps, whole=True)
            decayed = any(group["weight_decay"] for group in self.param_groups)
            rates = None if decayed else self._options("lr")
            loss = self.parts.backward(outputs, targets, None, None, self.steps, rates=rates)
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = TrainedParameters(self.trained(), self._options("lr"), self._options("weight_decay"), self._states())
        self.parts.watch.rated(self.steps, trained.rates.values())
        with torch.no_grad(), self._changed():
            self.parts.make_step(self._model, trained, self.steps, whole=whole)
        self.steps += 1
        return loss

    def _untrained(self) -> list[str]:
        """Names of the model's parameters that require a gradient and are in no group."""
        own = {id(p) for group in self.param_groups for p in group["params"]}
        return [name for name, p in self._model.named_parameters() if p.requires_grad and id(p) not in own]

    def _require_training(self) -> None:
        if torch.is_inference_mode_enabled():
            raise UnsupportedError("torch.inference_mode() keeps no graph to go backward through: train outside of it.")
        if self.parts.evaluating:
            raise UnsupportedError(
                "The model holds the average of its iterates since optimizer.eval(): call optimizer.train() before "
                "training goes on."
            )

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the model returns, captured where statistics are due; outputs are made of it, or are its ``logits``."""
        self._require_training()
        with self.parts.statistics.watched():
            return self.parts.forward(lambda: self._wrapped(*inputs, **options), self.steps, whole=False)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The mean negative log-likelihood of an example, differentiable."""
        return self.parts.forward_backward.loss_of(outputs, targets)

    def backward(
        self,
        outputs: Any,
        targets: Any = None,
        loss: Tensor | None = None,
        *,
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Add the gradient of the loss to ``.grad``, and collect statistics where they are due.

        Args:
            outputs: as `forward` returned them, or made of what it returned: ``outputs.squeeze(1)``, one of several
                tensors, or their concatenation.
            targets: as the likelihood takes them. Beside a `loss` they may be left out: they only tell masks, and how
                far the loss can fall.
            loss: another loss to differentiate, such as ``optimizer.loss(outputs, y) / 4 + penalty``. It cannot be
                evaluated again, so that `LevenbergMarquardt` refuses it.
            scale: applied to the loss before it is differentiated (``GradScaler.scale``); unscale before `step`.

        Returns:
            The loss, detached.

        Raises:
            DataError: `outputs` are not made of what `forward` returned.
            UnsupportedError: a loss that cannot be evaluated again, with a damping schedule that compares losses.
        """
        if loss is not None and self.parts.compares_losses:
            raise UnsupportedError(
                f"{type(self.trust).__name__} compares the loss before and after a step, and a loss that was computed "
                "outside cannot be evaluated again. Use trust=kf.Constant(λ) or kf.Schedule(...), or leave `loss` out."
            )
        with self.parts.statistics.watched():
            return self.parts.backward(outputs, targets, loss, scale, self.steps, rates=None)

    def attach(
        self,
        model: nn.Module | None = None,
        *,
        targets: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None,
        outputs: Callable[[Any], Any] | None = None,
    ) -> None:
        """For loops that call the model themselves: capture its forward passes, until `detach`.

        Then ``loss.backward(); optimizer.step()`` is a step, as with any optimiser. Where statistics are due, a hook on
        the model draws labels and runs one more backward pass, which leaves every ``.grad`` alone. A loss that the
        loop keeps to itself does not show how far it can fall: steps are not bounded by that, and noise shortens them
        sooner.

        Args:
            model: as the loop calls it; None: as it was given to the optimiser. Attach what ``torch.compile`` returned.
            targets: gives the targets of a call, from its positional and keyword arguments, for masks and for
                ``labels="observed"``. None: the keyword argument ``labels``, as in `estimate`; without one, every
                position counts.
            outputs: gives the outputs that the likelihood is of, from what the model returned, such as
                ``lambda answer: answer[0]``. None: that itself, or its ``logits``.

        Raises:
            UnsupportedError: the step evaluates the loss again.
        """
        if self.parts.compares_losses:
            raise UnsupportedError(
                f"{type(self.trust).__name__} evaluates the loss again, and a loop that calls the model keeps it to "
                "itself. Use the default step, step=kf.LayerwiseStep(), or step=kf.QuadraticModel(momentum=0.9)."
            )
        self.detach()
        self._attachment = Attachment(self.parts, lambda: self.steps, targets, outputs)
        self._attachment.add_to(self._wrapped if model is None else model)

    def detach(self) -> None:
        """Take back `attach`: the model is as it was before."""
        self._attachment.remove()
        self._attachment = Attachment()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in any optimiser; it may stand before, between or after `forward` and `backward`."""
        self.parts.forward_backward.forget_done()
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:  # torch's own asks its compiler first, which takes longer than a layer
            for parameter in group["params"]:
                parameter.grad = None

    def eval(self) -> None:
        """Put the average of the iterates in place of the weights, to evaluate or save the model; `train` undoes it."""
        with self._changed():
            self.parts.evaluate(True, self.trained())

    def train(self) -> None:
        """Put the weights back in place of their average, to continue training.

        Where the model holds other weights by then, loaded since or saved at another time than the optimiser, it keeps
        them, with a warning.
        """
        with self._changed():
            self.parts.evaluate(False, self.trained())

    def report(self) -> TrainingReport:
        """The state of training."""
        return self.parts.report(self.steps)

    # Parameters, options, state ---------------------------------------------------------------------------------------

    @property
    def trust(self) -> DampingSchedule | None:
        """The damping schedule; None for a step that has none.

        Example:
            >>> import torch, kronfisher as kf
            >>> model = torch.nn.Linear(3, 2)
            >>> kf.NaturalGradient(model, kf.Categorical(), trust=kf.Constant(0.1)).trust
            Constant(...)
            >>> kf.NaturalGradient(model, kf.Categorical()).trust is None
            True
        """
        return self.rule.schedule if isinstance(self.rule, QuadraticModel) else None

    def trained(self) -> dict[str, nn.Parameter]:
        """Name → parameter of all groups; whole ones where `fully_shard` spread them.

        Raises:
            ValueError: one is not the model's.

        Example:
            >>> import torch, kronfisher as kf
            >>> model = torch.nn.Linear(3, 2)
            >>> list(kf.NaturalGradient(model, kf.Categorical(), params=[model.weight]).trained())
            ['weight']
        """
        named = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in self._names:
                    raise ValueError(f"a parameter of shape {list(parameter.shape)} in `params` is not the model's")
                name = self._names[id(parameter)]
                named[name] = parameter if self._spread is None else self._spread.parameters[name]
        return named

    def _states(self) -> Mapping[Any, dict[str, Any]]:
        """Parameter, whole, → its state."""
        if self._spread is None:
            return self.state
        own = (parameter for group in self.param_groups for parameter in group["params"])
        return {self._spread.parameters[self._names[id(p)]]: self.state[p] for p in own}

    def _changed(self) -> AbstractContextManager[None]:
        """While weights are read and changed."""
        return nullcontext() if self._spread is None else self._spread.changed()

    def _options(self, key: str) -> dict[str, float]:
        given = ((float(group[key]), group["params"]) for group in self.param_groups)
        return {self._names[id(p)]: value for value, parameters in given for p in parameters}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in any optimiser; the new parameters get curvature from the next statistics on.

        They may have come into the model since the optimiser was made.

        Raises:
            UnsupportedError: they took the place of others that are trained.

        Example:
            >>> import torch, kronfisher as kf
            >>> model = torch.nn.Linear(3, 2)
            >>> optimizer = kf.NaturalGradient(model, kf.Categorical(), params=[model.weight])
            >>> optimizer.add_param_group({"params": [model.bias], "lr": 0.5})
            >>> list(optimizer.trained())
            ['weight', 'bias']
        """
        super().add_param_group(param_group)
        if hasattr(self, "parts"):
            self._find_names()
            self.parts.extend(self.trained())

    def _find_names(self) -> None:
        """Learn the names of parameters that have come into the model."""
        known = {self._names[id(p)]: p for group in self.param_groups for p in group["params"] if id(p) in self._names}
        for name, parameter in self._model.named_parameters():
            if known.get(name, parameter) is not parameter:
                self.param_groups.pop()
                raise UnsupportedError(
                    f"{name} took the place of a parameter that was trained before, whose curvature, momentum and "
                    "average are not its own: make a new optimiser for the model as it is now."
                )
            self._names[id(parameter)] = name

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a NaturalGradient belongs to its model; copy or save optimizer.state_dict() and the model's")

    def state_dict(self) -> dict[str, Any]:
        """All state of training but the model's; resumed with the same number of threads, it gives the same bits.

        With ``share="owned"`` all ranks make the call, and each gets the inverses of all: the state of one process,
        which any number of ranks can load, with either way to share.
        """
        own = {"steps": self.steps, **self.parts.state_dict()}
        return {**super().state_dict(), "natural_gradient": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            DataError: it was saved for other parameters or other fits, or by a version that kept its state otherwise.
        """
        rest = deepcopy(dict(state_dict))  # or two optimisers would change the same tensors
        own = rest.pop("natural_gradient", {})
        if own and "curvature" in rest:
            raise DataError(
                "the state was saved by an earlier version of kronfisher, which kept it in another form. Load the "
                "model's weights, and continue with a new optimiser."
            )
        if own.keys() == {"steps", *Parts.names()} - {"watch"}:  # of the first version
            own = {**own, "watch": Watch().state_dict()}
        if own.keys() != {"steps", *self.parts.names()}:
            if "statistics" in own:
                kind = "QuadraticModel" if "judge" in own else "LayerwiseStep"
                raise DataError(
                    f"the state was saved with step=kf.{kind}(...), and this optimiser takes "
                    f"{type(self.rule).__name__}: make it with step=kf.{kind}(...)"
                )
            raise DataError("this is not the state of a NaturalGradient; it lacks the curvature")
        self.parts.load_state_dict(own)
        super().load_state_dict(rest)
        self.steps = own["steps"]


def _rule(
    step: LayerwiseStep | QuadraticModel | None, refresh: Refresh | None, options: Mapping[str, Any]
) -> LayerwiseStep | QuadraticModel:
    """The rule of the step; options that only one rule has choose it."""
    require_kind(
        "step", step, (LayerwiseStep, QuadraticModel, type(None)), "use kf.LayerwiseStep() or kf.QuadraticModel()"
    )
    require_kind("refresh", refresh, (Refresh, type(None)), "use kf.Refresh(...)")
    given = {name: value for name, value in options.items() if value is not None}
    papers = given.keys() - {"momentum"} or given.get("momentum") == "exact" or (refresh and refresh.model is not None)
    if step is None:
        if papers:
            return QuadraticModel(**given)
        return LayerwiseStep(**given)
    if given:
        raise ValueError(f"{', '.join(given)}: give these to {type(step).__name__}(...), as `step` is given.")
    return step
