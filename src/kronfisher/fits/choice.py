"""The choice of a fit for every parameter."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from kronfisher.fits.fit import Fit
from kronfisher.fits.registry import resolve

__all__ = ["Choice", "asked_for", "choose"]

Choice = Fit | str | Mapping[str, Fit | str]


def choose(fit: Choice, parameters: Mapping[str, Any]) -> dict[str, Fit]:
    """The fit of every parameter, by the first pattern that its name matches.

    Parameters that were given the same fit, as an object or by name, get the same instance: fits treat these together.

    Raises:
        ValueError: a pattern matches nothing, or a parameter no pattern.

    Example:
        >>> choose({"*.bias": "diagonal", "*": "kfac"}, {"fc.weight": 0, "fc.bias": 0})
        {'fc.weight': KFAC(mode='expand'), 'fc.bias': Diagonal()}
    """
    if not isinstance(fit, Mapping):
        return dict.fromkeys(parameters, resolve(fit))
    names = {choice: resolve(choice) for choice in fit.values() if isinstance(choice, str)}
    patterns = {p: names[choice] if isinstance(choice, str) else resolve(choice) for p, choice in fit.items()}
    idle = [pattern for pattern in patterns if not any(_matches(name, pattern) for name in parameters)]
    if idle:
        raise ValueError(f"fit: the patterns {idle} match no trainable parameter; there are {list(parameters)}.")
    chosen = {}
    for name in parameters:
        match = next((choice for pattern, choice in patterns.items() if _matches(name, pattern)), None)
        if match is None:
            raise ValueError(
                f"fit: no pattern matches {name}; add '*' for the rest, or freeze it with requires_grad_(False)."
            )
        chosen[name] = match
    return chosen


def asked_for(fit: Choice, parameters: Iterable[str]) -> frozenset[str]:
    """Parameters whose fit was given by a pattern of their own, not by one for all.

    Example:
        >>> sorted(asked_for({"*.bias": "diagonal", "*": "kfac"}, ["fc.weight", "fc.bias"]))
        ['fc.bias']
    """
    if not isinstance(fit, Mapping):
        return frozenset()
    first = ((name, next((pattern for pattern in fit if _matches(name, pattern)), "*")) for name in parameters)
    return frozenset(name for name, pattern in first if pattern != "*")


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)  # a name may hold brackets, which mean something in a pattern
