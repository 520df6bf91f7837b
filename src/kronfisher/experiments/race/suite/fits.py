"""The fits that are compared on the suite."""

from typing import Any

from kronfisher.experiments.race.suite.table import FIT
from kronfisher.experiments.race.suite.whitening import WHITENING

__all__ = ["FITS", "named"]

FITS: dict[str, dict[str, Any]] = {
    "kfac": {"fit": "kfac"},
    "kfoc": {"fit": "kfoc"},
    "ekfac": {"fit": "ekfac"},
    "kronecker-sum": {"fit": "kronecker-sum"},
    "block-tridiagonal": {"fit": "block-tridiagonal"},
    "inputs": {"fit": WHITENING, "labels": "observed"},  # whose distribution hardly matters: only a trace is used
}
"""Fit → settings of `NaturalGradient`."""


def named(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Names of runs → settings, for these fits and K-FAC.

    Raises:
        ValueError: a fit is not in `FITS`.
    """
    if odd := [name for name in names if name not in FITS]:
        raise ValueError(f"there is no fit {odd[0]!r} in the suite; there are {', '.join(FITS)}")
    return {FIT + name: FITS[name] for name in dict.fromkeys(("kfac", *names))}
