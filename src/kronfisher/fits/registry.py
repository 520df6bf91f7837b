"""Fits that are known by name."""

from collections.abc import Callable
from dataclasses import dataclass

from kronfisher.fits.fit import Fit

__all__ = ["FITS", "Registered", "register", "resolve"]


@dataclass(frozen=True)
class Registered:
    """A fit with the settings that its name stands for.

    Attributes:
        build: makes it.
        description: what it is, in a few words.
        label: its name in pictures and prose.
        standard: whether comparisons take it without being asked for it by name.
    """

    build: Callable[[], Fit]
    description: str = ""
    label: str = ""
    standard: bool = True

    def __call__(self) -> Fit:
        return self.build()


FITS: dict[str, Registered] = {}
"""Name → fit; the conformance tests run every one, and comparisons and pictures read what it is from here."""


def register(
    name: str, build: Callable[[], Fit], description: str = "", label: str = "", standard: bool = True
) -> None:
    """Make a fit known by name.

    Args:
        name: for ``fit="..."`` and the command line.
        build: makes the fit with its settings.
        description: what it is, in a few words, for tables.
        label: its name in pictures and prose; `name` if left out.
        standard: whether comparisons take it without being asked for it by name.
    """
    FITS[name] = Registered(build, description, label or name, standard)


def resolve(fit: "Fit | str") -> Fit:
    """The fit itself, or a new one with the settings known by that name.

    Example:
        >>> import kronfisher as kf
        >>> resolve("kfac")
        KFAC(mode='expand')
    """
    if isinstance(fit, Fit):
        return fit
    if not isinstance(fit, str) or fit not in FITS:
        raise ValueError(f"fit={fit!r} is not known; use a fit object such as KFAC() or one of {sorted(FITS)}.")
    return FITS[fit]()
