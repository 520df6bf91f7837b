"""K-FOC of this library beside one public implementation, in this process and on one thread, as one line of JSON.

python benchmarks/kfoc.py bpnn wide --sources DIR

The public code runs from a clone of its own: DIR/BPNN (github.com/DLR-RM/BPNN, the official code of K-FOC) or
DIR/curvlinops (github.com/f-dangel/curvlinops, where K-FOC is on the main branch). Both take one batch. Run by run.py.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from floors import Floor
from measure import alternate
from peers import Skip
from torch import Tensor, nn
from workloads import WORKLOADS, Batch, Workload, class_batches, dense_layers

import kronfisher as kf

Factors = list[tuple[Tensor, Tensor]]  # of every layer: A [I + 1, I + 1] and B [O, O], of a sum over data
CLONES = {"bpnn": "BPNN", "curvlinops": "curvlinops"}
ROW = 20  # calls of ours one after the other: a single one after seconds of something else finds nothing in the caches
FEW = 16  # data whose blocks with all columns are compared; the other code takes them as it takes ten times as many


def wide() -> Workload:
    """256-256-256-10, ReLU; one batch of 128."""
    return Workload(dense_layers(256, 256, 256, 10, activation=nn.ReLU), class_batches((256,), 1, 128), "categorical")


def lenet() -> Workload:
    """LeNet-5; one batch of 256."""
    workload = WORKLOADS["lenet"]()
    return Workload(workload.model, workload.batches[:1], workload.likelihood)


CASES: dict[str, Callable[[], Workload]] = {"wide": wide, "lenet": lenet}


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


class Bpnn:
    """The official code: a power iteration for every batch, to a change of 1e-5; labels are up to the caller."""

    labels = "observed"

    def __init__(self, clone: Path, model: nn.Module) -> None:
        sys.path.insert(0, str(clone))
        self.model = model
        self.method = importlib.import_module("src.curvature.curvatures").KFOC

    def run(self, batch: Batch, labels: str = "sampled") -> Factors:
        curvature = self.method(self.model)
        try:
            self.model.zero_grad(set_to_none=True)
            logits = self.model(batch[0])
            if labels == "sampled":
                drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
            else:
                drawn = batch[1]
            F.cross_entropy(logits, drawn).backward()
            curvature.update(len(logits))
        finally:
            curvature.remove_hooks_and_records()
        return [(A, B) for A, B in (curvature.state[layer] for layer in layers(self.model).values())]


class Curvlinops:
    """curvlinops' main branch: SciPy's ARPACK on per-example gradients."""

    labels = "exact"

    def __init__(self, clone: Path, model: nn.Module) -> None:
        sys.path.insert(0, str(clone))
        self.package = importlib.import_module("curvlinops")
        if not hasattr(self.package, "KFOCLinearOperator") or clone not in Path(str(self.package.__file__)).parents:
            raise Skip(f"{clone} is not the main branch")
        self.model = model

    def run(self, batch: Batch, labels: str = "sampled") -> Factors:
        operator = self.package.KFOCLinearOperator(
            self.model,
            nn.CrossEntropyLoss(reduction="sum"),
            dict(self.model.named_parameters()),
            [batch],
            fisher_type="mc" if labels == "sampled" else "type-2",
            separate_weight_and_bias=False,
            check_deterministic=False,
            num_data=len(batch[0]),
        )
        _, blocks, _ = operator
        return [(A, B) for B, A in (list(block) for block in blocks)]


PEERS = {"bpnn": Bpnn, "curvlinops": Curvlinops}


def ours(model: nn.Module, batch: Batch, labels: str = "sampled", **options: Any) -> Factors:
    fisher = kf.estimate(
        model, [batch], kf.Categorical(), fit=kf.KFOC(**options), labels=labels, reduction="sum", strict=True
    )
    return [(block.A[0], block.B[0]) for block in (fisher[f"{name}.weight"] for name in layers(model))]


def gradients(model: nn.Module, batch: Batch, labels: str) -> list[Tensor]:
    """Of every layer, the gradients ``[n, O, I + 1]`` of single examples (or columns), by torch alone."""
    logits = model(batch[0])
    if labels == "observed":
        vectors = [logits.softmax(1) - F.one_hot(batch[1], logits.shape[1])]
    else:  # diag(p) − p pᵀ = Σ_c v_c v_cᵀ
        p = logits.softmax(1).detach()
        vectors = [(torch.eye(p.shape[1]).to(p)[c] - p) * p[:, c : c + 1].sqrt() for c in range(p.shape[1])]
    per_layer: list[list[Tensor]] = [[] for _ in layers(model)]
    for vector in vectors:
        for k in range(len(logits)):
            parts = torch.autograd.grad(logits[k], list(model.parameters()), vector[k].detach(), retain_graph=True)
            for place, (weight, bias) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
                per_layer[place].append(torch.cat([weight.flatten(1), bias[:, None]], dim=1))
    return [torch.stack(samples) for samples in per_layer]


def error(G: Tensor, A: Tensor, B: Tensor) -> float:
    """``‖F − B ⊗ A‖ / ‖F‖`` for ``F = Σ_k vec(G_k) vec(G_k)ᵀ``, with nothing written out: (measured, not reported)."""
    A, B, rows = A.double(), B.double(), G.double().flatten(1)
    squared = (rows @ rows.T).square().sum()
    inner = (G.double() * (B @ G.double() @ A.mT)).sum()
    return float(((squared - 2 * inner + A.square().sum() * B.square().sum()) / squared).clamp_min(0).sqrt())


def agreement(peer: Bpnn | Curvlinops, workload: Workload) -> dict[str, object]:
    """Errors of both in float64, layer by layer, on the same block; ours with its own tolerance and a strict one."""
    model, (inputs, targets) = workload.model.double(), workload.batches[0]
    few = len(inputs) if peer.labels == "observed" else FEW
    batch = (inputs[:few].double(), targets[:few])
    peer.model = model
    theirs, mine = peer.run(batch, peer.labels), ours(model, batch, peer.labels)
    strict = ours(model, batch, peer.labels, aggregation="exact", tolerance=1e-9, iterations=500)
    blocks = gradients(model, batch, peer.labels)
    sets = {"their errors": theirs, "our errors": mine, "optimum": strict}
    return {
        name: [error(G, A, B) for G, (A, B) in zip(blocks, factors, strict=True)] for name, factors in sets.items()
    } | {"compared on": f"{few} data, labels {peer.labels}"}


def measure(name: str, case: str, sources: Path | None, repeats: int) -> dict[str, object]:
    clone = None if sources is None else sources / CLONES[name]
    if clone is None or not clone.is_dir():
        return {"skipped": f"no clone: give --sources DIR with DIR/{CLONES[name]}"}
    torch.manual_seed(0)
    workload = CASES[case]()
    try:
        peer = PEERS[name](clone.resolve(), workload.model)
        floor = Floor(CASES[case]())
        works = {
            "own": lambda: ours(workload.model, workload.batches[0]),
            "row": lambda: [ours(workload.model, workload.batches[0]) for _ in range(ROW)],
            "theirs": lambda: peer.run(workload.batches[0]),
            "fb": floor.forward_backward,
        }
        times = {what: statistics.median(values) for what, values in alternate(works, repeats).items()}
        times["row"] /= ROW
        commit = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True)
        result = {"ratio": times["theirs"] / times["own"], "in a row": times["theirs"] / times["row"]}
        result |= {"commit": commit.stdout[:10], **times}
        return result | agreement(peer, workload)
    except Skip as reason:
        return {"skipped": str(reason)}
    except Exception as problem:  # whatever a library dies of belongs in the table
        return {"skipped": f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:160]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("workload", choices=CASES)
    parser.add_argument("--sources", type=Path, help="folder of the clones")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(json.dumps(measure(options.peer, options.workload, options.sources, options.repeats)))
