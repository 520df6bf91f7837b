import torch
from curvlinops import EFLinearOperator, EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator
from peers import ClassesSecond, Skip
from problems import Problem
from torch import Tensor, nn

from references import loss_scale

ANY_MODEL = True  # full matrices need no layers
LOSSES = {"gaussian": nn.MSELoss, "bernoulli": nn.BCEWithLogitsLoss, "categorical": nn.CrossEntropyLoss}


def matrix(problem: Problem, kind: str, labels: str, reduction: str) -> tuple[Tensor, float, str]:
    if kind == "diagonal":
        raise Skip("the diagonal of `full`, nothing of its own")
    if labels == "observed" and problem.positions > 1 and kind in ("full", "ekfac"):
        raise Skip("treats positions as separate data: another matrix, without products of different positions")
    if labels == "exact" and problem.positions > 1 and (kind == "kfac-reduce" or "GPT" in problem.name):
        raise Skip("sends one column back for all positions at once: no root of the Hessian once positions are mixed")
    sequence = problem.likelihood == "categorical" and problem.positions > 1
    model = ClassesSecond(problem.model) if sequence else problem.model
    loss = LOSSES[problem.likelihood](reduction=reduction)
    data = [(problem.inputs[:4], problem.targets[:4]), (problem.inputs[4:], problem.targets[4:])]
    parameters = list(problem.model.parameters())
    if kind == "full":
        operator = (GGNLinearOperator if labels == "exact" else EFLinearOperator)(model, loss, parameters, data)
    else:
        structure = EKFACLinearOperator if kind == "ekfac" else KFACLinearOperator
        options = {"fisher_type": "type-2" if labels == "exact" else "empirical", "separate_weight_and_bias": False}
        options["kfac_approx"] = "reduce" if kind == "kfac-reduce" else "expand"
        operator = structure(model, loss, parameters, data, **options)
    with torch.no_grad() if kind != "full" else torch.enable_grad():
        dense = operator @ torch.eye(operator.shape[1])
    return dense, *loss_scale(problem, labels, reduction)
