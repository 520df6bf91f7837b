"""Compares matrices of kronfisher with those of other libraries, and with dense ones, on tiny float64 problems.

Run by run.py with the names of the libraries; prints one line of JSON. A row says by which factor the other library's
matrix differs by convention; the relative error is what remains, in Frobenius norm, after that factor, which is
derived and never fitted.
"""

import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from functools import partial

import torch
from peers import Skip
from problems import Problem, own_problems, shared_problems, truth, unstructured_problems
from torch import Tensor, nn

import kronfisher as kf

MATRICES = ["kfac", "kfac-reduce", "ekfac", "diagonal", "full"]
LIBRARIES = ["curvlinops", "nngeometry", "backpack", "kronfluence"]


def estimate(problem: Problem, matrix: str, labels: str = "exact", reduction: str = "mean") -> kf.Fisher:
    """Ours, from two uneven batches."""
    likelihood = {
        "gaussian": kf.Gaussian(),
        "bernoulli": kf.Bernoulli(),
        "categorical": kf.Categorical(ignore_index=problem.ignore_index, weight=problem.weight, class_dim=-1),
    }[problem.likelihood]
    half = 1 + len(problem.inputs) // 2
    batches = [(problem.inputs[part], problem.targets[part]) for part in (slice(0, half), slice(half, None))]
    fit = kf.Full(across_layers=True) if matrix == "full" else matrix
    batches = [batch for batch in batches if len(batch[0])]
    return kf.estimate(problem.model, batches, likelihood, fit=fit, labels=labels, reduction=reduction)


def same_group(model: nn.Module) -> Tensor:
    """One where both entries belong to one layer and one group of its channels: the blocks of K-FAC."""
    marks, layers = [], [layer for layer in model.modules() if list(layer.parameters(recurse=False))]
    for k, layer in enumerate(layers):
        for p in layer.parameters(recurse=False):
            group = torch.arange(len(p)) * getattr(layer, "groups", 1) // len(p)
            marks.append(100 * k + group.repeat_interleave(p[0].numel()))
    marks = torch.cat(marks)
    return (marks[:, None] == marks).double()


def row(problem: Problem, matrix: str, labels: str, against: str, scale: str, error: str, why: str) -> dict[str, str]:
    names = {"problem": problem.name, "matrix": matrix, "labels": labels, "against": against}
    return {**names, "scale": scale, "relative error": error, "why this scale": why}


def difference(theirs: Tensor, ours: Tensor) -> str:
    return f"{(theirs - ours).norm() / theirs.norm():.1e}"


def against_library(name: str) -> Iterator[dict]:
    library = importlib.import_module(f"references.{name}")
    cases = [(matrix, labels, r) for matrix in MATRICES for labels in ("exact", "observed") for r in ("mean", "sum")]
    problems = [(problem, cases) for problem in shared_problems()]
    if getattr(library, "ANY_MODEL", False):
        problems += [(problem, [case for case in cases if case[0] == "full"]) for problem in unstructured_problems()]
    for problem, wanted in problems:
        for matrix, labels, reduction in wanted:
            try:
                theirs, scale, why = library.matrix(problem, matrix, labels, reduction)
            except Skip:
                continue
            except Exception as error:  # whatever the library dies of belongs in the table
                reason = f"skipped: {type(error).__name__}: {' '.join(str(error).split())}"[:120]
                yield row(problem, f"{matrix}, {reduction}", labels, name, "", reason, "")
                continue
            if counterpart := getattr(library, "COUNTERPARTS", {}).get(matrix):
                ours = counterpart(partial(estimate, problem, labels=labels, reduction=reduction))
            else:
                ours = estimate(problem, matrix, labels, reduction).to_dense()
            ours = ours.diagonal() if theirs.dim() == 1 else ours
            yield row(
                problem, f"{matrix}, {reduction}", labels, name, f"{scale:.4g}", difference(theirs, scale * ours), why
            )


def against_truth() -> Iterator[dict]:
    for problem, matrix, why in own_problems():
        theirs, ours = truth(problem), estimate(problem, matrix).to_dense()
        if matrix == "kfac":
            theirs = theirs * same_group(problem.model)
        elif matrix == "diagonal":
            theirs, ours = theirs.diagonal(), ours.diagonal()
        yield row(problem, f"{matrix}, mean", "exact", "dense truth", "1", difference(theirs, ours), why)
    for problem in shared_problems():
        error = difference(truth(problem), estimate(problem, "full").to_dense())
        yield row(problem, "full, mean", "exact", "dense truth", "1", error, "exact by definition")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    rows = [r for name in LIBRARIES if name in sys.argv[1:] for r in against_library(name)] + [*against_truth()]
    print(json.dumps({"rows": rows}))
