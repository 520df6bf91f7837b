"""The posterior against Λ written out: solves, samples, determinants, variances of the outputs."""

import math

import pytest
import torch
from torch import nn

import kronfisher as kf
from tests.helpers.close import close
from tests.helpers.networks import Written, convnet
from tests.helpers.truth import jacobian, precision
from tests.laplace.problems import FITS, problem


def flat(named):
    return torch.cat([tensor.flatten() for tensor in named.values()])


@pytest.mark.parametrize("network", ["mlp", "convnet", "tied"])
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_functional_variances_and_covariances_are_those_of_the_dense_posterior(network, fit, reduction):
    model, x, _, fisher = problem(network, fit=FITS[fit], reduction=reduction)
    posterior = kf.Laplace(model, fisher, prior_precision=0.7, temperature=0.5)
    inverse = torch.linalg.inv(precision(fisher, 0.7, 1 / 0.5))
    jac = jacobian(model, x[:5], fisher.names)
    truth = jac @ inverse @ jac.mT
    outputs, variance = posterior.functional_variance(x[:5])
    assert torch.equal(outputs, model(x[:5]).detach())
    close(variance, truth.diagonal(dim1=1, dim2=2))
    for _ in range(2):  # nothing is left over from a call
        close(posterior.functional_covariance(x[:5])[1], truth)
    close(flat(posterior.variance()), inverse.diagonal())


@pytest.mark.parametrize("fit", FITS)
def test_priors_by_block_and_by_parameter(fit):
    model, x, _, fisher = problem("convnet", fit=FITS[fit])
    per_block = torch.linspace(0.5, 2.0, len(fisher.blocks)).double()
    by_name = {name: float(value) for name, value in zip(fisher.blocks, per_block, strict=True)}
    values = {name: torch.empty(shape) for name, shape in fisher.shapes.items()}
    for (blocks, _), value in zip(fisher.entries, per_block, strict=True):
        for block in blocks:
            for name in block.parameters:
                values[name].fill_(value)
    jac = jacobian(model, x[:3], fisher.names)
    truth = jac @ torch.linalg.solve(precision(fisher, flat(values).double()), jac.mT)
    for prior in (per_block, by_name):
        close(kf.Laplace(model, fisher, prior).functional_covariance(x[:3])[1], truth, 1e-7)
    anything = torch.rand(fisher.dim).double() + 0.1
    truth = jac @ torch.linalg.solve(precision(fisher, anything), jac.mT)
    posterior = kf.Laplace(model, fisher, anything)  # small enough to be written out, whatever the structure
    close(posterior.functional_covariance(x[:3])[1], truth)
    close(posterior.functional_variance(x[:3])[1], truth.diagonal(dim1=1, dim2=2))
    determinant = sum(p.logdet() for p in posterior.precisions.values())
    close(determinant, torch.logdet(precision(fisher, anything)))


def test_another_prior_for_biases_keeps_the_kronecker_structure_at_any_size(monkeypatch):
    monkeypatch.setattr("kronfisher.operators.operator.DENSE_LIMIT", 0)
    model, x, _, fisher = problem("convnet", fit="kfac")
    prior = {name: 5.0 if "bias" in name else 0.5 for name in fisher.shapes}
    posterior = kf.Laplace(model, fisher, prior)
    assert all(p.factored is not None for p in posterior.precisions.values())
    vector = flat({name: torch.full(shape, prior[name]).double() for name, shape in fisher.shapes.items()})
    dense = precision(fisher, vector)
    jac = jacobian(model, x[:3], fisher.names)
    close(posterior.functional_covariance(x[:3])[1], jac @ torch.linalg.solve(dense, jac.mT))
    close(sum(p.logdet() for p in posterior.precisions.values()), torch.logdet(dense))
    with pytest.raises(kf.UnsupportedError, match=r"0\.weight.*no exact inverse"):
        kf.Laplace(model, fisher, torch.rand(fisher.dim) + 0.1)
    ekfac = problem("convnet", fit="ekfac")[3]
    with pytest.raises(kf.UnsupportedError, match="varies from parameter"):
        kf.Laplace(model, ekfac, prior)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("varied", [False, True])
