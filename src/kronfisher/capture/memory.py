"""A memory of what was found out, in which the oldest entries make room for new ones."""

from collections.abc import Callable, MutableMapping
from typing import TypeVar

__all__ = ["recall"]

K = TypeVar("K")
V = TypeVar("V")

_ROOM = 256  # graphs of one model: every shape of a batch has a graph of its own


def recall(memory: MutableMapping[K, V], key: K, new: Callable[[], V]) -> V:
    """The entry of the key, which a new one begins if there is none; the oldest are forgotten."""
    if key not in memory:
        while len(memory) >= _ROOM:
            memory.pop(next(iter(memory)))
        memory[key] = new()
    return memory[key]
