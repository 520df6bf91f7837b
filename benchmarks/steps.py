"""One training step beside AdamW's, in this process and on one thread: amortised over whole refresh periods.

Both optimisers take their steps in turn, on copies of one network, so that whatever else the machine does weighs on
both. Printed as one line of JSON; run by run.py, or alone: python benchmarks/steps.py autoencoder --batch 128
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from floors import mean_loss
from workloads import WORKLOADS, Batch

import kronfisher as kf

LIKELIHOODS = {"bernoulli": kf.Bernoulli, "categorical": lambda: kf.Categorical(class_dim=-1)}
KINDS = {
    "fixed": {"momentum": 0.9, "kl_limit": 1e-2},
    "exact": {},
}


def adamw(model: torch.nn.Module, likelihood: str) -> Callable[[Batch], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        mean_loss(likelihood, model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def ours(model: torch.nn.Module, likelihood: str, kind: str) -> tuple[Callable[[Batch], None], kf.NaturalGradient]:
    optimizer = kf.NaturalGradient(model, LIKELIHOODS[likelihood](), lr=1e-2, **KINDS[kind])
    return lambda batch: optimizer.step(lambda: model(batch[0]), batch[1]), optimizer


def measure(name: str, kind: str, size: int, rounds: int, period: int) -> dict[str, object]:
    """Ratios of the time of `period` steps, after a warm-up in which the periods reach their full length."""
    torch.manual_seed(0)
    workload = WORKLOADS[name]()
    inputs, targets = (torch.cat(parts) for parts in zip(*workload.batches, strict=True))
    times_over = -(-2 * size // len(inputs))
    inputs, targets = torch.cat([inputs] * times_over), torch.cat([targets] * times_over)
    batches = [(inputs[k * size : (k + 1) * size], targets[k * size : (k + 1) * size]) for k in range(2)]
    first = adamw(copy.deepcopy(workload.model), workload.likelihood)
    second, optimizer = ours(workload.model, workload.likelihood, kind)
    optimizer.steps = 4 * period  # past the early steps, in which everything is renewed more often
    for step in (first, second):
        for batch in batches * 2:
            step(batch)
    times: dict[str, list[float]] = {"adamw": [], "ours": []}
    for k in range(rounds * period):
        for label, step in (("adamw", first), ("ours", second)):
            began = time.process_time()
            step(batches[k % len(batches)])
            times[label].append(time.process_time() - began)
    ratios = []
    for k in range(rounds):
        window = slice(k * period, (k + 1) * period)
        ratios.append(sum(times["ours"][window]) / sum(times["adamw"][window]))
    plain = statistics.median(times["ours"]) / statistics.median(times["adamw"])
    return {
        "ratio": statistics.median(ratios),
        "between": plain,
        "adamw": sum(times["adamw"]) / len(times["adamw"]),
        "own": sum(times["ours"]) / len(times["ours"]),
        "seconds": optimizer.report().seconds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--kind", choices=KINDS, default="fixed")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--period", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(json.dumps(measure(options.workload, options.kind, options.batch, options.rounds, options.period)))
