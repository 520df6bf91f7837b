"""Lists of cases in which every two choices meet, in place of all combinations of all choices."""

from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations, product


def missing_pairs(cases: Sequence[tuple], *axes: Iterable[Hashable]) -> set[tuple]:
    """Pairs of values of two axes that no case holds together; a case has one value of each axis, in their order.

    Example:
        >>> sorted(missing_pairs([("a", 1), ("b", 2)], "ab", (1, 2)))
        [('a', 2), ('b', 1)]
    """
    places = combinations(range(len(axes)), 2)
    values = [list(axis) for axis in axes]
    return {
        pair for i, j in places for pair in set(product(values[i], values[j])) - {(case[i], case[j]) for case in cases}
    }
