"""Growth of the time of one layer's K-FAC factors with the samples n and the positions T; prints one line of JSON.

Run by run.py. Inputs and output gradients are there already: what is timed is the library's own part of an estimate.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch

from kronfisher import KFAC
from kronfisher.fisher.blocks import Block, Window
from kronfisher.layers.activations import Dense
from kronfisher.layers.convolution import Geometry, Patches
from kronfisher.layers.samples import Samples

WIDTH, CHANNELS = 256, 64
COUNTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
POSITIONS = (4, 8, 16, 32, 64, 128, 256)
SIDES = (8, 11, 16, 23, 32)


def linear(n: int, positions: int) -> Samples:
    return Samples(Dense(torch.randn(1, n, positions, WIDTH), bias=True), torch.randn(1, n, positions, WIDTH))


def convolution(side: int) -> Samples:
    window = Geometry((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    patches = Patches(torch.randn(32, CHANNELS, side, side), window, 1, 32, bias=True)
    return Samples(patches, torch.randn(1, 32, side * side, CHANNELS))


def milliseconds(samples: Samples, repeats: int) -> float:
    """The median time of one update of the factors."""
    _, outputs, inputs = samples.shape
    weight, bias = torch.empty(1, outputs, inputs - 1, device="meta"), torch.empty(1, outputs, device="meta")
    block = Block("w", "layer", Window.of("w", weight), Window.of("b", bias))
    fit = KFAC()
    state = fit.init((block,), fit.plan((block,), 4), torch.empty(0))
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state = fit.update(state, (samples,))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def exponent(points: list[tuple[int, float]]) -> float:
    """The slope of log time over log size, by least squares over the larger half of the sizes."""
    logs = [(math.log(size), math.log(value)) for size, value in points[len(points) // 2 :]]
    centre, height = (statistics.mean(values) for values in zip(*logs, strict=True))
    return sum((x - centre) * (y - height) for x, y in logs) / sum((x - centre) ** 2 for x, _ in logs)


def draw(series: dict[str, list[tuple[int, float]]], target: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(series), figsize=(4 * len(series), 3.6), layout="constrained")
    for axis, (name, points) in zip(axes, series.items(), strict=True):
        sizes, times = zip(*points, strict=True)
        axis.loglog(sizes, times, "o-", label=f"measured: exponent {exponent(points):.2f}")
        axis.loglog(sizes, [times[-1] * size / sizes[-1] for size in sizes], "k:", label="linear")
        axis.set(title=name.split(":")[0], xlabel=name.split(": ")[1], ylabel="milliseconds")
        axis.legend(frameon=False)
    figure.suptitle("K-FAC factors of one layer, one thread")
    figure.savefig(target, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    layer = f"linear {WIDTH}-{WIDTH}"
    series = {
        f"{layer}, T = 1: samples n": [(n, milliseconds(linear(n, 1), options.repeats)) for n in COUNTS],
        f"{layer}, n = 32: positions T": [(t, milliseconds(linear(32, t), options.repeats)) for t in POSITIONS],
        f"convolution {CHANNELS}-{CHANNELS}, 3×3, n = 32: positions T": [
            (side * side, milliseconds(convolution(side), options.repeats)) for side in SIDES
        ],
    }
    draw(series, options.target)
    rows = [{"series": name, "exponent": exponent(points), "points": points} for name, points in series.items()]
    print(json.dumps({"rows": rows, "figure": options.target.name}))


if __name__ == "__main__":
    main()
