"""What a K-FAC estimate of a recurrent network costs beside forward and backward of its fused kernel.

python benchmarks/recurrent.py [--widths 128 256] [--repeats 9]

A table of 64 characters, the kernel (one layer, or two in both directions) and a head on every position; 16 examples of
32 positions in each of two batches, one drawn label a position. Milliseconds of the processor on one thread, medians;
`fb` is forward and backward with parameter gradients of the same batches, in turn with the estimate. `layers` is the
share of parameters that `kf.coverage` finds treated by layers.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from small import forward_backward
from timing import median_seconds
from torch import Tensor, nn

import kronfisher as kf

WORDS, EXAMPLES, POSITIONS = 64, 16, 32
SHAPES: dict[str, dict[str, int | bool]] = {"one layer": {}, "two, both ways": {"num_layers": 2, "bidirectional": True}}


class Reader(nn.Module):
    """Embedded characters through a kernel, and a head on every position."""

    def __init__(self, kind: type[nn.RNNBase], width: int, **shape: int | bool) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, width)
        self.kernel = kind(width, width, batch_first=True, **shape)
        self.head = nn.Linear(width * (2 if shape.get("bidirectional") else 1), WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.kernel(self.table(ids))[0]).transpose(1, 2)  # classes second


def row(kind: type[nn.RNNBase], width: int, shape: str, repeats: int) -> dict[str, Any]:
    """One kernel of one width."""
    torch.manual_seed(0)
    model = Reader(kind, width, **SHAPES[shape])
    batches = [tuple(torch.randint(WORDS, (2, EXAMPLES, POSITIONS))) for _ in range(2)]
    works: dict[str, Callable[[], object]] = {
        "fb": lambda: forward_backward(model, batches),
        "kfac": lambda: kf.estimate(model, batches, kf.Categorical(), fit="kfac"),
    }
    found = {name: 1000 * taken for name, taken in median_seconds(works, repeats).items()}
    layers = kf.coverage(model, batches[0][0]).share
    return {"kernel": kind.__name__, "shape": shape, "width": width, "layers": layers} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = [(kind, width, shape) for kind in (nn.LSTM, nn.GRU) for width in options.widths for shape in SHAPES]
    rows = [row(kind, width, shape, options.repeats) for kind, width, shape in cases]
    print(json.dumps({"rows": [{"table": "recurrent", **r, "ratio": r["kfac"] / r["fb"]} for r in rows]}))


if __name__ == "__main__":
    main()
