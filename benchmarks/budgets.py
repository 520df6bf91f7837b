"""K-FOC of large layers within memory budgets: peak resident memory of one estimate in this fresh process.

python benchmarks/budgets.py wide --times 1.5

The budget is that many times the bytes that the matrices take by the library's own count, which it tells when it
refuses. What the model's own forward and backward pass needs is measured apart: no budget of an estimate can change it.
Prints one line of JSON; run by run.py.
"""

import argparse
import json
import re
import warnings
from collections.abc import Callable

import torch
from resident import peak, return_freed_memory
from torch import Tensor, nn

import kronfisher as kf

Data = list[tuple[Tensor, Tensor]]


def with_labels(inputs: list[Tensor], classes: int) -> Data:
    return [(x, torch.randint(classes, x.shape[:1])) for x in inputs]


def wide() -> tuple[nn.Module, Data]:
    """Linear layers 2048-2048-2048-10; 2 batches of 512."""
    model = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))
    return model, with_labels([torch.randn(512, 2048) for _ in range(2)], 10)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def embedding() -> tuple[nn.Module, Data]:
    """A table of 50,000 rows of 256 numbers, 32 tokens an example; 2 batches of 256."""
    model = nn.Sequential(nn.Embedding(50_000, 256), Mean(), nn.Linear(256, 10))
    return model, with_labels([torch.randint(50_000, (256, 32)) for _ in range(2)], 10)


def convolution() -> tuple[nn.Module, Data]:
    """512 channels to 512, 3×3, on images of 14×14; 2 batches of 16."""
    layers = nn.Conv2d(512, 512, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)
    return nn.Sequential(*layers), with_labels([torch.randn(16, 512, 14, 14) for _ in range(2)], 10)


CASES: dict[str, Callable[[], tuple[nn.Module, Data]]] = {
    "wide": wide,
    "embedding": embedding,
    "convolution": convolution,
}


def required_bytes(model: nn.Module, data: Data) -> int:
    """The size of the matrices: the number in the refusal of a budget of one byte."""
    try:
        kf.estimate(model, data, kf.Categorical(), fit="kfoc", memory_budget=1)
    except kf.MemoryBudgetError as refusal:
        match = re.search(r"needs ([\d,]+) bytes", str(refusal))
        assert match
        return int(match[1].replace(",", ""))
    raise AssertionError("a budget of one byte was not refused")


def measure(case: str, times: float, fit: str) -> dict[str, object]:
    return_freed_memory()
    torch.manual_seed(0)
    model, data = CASES[case]()
    kf.estimate(nn.Linear(3, 2), torch.randn(4, 3), kf.Categorical(), fit=fit)  # code and tables of BLAS
    model(data[0][0]).sum().backward()
    model.zero_grad(set_to_none=True)

    def own() -> None:  # the gradients of outputs and nothing else, as a capture has them
        leaf = next(m for m in model.modules() if not list(m.children()))
        outputs: list[Tensor] = []
        handle = leaf.register_forward_hook(lambda _m, _a, out: outputs.append(out))
        for x, _ in data:
            outputs.clear()
            torch.autograd.grad(model(x).sum(), outputs)
        handle.remove()

    floor, _ = peak(own)
    matrices = required_bytes(model, data)
    budget = int(matrices * times)
    result: dict[str, object] = {"budget": budget, "matrices": matrices, "floor": floor}
    try:
        result["peak"], _ = peak(lambda: kf.estimate(model, data, kf.Categorical(), fit=fit, memory_budget=budget))
        result["within"] = result["peak"] <= budget + floor
    except kf.MemoryBudgetError as refusal:
        result["refused"] = str(refusal)[:90]
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--times", type=float, default=1.5, help="the budget over the size of the matrices")
    parser.add_argument("--fit", default="kfoc")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(json.dumps(measure(options.case, options.times, options.fit)))
