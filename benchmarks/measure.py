"""Measures one library on one workload, in this process and on one thread, and prints the result as one line of JSON.

Run by run.py. The floors run beside the library, in turn, so that whatever else the machine does weighs on both.
"""

import argparse
import gc
import importlib
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from floors import Floor
from peers import Skip
from resident import peak, return_freed_memory
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import WORKLOADS, Batch, Workload

DAMPING = 1e-3


def seconds(work: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()  # of the one thread: other work on the machine takes none of it
    result = work()
    elapsed = time.process_time() - start
    del result
    return elapsed


class Operators(TorchDispatchMode):
    """Counts the operators of torch that are called, in backward passes as well."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def operators(work: Callable[[], object]) -> int | None:
    """How many operators of torch one call of a piece of work takes; None where it cannot be watched."""
    try:
        with Operators() as count:
            work()
    except Exception:  # some libraries refuse modes within their own
        return None
    return count.number


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def alternate(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every piece of work in every repeat, after one round of warming up; every other round backwards."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for k in range(repeats):
        for name in list(works)[:: 1 if k % 2 else -1]:
            times[name].append(seconds(works[name]))
    return times


def relative(times: dict[str, list[float]], what: str, *floors: str) -> dict[str, float]:
    return spread([t / sum(parts) for t, *parts in zip(times[what], *(times[f] for f in floors), strict=True)])


def ratios(times: dict[str, list[float]], *floors: str) -> dict[str, object]:
    return {"ratio": relative(times, "own", *floors), **{name: spread(values) for name, values in times.items()}}


def factors(adaptor: Any, workload: Workload, floor: Floor, repeats: int) -> dict[str, object]:
    first = seconds(lambda: adaptor.run(workload.batches))
    floor.write_out()
    works = {"own": lambda: adaptor.run(workload.batches), "fb": floor.forward_backward, "gemm": floor.products}
    linear = not any(isinstance(layer, nn.Conv2d) for layer in floor.model.modules())
    if linear:  # a convolution's products have shortcuts, and no such floor
        works["least"] = floor.least_kfoc if getattr(adaptor, "fit", "") == "kfoc" else floor.least
    if kfac := getattr(adaptor, "kfac", None):
        works["kfac"] = lambda: kfac(workload.batches)
    times = alternate(works, repeats)
    calls = {name: operators(works[name]) for name in ("own", "fb")}
    result = {"first": first, "calls": calls, **ratios(times, "fb", "gemm")}
    if kfac:
        result["over K-FAC"] = relative(times, "own", "kfac")
    return {**result, "least": relative(times, "least", "fb", "gemm")} if linear else result


def solve(adaptor: Any, workload: Workload, floor: Floor, repeats: int, exact: bool) -> dict[str, object]:
    floor.write_out_factors()
    vector = {name: torch.randn_like(p) for name, p in floor.model.named_parameters()}
    computed = adaptor.run(workload.batches)
    works = {"own": lambda: adaptor.solve(computed, vector, DAMPING, exact), "bare": lambda: floor.solve(DAMPING)}
    return ratios(alternate(works, repeats), "bare")


def memory(prepare: Callable[[], tuple[Any, Workload]]) -> dict[str, object]:
    """Peak resident memory of one call above what was resident before it, in MiB, the factors included."""
    return_freed_memory()
    adaptor, workload = (
        prepare()
    )  # to load code and the tables of BLAS; libraries leave results on the model, so drop it
    adaptor.run([(x[:2], y[:2]) for x, y in workload.batches])
    del adaptor, workload
    adaptor, workload = prepare()
    extra, _ = peak(lambda: adaptor.run(workload.batches))
    return {"likelihood": adaptor.likelihood, "extra": extra / 2**20}


class Bare:
    """Forward and backward with parameter gradients, as if it were a library: the floor of the memory table."""

    def setup(self, model: nn.Module, likelihood: str) -> None:
        self.model, self.likelihood = model, likelihood

    def run(self, batches: list[Batch]) -> None:
        Floor(Workload(self.model, batches, self.likelihood)).forward_backward()


def measure(peer: str, name: str, what: str, repeats: int) -> dict[str, object]:
    def build() -> Workload:
        torch.manual_seed(0)
        return WORKLOADS[name]()

    def prepare() -> tuple[Any, Workload]:
        adaptor = Bare() if peer == "floor" else importlib.import_module(f"peers.{peer}").Adaptor()
        workload = build()
        adaptor.setup(workload.model, workload.likelihood)
        return adaptor, workload

    try:
        if what == "memory":
            return memory(prepare)
        adaptor, workload = prepare()
        if what == "factors":
            result = factors(adaptor, workload, Floor(build()), repeats)
        else:
            result = solve(adaptor, workload, Floor(build()), repeats, exact=what == "solve-exact")
        return {"likelihood": adaptor.likelihood, **result}
    except Skip as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # whatever a library dies of belongs in the table
        return {"skipped": f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("what", choices=["factors", "solve", "solve-exact", "memory"])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(json.dumps(measure(options.peer, options.workload, options.what, options.repeats)))
