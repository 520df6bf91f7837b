"""The damping of every block: a number, a share of the block's mean eigenvalue, or either by patterns of names."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from kronfisher.fisher import Fisher
from kronfisher.fisher.layout import Blocks, block_name
from kronfisher.operators import Operator
from kronfisher.operators.algebra import nonnegative

__all__ = ["DampingChoice", "Share", "read_damping"]


@dataclass(frozen=True)
class Share:
    """λ as a share of the mean eigenvalue of each block.

    Attributes:
        value: λ over the mean eigenvalue, at least 0.

    Example:
        >>> Share(0.1)
        Share(value=0.1)
    """

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", nonnegative(self.value, "the share"))


DampingChoice = float | Share | Mapping[str, float | Share]


def read_damping(damping: DampingChoice | None, fisher: Fisher) -> list[float]:
    """λ of every entry of a mean-reduced Fisher; None is a tenth of each block's mean eigenvalue.

    Raises:
        ValueError: a value is negative or not finite, a pattern matches nothing, or a block no pattern.
    """
    if damping is None:
        damping = Share(0.1)
    if not isinstance(damping, Mapping):
        return [_of(damping, operator) for _, operator in fisher.entries]
    idle = [p for p in damping if not any(_matches(blocks, p) for blocks, _ in fisher.entries)]
    if idle:
        raise ValueError(f"damping: the patterns {idle} match no block; there are {list(fisher.blocks)}.")
    values = []
    for blocks, operator in fisher.entries:
        match = next((value for pattern, value in damping.items() if _matches(blocks, pattern)), None)
        if match is None:
            raise ValueError(f"damping: no pattern matches {block_name(blocks)}; add '*' for the rest.")
        values.append(_of(match, operator))
    return values


def _of(value: float | Share, operator: Operator) -> float:
    if isinstance(value, Share):
        return value.value * max(float(operator.trace()) / operator.dim, 0.0)
    return nonnegative(value, "the damping λ")


def _matches(blocks: Blocks, pattern: str) -> bool:
    names = [block_name(blocks), *(block.name for block in blocks)]
    return any(name == pattern or fnmatchcase(name, pattern) for name in names)
