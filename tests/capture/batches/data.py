"""Data of two classes, and a short way to a matrix."""

import torch

import kronfisher as kf

SEEDED = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 3, generator=SEEDED), torch.randint(2, (12,), generator=SEEDED)


def dense(model, data, likelihood=None, **options):
    options = {"labels": "observed" if likelihood is None else "exact", **options}
    return kf.estimate(model, data, likelihood or kf.Categorical(), **options).to_dense()
