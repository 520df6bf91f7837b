"""The two halves of the suite: one to develop on, the other for the record; decided by lot before any run."""

import random

from kronfisher.experiments.race.suite.problem import PROBLEMS

__all__ = ["HALVES", "SEED", "half"]

HALVES = ("development", "record")
SEED = 20


def half(name: str) -> tuple[str, ...]:
    """The problems of a half, in the order of `PROBLEMS`; of both if the name is empty.

    Sorted names are shuffled by `SEED`; the first half of them is "development".

    Raises:
        ValueError: there is no such half.
    """
    if name and name not in HALVES:
        raise ValueError(f"there is no half {name!r} of the suite; there are {', '.join(HALVES)}")
    names = sorted(PROBLEMS)
    random.Random(SEED).shuffle(names)
    middle = len(names) // 2
    chosen = {"development": names[:middle], "record": names[middle:], "": names}[name]
    return tuple(each for each in PROBLEMS if each in chosen)