def test_samples_have_the_posterior_covariance(fit, varied):
    model, _, _, fisher = problem("mlp", fit=FITS[fit])
    prior = torch.rand(fisher.dim).double() + 1.0 if varied else 2.0
    posterior = kf.Laplace(model, fisher, prior)
    number = 60_000
    drawn = posterior.sample(number, seed=3)
    assert {name: t.shape[1:] for name, t in drawn.items()} == dict(fisher.shapes)
    draws = torch.cat([t.flatten(1) for t in drawn.values()], dim=1) - flat(dict(model.named_parameters())).detach()
    covariance = torch.linalg.inv(precision(fisher, prior))
    white = torch.linalg.cholesky(precision(fisher, prior)).mT @ draws.mT
    found = white @ white.mT / number  # identity; entries deviate by 1/√number
    assert (found - torch.eye(len(found))).abs().max() < 7 / number**0.5
    assert draws.mean(0).abs().max() < 6 * (covariance.diagonal().max() / number) ** 0.5
    again = posterior.sample(2, seed=5)
    assert all(torch.equal(again[n], posterior.sample(2, seed=5)[n]) for n in again)


def test_functional_samples_are_those_of_the_drawn_parameters():
    for network in ("mlp", "convnet", "tied"):
        model, x, _, fisher = problem(network)
        posterior = kf.Laplace(model, fisher, 3.0)
        drawn = posterior.sample(7, seed=2)
        delta = torch.cat([(drawn[n] - posterior.mean[n]).flatten(1) for n in fisher.names], dim=1)
        outputs = model(x[:4]).detach()
        truth = outputs + (jacobian(model, x[:4], fisher.names) @ delta.mT).permute(2, 0, 1).reshape(7, *outputs.shape)
        close(posterior.functional_samples(x[:4], 7, seed=2), truth)


@pytest.mark.parametrize("fit", FITS)
def test_the_log_marginal_likelihood_and_its_derivatives(fit):
    model, x, y, fisher = problem("mlp", fit=FITS[fit])
    posterior = kf.Laplace(model, fisher, 0.7, prior_mean=0.1)
    theta = flat(dict(model.named_parameters())).detach() - 0.1

    def truth(prior, noise):
        residual = y - model(x).detach()
        fit_term = -0.5 * (residual.square() / noise + torch.log(2 * math.pi * noise)).sum()
        prior = prior.expand(fisher.dim)
        dense = fisher.count * fisher.to_dense() * 0.3 / noise + prior.diag()
        penalty = (prior * theta.square()).sum() + torch.logdet(dense) - prior.log().sum()
        return fit_term - 0.5 * penalty

    hyper = torch.tensor([0.7, 0.3], dtype=torch.float64)
    close(posterior.log_marginal_likelihood(), truth(*hyper))
    for prior in (torch.tensor(2.0), torch.rand(fisher.dim) + 0.2):
        prior, noise = prior.double().requires_grad_(), torch.tensor(0.11, dtype=torch.float64, requires_grad=True)
        found, expected = posterior.log_marginal_likelihood(prior, noise), truth(prior, noise)
        close(found, expected)
        for a, b in zip(
            torch.autograd.grad(found, (prior, noise)), torch.autograd.grad(expected, (prior, noise)), strict=True
        ):
            close(a, b, 1e-6)
    close(posterior.log_marginal_likelihood(torch.tensor(2.0)), truth(torch.tensor(2.0).double(), hyper[1]))


def test_optimised_hyper_parameters_are_stationary_points():
    model, _, _, fisher = problem("mlp", fit="ekfac")
    for per_block in (False, True):
        posterior = kf.Laplace(model, fisher).optimize_prior(per_block=per_block, noise=True)
        start = kf.Laplace(model, fisher).log_marginal_likelihood()
        assert posterior.log_marginal_likelihood() > start
        prior = torch.stack(list(posterior.prior_precision.values())).requires_grad_()
        noise = torch.tensor(posterior.noise, dtype=torch.float64, requires_grad=True)
        value = posterior.log_marginal_likelihood(prior, noise)
        by_prior, by_noise = torch.autograd.grad(value, (prior, noise))
        slopes = by_prior * prior if per_block else (by_prior * prior).sum()
        assert slopes.abs().max() < 1e-3
        assert (by_noise * noise).abs() < 1e-3
        assert len(set(prior.tolist())) == (len(prior) if per_block else 1)
    varied = torch.rand(fisher.dim).double() + 0.2
    posterior = kf.Laplace(model, fisher, varied).optimize_prior()
    factor = posterior.prior_precision["0.weight"] / kf.Laplace(model, fisher, varied).prior_precision["0.weight"]
    close(factor, factor[0].expand_as(factor))  # the form stays
    logs = torch.zeros((), dtype=torch.float64, requires_grad=True)
    scaled = flat(posterior.by_name({g: p.prior[None] for g, p in posterior.precisions.items()})) * logs.exp()
    assert torch.autograd.grad(posterior.log_marginal_likelihood(scaled), logs)[0].abs() < 1e-3


