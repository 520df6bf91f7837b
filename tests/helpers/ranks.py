"""Runs functions on all ranks of a process group of gloo, each in a process of its own, under a time limit."""

import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 180  # seconds that one call may take


class World:
    """A process group; `call` runs a function on every rank and gives the answers in their order.

    Args:
        size: W.
        folder: for the file by which the ranks find each other.
        patience: seconds that a rank waits for another.
    """

    def __init__(self, size: int, folder: Any, patience: float = 120) -> None:
        self.size, self.folder, self.patience = size, folder, patience
        self.started = 0
        self.start()

    def start(self) -> None:
        """Start all ranks."""
        self.started += 1
        context = multiprocessing.get_context("forkserver")  # which imports once, and computes nothing before it forks
        modules = ["torch.distributed", "torch.distributed.fsdp", "torch._dynamo"]  # DDP needs the last one
        context.set_forkserver_preload([*modules, "kronfisher", "tests.conformance.problems"])
        store = f"{self.folder}/store {self.started}"
        self.executors = [
            ProcessPoolExecutor(1, context, _begin, (sys.path, store, rank, self.size, self.patience))
            for rank in range(self.size)
        ]
        self.call(_ready, limit=5 * LIMIT)

    def call(self, function: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> list[Any]:
        """The answers of all ranks; the function gets the rank first.

        Its other arguments and its answer are pickled. An error on any rank is raised here.
        """
        calls = [each.submit(run, function, rank, arguments) for rank, each in enumerate(self.executors)]
        _, late = wait(calls, timeout=limit)
        if late:
            self.kill()
            self.start()
            raise TimeoutError(f"{len(late)} of {self.size} ranks did not end within {limit} seconds")
        if any(call.exception() for call in calls):  # who met whom is not known any more
            self.kill()
            self.start()
        return [call.result() for call in calls]

    def kill(self) -> None:
        """End all ranks at once."""
        for executor in self.executors:
            for process in list((executor._processes or {}).values()):
                process.kill()
            executor.shutdown(wait=True, cancel_futures=True)

    def end(self) -> None:
        """Let all ranks end."""
        for executor in self.executors:
            executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def world(size: int, folder: Any) -> Iterator[World]:
    """A process group of so many ranks."""
    own = World(size, folder)
    try:
        yield own
    finally:
        own.end()


def _begin(path: list[str], store: str, rank: int, size: int, patience: float) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    file = dist.FileStore(store, size)
    dist.init_process_group("gloo", store=file, rank=rank, world_size=size, timeout=timedelta(seconds=patience))
    warnings.simplefilter("error")


def _ready(rank: int) -> None:
    dist.barrier()


def run(function: Callable[..., Any], rank: int, arguments: tuple[Any, ...]) -> Any:
    """The function of a rank, in its process."""
    torch.manual_seed(0)
    return function(rank, *arguments)
