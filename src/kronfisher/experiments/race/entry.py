"""A race from names, as the command line has them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kronfisher.experiments.race.competitors import Settings, select
from kronfisher.experiments.race.papers import kpsvd
from kronfisher.experiments.race.problems import PROBLEMS
from kronfisher.experiments.race.race import Race

__all__ = ["DEFAULT", "enter"]

DEFAULT = ("natural", "sgd", "adamw", "muon", "soap", "shampoo")


def enter(
    problem: str,
    *,
    optimizers: tuple[str, ...] = (),
    options: Mapping[str, Settings] = {},
    study: str = "",
    full: bool = False,
    seeds: tuple[int, ...] | None = None,
    folder: Path | None = None,
    train_size: int | None = None,
    evaluations: int | None = None,
    seconds: float | None = None,
    device: str = "cpu",
    **settings: Any,
) -> Race:
    """The race of a problem and competitors given by name.

    Args:
        problem: of `PROBLEMS`.
        optimizers: names of competitors (default: `DEFAULT`, or all of the study's).
        options: name → settings that differ.
        study: "kpsvd" or nothing.
        full: the study's published length.
        seeds: default: 0, 1, 2, or 0 for a study.
        folder: default: ``results/race/<problem>``.
        train_size: at most so many data.
        evaluations: of a run.
        seconds: training time of a run (default: the problem's).
        device: of torch.
        settings: of `Race`.

    Raises:
        ValueError: a name is not known, or a setting not possible.
    """
    if problem not in PROBLEMS:
        raise ValueError(f"there is no problem {problem!r}; there are {', '.join(PROBLEMS)}")
    if study not in ("", "kpsvd"):
        raise ValueError(f"there is no study {study!r} of races; there is kpsvd")
    if full and not study:
        raise ValueError("--full belongs to a --study")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, and torch finds none")
    for name, value in (("train-size", train_size), ("evaluations", evaluations)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value} and must be at least 1")
    chosen, clocks = PROBLEMS[problem], ("seconds", "cpu_seconds", "step")
    if study:
        chosen = replace(chosen, train_size=train_size)
        chosen, competitors, steps = kpsvd(chosen, optimizers, options)
        settings, clocks = (
            {**settings, "steps": settings.get("steps") if settings.get("steps") is not None else steps},
            ("seconds", "epoch"),
        )
        unlimited = full
    else:
        competitors = select(optimizers or DEFAULT, options)
        unlimited = settings.get("steps") is not None
    if seconds is None and not unlimited:
        seconds = chosen.seconds
    changes = {"train_size": train_size, "evaluations": evaluations}
    chosen = replace(chosen, **{name: value for name, value in changes.items() if value is not None})
    folder = folder or Path("results/race") / (problem + (f"-{study}" if study else ""))
    seeds = seeds or ((0,) if study else (0, 1, 2))
    return Race(chosen, competitors, folder, seeds, seconds, device=device, clocks=clocks, **settings)
