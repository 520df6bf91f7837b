"""Memory that is available."""

import os

import torch

from kronfisher.errors import MemoryBudgetError
from kronfisher.tables import size

__all__ = ["available_memory", "require_memory"]


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be allocated on a device; a very large number where nobody can tell."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [_system(), _container()]
    return min(limit for limit in limits if limit is not None) if any(x is not None for x in limits) else 2**62


def require_memory(needed: int, device: torch.device | str, what: str, remedy: str) -> None:
    """Refuse early what cannot fit.

    Raises:
        MemoryBudgetError: fewer than `needed` bytes are available on the device.
    """
    if needed > (free := available_memory(device)):
        raise MemoryBudgetError(
            f"{what} takes {needed:,} bytes ({size(needed)}) on {device}, where {size(free)} are available. {remedy}"
        )


def _system() -> int | None:
    try:
        with open("/proc/meminfo", "rb", buffering=0) as file:  # every estimate asks
            lines = file.read(512).splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(b"MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _container() -> int | None:
    numbers = []
    try:
        for name in ("max", "current"):
            with open(f"/sys/fs/cgroup/memory.{name}", "rb", buffering=0) as file:
                numbers.append(int(file.read(64)))
        return numbers[0] - numbers[1]
    except (OSError, ValueError):  # no container, or no limit ("max")
        return None
