"""One training step beside AdamW's, in this process and on one thread: amortised over whole refresh periods.

Both optimisers take their steps in turn, on copies of one network, so that whatever else the machine does weighs on
both; time is the process's. From a fresh optimiser on, so that the first steps show too: the largest steps are told
over the median step, and bytes that the optimiser holds over AdamW's and over those of its factors. Printed as one line
of JSON; run by run.py, or alone: python benchmarks/steps.py autoencoder --batch 128
"""

import argparse
import copy
import gc
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from floors import mean_loss
from torch import Tensor, nn
from workloads import WORKLOADS, Batch, Workload

import kronfisher as kf
from kronfisher.experiments.networks import gpt, mlp, vit
from kronfisher.experiments.networks.convolutional import Residual
from kronfisher.fits.state import State

LIKELIHOODS = {"bernoulli": kf.Bernoulli, "categorical": lambda: kf.Categorical(class_dim=-1)}
KINDS = {
    "default": {},
    "fixed": {"momentum": 0.9, "kl_limit": 1e-2},
    "exact": {"step": kf.QuadraticModel()},
}
EARLY = 3  # the step from which on none may be much longer than the median
LARGEST = 5  # of the longest steps are told


class Tabled(nn.Module):
    """A perceptron at every position of a long sequence, to which a table of 1,000 × 64 positions is added."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(1000, 64))
        self.words, self.body = nn.Embedding(65, 64), mlp(64, (64,), 65)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.positions
        return self.body[-1](F.relu(self.body[0](x.flatten(0, 1)))).unflatten(0, tokens.shape)


def images(model: nn.Module, channels: int, side: int, size: int = 128) -> Workload:
    return Workload(model, [(torch.randn(size, channels, side, side), torch.randint(10, (size,)))], "categorical")


def text(model: nn.Module, length: int, size: int = 128) -> Workload:
    inputs, targets = torch.randint(65, (2, size, length))
    return Workload(model, [(inputs, targets)], "categorical")


def small_vit() -> Workload:
    return images(vit(1, 28, 10, patch=7, width=64, heads=4, depth=3), 1, 28)


def small_gpt() -> Workload:
    """With tables and norms: the suite's, unlike that of the comparison with other libraries."""
    return text(gpt(65, 64, width=64, heads=4, depth=2), 64)


def small_mlp() -> Workload:
    return Workload(mlp(16, (64, 64), 10), [(torch.randn(128, 16), torch.randint(10, (128,)))], "categorical")


def image_mlp() -> Workload:
    return Workload(mlp(784, (256, 256), 10), [(torch.rand(256, 784), torch.randint(10, (256,)))], "categorical")


def tabled() -> Workload:
    return text(Tabled(), 1000, 8)


def resnet18() -> Workload:
    """ResNet-18 for small images (He et al. 2016): 11 million parameters."""
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [Residual(before, after, 1 + (before != after)) for before, after in itertools.pairwise(widths)]
    stem = (nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
    return images(nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)), 3, 32, 32)


TRAINED: dict[str, Callable[[], Workload]] = {
    **WORKLOADS,
    "vit": small_vit,
    "gpt-tables": small_gpt,
    "mlp-small": small_mlp,
    "mlp-images": image_mlp,
    "positions": tabled,
    "resnet18": resnet18,
}


def adamw(model: nn.Module, likelihood: str) -> tuple[Callable[[Batch], None], torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        mean_loss(likelihood, model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step, optimizer


def ours(
    model: nn.Module, likelihood: str, kind: str, **options: object
) -> tuple[Callable[[Batch], None], kf.NaturalGradient]:
    optimizer = kf.NaturalGradient(model, LIKELIHOODS[likelihood](), lr=1e-2, **KINDS[kind], **options)
    return lambda batch: optimizer.step(lambda: model(batch[0]), batch[1]), optimizer


def held() -> dict[int, int]:
    """Storage → bytes, of all tensors that there are."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storages = [each.untyped_storage() for each in gc.get_objects() if isinstance(each, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def bytes_of(states: Iterable[State]) -> int:
    """Bytes of the averaged statistics: what the factors take."""
    return sum(t.numel() * t.element_size() for state in states for t in _tensors(state.to_dict()))


def _tensors(entry: object) -> list[Tensor]:
    if isinstance(entry, Tensor):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list | tuple) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def batches(workload: Workload, size: int) -> list[Batch]:
    """Two batches of that size, repeating the data if there are too few."""
    inputs, targets = (torch.cat(parts) for parts in zip(*workload.batches, strict=True))
    times = -(-2 * size // len(inputs))
    inputs, targets = torch.cat([inputs] * times), torch.cat([targets] * times)
    return [(inputs[k * size : (k + 1) * size], targets[k * size : (k + 1) * size]) for k in range(2)]


def measure(name: str, kind: str, size: int | None, rounds: int, period: int) -> dict[str, object]:
    """Ratios of the time of `period` steps, after one period in which the intervals reach their full length."""
    torch.manual_seed(0)
    workload = TRAINED[name]()
    data = batches(workload, size or len(workload.batches[0][0]))
    times: dict[str, list[float]] = {"adamw": [], "ours": []}
    before = held()
    twin = copy.deepcopy(workload.model)
    first, other = adamw(twin, workload.likelihood)
    second, optimizer = ours(workload.model, workload.likelihood, kind)
    for k in range((1 + rounds) * period):
        for label, step in (("adamw", first), ("ours", second)):
            began = time.process_time()
            step(data[k % len(data)])
            times[label].append(time.process_time() - began)
    windows = [slice(k * period, (k + 1) * period) for k in range(1, 1 + rounds)]
    ratios = [sum(times["ours"][window]) / sum(times["adamw"][window]) for window in windows]
    median = statistics.median(times["ours"])
    longest = sorted(enumerate(times["ours"][EARLY:], EARLY), key=lambda pair: -pair[1])[:LARGEST]
    report = optimizer.report()
    moments = sum(t.numel() * t.element_size() for s in other.state.values() for t in s.values() if t.dim())
    parameters = sum(p.numel() * p.element_size() for p in workload.model.parameters())
    factors = bytes_of(layer.average for layer in optimizer.parts.statistics.layers if layer.average is not None)
    for each in (workload.model, twin):
        each.zero_grad()
    del each, twin, other, first
    after = held()
    own = sum(size for pointer, size in after.items() if pointer not in before)
    return {
        "ratio": statistics.median(ratios),
        "between": median / statistics.median(times["adamw"]),
        "adamw": statistics.mean(times["adamw"][period:]),
        "own": statistics.mean(times["ours"][period:]),
        "longest": {k: round(spent / median, 2) for k, spent in longest},
        "memory": {"beyond AdamW's, over the factors": (own - moments) / max(factors, 1), "factors": factors},
        "held": own,
        "moments": moments,
        "parameters": parameters,
        "seconds": report.seconds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=TRAINED)
    parser.add_argument("--kind", choices=KINDS, default="default")
    parser.add_argument("--batch", type=int, help="examples; that of the workload by default")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--period", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(json.dumps(measure(options.workload, options.kind, options.batch, options.rounds, options.period)))
