"""What an estimate costs where networks are small: the demonstration's perceptron, and a hundred narrow layers.

python benchmarks/small.py [--tables perceptron narrow threads] [--repeats 20]

Milliseconds of the processor on one thread, medians after a first call; what is compared takes turns in one process.

perceptron: 64-32-32-10 on handwritten digits, trained as the demonstration trains it, five batches of 100, by each
    fit with one drawn label an example and with exact labels, beside forward and backward (fb).
narrow: a hundred layers of width 32, one batch of 128: K-FAC over plain hooks that make the same products, a layer.
threads: the wide perceptron of workloads.py by the clock, one thread over two: the least of all repeats, since
    whatever else the machine does adds to both.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timing import median_seconds
from torch import Tensor, nn
from workloads import WORKLOADS, Batch, Workload, class_batches, dense_layers

import kronfisher as kf

FITS = ("kfac", "kfoc", "ekfac", "kronecker-sum", "full")
LAYERS, WIDTH = 100, 32


def perceptron() -> Workload:
    """The demonstration's, as it stands after training."""
    from kronfisher.experiments.study import Study
    from kronfisher.experiments.training import train

    study = Study(network="mlp", epochs=15, batch_size=100)
    dataset, model = study.load()
    train(model, dataset, epochs=study.epochs, batch_size=64, lr=study.lr, seed=study.seed)
    return Workload(model.eval(), list(dataset.batches(study.batch_size, study.limit)), "categorical")


def forward_backward(model: nn.Module, batches: list[Batch]) -> None:
    for inputs, targets in batches:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(inputs), targets).backward()


def hooks(model: nn.Module, batches: list[Batch]) -> list[tuple[Tensor, Tensor]]:
    """K-FAC's sums by plain hooks: a product of inputs with a column of ones, one of output gradients, labels drawn."""
    sums: dict[nn.Module, list[Tensor]] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor], outputs: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            rows = torch.cat([inputs[0].detach(), inputs[0].new_ones(len(inputs[0]), 1)], dim=1)
            for total, each in zip(sums[layer], (rows, gradient), strict=True):
                total.addmm_(each.T, each)

        outputs.register_hook(add)

    handles = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            sums[layer] = [torch.zeros(2 * [size]) for size in (layer.in_features + 1, layer.out_features)]
            handles.append(layer.register_forward_hook(note))
    for inputs, _ in batches:
        outputs = model(inputs)
        drawn = torch.multinomial(outputs.detach().softmax(-1), 1).squeeze(-1)
        first = next(layer for layer in model.modules() if isinstance(layer, nn.Linear))
        torch.autograd.grad(F.cross_entropy(outputs, drawn, reduction="sum"), [first.weight])
    for handle in handles:
        handle.remove()
    return [(a, g) for a, g in sums.values()]


def by_fits(repeats: int) -> list[dict[str, object]]:
    """The perceptron by every fit."""
    workload = perceptron()
    model, batches = workload.model, workload.batches

    def estimate(fit: str, labels: Any) -> Callable[[], object]:
        return lambda: kf.estimate(model, batches, kf.Categorical(), fit=fit, labels=labels)

    works: dict[str, Callable[[], object]] = {"fb": lambda: forward_backward(model, batches)}
    works |= {f"{fit} {labels}": estimate(fit, labels) for fit in FITS for labels in ("sampled", "exact")}
    found = {name: 1000 * taken for name, taken in median_seconds(works, repeats).items()}
    rows = [{"fit": fit, **{labels: found[f"{fit} {labels}"] for labels in ("sampled", "exact")}} for fit in FITS]
    return [{"table": "perceptron", "fb": found["fb"], **row} for row in rows]


def by_layers(repeats: int) -> dict[str, object]:
    """The hundred narrow layers."""
    torch.manual_seed(0)
    model = dense_layers(*[WIDTH] * LAYERS, 10, activation=nn.ReLU)
    for layer in model:
        if isinstance(layer, nn.Linear):  # or nothing is left of the signal after so many layers
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    batches = class_batches((WIDTH,), 1, 128)
    works: dict[str, Callable[[], object]] = {
        "hooks": lambda: hooks(model, batches),
        "kfac": lambda: kf.estimate(model, batches, kf.Categorical(), fit="kfac"),
        "kfoc": lambda: kf.estimate(model, batches, kf.Categorical(), fit="kfoc"),
    }
    found = {name: 1000 * taken for name, taken in median_seconds(works, repeats).items()}
    return {"table": "narrow", **found, "overhead": (found["kfac"] - found["hooks"]) / LAYERS}


def by_threads(repeats: int) -> list[dict[str, object]]:
    """The wide perceptron with one thread and with two, by the clock."""
    torch.manual_seed(0)
    workload, rows = WORKLOADS["mlp"](), []
    for fit in ("kfac", "kfoc"):
        least = {1: float("inf"), 2: float("inf")}
        for k in range(min(repeats, 4) + 1):
            for threads in least:
                torch.set_num_threads(threads)
                start = time.perf_counter()
                kf.estimate(workload.model, workload.batches, kf.Categorical(), fit=fit)
                if k:
                    least[threads] = min(least[threads], time.perf_counter() - start)
        rows.append({"table": "threads", "fit": fit, "one": least[1], "two": least[2], "ratio": least[1] / least[2]})
    torch.set_num_threads(1)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = [TABLES[name](options.repeats) for name in options.tables]
    print(json.dumps({"rows": [row for each in found for row in (each if isinstance(each, list) else [each])]}))


TABLES = {"perceptron": by_fits, "narrow": by_layers, "threads": by_threads}


if __name__ == "__main__":
    main()
