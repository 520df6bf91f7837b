"""Who races: a name, how to build it, which of its settings are searched."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn

from kronfisher.experiments.race.problems import Task

__all__ = ["COMMON", "COMPETITORS", "Competitor", "Racer", "Settings", "register", "select"]

Settings = Mapping[str, Any]
"""The settings of a run, as JSON has them. Common to all: "batch_size" (a number, or ``[first, last, steps]`` for
one that grows), "schedule" ("constant" or "cosine"), "average" (the decay of an average of the parameters, evaluated
beside them). The others belong to the optimiser."""
COMMON = ("batch_size", "schedule", "average")


class Racer(Protocol):
    """One optimiser at work on one model."""

    def step(self, x: Tensor, y: Tensor, factor: float) -> Tensor:
        """One step on a batch, with the learning rate times `factor`; the loss before it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state that is needed, beside the model's, to continue with the same bits."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        ...

    def report(self) -> str:
        """Its own account of the run, for the file of results; may be empty."""
        ...


@dataclass(frozen=True)
class Competitor:
    """An optimiser that can be entered in a race.

    Attributes:
        name: what it is called.
        build: makes it for a model, a task, settings and a seed.
        settings: its settings before any search.
        axes: setting → the values to choose from, in order; searched one after another.
        baseline: whether it is one of those to be beaten.
        takes: settings that it knows, besides those that it has.
        follows: the competitor whose search it takes part in, instead of one of its own.
    """

    name: str
    build: Callable[[nn.Module, Task, Settings, int], Racer]
    settings: Settings = field(default_factory=dict)
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    baseline: bool = False
    takes: tuple[str, ...] = ()
    follows: str = ""

    def with_settings(self, name: str, settings: Settings) -> "Competitor":
        """The same with other settings, under another name; what is set is not searched.

        Raises:
            ValueError: there is no such setting.
        """
        known = dict.fromkeys((*COMMON, *self.settings, *self.axes, *self.takes))
        for key in settings:
            if key not in known:
                raise ValueError(f"options: {name} has no setting {key!r}; it has {', '.join(known)}")
        axes = {axis: values for axis, values in self.axes.items() if axis not in settings}
        return replace(self, name=name, settings={**self.settings, **settings}, axes=axes)


COMPETITORS: dict[str, Competitor] = {}
"""Name → competitor."""


def register(competitor: Competitor) -> None:
    """Make a competitor known by its name."""
    COMPETITORS[competitor.name] = competitor


def select(
    names: tuple[str, ...], options: Mapping[str, Settings], known: Mapping[str, Competitor] = COMPETITORS
) -> dict[str, Competitor]:
    """The competitors called so.

    Args:
        names: of `known`, or keys of `options`.
        options: name → settings that differ. A name that is not known says with "base" whose settings it changes.
        known: name → competitor.

    Raises:
        ValueError: a name is not known, or an option belongs to nobody.

    Example:
        >>> from kronfisher.experiments.race import baselines
        >>> sgd = select(("slow",), {"slow": {"base": "sgd", "lr": 1e-5}})["slow"]
        >>> sgd.settings["lr"], "lr" in sgd.axes
        (1e-05, False)
    """
    known = dict(known)
    for name, changes in options.items():
        base = changes.get("base", name)
        if base not in known:
            raise ValueError(f'options: {name!r} needs "base", one of {", ".join(known)}')
        known[name] = known[base].with_settings(name, {key: value for key, value in changes.items() if key != "base"})
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"there is no optimizer {missing[0]!r}; there are {', '.join(known)}")
    return {name: known[name] for name in names}
