"""Dense truth of a posterior: Λ written out, Jacobians by ``torch.autograd.grad`` one number at a time."""

import torch
from torch import nn

import kronfisher as kf


def jacobian(model, x, names):
    """``[n, C, P]``."""
    outputs = model(x)
    parameters = [p for name, p in model.named_parameters() if name in names]
    rows = []
    for value in outputs.flatten():
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for p, g in zip(parameters, found, strict=True)
                ]
            )
        )
    return torch.stack(rows).reshape(len(outputs), -1, len(rows[0])).detach()


def precision(fisher, prior, scale=1.0):
    """``N·F·scale + diag(prior)`` for a flat or a single prior."""
    n = fisher.count if fisher.reduction == "mean" else 1
    dense = fisher.to_dense()
    return n * scale * dense + torch.as_tensor(prior, dtype=dense.dtype).expand(len(dense)).diag()


class Gain(nn.Module):
    """A scale and a shift of the features, as normalisation layers have."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x)


def mlp(outputs=3):
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), Gain(6), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, outputs)
    )


def convnet(outputs=3):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, outputs),
    )


class Tied(nn.Module):
    """One layer applied twice, and positions at the output."""

    def __init__(self, outputs=3):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, outputs)

    def forward(self, x):
        return self.head(self.layer(self.layer(x).tanh()).tanh())


def problem(name, dtype=torch.float64, outputs=3, data=20, likelihood=None, fit="kfac", **options):
    """A model at random weights, inputs, targets, and its Fisher."""
    torch.manual_seed(1)
    make, shape = {"mlp": (mlp, (4,)), "convnet": (convnet, (2, 7, 7)), "tied": (Tied, (4,))}[name]
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
