"""Our own optimiser in a race: as it comes, with each fit, or with settings from a file."""

from typing import Any

import torch
from torch import Tensor, nn

import kronfisher.fisher.damping as dampings
import kronfisher.fits as fits
from kronfisher.experiments.race.competitors import COMMON, Competitor, Settings, register
from kronfisher.experiments.race.problems import Task

__all__ = ["OPTIONS", "Natural", "arguments"]

OPTIONS = (
    *("fit", "step", "damping", "trust", "momentum", "lr", "weight_decay", "refresh"),
    *("labels", "samples", "kl_limit"),
)


PAPERS = ["QuadraticModel", {}]  # the step of the papers' races
PAPERS_OPTIONS = {"damping", "trust", "momentum", "kl_limit"}


class Natural:
    """`NaturalGradient`, by default with the papers' step; ``layerwise`` is its own default.

    Settings are its arguments, where JSON has no such thing spelled as follows: a ``fit`` is a name or
    ``["KroneckerSum", {"rank": 2}]``; a ``step`` is ``["QuadraticModel", {}]`` or
    ``["LayerwiseStep", {"rate": 0.03}]``; ``damping`` a number (factored) or ``["exact", 0.1]``; ``trust``
    ``["LevenbergMarquardt", {"floor": 1e-6}]``; ``refresh`` the arguments of `Refresh`. Numbers for ``damping``,
    ``kl_limit`` and ``weight_decay`` are in units of the task's loss, as the rates of other optimisers are.
    """

    def __init__(self, model: nn.Module, task: Task, settings: Settings, seed: int) -> None:
        from kronfisher.optim import NaturalGradient

        options = arguments(settings, task.scale)
        self.model, self.scale = model, task.scale
        self.optimizer = NaturalGradient(model, task.likelihood, seed=seed, **options)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, x: Tensor, y: Tensor, factor: float) -> Tensor:
        """One step; see `Racer`."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        loss = self.optimizer.step(lambda: self.model(x), y)
        return torch.as_tensor(loss).detach() * self.scale

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's, with its curvature."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.optimizer.load_state_dict(state)

    def report(self) -> str:
        """Damping, step size, seconds by phase, what went wrong."""
        return str(self.optimizer.report())


def arguments(settings: Settings, scale: float = 1.0) -> dict[str, Any]:
    """The arguments of `NaturalGradient` for settings of JSON, see `Natural`.

    Args:
        settings: those that all optimisers have are left out.
        scale: of the loss that the settings belong to, over the optimiser's.
    """
    import kronfisher.optim as optim
    import kronfisher.optim.damping_schedule as trusts
    from kronfisher.optim import Refresh

    options: dict[str, Any] = {key: value for key, value in settings.items() if key not in COMMON}
    if options.get("step") == PAPERS and PAPERS_OPTIONS & options.keys():
        del options["step"]  # these select it, and are not its own
    if not isinstance(options.get("fit", ""), str):
        options["fit"] = _build(fits, options["fit"])
    if "step" in options:
        options["step"] = _build(optim, options["step"])
    if "damping" in options:
        given = options["damping"]
        kind, value = ("factored", given) if isinstance(given, int | float) else given
        rule = {"factored": dampings.FactoredTikhonov, "exact": dampings.Tikhonov}[kind]
        options["damping"] = rule(value / scale)
    if "trust" in options:
        options["trust"] = _build(trusts, options["trust"])
    if "refresh" in options:
        options["refresh"] = Refresh(**options["refresh"])
    # The loss of a task may be a mean over outputs, the optimiser's is their sum.
    return options | {name: options[name] / scale for name in ("kl_limit", "weight_decay") if name in options}


def _build(module: Any, given: Any) -> Any:
    """``["Name", {argument: value}]`` → ``module.Name(argument=value)``."""
    name, arguments = given
    if not hasattr(module, name):
        raise ValueError(f"options: there is no {name} in {module.__name__}")
    return getattr(module, name)(**arguments)


register(Competitor("layerwise", Natural, {"batch_size": 512}, takes=OPTIONS))
register(Competitor("natural", Natural, {"batch_size": 512, "step": PAPERS}, takes=OPTIONS))
for fit in fits.FITS:
    # Matrices of whole layers are for networks smaller than any here.
    if fit != "full" and fits.resolve(fit).trains:
        own = {"batch_size": 512, "fit": fit, "step": PAPERS}
        register(Competitor(f"natural-{fit}", Natural, own, takes=OPTIONS))
