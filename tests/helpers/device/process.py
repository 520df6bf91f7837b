"""Runs functions on the simulated device, in a process of its own.

Torch's autograd engine counts devices at the first backward pass of a process, and once there is an accelerator other
libraries would use it.
"""

import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.helpers.device.simulated import missing, simulated


@contextmanager
def device_process() -> Iterator[Callable[..., Any]]:
    """Calls a function of a module, with the device as its first argument, in the device's process.

    Its other arguments and its answer are pickled: tensors of the answer have to be on the CPU.
    """
    if (reason := missing()) is not None:
        pytest.skip(reason)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _begin, (sys.path,)) as executor:
        yield lambda function, *arguments: executor.submit(_call, function, arguments).result()


def _begin(path: list[str]) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    simulated()
    warnings.simplefilter("error")


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.manual_seed(0)
    return function(simulated(), *arguments)
