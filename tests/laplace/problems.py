"""Posteriors of small networks: a model at random weights, inputs, targets, and its Fisher."""

import torch

import kronfisher as kf
from tests.helpers.networks import Tied, convnet, normalised


def problem(name, dtype=torch.float64, outputs=3, data=20, likelihood=None, fit="kfac", **options):
    """A model at random weights, inputs, targets, and its Fisher."""
    torch.manual_seed(1)
    make, shape = {"mlp": (normalised, (4,)), "convnet": (convnet, (2, 7, 7)), "tied": (Tied, (4,))}[name]
    model = make(outputs).double()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    model, x = model.to(dtype), torch.randn(data, *shape, dtype=torch.float64).to(dtype)
    likelihood = likelihood or kf.Gaussian(0.3)
    with torch.no_grad():
        f = model(x)
    if isinstance(likelihood, kf.Categorical):
        y = torch.distributions.Categorical(logits=f).sample()
    else:
        y = f + 0.5 * torch.randn_like(f)
    batches = [(x[:12], y[:12]), (x[12:], y[12:])]
    fisher = kf.estimate(model, batches, likelihood, fit=fit, labels="exact", **options)
    return model, x, y, fisher


SEPARATE = {"*.bias": "kfac-reduce", "*": "kfac"}
FITS = {
    "kfac": "kfac",
    "ekfac": "ekfac",
    "diagonal": "diagonal",
    "full": "full",
    "joint": kf.Full(across_layers=True),
    "separate": SEPARATE,
}
