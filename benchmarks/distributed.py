"""Estimates in W processes: measured seconds and bytes over gloo, and a simulator for as many as 1024.

python benchmarks/distributed.py [--ranks 1 2 3 4] [--fit autoencoder] [--check mlp] [--more alexnet] [--repeats N]

Prints tables, and one line of JSON last. A rank's seconds are processor time, of which gloo's copies are a part: with
more ranks than idle cores, wall time says what else the machine does. The simulator's two rates (multiplications and
bytes a second) are fitted on one workload with two ranks, and checked on the other with three.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import simulator
import torch
import torch.distributed as dist
from report import PARTS, processes
from torch import nn
from workloads import WORKLOADS, Workload

import kronfisher as kf
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.estimation.meeting import Meeting

BATCHES, BATCH = 12, 128  # as many batches for one, two, three and four ranks
LIMIT = 600  # seconds


def workload(name: str) -> Workload:
    """A workload with the same data on all ranks, in small batches."""
    torch.manual_seed(0)
    own = WORKLOADS[name]()
    x, y = own.batches[0]
    order = torch.arange(BATCHES * BATCH) % len(x)
    data = [(x[part], y[part]) for part in order.split(BATCH)]
    return Workload(own.model, data, own.likelihood)


def likelihood(name: str) -> kf.Likelihood:
    return kf.Bernoulli() if name == "bernoulli" else kf.Categorical()


def timed(spent: dict[str, float], part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] += time.process_time() - start

    return call


def measured(work: Workload, group: Any) -> dict[str, float]:
    """Processor seconds of one estimate on this rank, whole and by parts; bytes and collectives of all ranks."""
    spent = dict.fromkeys(PARTS, 0.0)
    old = Accumulator._read_pass, Meeting.agree, Meeting.merge, Meeting.at_owners
    try:
        Accumulator._read_pass = timed(spent, "read", old[0])
        Meeting.agree, Meeting.merge = timed(spent, "sum", old[1]), timed(spent, "sum", old[2])
        Meeting.at_owners = timed(spent, "share", old[3])
        start, wall = time.process_time(), time.perf_counter()
        fisher = kf.estimate(work.model, kf.shard(work.batches), likelihood(work.likelihood), fit="kfac", group=group)
        seconds, wall = time.process_time() - start, time.perf_counter() - wall
    finally:
        Accumulator._read_pass, Meeting.agree, Meeting.merge, Meeting.at_owners = old
    info = fisher.info
    sent = {"sent": info.sent, "planned": info.planned, "collectives": info.collectives}
    return {"seconds": seconds, "wall": wall, **spent, **sent}


def rank(number: int, ranks: int, store: str, names: list[str], repeats: int, paths: list[str], answers: Any) -> None:
    sys.path[:] = paths
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=number, world_size=ranks)
    group = dist.group.WORLD if ranks > 1 else None
    runs = {}
    for name in names:
        work = workload(name)
        runs[name] = [measured(work, group) for _ in range(repeats + 1)][1:]
    answers.put((number, runs))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def run(ranks: int, names: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """Workload → what the rank with most to do took, medians of all repeats."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "kronfisher"])
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, f"{folder}/store", names, repeats, sys.path, answers)
        processes = [context.Process(target=rank, args=(number, *arguments)) for number in range(ranks)]
        for process in processes:
            process.start()
        found = dict(answers.get() for _ in processes)
        for process in processes:
            process.join(LIMIT)
    results = {}
    for name in names:
        medians = [
            {key: statistics.median(one[key] for one in found[number][name]) for key in found[number][name][0]}
            for number in range(ranks)
        ]
        results[name] = max(medians, key=lambda one: one["seconds"])
    return results


def network(name: str) -> simulator.Network:
    """A workload of linear layers as the simulator sees it."""
    work = workload(name)
    linear = [module for module in work.model.modules() if isinstance(module, nn.Linear)]
    layers = tuple(simulator.Layer(one.out_features, one.in_features + 1) for one in linear)
    positions = BATCHES * BATCH * (work.batches[0][0].shape[1] if name == "gpt" else 1)
    return simulator.Network(name, layers, positions, BATCH, BATCHES)


def simulated(machine: simulator.Machine, networks: tuple[simulator.Network, ...], counts: list[int]) -> list[dict]:
    rows = []
    for each in networks:
        for ranks in counts:
            for share in ("all", "owned"):
                rows.append({"network": each.name, "ranks": ranks, **simulator.estimate(each, machine, ranks, share)})
                rows[-1]["kind"] = f"estimate, {share}"
                rows.append({"network": each.name, "ranks": ranks, **simulator.step(each, machine, ranks, share)})
                rows[-1]["kind"] = f"step, {share}"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--fit", choices=("autoencoder", "mlp", "gpt"), default="autoencoder")
    parser.add_argument("--check", choices=("autoencoder", "mlp", "gpt"), default="mlp")
    parser.add_argument("--more", nargs="*", choices=WORKLOADS, default=[], help="workloads that are measured, too")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    names = [options.fit, options.check, *options.more]
    rows: list[dict] = []
    for ranks in options.ranks:
        for name, one in run(ranks, names, options.repeats).items():
            rows.append({"workload": name, "ranks": ranks, **one})
            print(rows[-1], file=sys.stderr)
    machine = simulator.Machine()
    results: dict[str, Any] = {"measured": rows, "machine": str(machine)}
    found = {(row["workload"], row["ranks"]): row for row in rows}
    if (options.fit, 2) in found and (options.check, 3) in found:
        own = simulator.fitted(machine, network(options.fit), 2, found[options.fit, 2])
        predicted = simulator.estimate(network(options.check), own, 3)["seconds"]
        check = {"fit": options.fit, "check": options.check, "predicted": predicted}
        check |= {"measured": found[options.check, 3]["seconds"], "multiplications": own.multiplications}
        results["check"] = {**check, "bandwidth": own.bandwidth}
    results["simulated"] = simulated(machine, simulator.GPT, [1, 4, 16, 64, 256, 1024])
    print(processes(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
