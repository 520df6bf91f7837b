"""Predictions: links against draws from the very Gaussian, calibration, files."""

import math

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.likelihoods.bridge import bridge
from tests.helpers.memory import Sizes
from tests.helpers.truth import jacobian, precision
from tests.laplace.problems import problem


def logits_posterior(model, x, fisher, prior):
    jac = jacobian(model, x, fisher.names)
    return model(x).detach(), jac @ torch.linalg.solve(precision(fisher, prior), jac.mT)


def classes(fit="kfac", prior=3.0):
    model, x, y, fisher = problem("mlp", likelihood=kf.Categorical(), fit=fit)
    return kf.Laplace(model, fisher, prior), model, x, y, fisher


def test_the_probit_link():
    posterior, model, x, _, fisher = classes()
    outputs, covariance = logits_posterior(model, x, fisher, 3.0)
    kappa = 1 / (1 + math.pi / 8 * covariance.diagonal(dim1=1, dim2=2)).sqrt()
    prediction = posterior.predict(x)
    torch.testing.assert_close(prediction.mean, (outputs * kappa).softmax(-1))
    torch.testing.assert_close(prediction.variance, prediction.epistemic_variance + prediction.noise_variance)
    torch.testing.assert_close(prediction.variance, prediction.mean * (1 - prediction.mean))
    p = outputs.softmax(-1)
    slope = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    linear = (slope.square() @ covariance.diagonal(dim1=1, dim2=2).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(prediction.epistemic_variance, torch.minimum(linear, prediction.variance))


def test_the_laplace_bridge():
    """Against the formulas of Hobbhahn et al. by loops: condition on a zero sum, then match the Dirichlet."""
    posterior, model, x, _, fisher = classes()
    outputs, covariance = logits_posterior(model, x, fisher, 3.0)
    found = posterior.predict(x, predictor="bridge")
    for k in range(len(x)):
        f, cov = outputs[k], covariance[k]
        f = f - cov.sum(1) * f.sum() / cov.sum()
        cov = cov - torch.outer(cov.sum(1), cov.sum(0)) / cov.sum()
        alpha = torch.stack([(1 - 2 / 3 + f[i].exp() / 9 * (-f).exp().sum()) / cov[i, i] for i in range(3)])
        dirichlet = torch.distributions.Dirichlet(alpha)
        torch.testing.assert_close(found.mean[k], dirichlet.mean)
        torch.testing.assert_close(found.epistemic_variance[k], dirichlet.variance)
        torch.testing.assert_close(found.variance[k], dirichlet.mean * (1 - dirichlet.mean))


def test_draws_converge_to_the_integral_and_the_closed_forms_are_near():
    posterior, model, x, _, fisher = classes()
    x = x[:6]
    outputs, covariance = logits_posterior(model, x, fisher, 3.0)
    gaussian = torch.distributions.MultivariateNormal(outputs, covariance)
    p = gaussian.sample((200_000,)).softmax(-1)
    found = posterior.predict(x, predictor="mc", samples=200_000)
    assert (found.mean - p.mean(0)).abs().max() < 4e-3
    assert (found.epistemic_variance - p.var(0)).abs().max() < 3e-3
    torch.testing.assert_close(found.variance, found.mean * (1 - found.mean))  # the law of total variance
    sure = kf.Laplace(model, fisher, 300.0)
    truth = sure.predict(x, predictor="mc", samples=20_000).mean
    assert (sure.predict(x).mean - truth).abs().max() < 0.03
    for predictor in ("probit", "bridge"):
        torch.testing.assert_close(sure.predict(x, predictor=predictor).mean.sum(-1), torch.ones(6).double())


def test_sampled_networks_agree_with_linearised_ones_where_the_posterior_is_narrow():
    model, x, _, fisher = problem("convnet")
    posterior = kf.Laplace(model, fisher, 1e6)  # so sure that the network is linear there
    linear = posterior.predict(x[:4])
    sampled = posterior.predict(x[:4], predictor="sampled", samples=4000)
    torch.testing.assert_close(sampled.mean, linear.mean, rtol=0, atol=1e-3)
    ratio = sampled.epistemic_variance / linear.epistemic_variance
    assert (ratio - 1).abs().max() < 0.15  # 4000 draws: a standard deviation of 2 %, twelve numbers
    torch.testing.assert_close(sampled.noise_variance, torch.full_like(linear.mean, 0.3))
    again = posterior.predict(x[:4], predictor="sampled", samples=3, seed=1)
    assert torch.equal(again.mean, posterior.predict(x[:4], predictor="sampled", samples=3, seed=1).mean)


@pytest.mark.parametrize("predictor", ["probit", "mc", "sampled"])
def test_binary_targets_of_any_shape(predictor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4), nn.Unflatten(1, (2, 2)))
    x, y = torch.randn(30, 3), torch.randint(2, (30, 2, 2)).float()
    posterior = kf.Laplace(model, kf.estimate(model, [(x, y)], kf.Bernoulli(), labels="exact"), 2.0)
    prediction = posterior.predict(x, predictor=predictor)
    for tensor in (prediction.mean, prediction.variance, prediction.epistemic_variance, prediction.noise_variance):
        assert tensor.shape == (30, 2, 2)
        assert (tensor >= 0).all()
    total = prediction.epistemic_variance + prediction.noise_variance
    torch.testing.assert_close(prediction.variance, total)
    torch.testing.assert_close(prediction.variance, prediction.mean * (1 - prediction.mean))
    assert posterior.log_predictive_density(x, y, predictor=predictor).shape == (30,)


