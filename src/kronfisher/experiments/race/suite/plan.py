"""What a run is."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """Everything that a run depends on, but for the code.

    Attributes:
        problem: its name.
        name: what the run is called in tables.
        base: the contestant, of `CONTESTANTS`.
        settings: of the optimiser.
        batch: examples in a batch.
        seed: of initial weights, of the order of the data and of the optimiser.
        seconds: CPU time of training.
        horizon: the number of steps that the optimiser is told; 0: none.
        brief: evaluated at the end only.
    """

    problem: str
    name: str
    base: str
    settings: Mapping[str, Any]
    batch: int
    seed: int
    seconds: float
    horizon: int = 0
    brief: bool = False

    @property
    def key(self) -> str:
        """A name for files; another one as soon as anything differs, the horizon's length aside."""
        whole = asdict(self) | {"horizon": self.horizon > 0}
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.name}-seed{self.seed}-{digest}".replace(os.sep, "-")
