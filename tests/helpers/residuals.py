"""Small problems of residuals with derivatives in them."""

from itertools import pairwise

import torch
from torch import Tensor, nn


def network(*sizes: int) -> nn.Sequential:
    """A tanh network in float64."""
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def laplacian(model: nn.Module, x: Tensor) -> Tensor:
    """``Σ ∂²u/∂x_i²`` ``[n]``, with its graph."""
    x = x.detach().requires_grad_()
    (slopes,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    each = (torch.autograd.grad(slopes[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1]))
    return sum(each, torch.zeros(len(x), dtype=x.dtype))


def rows(numbers: Tensor, model: nn.Module) -> Tensor:
    """``[n, P]``, one backward pass each."""
    leaves = list(model.parameters())
    found = [torch.autograd.grad(each, leaves, retain_graph=True, materialize_grads=True) for each in numbers]
    return torch.stack([torch.cat([part.flatten() for part in parts]) for parts in found])
