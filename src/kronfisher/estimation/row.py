"""The results of one fit in a comparison."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kronfisher.tables import duration, number, size

__all__ = ["Row"]


@dataclass(frozen=True, eq=False)
class Row:
    """The results of one fit.

    Attributes:
        fit: its name, or its settings where it was given as an object.
        count: N, the number of examples.
        seconds: wall time of the estimate alone, warmed up; the shortest of three if it is short.
        bytes: of the operator.
        error: ‖F̂ − F‖ / ‖F‖ in the Frobenius norm over all blocks, F the exact blocks of the same data and labels.
        blocks: the same for every block, by name.
        trace: tr F̂ / tr F.
        shown: the name and the dense matrix ``[D, D]`` of one small block, the same for all
            fits; None if there is none.
        failure: why there is no result, or no error; missing numbers are NaN or 0.
    """

    fit: str
    count: int = 0
    seconds: float = math.nan
    bytes: int = 0
    error: float = math.nan
    blocks: Mapping[str, float] = field(default_factory=dict)
    trace: float = math.nan
    shown: tuple[str, Tensor] | None = None
    failure: str = ""

    def __str__(self) -> str:
        numbers = f"relative error {number(self.error)}, {duration(self.seconds)}, {size(self.bytes)}"
        return f"{self.fit}: {self.failure or numbers}"
