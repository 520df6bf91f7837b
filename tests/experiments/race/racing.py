"""Small races."""

import json

from kronfisher.experiments.race import Problem, Race
from kronfisher.experiments.race.competitors import select

BASELINES = ("sgd", "adam", "adamw", "muon", "soap", "shampoo")
TINY = Problem("digits", "digits", "autoencoder", seconds=1, train_size=200, evaluated=100, evaluations=4)
CLASSES = Problem(
    "lenet", "digits", "lenet5", seconds=1, train_size=200, evaluated=100, evaluations=4, weight_decay=0.1
)


def race(folder, *names, problem=TINY, options=None, **settings):
    settings = {"seeds": (0,), "search": "none", "steps": 8} | settings
    small = {
        name: {"batch_size": 32, **({} if name not in ("soap", "shampoo") else {"frequency": 3})} for name in names
    }
    return Race(problem, select(names, small | (options or {})), folder, **settings)


def rows(folder):
    return {path.name.split("-seed")[0]: json.loads(path.read_text()) for path in (folder / "runs").glob("*.json")}


class Interrupted:
    """A competitor that is stopped before one of its steps."""

    def __init__(self, inner, at):
        self.inner, self.left = inner, at

    def step(self, *arguments):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inner.step(*arguments)

    def __getattr__(self, name):
        return getattr(self.inner, name)
