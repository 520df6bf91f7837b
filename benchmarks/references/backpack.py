from collections.abc import Callable
from copy import deepcopy

import torch
from backpack import backpack, extend
from backpack.extensions import KFLR, BatchGrad, DiagGGNExact, SumGradSquared
from backpack.hessianfree.ggnvp import ggn_vector_product
from peers import Skip
from problems import Problem
from torch import Tensor, nn

from kronfisher import Fisher
from references import loss_scale


def counterpart(estimate: Callable[[str], Fisher]) -> Tensor:
    """Its K-FAC in terms of ours: no cross terms of weight and bias, and for T positions another matrix.

    It multiplies Σ_t a aᵀ (ours expand, T times its mean) by products of output gradients that are already summed over
    positions (ours reduce, T² times its mean).
    """
    expand, reduce = estimate("kfac"), estimate("kfac-reduce")
    blocks = []
    for name in (name for name in expand.blocks if name.endswith("weight")):
        positions = expand.rows[name] / expand.count
        inputs, outputs = positions * expand[name].A[0], positions**2 * reduce[name].B[0]
        blocks += [torch.kron(outputs, inputs[:-1, :-1]), outputs]
    return torch.block_diag(*blocks)


COUNTERPARTS = {"kfac": counterpart}


def matrix(problem: Problem, kind: str, labels: str, reduction: str) -> tuple[Tensor, float, str]:
    """All data at once; the batch of a mean is the mean of all data."""
    if "sequence" in problem.name or problem.likelihood == "bernoulli":
        raise Skip("2-D inputs and, for Bernoulli, one output only")
    if kind in ("kfac-reduce", "ekfac") or (kind == "kfac" and labels == "observed"):
        raise Skip("not there")
    model, count = extend(deepcopy(problem.model)), len(problem.inputs)
    losses = {"gaussian": nn.MSELoss, "categorical": nn.CrossEntropyLoss}
    loss = extend(losses[problem.likelihood](reduction=reduction))
    scale, why = loss_scale(problem, labels, reduction)
    if (kind, labels) == ("full", "exact"):
        outputs = model(problem.inputs)
        value = loss(outputs, problem.targets)
        eye = torch.eye(sum(p.numel() for p in model.parameters()))
        split = [[*map(_like, row.split([p.numel() for p in model.parameters()]), model.parameters())] for row in eye]
        return torch.stack([_flat(ggn_vector_product(value, outputs, model, v)) for v in split]), scale, why
    diagonal = DiagGGNExact() if labels == "exact" else SumGradSquared()
    with backpack({"kfac": KFLR(), "diagonal": diagonal, "full": BatchGrad()}[kind]):
        loss(model(problem.inputs), problem.targets).backward()
    if kind == "kfac":
        if any(isinstance(layer, nn.Conv2d) for layer in model):
            why += "; convolutions: input factor of ours expand, output factor of ours reduce"
        blocks = [p.kflr[0] if len(p.kflr) == 1 else torch.kron(*p.kflr) for p in model.parameters()]
        return torch.block_diag(*blocks), scale, why
    if labels == "exact":
        return _flat([p.diag_ggn_exact for p in model.parameters()]), scale, why
    if reduction == "mean":  # individual gradients of a mean are divided by the number of data before they are squared
        scale, why = scale / problem.classes / count if problem.likelihood == "gaussian" else scale / count, why
        why = f"{why}; gradients of a mean are divided before they are squared"
    if kind == "diagonal":
        return _flat([p.sum_grad_squared for p in model.parameters()]), scale, why
    rows = torch.cat([p.grad_batch.flatten(1) for p in model.parameters()], dim=1)
    return rows.T @ rows, scale, why


def _like(values: Tensor, parameter: Tensor) -> Tensor:
    return values.view_as(parameter)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])
