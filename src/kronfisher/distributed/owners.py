"""Which rank computes what."""

from collections.abc import Sequence

__all__ = ["owners"]


def owners(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that owns each piece of work: the longest first, each to the rank that has least so far.

    Args:
        costs: of the pieces.
        ranks: how many there are.

    Example:
        >>> owners([1.0, 5.0, 3.0, 3.0], 2)
        [0, 0, 1, 1]
    """
    loads, owner = [0.0] * ranks, [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda k: -costs[k]):
        owner[place] = min(range(ranks), key=lambda rank: loads[rank])
        loads[owner[place]] += costs[place]
    return owner
