"""Who trains on the suite: the baselines of the races with a cosine by the clock, and ours as it comes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kronfisher.experiments.race import baselines
from kronfisher.experiments.race.competitors import Racer
from kronfisher.experiments.race.natural import arguments
from kronfisher.experiments.race.suite.plan import Plan
from kronfisher.experiments.race.suite.problem import Loaded, penalty_of
from kronfisher.experiments.race.suite.whitening import WHITENING, Whitening

__all__ = ["BASELINES", "CONTESTANTS", "OURS", "Contestant"]

OURS = "natural"


class Contestant(Protocol):
    """An optimiser at work on one model."""

    def step(self, x: Tensor, y: Tensor, factor: float) -> Tensor:
        """One step; `factor` is where a cosine over the budget is."""
        ...

    def evaluated(self) -> Any:
        """A context in which the model has the weights that are to be evaluated."""
        ...

    def report(self) -> str:
        """Its own account of the run."""
        ...


class Baseline:
    """A baseline of the races; its rate follows the cosine."""

    def __init__(
        self, build: Callable[..., Racer], extra: dict[str, Any], model: nn.Module, loaded: Loaded, plan: Plan
    ) -> None:
        self.racer = build(model, _Penalised(loaded, model), {**extra, **plan.settings}, plan.seed)

    def step(self, x: Tensor, y: Tensor, factor: float) -> Tensor:
        """See `Contestant`."""
        return self.racer.step(x, y, factor)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The weights as they are."""
        yield

    def report(self) -> str:
        """Nothing."""
        return ""


class _Penalised:
    """A task of the races whose loss has the model's penalty."""

    def __init__(self, loaded: Loaded, model: nn.Module) -> None:
        self.loaded, self.model = loaded, model
        self.problem = SimpleNamespace(weight_decay=0.0)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of an example."""
        loss, penalty = self.loaded.loss(outputs, targets), penalty_of(self.model)
        return loss if penalty is None else loss + penalty


class Natural:
    """`NaturalGradient` as it comes; without a schedule, unless it is told the number of steps.

    Settings are its arguments, spelled as those of the race's `Natural`; the fit may also be `WHITENING`.
    """

    def __init__(self, model: nn.Module, loaded: Loaded, plan: Plan) -> None:
        from kronfisher.optim import NaturalGradient

        options: dict[str, Any] = arguments(plan.settings) | ({"total_steps": plan.horizon} if plan.horizon else {})
        if options.get("fit") == WHITENING:
            options["fit"] = Whitening()
        self.model = model
        self.optimizer: Any = NaturalGradient(model, loaded.likelihood, seed=plan.seed, **options)
        self.penalised = penalty_of(model) is not None

    def step(self, x: Tensor, y: Tensor, factor: float) -> Tensor:
        """See `Contestant`; the cosine is not followed."""
        if not self.penalised:
            return torch.as_tensor(self.optimizer.step(lambda: self.model(x), y)).detach()
        self.optimizer.zero_grad()
        outputs = self.optimizer.forward(x)
        loss = self.optimizer.loss(outputs, y) + penalty_of(self.model)
        self.optimizer.backward(outputs, y, loss=loss)
        self.optimizer.step()
        return loss.detach()

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The weights for evaluation."""
        self.optimizer.eval()
        try:
            yield
        finally:
            self.optimizer.train()

    def report(self) -> str:
        """The optimiser's."""
        return str(self.optimizer.report())


class Preconditioned(baselines.FirstOrder):
    """`Preconditioner` as it comes, before SGD with momentum."""

    def __init__(self, model: nn.Module, task: Any, settings: Mapping[str, Any], seed: int) -> None:
        from kronfisher.optim.preconditioner import Preconditioner

        trained = [p for p in model.parameters() if p.requires_grad]
        super().__init__(model, task, torch.optim.SGD(trained, settings["lr"], settings["momentum"], nesterov=True))
        self.preconditioner = Preconditioner(model, task.loaded.likelihood, seed=seed)
        self.optimizers[0].register_step_pre_hook(lambda *_: self.preconditioner.step())
        self.model = self.through = _Through(model, self.preconditioner)

    def step(self, x: Tensor, y: Tensor, factor: float) -> Tensor:
        """One step; see `Racer`."""
        self.through.targets = y
        return super().step(x, y, factor)


class _Through(nn.Module):
    """A model that is called through its preconditioner, which may need targets to know where classes are."""

    def __init__(self, model: nn.Module, preconditioner: Any) -> None:
        super().__init__()
        self.inner, self.preconditioner = model, preconditioner
        self.targets: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """The model's outputs."""
        return self.preconditioner(x, targets=self.targets)


def _baseline(build: Callable[..., Racer], **extra: Any) -> Callable[..., Contestant]:
    return lambda model, loaded, plan: Baseline(build, extra, model, loaded, plan)


BASELINES = {
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2),
    "muon": (1e-3, 3e-3, 1e-2, 3e-2),
    "soap": (1e-3, 3e-3, 1e-2, 3e-2),
}
"""Baseline → the learning rates of its grid; the grid grows until the best is inside."""

CONTESTANTS: dict[str, Callable[..., Contestant]] = {
    "adamw": _baseline(baselines.adamw),
    "muon": _baseline(baselines.muon),
    "soap": _baseline(baselines.soap, frequency=10),
    OURS: Natural,
    "sgd": _baseline(baselines.sgd, momentum=0.9),
    "preconditioner": _baseline(Preconditioned, momentum=0.9),
}
"""Name → contestant, built for a model, a loaded problem and a plan."""
