"""Builds and loads the simulated device: host memory that refuses to mix with the CPU, and counts waits."""

import fcntl
import os
import shutil
import sys
import tempfile
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from getpass import getuser
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_suffix(".cpp")


class Wait(NamedTuple):
    """One operator for which the host would have had to wait, and the innermost line of the library that called it."""

    operation: str
    place: str


_counting: list[list[Wait]] = []


def missing() -> str | None:
    """What is needed to build the device and not there."""
    beside = str(Path(sys.executable).parent)  # where pip puts ninja, in the path or not
    if beside not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] += os.pathsep + beside
    if shutil.which(cpp_extension.get_cxx_compiler()) is None:
        return "the simulated device needs a C++ compiler (g++)"
    if not cpp_extension.is_ninja_available():
        return "the simulated device needs ninja: pip install ninja"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13):
        return f"the simulated device is written for the headers of torch 2.13 and newer, this is {torch.__version__}"
    return None


@cache
def simulated() -> torch.device:
    """The device, built once for a version of torch. To be called before the first backward pass of the process."""
    version = sha256(f"{torch.__version__} {SOURCE.read_text()}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"simulated_device_{getuser()}_{version}"
    folder.mkdir(exist_ok=True)
    with (folder / "building").open("w") as building:  # other processes wait; torch's own lock outlives a crash
        fcntl.flock(building, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        cpp_extension.load(
            "simulated_device",
            [str(SOURCE)],
            extra_cflags=["-O0", "-DAT_PER_OPERATOR_HEADERS"],
            build_directory=str(folder),
            is_python_module=False,
        )
    torch.library.impl("simulated::waited", "CompositeExplicitAutograd", _waited)
    torch._register_device_module("simulated", _module())
    return torch.device("simulated", 0)


def _module() -> types.ModuleType:
    """What stands for `torch.cuda`: random numbers are the host's."""
    module = types.ModuleType("torch.simulated")
    module.__dict__.update(
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        manual_seed_all=lambda seed: None,
        _is_in_bad_fork=lambda: False,
    )
    return module


def _waited(operation: str) -> None:
    if _counting:
        frames = [frame for frame in traceback.extract_stack() if "kronfisher" in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside the library"
        for counted in _counting:
            counted.append(Wait(operation, place))


@contextmanager
def waits() -> Iterator[list[Wait]]:
    """A list to which every wait within the block is added."""
    counted: list[Wait] = []
    _counting.append(counted)
    try:
        yield counted
    finally:
        _counting.remove(counted)