def test_bayesian_linear_regression_is_exact():
    """Λ, mean, predictive variance and evidence of a linear model are those of the textbook."""
    torch.manual_seed(0)
    features, noise, delta = torch.randn(40, 5).double(), 0.2, 1.7
    y = features @ torch.randn(5, 1).double() + noise**0.5 * torch.randn(40, 1).double()
    design = torch.cat([features, torch.ones(40, 1)], dim=1)
    hessian = design.mT @ design / noise + delta * torch.eye(6)
    mean = torch.linalg.solve(hessian, design.mT @ y / noise)
    model = nn.Linear(5, 1).double()
    model.weight.data, model.bias.data = mean[:5].mT.clone(), mean[5].clone()
    evidence = torch.distributions.MultivariateNormal(
        torch.zeros(40).double(), design @ design.mT / delta + noise * torch.eye(40)
    ).log_prob(y[:, 0])
    new = torch.randn(7, 5).double() * 3
    wide = torch.cat([new, torch.ones(7, 1)], dim=1)
    for fit in ("full", "kfac", "ekfac"):
        fisher = kf.estimate(model, [(features, y)], kf.Gaussian(noise), fit=fit, labels="exact")
        posterior = kf.Laplace(model, fisher, delta)
        close(posterior.log_marginal_likelihood(), evidence, 1e-8)
        prediction = posterior.predict(new)
        epistemic = (wide @ torch.linalg.inv(hessian) * wide).sum(1, keepdim=True)
        close(prediction.mean, wide @ mean)
        close(prediction.epistemic_variance, epistemic, 1e-8)
        close(prediction.variance, epistemic + noise, 1e-8)
        target = torch.randn(7, 1).double()
        truth = torch.distributions.Normal(wide @ mean, (epistemic + noise).sqrt()).log_prob(target)[:, 0]
        close(posterior.log_predictive_density(new, target), truth, 1e-8)
        # A model that was trained under another noise: only the likelihood's scale in F changes.
        other = kf.estimate(model, [(features, y)], kf.Gaussian(2.0), fit=fit, labels="exact")
        close(kf.Laplace(model, other, delta, noise=noise).log_marginal_likelihood(), evidence, 1e-8)


def test_more_data_give_the_posterior_of_all():
    for fit in ("diagonal", "full", "kfac"):
        model, x, y, _ = problem("mlp")
        parts = [(x[:12], y[:12]), (x[12:], y[12:])]
        fishers = [kf.estimate(model, [part], kf.Gaussian(0.3), fit=fit, labels="exact") for part in parts]
        posterior = kf.Laplace(model, fishers[0], 0.7).updated(fishers[1])
        assert posterior.fisher.count == 20
        dense = sum(f.count * f.to_dense() for f in fishers) + 0.7 * torch.eye(fishers[0].dim).double()
        close(flat(posterior.variance()), torch.linalg.inv(dense).diagonal())
        if fit != "kfac":  # the Kronecker product of sums is another matrix than the sum of products
            whole = kf.estimate(model, parts, kf.Gaussian(0.3), fit=fit, labels="exact")
            joint = kf.Laplace(model, whole, 0.7)
            close(posterior.log_marginal_likelihood(), joint.log_marginal_likelihood())
            close(posterior.functional_variance(x[:4])[1], joint.functional_variance(x[:4])[1])


