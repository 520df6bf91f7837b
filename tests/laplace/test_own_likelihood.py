"""Likelihoods defined outside of the package are like those inside: estimates, training, posteriors, predictions."""

import math

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.laplace.predictions import draw_outputs
from kronfisher.likelihoods import Likelihood
from tests.helpers.close import close
from tests.helpers.truth import jacobian


class Lifetimes(Likelihood):
    """Exponential lifetimes; the outputs are logarithms f of their rates, so that a Gaussian f has closed forms."""

    predictors = {"lognormal": "variances", "mc": "draws", "sampled": "networks"}  # noqa: RUF012

    def log_prob(self, outputs, targets):
        return (outputs - targets * outputs.exp()).flatten(1).sum(1)

    def sample(self, outputs, draws):
        uniform = draws.uniform(outputs.shape, device=outputs.device, dtype=outputs.dtype)
        return -uniform.log() / outputs.detach().exp()

    def root(self, outputs, targets=None):
        return torch.ones_like(outputs)

    def mean(self, outputs):
        return (-outputs).exp()

    def noise_variance(self, outputs):
        return (-2 * outputs).exp()

    def predict_from_variances(self, outputs, variances, noise_factor=1.0):
        mean, noise = (-outputs + variances / 2).exp(), (-2 * outputs + 2 * variances).exp()
        epistemic = noise - mean.square()
        return kf.Prediction(mean, epistemic + noise, epistemic, noise)

    def log_predictive_density(self, prediction, targets):
        return self.log_prob(-prediction.mean.log(), targets)


class Normal(Likelihood):
    """Gaussian noise of variance ½, written by a user."""

    predictors = {"linearized": "variances", "mc": "draws"}  # noqa: RUF012

    @property
    def single_noise(self):
        return 0.5

    def log_prob(self, outputs, targets):
        return (-(targets - outputs).square() - 0.5 * math.log(math.pi)).flatten(1).sum(1)

    def sample(self, outputs, draws):
        return outputs.detach() + 0.5**0.5 * draws.normal(outputs.shape, device=outputs.device, dtype=outputs.dtype)

    def root(self, outputs, targets=None):
        return torch.full_like(outputs, 2**0.5)

    def mean(self, outputs):
        return outputs

    def noise_variance(self, outputs):
        return torch.full_like(outputs, 0.5)

    def predict_from_variances(self, outputs, variances, noise_factor=1.0):
        noise = self.noise_variance(outputs) * noise_factor
        return kf.Prediction(outputs, variances + noise, variances, noise)

    def log_predictive_density(self, prediction, targets):
        return torch.distributions.Normal(prediction.mean, prediction.variance.sqrt()).log_prob(targets).sum(1)


class Least(Likelihood):
    """Only what estimates and draws need."""

    log_prob, sample, mean, noise_variance = (
        Lifetimes.log_prob,
        Lifetimes.sample,
        Lifetimes.mean,
        Lifetimes.noise_variance,
    )
    root = Lifetimes.root


@pytest.fixture
def lifetimes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(40, 3).double()
    return model, x, torch.distributions.Exponential(model(x).detach().exp()).sample()


def test_its_matrix_is_that_of_its_hessian(lifetimes):
    model, x, y = lifetimes
    fisher = kf.estimate(model, (x, y), Lifetimes(), fit=kf.Full(across_layers=True), labels="exact")
    rows = jacobian(model, x, fisher.names)
    close(fisher.to_dense(), (rows.mT @ rows).sum(0) / len(x))
    drawn = kf.estimate(model, x, Lifetimes(), fit=kf.Full(across_layers=True), labels="sampled", samples=500)
    assert (drawn.to_dense() - fisher.to_dense()).norm() < 0.1 * fisher.to_dense().norm()
    observed = kf.estimate(model, (x, y), Lifetimes(), fit="diagonal", labels="observed")
    assert all(bool((value > 0).all()) for value in observed.diagonal().values())


def test_it_trains(lifetimes):
    model, x, _ = lifetimes
    y = torch.full((40, 2), 0.25).double()  # at its best the mean, 1/rate, is this everywhere
    optimizer = kf.NaturalGradient(model, Lifetimes(), step=kf.QuadraticModel())
    losses = [float(optimizer.step(lambda: model(x), y)) for _ in range(15)]
    assert losses[-1] < losses[0]
    assert losses[-1] == pytest.approx(2 * (1 + math.log(0.25)), abs=0.05)


def test_its_closed_form_is_the_mean_over_draws_and_its_density_calibrates(lifetimes):
    model, x, y = lifetimes
    posterior = kf.Laplace(model, kf.estimate(model, (x, y), Lifetimes(), labels="exact"), 2.0)
    closed, drawn = posterior.predict(x[:5]), posterior.predict(x[:5], predictor="mc", samples=100_000)
    torch.testing.assert_close(drawn.mean, closed.mean, rtol=0.02, atol=0)
    torch.testing.assert_close(drawn.noise_variance, closed.noise_variance, rtol=0.05, atol=0)
    torch.testing.assert_close(drawn.epistemic_variance, closed.epistemic_variance, rtol=0.1, atol=0)
    assert posterior.predict(x[:5], predictor="sampled", samples=3).mean.shape == (5, 2)
    close(posterior.log_predictive_density(x, y), Lifetimes().log_prob(-posterior.predict(x).mean.log(), y))
    with pytest.raises(ValueError, match="Lifetimes has lognormal, mc, sampled"):
        posterior.predict(x, predictor="probit")
    posterior.calibrate([(x, y)])
    assert posterior.calibrated_for == "lognormal"
    best = posterior.log_predictive_density(x, y).sum()
    for factor in (0.1, 0.5, 2.0, 10.0):
        precision = {name: float(value) * factor for name, value in posterior.prior_precision.items()}
        other = kf.Laplace(model, posterior.fisher, precision)
        assert other.log_predictive_density(x, y).sum() <= best + 1e-3
    assert posterior.optimize_prior().log_marginal_likelihood().isfinite()
    with pytest.raises(kf.UnsupportedError, match="noise"):
        posterior.noise = 0.3


