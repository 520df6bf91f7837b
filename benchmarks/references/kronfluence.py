from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from kronfluence.analyzer import prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition
from kronfluence.task import Task
from kronfluence.utils.state import State
from peers import Skip
from problems import Problem
from torch import Tensor, nn

from kronfisher import Fisher

Batch = tuple[Tensor, Tensor, Tensor]  # inputs, targets and, for every example, the number of a column


class Columns(Task):
    """Its own loss for observed labels; in place of labels drawn, one column after the other of a root of the Hessian.

    Column ``p·C + c`` is zero everywhere but at output position p. There it is, for classes, the gradient at label c
    times the root of its probability; for numbers the c-th axis times the root of the second derivative.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
        inputs, targets, column = batch
        outputs = model(inputs)
        if not sample:
            return self._loss(outputs, targets)
        place, label = divmod(int(column[0]), outputs.shape[-1])
        row = outputs.unflatten(0, (len(outputs), -1)).flatten(1, -2)[:, place]
        fixed = row.detach()
        if self.problem.likelihood == "categorical":
            return (fixed.softmax(-1)[:, label].sqrt() * (row.logsumexp(-1) - row[:, label])).sum()
        root = (fixed.sigmoid() * (-fixed).sigmoid()).sqrt() if self.problem.likelihood == "bernoulli" else 1
        return (root * row)[:, label].sum()

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.problem.likelihood == "categorical":
            return F.cross_entropy(outputs.flatten(end_dim=-2), targets.flatten(), reduction="sum")
        if self.problem.likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
        return 0.5 * (outputs - targets).square().sum()

    def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def kfac(estimate: Callable[[str], Fisher]) -> Tensor:
    """Its K-FAC in terms of ours: both factors are means over positions, where our B is a sum over them."""
    ours = estimate("kfac")
    return torch.block_diag(*(ours[name].to_dense() * (ours.count / ours.rows[name]) for name in ours.blocks))


def ekfac(estimate: Callable[[str], Fisher]) -> Tensor:
    """Ours layer by layer, the bias a last column of the weight."""
    ours = estimate("ekfac")
    return torch.block_diag(*(ours[name].to_dense() for name in ours.blocks))


COUNTERPARTS = {"kfac": kfac, "ekfac": ekfac}


def matrix(problem: Problem, kind: str, labels: str, reduction: str) -> tuple[Tensor, float, str]:
    """A loader of single columns: every example comes once for each, which its means divide by."""
    if kind not in ("kfac", "ekfac") or reduction != "mean":
        raise Skip("K-FAC (expand) and EKFAC, means only")
    columns = problem.positions * problem.classes if labels == "exact" else 1
    state, task = State(cpu=True), Columns(problem)
    model = prepare_model(deepcopy(problem.model), task)
    kinds = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
    options = {f"{name}_dtype": torch.float64 for name in kinds}
    arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=labels == "observed", **options)
    loader = [
        (x, y, torch.full((len(x),), column))
        for x, y in zip(problem.inputs.split(4), problem.targets.split(4), strict=True)
        for column in range(columns)
    ]
    _, sums = fit_covariance_matrices_with_loader(model, state, task, loader, arguments, disable_tqdm=True)
    names = list(sums["gradient_covariance"])
    why = "same definition" if columns == 1 else f"its mean is over {columns} columns as well"
    if kind == "kfac":
        means = [
            [sums[f"{side}_covariance"][name] / sums[f"num_{side}_covariance_processed"][name] for name in names]
            for side in ("gradient", "activation")
        ]
        why = f"{why}; ours times N / rows, because its B is a mean over positions"
        return torch.block_diag(*map(torch.kron, *means)), 1 / columns, why
    basis = perform_eigendecomposition(sums, model, state, arguments, disable_tqdm=True)
    _, found = fit_lambda_matrices_with_loader(model, state, task, loader, arguments, basis, disable_tqdm=True)
    blocks = []
    for name in names:
        U = torch.kron(basis["gradient_eigenvectors"][name], basis["activation_eigenvectors"][name])
        values = found["lambda_matrix"][name] / found["num_lambda_processed"][name]
        blocks.append((U * values.flatten()) @ U.mT)
    return torch.block_diag(*blocks), 1 / columns, why
