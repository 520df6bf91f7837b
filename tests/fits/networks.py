"""Small networks in float64, and their dense rearranged blocks."""

import torch
from torch import nn

import kronfisher as kf
from tests.conformance.truth import shake


def network(shared, widths=(4, 5, 3), images=(12, 2, 4)):
    """A network and data: two linear layers, or convolutions with several positions, the second one of two groups."""
    torch.manual_seed(5)
    if shared:
        layers = (nn.Conv1d(2, 4, 2, padding=1), nn.Tanh(), nn.Conv1d(4, 6, 2, groups=2), nn.Tanh())
        return shake(nn.Sequential(*layers)).double(), torch.randn(images).double()
    a, b, c = widths
    model = shake(nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c), nn.Sigmoid())).double()
    return model, torch.randn(25, a).double() * torch.tensor([0.3, 0.6, 1.0, 2.0])


def estimate(model, x, fit, labels="exact", **options):
    return kf.estimate(model, x, kf.Gaussian(), fit=fit, labels=labels, **options)


def rearranged(model, x):
    """Name of every layer → ℛ(F) of each of its groups, ``[H, O², I²]``, from the dense matrix."""
    full, kfac = estimate(model, x, "full"), estimate(model, x, "kfac")
    found = {}
    for name, product in kfac.blocks.items():
        groups, inputs, outputs = len(product.A), product.A.shape[1], product.B.shape[1]
        dense = next(op.to_dense() for key, op in full.blocks.items() if key.split(" + ")[0] == name)
        F = dense.view(groups, outputs, inputs, groups, outputs, inputs)
        parts = [F[h, :, :, h].permute(0, 2, 1, 3).reshape(outputs**2, inputs**2) for h in range(groups)]
        found[name] = torch.stack(parts)
    return found
