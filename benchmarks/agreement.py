"""Compares matrices of kronfisher with those of other libraries, and with dense ones, on tiny float64 problems.

Run by run.py with the names of the libraries; prints one line of JSON. A row says by which factor the other library's matrix differs by
convention; the relative error is what remains in Frobenius norm after that factor, which is derived and never fitted.
"""

import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from math import prod

import kronfisher as kf
import torch
from peers import Skip
from problems import Problem, own_problems, shared_problems, truth
from torch import Tensor

MATRICES = ["kfac", "kfac-reduce", "ekfac", "diagonal", "full"]


def estimate(problem: Problem, matrix: str, labels: str = "exact", reduction: str = "mean") -> kf.Fisher:
    """Ours, from two uneven batches."""
    likelihood = {
        "gaussian": kf.Gaussian(),
        "bernoulli": kf.Bernoulli(),
        "categorical": kf.Categorical(ignore_index=problem.ignore_index, weight=problem.weight, class_dim=-1),
    }[problem.likelihood]
    halves = [slice(0, 1 + len(problem.inputs) // 2), slice(1 + len(problem.inputs) // 2, None)]
    batches = [(problem.inputs[half], problem.targets[half]) for half in halves if len(problem.inputs[half])]
    fit = kf.Full(across_layers=True) if matrix == "full" else matrix
    return kf.estimate(problem.model, batches, likelihood, fit=fit, labels=labels, reduction=reduction)


def difference(theirs: Tensor, ours: Tensor, scale: float) -> float:
    return ((theirs - scale * ours).norm() / theirs.norm()).item()


def within_parameters(model: torch.nn.Module) -> Tensor:
    """One where two entries belong to the same parameter."""
    return torch.block_diag(*(torch.ones(p.numel(), p.numel()) for p in model.parameters()))


def within_groups(model: torch.nn.Module) -> Tensor:
    """One where two entries belong to the same layer and the same group of its channels."""
    marks = []
    for layer in (m for m in model.modules() if list(m.parameters(recurse=False))):
        for p in layer.parameters(recurse=False):
            group = torch.arange(len(p)) * getattr(layer, "groups", 1) // len(p)
            marks.append(group.repeat_interleave(p[0].numel()) + 1000 * len(marks) // 2)
    marks = torch.cat(marks)
    return (marks[:, None] == marks).to(torch.float64)


def against_library(name: str) -> Iterator[dict]:
    library = importlib.import_module(f"references.{name}")
    for problem in shared_problems():
        for matrix in MATRICES:
            for labels in ("exact", "observed"):
                for reduction in ("mean", "sum"):
                    row = {"problem": problem.name, "matrix": f"{matrix}, {reduction}", "labels": labels, "against": name}
                    try:
                        theirs, scale, why = library.matrix(problem, matrix, labels, reduction)
                    except Skip:
                        continue
                    except Exception as error:
                        reason = f"skipped: {type(error).__name__}: {' '.join(str(error).split())}"[:120]
                        yield row | {"scale": "", "relative error": reason, "why this scale": ""}
                        continue
                    ours = estimate(problem, matrix, labels, reduction).to_dense()
                    if theirs.dim() == 1:
                        ours = ours.diagonal()
                    elif getattr(library, "SEPARATE_BIAS", False) and matrix == "kfac":
                        ours = ours * within_parameters(problem.model)
                    error = difference(theirs, ours, scale)
                    yield row | {"scale": f"{scale:.4g}", "relative error": f"{error:.1e}", "why this scale": why}
