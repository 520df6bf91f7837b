"""Dense rearranged blocks of small networks."""

import torch

import kronfisher as kf


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
