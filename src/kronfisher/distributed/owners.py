"""Which rank computes what."""

from collections.abc import Sequence

__all__ = ["owners"]


def owners(costs: Sequence[float], ranks: int, loads: Sequence[float] = ()) -> list[int]:
    """The rank that owns each piece of work: the longest first, each to the rank that has least so far.

    Args:
        costs: of the pieces.
        ranks: how many there are.
        loads: what each has already; none if that is left out.

    Example:
        >>> owners([1.0, 5.0, 3.0, 3.0], 2)
        [0, 0, 1, 1]
        >>> owners([1.0], 2, loads=[3.0, 2.0])
        [1]
    """
    total, owner = list(loads) or [0.0] * ranks, [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda k: -costs[k]):
        owner[place] = min(range(ranks), key=lambda rank: total[rank])
        total[owner[place]] += costs[place]
    return owner