@pytest.mark.parametrize("axis", [1, -1])
def test_classes_at_positions(axis):
    """Positions are predicted as if each stood alone with its own classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Unflatten(1, (4, 3) if axis == -1 else (3, 4))).double()
    x = torch.randn(20, 5).double()
    likelihood = kf.Categorical(class_dim=axis)
    posterior = kf.Laplace(model, kf.estimate(model, x, likelihood, labels="exact"), 2.0)
    outputs, covariance = posterior.functional_covariance(x)
    for position in range(4):
        index = torch.arange(12).reshape(outputs.shape[1:]).movedim(axis % 3 - 1, -1)[position]
        alone = outputs.flatten(1)[:, index], covariance[:, index[:, None], index]
        for predictor in ("probit", "bridge"):
            whole = posterior.predict(x, predictor=predictor)
            if predictor == "probit":
                part = kf.Categorical().predict_from_variances(alone[0], alone[1].diagonal(dim1=1, dim2=2))
            else:
                part = bridge(*alone, axis=1)
            for name in ("mean", "epistemic_variance"):
                found = getattr(whole, name).movedim(axis, -1)[:, position]
                torch.testing.assert_close(found, getattr(part, name))
    targets = torch.randint(3, (20, 4))
    targets[:, 1:] = -100
    found = posterior.log_predictive_density(x, targets)
    p = posterior.predict(x).mean.movedim(axis, -1)[:, 0]
    torch.testing.assert_close(found, p.gather(1, targets[:, :1])[:, 0].log())


@pytest.mark.parametrize("predictor", ["probit", "bridge", "sampled"])
def test_calibration_finds_the_best_prior_and_is_remembered(predictor):
    model, x, y, fisher = problem("mlp", likelihood=kf.Categorical(), data=40)
    new, labels = x[:15] + 0.5, y[:15]
    posterior = kf.Laplace(model, fisher, 1e3)
    assert (
        posterior.calibrate([(new[:8], labels[:8]), (new[8:], labels[8:])], predictor=predictor, samples=10)
        is posterior
    )
    assert posterior.calibrated_for == predictor
    best = posterior.log_predictive_density(new, labels, predictor=predictor, samples=10).sum()
    if predictor != "sampled":  # the draws differ from batch to batch
        tuned = float(posterior.prior_precision["0.weight"])
        for factor in (1e-2, 0.1, 0.5, 0.9, 1.1, 2.0, 10.0, 100.0):
            other = kf.Laplace(model, fisher, tuned * factor)
            assert other.log_predictive_density(new, labels, predictor=predictor, samples=10).sum() <= best + 1e-3
    posterior.predict(new)  # the default is what was calibrated
    other = "probit" if predictor != "probit" else "mc"
    with pytest.raises(ValueError, match=f"calibrated for '{predictor}'"):
        posterior.predict(new, predictor=other)
    posterior.prior_precision = 1.0
    posterior.predict(new, predictor=other)


def test_calibration_scales_a_varied_prior_without_changing_its_form():
    model, x, y, fisher = problem("mlp")
    varied = torch.rand(fisher.dim).double() + 0.5
    posterior = kf.Laplace(model, fisher, varied)
    before = {name: p.clone() for name, p in posterior.prior_precision.items()}
    posterior.calibrate([(x, y)])
    ratios = torch.cat([(p / before[name]).flatten() for name, p in posterior.prior_precision.items()])
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    flat = torch.cat(
        [t.flatten() for t in posterior.by_name({g: p.prior[None] for g, p in posterior.precisions.items()}).values()]
    )
    torch.testing.assert_close(posterior.predict(x).variance, kf.Laplace(model, fisher, flat).predict(x).variance)
    with pytest.raises(kf.DataError, match="no targets"):
        posterior.calibrate([x])
    with pytest.raises(kf.DataError, match="no batch"):
        posterior.calibrate([])


def test_noise_by_maximum_likelihood():
    model, x, y, fisher = problem("mlp")
    posterior = kf.Laplace(model, fisher, 1.0).fit_noise()
    assert posterior.noise == pytest.approx(float((y - model(x).detach()).square().mean()))
    noises = torch.tensor([0.9, 1.0, 1.1]).double() * posterior.noise
    likely = [float(kf.Gaussian(float(noise)).log_prob(model(x).detach(), y).sum()) for noise in noises]
    assert likely[1] == max(likely)
    torch.testing.assert_close(posterior.predict(x).noise_variance, torch.full_like(y, posterior.noise))


@pytest.mark.parametrize("fit", ["kfac", "ekfac", "diagonal", "full"])
def test_a_posterior_survives_a_file(tmp_path, fit):
    model, x, y, fisher = problem("mlp", fit=fit)
    posterior = kf.Laplace(model, fisher, torch.rand(len(fisher.blocks)), temperature=0.7, prior_mean=0.2)
    posterior.optimize_prior(noise=True).calibrate([(x, y)])
    posterior.save(tmp_path / "posterior.safetensors")
    back = kf.Laplace.load(tmp_path / "posterior.safetensors", model, kf.Gaussian(0.3))
    for name in ("mean", "variance", "epistemic_variance"):
        assert torch.equal(getattr(posterior.predict(x), name), getattr(back.predict(x), name))
    assert torch.equal(back.log_marginal_likelihood(), posterior.log_marginal_likelihood())
    assert back.calibrated_for == "linearized"
    with pytest.raises(kf.DataError, match="likelihood"):
        kf.Laplace.load(tmp_path / "posterior.safetensors", model, kf.Gaussian(0.4))
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(kf.DataError, match=r"0\.weight"):
        kf.Laplace.load(tmp_path / "posterior.safetensors", model, kf.Gaussian(0.3))
    fisher.save(tmp_path / "fisher.safetensors")
    with pytest.raises(kf.DataError, match="not a posterior"):
        kf.Laplace.load(tmp_path / "fisher.safetensors", model, kf.Gaussian(0.3))
    assert kf.load(tmp_path / "posterior.safetensors", model).dim == fisher.dim


def test_moving_keeps_the_posterior():
    model, x, _, fisher = problem("mlp", torch.float32)
    posterior = kf.Laplace(model, fisher, 2.0)
    before = posterior.predict(x)
    assert posterior.to("cpu", torch.float64) is posterior
    assert posterior.fisher.dtype == torch.float64
    torch.testing.assert_close(posterior.predict(x).variance, before.variance, rtol=1e-4, atol=1e-6)


def test_batches_of_several_inputs_and_a_forward_of_ones_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(2, 3), nn.Linear(3, 3)

        def forward(self, a, b):
            return self.left(a) + self.right(b)

    model, a, b = Two(), torch.randn(10, 2), torch.randn(10, 3)
    fisher = kf.estimate(model, [((a, b), torch.zeros(10, 3))], kf.Gaussian(), labels="exact")
    one = kf.Laplace(model, fisher).predict((a, b))
    two = kf.Laplace(model, fisher).predict({"a": a, "b": b})

    def forward(model, batch):
        return model(batch["first"], batch["second"]), batch.get("y")

    batch = {"first": a, "second": b, "y": torch.zeros(10, 3)}
    own = kf.estimate(model, [batch], kf.Gaussian(), labels="exact", forward=forward)
    posterior = kf.Laplace(model, own)
    three, four = posterior.predict(batch), posterior.calibrate([batch]).predict(batch)
    for other in (two, three):
        assert torch.equal(one.variance, other.variance)
    assert four.variance.shape == (10, 3)


def test_no_jacobian_of_all_parameters_is_built(monkeypatch):
    """Wide layers: one example's Jacobian is larger than anything that is allocated."""
    model = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 10))
    x = torch.randn(64, 300)
    fisher = kf.estimate(model, [(x, torch.randint(10, (64,)))], kf.Categorical(), fit="ekfac")
    posterior = kf.Laplace(model, fisher)
    posterior.predict(x)
    largest = []
    with Sizes(largest):
        posterior.predict(x)
        posterior.predict(x, predictor="bridge")
    assert max(largest) <= 64 * 10 * 400  # output gradients; [64, 10, 124410] would be 80 million numbers
