"""Peak resident memory of a piece of work, as Linux counts it."""

import ctypes
import gc
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

TRIM, MMAP = -1, -3  # names of thresholds for glibc's mallopt
RETURNED = 65536  # bytes of a block that goes back to the system as soon as it is freed


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def return_freed_memory() -> None:
    """Tell glibc to return what is freed from now on: what is resident is in use then.

    At the beginning of what measures memory alone: fresh pages take time, and how memory was divided before stays.
    """
    with suppress(OSError, AttributeError):  # another C library
        for threshold in (TRIM, MMAP):
            ctypes.CDLL(None).mallopt(threshold, RETURNED)


def peak(work: Callable[[], Result]) -> tuple[int, Result]:
    """Bytes by which the resident memory grows while something is done, its result included; and the result.

    Raises:
        OSError: not on Linux, or what came before cannot be forgotten, so that the peak would be of something else.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library; what was freed may be there again without growing
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    result = work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, result
