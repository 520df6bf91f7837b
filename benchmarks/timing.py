"""Times pieces of work beside each other."""

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["median_seconds"]


def median_seconds(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of the processor, after one round of warming up; every other round backwards."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for k in range(repeats + 1):
        for name in list(works)[:: 1 if k % 2 else -1]:
            start = time.process_time()
            works[name]()
            if k:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}
