"""The study of KPSVD and its relatives (Koroko et al. 2022, 2201.10285): sums of Kronecker products in training.

Rectified auto-encoders, losses averaged over pixels, batches of 256, 512 and 1,024; statistics and inverses every 100
steps; a fixed rate with momentum 0.9 and a KL limit of 0.01; 200 epochs. The published weight decay of 1e-3 is 1e-5
here: with the larger one neither SGD nor K-FAC leaves a loss of about 0.2 on CURVES. The published run compares methods
whose dampings differ; here every method runs twice, with λ and rate of its own search and with K-FAC's. The statistics
come from the whole batch instead of a quarter of it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kronfisher.experiments.race.baselines import adam, rates, sgd
from kronfisher.experiments.race.competitors import Competitor, Settings, select
from kronfisher.experiments.race.natural import OPTIONS, Natural
from kronfisher.experiments.race.problems import Problem

__all__ = ["METHODS", "kpsvd"]

METHODS: dict[str, list[Any]] = {
    "kfac": ["KFAC", {}],
    "kpsvd": ["KPSVD", {}],
    "corrected": ["KFACCorrected", {}],
    "deflation": ["KroneckerSum", {"rank": 2, "method": "deflation"}],
    "lanczos": ["KroneckerSum", {"rank": 2, "method": "lanczos"}],
    # Its descent ends earlier than by default: the average of some batches is no better known than that.
    "nonnegative": ["KroneckerSum", {"rank": 2, "method": "nonnegative", "tolerance": 1e-2}],
}
"""Method → the fit that it is."""
BATCHES = {"curves": 256, "mnist": 512, "faces": 1024, "digits": 64}
SIZES = {"curves": 20_000, "mnist": 60_000, "faces": 103_500, "digits": 1_500}
EPOCHS, SECONDS, DECAY = 200, 600.0, 1e-5
EQUAL = "@kfac"  # with K-FAC's λ and rate
FIXED = {"momentum": 0.9, "kl_limit": 0.01, "weight_decay": DECAY, "refresh": {"statistics": 100, "inverse": 100}}


def kpsvd(
    problem: Problem,
    names: tuple[str, ...] = (),
    options: Mapping[str, Settings] = {},
) -> tuple[Problem, dict[str, Competitor], int]:
    """The problem as in the paper, the competitors of the study, and the steps of 200 epochs.

    Args:
        problem: one of the auto-encoders.
        names: of competitors: "sgd", "adam", a method, or a method with "@kfac" for K-FAC's settings (default: all).
        options: name → settings that differ.

    Raises:
        ValueError: the problem is no auto-encoder, or a name is not known.

    Example:
        >>> from kronfisher.experiments.race.problems import PROBLEMS
        >>> problem, competitors, steps = kpsvd(PROBLEMS["curves"])
        >>> problem.activation, competitors["adam"].settings["batch_size"], steps
        ('relu', 256, 15600)
    """
    if problem.name not in BATCHES:
        raise ValueError(f"the study kpsvd is of auto-encoders: {', '.join(BATCHES)}")
    size = BATCHES[problem.name]
    known = {}
    for name, build, lr, more in (("sgd", sgd, 0.3, {"momentum": 0.9, "nesterov": False}), ("adam", adam, 1e-3, {})):
        settings = {"batch_size": size, "lr": lr, "weight_decay": DECAY, **more}
        known[name] = Competitor(name, build, settings, {"lr": rates(-4, 1)})
    for name, fit in METHODS.items():
        settings = {"batch_size": size, "fit": fit, "lr": 0.1, "damping": 0.03, **FIXED}
        own = Competitor(name, Natural, settings, {"damping": rates(-5, 1), "lr": rates(-3, 1)}, takes=OPTIONS)
        # As in the paper, K-FAC is what the others are measured against.
        known[name] = replace(own, baseline=name == "kfac")
        if name != "kfac":
            known[name + EQUAL] = replace(own, name=name + EQUAL, axes={}, follows="kfac")
    steps = EPOCHS * ((problem.train_size or SIZES[problem.name]) // size)
    changed = replace(problem, activation="relu", mean=True, seconds=SECONDS)
    return changed, select(names or tuple(known), options, known), steps
