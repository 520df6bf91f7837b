"""Contributions of uses to blocks."""

from dataclasses import dataclass

from kronfisher.fisher.blocks import Block
from kronfisher.layers import Use

__all__ = ["Part"]


@dataclass(frozen=True)
class Part:
    """The contribution of one use to one block: its weight, its bias, or both."""

    use: Use
    block: Block
    weight: bool
    bias: bool