def test_a_single_noise_is_learned_from_residuals_as_that_of_the_gaussian(lifetimes):
    model, x, _ = lifetimes
    y = model(x).detach() + 0.3 * torch.randn(40, 2).double()
    own, ours = (
        kf.Laplace(model, kf.estimate(model, (x, y), likelihood, labels="exact"))
        for likelihood in (Normal(), kf.Gaussian(0.5))
    )
    close(own.log_marginal_likelihood(), ours.log_marginal_likelihood())
    assert own.optimize_prior(noise=True).noise == pytest.approx(ours.optimize_prior(noise=True).noise, rel=1e-6)
    assert own.fit_noise().noise == pytest.approx(ours.fit_noise().noise, rel=1e-8)
    assert own.noise == pytest.approx(float((y - model(x).detach()).square().mean()), rel=1e-8)
    for predictor in ("linearized", "mc"):
        close(own.predict(x, predictor=predictor).variance, ours.predict(x, predictor=predictor).variance, 1e-6)
        density = own.log_predictive_density(x, y, predictor=predictor)
        close(density, ours.log_predictive_density(x, y, predictor=predictor), 1e-6)


def test_the_least_predicts_by_draws_and_says_what_it_lacks(lifetimes):
    model, x, y = lifetimes
    posterior = kf.Laplace(model, kf.estimate(model, (x, y), Least(), labels="exact"), 2.0)
    full = kf.Laplace(model, kf.estimate(model, (x, y), Lifetimes(), labels="exact"), 2.0)
    assert torch.equal(posterior.predict(x).mean, full.predict(x, predictor="mc").mean)
    with pytest.raises(ValueError, match="Least has mc, sampled"):
        posterior.predict(x, predictor="lognormal")
    with pytest.raises(
        kf.UnsupportedError, match=r"define Least\.log_predictive_density.* predictor='mc' or predictor='s"
    ):
        posterior.likelihood.log_predictive_density(posterior.predict(x), y)
    for predictor in ("mc", "sampled"):  # as it says
        density = kf.Laplace(model, posterior.fisher, 2.0).log_predictive_density(x, y, predictor=predictor)
        assert density.shape == (40,) and density.isfinite().all()
        kf.Laplace(model, posterior.fisher, 2.0).calibrate([(x, y)], predictor=predictor, samples=10)
    with pytest.raises(kf.UnsupportedError, match=r"define Least\.predict_from_variances"):
        posterior.likelihood.predict_from_variances(x, x)


class Closed(Lifetimes):
    """A closed form of the prediction, and none of its density."""

    log_predictive_density = Likelihood.log_predictive_density


class Bare(Likelihood):
    """The two methods that are required."""

    log_prob, sample = Lifetimes.log_prob, Lifetimes.sample


class Loud(Normal):
    """Gaussian noise without a density of predictions."""

    log_predictive_density = Likelihood.log_predictive_density


def test_without_a_density_of_its_own_it_has_the_mean_over_draws(lifetimes):
    model, x, y = lifetimes
    fisher = kf.estimate(model, (x, y), Closed(), labels="exact")
    posterior = kf.Laplace(model, fisher, 2.0)
    for call in (lambda: posterior.log_predictive_density(x, y), lambda: posterior.calibrate([(x, y)])):
        with pytest.raises(
            kf.UnsupportedError, match=r"define Closed\.log_predictive_density, or .* predictor='mc' or"
        ):
            call()
    density = posterior.log_predictive_density(x, y, predictor="mc", samples=50, seed=3)
    draws = draw_outputs(*posterior.functional_covariance(x), 50, 3)
    truth = [
        math.log(math.fsum(math.exp(p) for p in logs) / 50)
        for logs in torch.stack([Lifetimes().log_prob(f, y) for f in draws]).T.tolist()
    ]
    close(density, torch.tensor(truth, dtype=torch.float64), 1e-12)
    assert posterior.calibrate([(x, y)], predictor="mc").calibrated_for == "mc"
    best = posterior.log_predictive_density(x, y).sum()
    for factor in (0.1, 10.0):
        precision = {name: float(value) * factor for name, value in posterior.prior_precision.items()}
        other = kf.Laplace(model, fisher, precision)
        assert other.log_predictive_density(x, y, predictor="mc").sum() <= best + 1e-3
    bare = kf.Laplace(model, kf.estimate(model, (x, y), Bare(), labels="sampled"), 2.0)
    assert bare.optimize_prior().calibrate([(x, y)]).log_predictive_density(x, y).isfinite().all()


def test_another_noise_counts_in_the_mean_over_draws(lifetimes):
    model, x, _ = lifetimes
    y = model(x).detach() + 0.3 * torch.randn(40, 2).double()
    posterior = kf.Laplace(model, kf.estimate(model, (x, y), Loud(), labels="exact"), noise=0.1)
    draws = draw_outputs(*posterior.functional_covariance(x), 20, 0)
    truth = torch.stack([kf.Gaussian(0.1).log_prob(f, y) for f in draws]).exp().mean(0).log()
    close(posterior.log_predictive_density(x, y, predictor="mc", samples=20), truth, 1e-12)
    posterior.noise = 0.5
    draws = draw_outputs(*posterior.functional_covariance(x), 20, 0)
    truth = torch.stack([Normal().log_prob(f, y) for f in draws]).exp().mean(0).log()
    close(posterior.log_predictive_density(x, y, predictor="mc", samples=20), truth, 1e-12)
