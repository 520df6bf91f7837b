"""Reports of long work: callables that take them, and one that ignores them."""

from collections.abc import Callable

__all__ = ["Say", "Step", "ignore"]

Say = Callable[[str], None]
"""Called with a line of text whenever a part is done."""
Step = Callable[[str, int, int], None]
"""Called with what is being done, how many parts of it are done, and of how many."""


def ignore(*report: object) -> None:
    """Nothing happens."""
