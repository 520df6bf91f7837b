"""Merging by one solve: against dense algebra for every fit, and with too many rows to be written out."""

import copy

import pytest
import torch

import kronfisher as kf
from kronfisher.fisher.vectors import flatten
from kronfisher.fits import FITS
from kronfisher.operators import operator
from tests.helpers.close import close


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        return self.second((self.first(x) * self.scale).tanh())


def pair(fit, sizes=(40, 70)):
    """Two models that left one start, and their matrices."""
    start = Network().double()
    models, fishers = [], []
    for size in sizes:
        model = copy.deepcopy(start)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        models.append(model)
        fishers.append(kf.estimate(model, torch.randn(size, 4).double(), kf.Categorical(), fit=fit))
    return models, fishers


def flat(parameters):
    parameters = dict(parameters.named_parameters()) if isinstance(parameters, torch.nn.Module) else parameters
    return flatten({name: p[None] for name, p in parameters.items()})[0].detach()


def merged_densely(models, fishers, shares, damping):
    mean = sum(share * flat(model) for share, model in zip(shares, models, strict=True))
    matrices = [share * f.reduced("mean").to_dense() for share, f in zip(shares, fishers, strict=True)]
    pull = sum(matrix @ (flat(model) - mean) for matrix, model in zip(matrices, models, strict=True))
    return mean + torch.linalg.solve(sum(matrices) + damping * torch.eye(len(mean)).double(), pull)


@pytest.mark.parametrize("fit", FITS)
def test_every_fit_merges_by_its_own_matrix(fit):
    models, fishers = pair(fit)
    merged = kf.merge(models, fishers, damping=0.05)
    close(flat(merged), merged_densely(models, fishers, [40 / 110, 70 / 110], 0.05), 1e-8)
    models[0].load_state_dict(merged, strict=False)
    assert torch.equal(flat(models[0]), flat(merged))


def test_weights_reductions_and_three_models():
    models, fishers = pair("kfac", sizes=(20, 30, 40))
    expected = merged_densely(models, fishers, [0.5, 0.25, 0.25], 0.1)
    close(flat(kf.merge(models, fishers, weights=[2, 1, 1], damping=0.1)), expected, 1e-8)
    sums = [fisher.reduced("sum") for fisher in fishers]
    close(flat(kf.merge(models, sums, weights=[2, 1, 1], damping=kf.Tikhonov(0.1))), expected, 1e-8)


def test_too_large_to_be_written_out_it_is_solved_from_products(monkeypatch):
    models, fishers = pair("ekfac")
    expected = merged_densely(models, fishers, [40 / 110, 70 / 110], 0.02)
    monkeypatch.setattr(operator, "DENSE_LIMIT", 2)
    merged = kf.merge(models, fishers, damping=0.02)
    close(flat(merged), expected, 1e-8)


def test_without_a_number_it_is_damped_by_a_tenth_of_the_mean_eigenvalue_of_each_block():
    models, fishers = pair("full")
    merged = flat(kf.merge(models, fishers))
    shares = [40 / 110, 70 / 110]
    matrix = sum(share * f.to_dense() for share, f in zip(shares, fishers, strict=True))
    sizes = [block.dim for block in fishers[0].blocks.values()]
    means = [part.mean() for part in matrix.diagonal().split(sizes)]
    damping = torch.cat([0.1 * mean.expand(size) for mean, size in zip(means, sizes, strict=True)]).diag()
    centre = sum(share * flat(model) for share, model in zip(shares, models, strict=True))
    pull = sum(s * f.to_dense() @ (flat(m) - centre) for s, f, m in zip(shares, fishers, models, strict=True))
    close(merged, centre + torch.linalg.solve(matrix + damping, pull), 1e-8)


def test_the_merged_model_has_the_least_sum_of_penalties():
    models, fishers = pair("kfac")
    merged = {name: p.requires_grad_() for name, p in kf.merge(models, fishers, damping=1e-6).items()}
    penalties = [f.count * f.penalty(model) for f, model in zip(fishers, models, strict=True)]
    at_merged = sum(penalties)(merged)
    assert all(at_merged < sum(penalties)(model) for model in models)
    mean = {
        name: (40 * p + 70 * q) / 110
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True)
    }
    assert at_merged < sum(penalties)(mean)


def test_what_cannot_be_merged_is_refused():
    models, fishers = pair("kfac")
    with pytest.raises(kf.DataError, match="2 models and 1 Fisher"):
        kf.merge(models, fishers[:1])
    with pytest.raises(kf.DataError, match="other parameters than the model has now"):
        kf.merge(models[::-1], fishers)
    with pytest.raises(ValueError, match="weights"):
        kf.merge(models, fishers, weights=[0, 0])
    with pytest.raises(ValueError, match="weights"):
        kf.merge(models, fishers, weights=[1, -1])
    with pytest.raises(ValueError, match="weights"):
        kf.merge(models, fishers, weights=[1])
    with pytest.raises(kf.DataError, match="same blocks"):
        kf.merge(models, [fishers[0], kf.estimate(models[1], torch.randn(9, 4).double(), kf.Categorical(), fit="gram")])
    models[1].scale += 1
    with pytest.raises(kf.DataError, match="differ in scale, which no Fisher matrix covers"):
        kf.merge(models, fishers)
    assert "scale" not in kf.merge(models, fishers, strict=False)