def test_directions_without_curvature_are_the_prior_and_reported():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    model[1].weight.data[2], model[1].bias.data[2] = 0.0, -1.0  # a dead unit
    x = torch.randn(30, 3).double()
    for fit in ("kfac", "diagonal", "ekfac"):
        fisher = kf.estimate(model, [(x, model(x).detach())], kf.Gaussian(), fit=fit, labels="exact")
        posterior = kf.Laplace(model, fisher, 4.0)
        assert posterior.flat_directions["0.weight"] >= 4  # the row into the dead unit
        variance = posterior.variance()
        close(variance["0.weight"][2], torch.full((3,), 0.25).double())
        close(variance["3.weight"][:, 2], torch.full((2,), 0.25).double())
        assert "directions without curvature" in repr(posterior)
        close(
            posterior.functional_variance(x[:3])[1],
            (lambda j: (j @ torch.linalg.inv(precision(fisher, 4.0)) @ j.mT).diagonal(dim1=1, dim2=2))(
                jacobian(model, x[:3], fisher.names)
            ),
        )
        with pytest.raises(kf.SingularError):
            kf.Laplace(model, fisher, 0.0).sample(1)
        with pytest.raises(kf.SingularError, match="prior"):
            posterior.log_marginal_likelihood(0.0)


def test_a_part_of_the_parameters():
    model, x, y, _ = problem("convnet")
    for p in model[:4].parameters():
        p.requires_grad_(False)
    fisher = kf.estimate(model, [(x, y)], kf.Gaussian(0.3), fit="kfac", labels="exact")
    posterior = kf.Laplace(model, fisher, 0.7)
    assert list(posterior.sample(2)) == ["5.weight", "5.bias"]
    for p in model[:4].parameters():  # thawed again: still not a part of the posterior
        p.requires_grad_(True)
    jac = jacobian(model, x[:3], fisher.names)
    close(posterior.functional_covariance(x[:3])[1], jac @ torch.linalg.inv(precision(fisher, 0.7)) @ jac.mT)
    model[5].bias.requires_grad_(False)
    with pytest.raises(kf.DataError, match=r"5\.bias.*frozen"):
        posterior.predict(x[:3])


def test_nothing_of_the_model_changes():
    model, x, _, fisher = problem("convnet")
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    posterior = kf.Laplace(model, fisher)
    (
        posterior.predict(x[:3]),
        posterior.predict(x[:3], predictor="sampled", samples=3),
        posterior.functional_samples(x[:2], 3),
    )
    assert torch.equal(random, torch.get_rng_state())
    for name, p in model.named_parameters():
        assert torch.equal(p, state[name])
        assert p.grad is None
    assert not any(module._forward_hooks for module in model.modules())


def test_float32_agrees_with_float64():
    for fit in FITS:
        _, _, _, fisher = problem("convnet", fit=FITS[fit])
        model, x, _, narrow = problem("convnet", torch.float32, fit=FITS[fit])
        wide, x64, _, _ = problem("convnet")
        truth = kf.Laplace(wide, fisher).functional_covariance(x64[:4])[1]
        found = kf.Laplace(model, narrow).functional_covariance(x[:4])[1]
        assert found.dtype == torch.float32
        close(found.double(), truth, 2e-3)


