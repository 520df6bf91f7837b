"""Networks, batches and loops that several tests of training use."""

import torch
from torch import nn

import kronfisher as kf
from kronfisher.optim.direction import Direction
from kronfisher.optim.statistics import Statistics
from tests.helpers.networks import perceptron

FITS = ["kfac", "kfoc", "ekfac", "ekfac-kfoc", kf.KroneckerSum(2)]
FIXED = {"momentum": 0.9, "trust": 0.1, "kl_limit": 1.0}


def network(*extra, dtype=torch.float32):
    return perceptron(4, 6, 3, after=extra, seed=3, dtype=dtype)


def wide():
    """With batches of a few examples, steps of its linear layers are made from rows."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))


def batches(count=4, n=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(n, 4, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator))
        for _ in range(count)
    ]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(optimizer, model, data):
    return [optimizer.step(lambda x=x: model(x), y) for x, y in data]


class Curvature:
    """Statistics and directions of a classifier, as an optimiser composes them, without steps."""

    def __init__(self, model, fit="kfac", damping=None, refresh=None, labels="exact"):
        self.model, self.step, refresh = model, 0, refresh or kf.Refresh()
        parameters = dict(model.named_parameters())
        self.statistics = Statistics(
            model, parameters, kf.Categorical(), fit=fit, refresh=refresh, labels=labels, samples=1, seed=0
        )
        self.direction = Direction(parameters, damping or kf.FactoredTikhonov(), refresh)

    def observe(self, x, y=None):
        self.statistics.prepare(self.step)
        with self.statistics.captured() as capture:
            outputs = self.model(x)
        self.statistics.absorb(capture, outputs, y, self.step, retain=False)

    def merge(self):
        self.statistics.merge(self.step)
        self.direction.follow(self.statistics.layers, self.step)

    def renew(self, value):
        self.direction.renew(value, self.step)
        self.statistics.schedule_bases(self.direction.due)

    def precondition(self, v, value):
        return self.direction.precondition(v, value)
