"""The same numbers as laplace-torch where the conventions agree, and a backend for it. Skipped where it is missing."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronfisher as kf
from tests.helpers.close import close
from tests.helpers.networks import perceptron
from tests.helpers.optional import require

laplace = require("laplace")
pytestmark = pytest.mark.filterwarnings("ignore")

SEPARATE = {"*.bias": "kfac-reduce", "*": "kfac"}  # laplace-torch keeps biases apart; T = 1 here


def problem(kind, convolution=False):
    torch.manual_seed(0)
    if convolution:
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
        )
        x = torch.randn(60, 2, 6, 6)
    else:
        model, x = perceptron(4, 10, 3, dtype=torch.float32), torch.randn(60, 4)
    y = torch.randint(3, (60,)) if kind == "classification" else torch.randn(60, 3)
    return model, x, y


def loader(x, y, size=60):
    return DataLoader(TensorDataset(x, y), batch_size=size)


def likelihood(kind):
    return kf.Categorical() if kind == "classification" else kf.Gaussian()


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_numbers_of_laplace_torch(kind, structure):
    model, x, y = problem(kind)
    new = torch.randn(9, 4)
    theirs = laplace.Laplace(
        model, kind, subset_of_weights="all", hessian_structure=structure, prior_precision=0.7, sigma_noise=1.0
    )
    theirs.fit(loader(x, y, 20))
    fit = {"kron": SEPARATE, "diag": "diagonal", "full": kf.Full(across_layers=True)}[structure]
    fisher = kf.estimate(
        model, [(x[k : k + 20], y[k : k + 20]) for k in (0, 20, 40)], likelihood(kind), fit=fit, labels="exact"
    )
    ours = kf.Laplace(model, fisher, 0.7)
    close(ours.log_marginal_likelihood().float(), theirs.log_marginal_likelihood())
    outputs, covariance = ours.functional_covariance(new)
    mean, expected = theirs._glm_predictive_distribution(new)
    close(outputs, mean)
    close(covariance, expected)
    if kind == "classification":
        for link in ("probit", "bridge"):
            close(ours.predict(new, predictor=link).mean, theirs(new, link_approx=link))
        drawn = theirs(new, link_approx="mc", n_samples=20_000)
        assert (ours.predict(new, predictor="mc", samples=20_000).mean - drawn).abs().max() < 0.02
    else:
        prior, sigma = torch.tensor(3.0), torch.tensor(0.5)
        value = theirs.log_marginal_likelihood(prior_precision=prior, sigma_noise=sigma)
        close(ours.log_marginal_likelihood(prior, sigma**2).float(), value)


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("convolution", [False, True])
def test_the_backend_gives_laplace_torch_what_its_own_does(kind, structure, convolution):
    model, x, y = problem(kind, convolution)
    posteriors = []
    for backend in (None, kf.laplace_backend(fit="kfac")):
        posterior = laplace.Laplace(
            model, kind, subset_of_weights="all", hessian_structure=structure, backend=backend, prior_precision=0.7
        )
        posterior.fit(loader(x, y, 25))
        posterior.fit(loader(x, y, 25))  # a second fit starts anew
        posteriors.append(posterior)
    theirs, ours = posteriors
    close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    close(ours._glm_predictive_distribution(x[:5])[1], theirs._glm_predictive_distribution(x[:5])[1])


@pytest.mark.parametrize("fit", ["kfac", "kfoc"])
@pytest.mark.parametrize("layers", ["all", "last_layer"])
@pytest.mark.parametrize("times", ["some", "twice"])
def test_every_fit_starts_anew_whatever_the_loader_leaves_out(times, layers, fit):
    """Seen: a second fit that continued the first, as that had not read as many examples as the data set has."""
    model, x, y = problem("classification")
    data = TensorDataset(x, y)
    if times == "some":
        batches = DataLoader(data, batch_size=25, drop_last=True)
    else:
        batches = DataLoader(data, batch_size=25, sampler=[*range(60), *range(60)])
    posterior = laplace.Laplace(
        model, "classification", subset_of_weights=layers, hessian_structure="kron", backend=kf.laplace_backend(fit)
    )
    found = []
    for _ in range(3):
        posterior.fit(batches)
        found.append(posterior.log_marginal_likelihood())
        posterior(x[:5])
    assert found[0] == found[1] == found[2]
    if fit == "kfac" and layers == "all":
        seen = [(x[k % 60 : k % 60 + 1], y[k % 60 : k % 60 + 1]) for k in range(50 if times == "some" else 120)]
        fisher = kf.estimate(model, seen, kf.Categorical(), fit=SEPARATE, labels="exact")
        close(kf.Laplace(model, fisher).log_marginal_likelihood().float(), found[0])


def test_the_backend_for_the_last_layer_and_its_optimised_prior():
    model, x, y = problem("classification")
    found = []
    for backend in (None, kf.laplace_backend()):
        posterior = laplace.Laplace(model, "classification", hessian_structure="kron", backend=backend)
        posterior.fit(loader(x, y, 25))
        posterior.optimize_prior_precision(method="marglik", n_steps=20)
        found.append(posterior(x[:5]))
    close(found[1], found[0], 1e-3)


@pytest.mark.parametrize("fit", sorted(kf.fits.FITS))
def test_any_fit_of_one_product_serves(fit):
    model, x, y = problem("classification", convolution=True)
    posterior = laplace.Laplace(
        model, "classification", subset_of_weights="all", hessian_structure="kron", backend=kf.laplace_backend(fit)
    )
    try:
        posterior.fit(loader(x, y, 25))
    except kf.UnsupportedError as error:
        assert "kronfisher.Laplace" in str(error)  # what to use instead
        assert fit not in ("kfac", "kfac-reduce", "kfoc", "tkfac")
        return
    p = posterior(x[:5])
    torch.testing.assert_close(p.sum(1), torch.ones(5))
