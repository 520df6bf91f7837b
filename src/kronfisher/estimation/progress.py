"""Progress reports of long estimates."""

import sys
from collections.abc import Callable

__all__ = ["Progress", "writer"]

Progress = bool | Callable[[str], None]


def writer(progress: Progress) -> Callable[[str], None]:
    """The function that receives a line on progress: the user's own, one that writes to standard error, or none."""
    if callable(progress):
        return progress
    if not progress:
        return lambda text: None
    return lambda text: print(f"\r{text:<78}" if text else "", end="" if text else "\n", file=sys.stderr, flush=True)