def test_clear_refusals():
    model, x, y, fisher = problem("mlp")
    with pytest.raises(kf.DataError, match="changed since its estimate"):
        kf.Laplace(model, fisher + 1.0)
    with pytest.raises(kf.DataError, match="no parameter of this model"):
        kf.Laplace(convnet(), fisher)
    with pytest.raises(kf.DataError, match="blocks"):
        kf.Laplace(model, fisher, torch.ones(3, 3))
    with pytest.raises(kf.DataError, match="does not cover"):
        kf.Laplace(model, fisher, {"nothing": 1.0})
    with pytest.raises(kf.DataError, match=r"leaves out.*5\.weight"):
        kf.Laplace(model, fisher, {name: 1.0 for name in fisher.shapes if name != "5.weight"})
    with pytest.raises(ValueError, match="at least 0"):
        kf.Laplace(model, fisher, -1.0)
    with pytest.raises(ValueError, match="temperature"):
        kf.Laplace(model, fisher, temperature=0.0)
    with pytest.raises(ValueError, match=r"linearized, mc, sampled"):
        kf.Laplace(model, fisher).predict(x, predictor="probit")
    blind = kf.estimate(model, [x], kf.Gaussian(0.3))
    with pytest.raises(kf.DataError, match="without targets"):
        kf.Laplace(model, blind).log_marginal_likelihood()
    scored = kf.Laplace(model, blind).score([(x, y)])
    close(
        scored.log_marginal_likelihood(),
        kf.Laplace(model, kf.estimate(model, [(x, y)], kf.Gaussian(0.3))).log_marginal_likelihood(),
    )
    categorical = problem("mlp", likelihood=kf.Categorical())
    with pytest.raises(kf.UnsupportedError, match="noise"):
        kf.Laplace(categorical[0], categorical[3], noise=0.1)
    posterior = kf.Laplace(model, fisher)
    with torch.no_grad():
        model[0].weight += 1.0
    with pytest.raises(kf.DataError, match=r"0\.weight has changed"):
        posterior.predict(x)
    with torch.no_grad():
        model[0].weight -= 1.0


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e2])
@pytest.mark.parametrize("fit", ["kfac", "prototypes", "full"])
def test_the_noise_of_targets_of_any_size(fit, size):
    """In float32 too, and under a likelihood whose variance is far from that of the targets."""
    torch.manual_seed(0)
    x = torch.randn(200, 3)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    with torch.no_grad():
        for p in model[2].parameters():
            p *= size
        y = model(x) + 0.1 * size * torch.randn(200, 1)
    fisher = kf.estimate(model, [(x, y)], kf.Gaussian(), fit=fit, labels="exact")
    residual = float((model(x).detach() - y).double().square().mean())
    assert kf.Laplace(model, fisher).fit_noise().noise == pytest.approx(residual, rel=1e-3)
    assert residual < kf.Laplace(model, fisher).optimize_prior(noise=True, per_block=True).noise < 1.5 * residual


def test_a_perfect_fit_tells_no_noise():
    model, x = nn.Linear(3, 1), torch.randn(20, 3)
    posterior = kf.Laplace(model, kf.estimate(model, [(x, model(x).detach())], kf.Gaussian(), fit="kfac"))
    with pytest.raises(kf.DataError, match="noise cannot be determined"):
        posterior.fit_noise()
    with pytest.raises(kf.DataError, match="noise cannot be determined"):
        posterior.optimize_prior(noise=True)
    assert posterior.optimize_prior().log_marginal_likelihood().isfinite()


def test_an_indefinite_sum_says_so():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 1)), torch.randn(50, 3)
    fisher = kf.estimate(
        model, [(x, x.sum(1, keepdim=True))], kf.Gaussian(1e-3), fit=kf.KroneckerSum(2), labels="exact"
    )
    assert float(fisher.eigenvalues()[-1]) * 50 < -0.1
    with pytest.raises(kf.IndefiniteError, match="indefinite"):
        kf.Laplace(model, fisher, 1e-3).log_marginal_likelihood()


@pytest.mark.parametrize("sign", [1, -1])
def test_predictions_may_leave_out_parameters_that_are_tied_to_others(sign):
    """One dense operator covers both branches of which a batch takes one."""
    torch.manual_seed(3)
    model = Written(
        lambda m, x: m.o((m.a if x[0, 0] > 0 else m.b)(x).tanh()),
        a=nn.Linear(3, 3), b=nn.Linear(3, 3), o=nn.Linear(3, 2),
    ).double()  # fmt: skip
    batches = [torch.randn(6, 3).double() for _ in range(2)]
    for x, own in zip(batches, (1, -1), strict=True):
        x[:, 0] = own * x[:, 0].abs()
    fisher = kf.estimate(model, [(x,) for x in batches], kf.Gaussian(), fit=kf.Full(across_layers=True))
    posterior = kf.Laplace(model, fisher, prior_precision=0.5)
    J = jacobian(model, batches[0 if sign > 0 else 1], fisher.names)
    expected = torch.einsum("ncp,pq,ncq->nc", J, torch.linalg.inv(precision(fisher, 0.5)), J)
    close(posterior.functional_variance(batches[0 if sign > 0 else 1])[1], expected, 1e-9)
