"""The matrix in the space of samples beside forward and backward, and the tangent kernel beside other ways to it.

python benchmarks/gram.py [--networks mlp lenet] [--size 1000] [--repeats 5]

Seconds of the processor on one thread, medians; what is compared takes turns in one process. `gram` is an estimate with
one drawn label an example and K₀ = J Jᵀ of its rows, float32. `func` contracts the Jacobians of `torch.func` (vmap of
jacrev, a chunk of examples at a time, and one product a parameter), where all of them take no more than 4 GiB. Two
libraries have a form of the kernel: ASDL one for each output, which are added up, and nngeometry one for all pairs of
outputs, which is asked for the sum of the outputs and measured beside `kf.kernel(outputs="sum")`. All kernels are
compared number by number.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from timing import median_seconds
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.data import DataLoader, TensorDataset
from workloads import WORKLOADS

import kronfisher as kf

CHUNK = 50  # examples whose Jacobians torch.func makes at a time
ROOM = 4 * 2**30  # bytes of all Jacobians, beyond which kernels are not compared


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (perceptron, (784,)),
    "lenet": (lambda: WORKLOADS["lenet"]().model, (1, 28, 28)),
}


def forward_backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(model(x), y).backward()
    model.zero_grad()


def gram(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """K₀ ``[N, N]``."""
    (operator,) = kf.estimate(model, (x, y), kf.Categorical(), fit="gram").blocks.values()
    return operator.rows.gram


def jacobians(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """``{name: [n, C, numel]}``."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, parameters, (one[None],))[0]

    found = vmap(jacrev(outputs), (None, 0))(parameters, x)
    return {name: part.flatten(2) for name, part in found.items()}


def by_func(model: nn.Module, x: Tensor) -> Tensor:
    """The kernel summed over outputs ``[N, N]``, from Jacobians that are all kept."""
    parts = [jacobians(model, some) for some in x.split(CHUNK)]
    rows = [torch.cat([part[name] for part in parts]).flatten(1) for name in parts[0]]
    return torch.stack([each @ each.mT for each in rows]).sum(0)


def by_asdl(model: nn.Module, x: Tensor) -> Tensor:
    """The kernel summed over outputs ``[N, N]``."""
    from asdl.kernel import empirical_class_wise_direct_ntk

    return empirical_class_wise_direct_ntk(model, x).sum(2)


def by_nngeometry(model: nn.Module, x: Tensor) -> Tensor:
    """The kernel of the summed output ``[N, N]``, all examples at once."""
    from nngeometry import GramMatrix
    from nngeometry.layercollection import LayerCollection

    data = DataLoader(TensorDataset(x), batch_size=len(x))
    layers = LayerCollection.from_model(model)
    return GramMatrix(model, data, lambda x: model(x).sum(1, keepdim=True), layer_collection=layers).data[0, :, 0]


def measure(name: str, size: int, repeats: int) -> dict[str, object]:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    model, x, y = build(), torch.randn(size, *shape), torch.randint(10, (size,))
    found = median_seconds({"fb": lambda: forward_backward(model, x, y), "gram": lambda: gram(model, x, y)}, repeats)
    result: dict[str, object] = {"network": name, "samples": size, **found, "gram / fb": found["gram"] / found["fb"]}
    if 4 * size * 10 * sum(p.numel() for p in model.parameters()) > ROOM:
        return result
    found = {"trace": {"func": by_func, "asdl": by_asdl}, "sum": {"nngeometry": by_nngeometry}}
    rows = [beside(model, x, outputs, others, max(1, repeats // 3)) for outputs, others in found.items()]
    return {**result, "kernels": [row for each in rows for row in each]}


def beside(
    model: nn.Module,
    x: Tensor,
    outputs: Literal["trace", "sum"],
    others: dict[str, Callable[[nn.Module, Tensor], Tensor]],
    repeats: int,
) -> list[dict[str, object]]:
    """`kf.kernel` and what others make of the same, in turn; a library that is missing or fails says so."""
    ours, skipped = kf.kernel(model, x, outputs=outputs), {}
    differences: dict[str, float] = {}
    for name, make in others.items():
        try:
            differences[name] = float((make(model, x) - ours).norm() / ours.norm())
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {error}"[:120]
    works: dict[str, Callable[[], object]] = {name: lambda make=others[name]: make(model, x) for name in differences}
    times = median_seconds({"kernel": lambda: kf.kernel(model, x, outputs=outputs), **works}, repeats)
    rows: list[dict[str, object]] = [
        {"outputs": outputs, "peer": name, "skipped": why} for name, why in skipped.items()
    ]
    for name, difference in differences.items():
        own = {"kernel": times["kernel"], "seconds": times[name], "ratio": times[name] / times["kernel"]}
        rows.append({"outputs": outputs, "peer": name, **own, "difference": difference})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--size", type=int, default=1000, help="examples")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(json.dumps({"rows": [measure(name, options.size, options.repeats) for name in options.networks]}))


if __name__ == "__main__":
    main()
