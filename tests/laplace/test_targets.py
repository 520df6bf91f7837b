"""Targets are read and refused by calibration and densities as by an estimate: cases × entry points."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.laplace.predictions import draw_outputs
from kronfisher.likelihoods.prediction import log_mean_exp
from tests.helpers.close import close
from tests.helpers.targets import CASES, CATEGORICAL, IDS, LABELS, NUMBERS, TOKENS, Named, Pair, TinyForCausalLM, X


@pytest.fixture
def posterior(request):
    model, likelihood, batch, error = CASES[request.param]
    inputs = IDS if isinstance(model, TinyForCausalLM) else X
    given = inputs
    if isinstance(likelihood, kf.Weighted):
        given = inputs, (None, torch.ones(len(inputs)))
    fisher = kf.estimate(model, given, likelihood, labels="exact", fit="diagonal")
    return kf.Laplace(model, fisher, 2.0), batch, error


def entries(posterior, batch):
    """Every way in for a batch with targets."""
    model, likelihood = posterior.model, posterior.likelihood
    yield lambda: kf.estimate(model, [batch], likelihood, labels="observed", fit="diagonal")
    yield lambda: posterior.calibrate([batch], samples=3)
    yield lambda: posterior.log_predictive_density(batch, samples=3)
    yield lambda: posterior.log_predictive_error(batch, samples=3)
    yield lambda: posterior.score([batch])
    if isinstance(batch, tuple) and len(batch) == 2 and not hasattr(batch, "_fields") and batch[1] is not None:
        yield lambda: posterior.log_predictive_density(*batch, samples=3)


@pytest.mark.parametrize("posterior", CASES, indirect=True)
def test_all_accept_or_all_refuse(posterior):
    posterior, batch, error = posterior
    prior = {name: value.clone() for name, value in posterior.prior_precision.items()}
    for _ in range(2):
        for call in entries(posterior, batch):
            if error is None:
                call()
            else:
                with pytest.raises(kf.DataError, match=error):
                    call()
    if error is not None:
        assert posterior.calibrated_for is None
        assert all(torch.equal(value, prior[name]) for name, value in posterior.prior_precision.items())


def test_a_refused_calibration_leaves_the_one_before():
    model = Named(1)
    posterior = kf.Laplace(model, kf.estimate(model, X, kf.Gaussian(), labels="exact")).calibrate([(X, NUMBERS)])
    with pytest.raises(kf.DataError, match=r"^validation batch 1: "):
        posterior.calibrate([(X, NUMBERS), (X, NUMBERS[:, 0])], predictor="mc")
    assert posterior.calibrated_for == "linearized"


def test_the_smallest_broadcast():
    """It gave -2772 for 0.81: every target was compared with every output."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 50, dtype=torch.float64).unsqueeze(1)
    y = 2 * x + 0.1 * torch.randn_like(x)
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.zero_()
    posterior = kf.Laplace(model, kf.estimate(model, (x, y), kf.Gaussian(0.01), labels="exact"))
    prediction = posterior.predict(x)
    truth = torch.distributions.Normal(prediction.mean, prediction.variance.sqrt()).log_prob(y)[:, 0]
    close(posterior.log_predictive_density(x, y), truth)
    for call in (posterior.log_predictive_density, lambda *batch: posterior.calibrate([batch])):
        with pytest.raises(kf.DataError, match=r"targets of shape \[50, 1\], found \[50\]"):
            call(x, y[:, 0])


def test_every_form_of_a_batch_has_the_same_density():
    model = Named(3)
    posterior = kf.Laplace(model, kf.estimate(model, X, CATEGORICAL, labels="exact"), 2.0)
    truth = posterior.log_predictive_density(X, LABELS)
    p = posterior.predict(X).mean
    close(truth, p.gather(1, LABELS[:, None])[:, 0].log())
    for batch in ((X, LABELS), [X, LABELS], {"x": X, "labels": LABELS}, Pair(X, LABELS), (X.numpy(), LABELS.numpy())):
        assert torch.equal(posterior.log_predictive_density(batch), truth)
    assert torch.equal(posterior.log_predictive_density(X.numpy(), LABELS.numpy()), truth)
    assert torch.equal(posterior.log_predictive_density({"x": X}, LABELS), truth)


def test_labels_of_tokens_are_shifted_as_in_an_estimate():
    model = TinyForCausalLM()
    posterior = kf.Laplace(model, kf.estimate(model, IDS, TOKENS, labels="exact", fit="diagonal"), 2.0)
    shifted = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], 1)
    batch = {"input_ids": IDS, "labels": IDS}
    assert torch.equal(posterior.log_predictive_density(batch), posterior.log_predictive_density(IDS, shifted))
    one = posterior.calibrate([batch]).prior_precision["head.weight"]
    posterior.prior_precision = 2.0
    other = posterior.calibrate([(IDS, shifted)]).prior_precision["head.weight"]
    assert torch.equal(one, other)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("predictor", ["probit", "bridge", "mc", "sampled"])
def test_the_shape_of_targets_shows_the_layout_as_in_an_estimate(axis, predictor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 12), nn.Unflatten(1, (4, 3) if axis == -1 else (3, 4))).double()
    y = torch.randint(3, (6, 4))
    posterior = kf.Laplace(model, kf.estimate(model, (X, y), kf.Categorical(), labels="exact", fit="diagonal"))
    said = kf.Categorical(class_dim=axis)
    told = kf.Laplace(model, kf.estimate(model, (X, y), said, labels="exact", fit="diagonal"))
    given = {"predictor": predictor, "samples": 5}
    assert torch.equal(posterior.log_predictive_density(X, y, **given), told.log_predictive_density(X, y, **given))
    with pytest.raises(kf.DataError, match=r"class_dim=-1.*say Categorical\(class_dim=1\) or"):
        posterior.predict(X, **given)
    assert told.predict(X, **given).mean.shape == model(X).shape  # as it says
    one, other = (each.calibrate([(X, y)], **given).prior_precision["0.weight"] for each in (posterior, told))
    assert torch.equal(one, other)
    if predictor in ("mc", "sampled"):
        weight = torch.rand(6, 4).double()
        pair = (X, (y, weight))
        weighted = kf.estimate(model, pair, kf.Weighted(kf.Categorical()), labels="exact", fit="diagonal")
        weighted = kf.Laplace(model, weighted)
        half = weighted.log_predictive_density(X, (y, weight / 2), **given)
        close(2 * half, weighted.log_predictive_density(*pair, **given))


def test_one_batch_of_training_data_is_scored_as_it_was_estimated():
    model = Named(1)
    blind = kf.Laplace(model, kf.estimate(model, X, kf.Gaussian(), labels="exact"))
    truth = kf.Laplace(model, kf.estimate(model, (X, NUMBERS), kf.Gaussian(), labels="exact"))
    for data in (
        (X, NUMBERS),
        [(X, NUMBERS)],
        {"x": X, "labels": NUMBERS},
        [(X[:2], NUMBERS[:2]), (X[2:], NUMBERS[2:])],
    ):
        close(blind.score(data).log_marginal_likelihood(), truth.log_marginal_likelihood())
    with pytest.raises(kf.DataError, match="no batch"):
        blind.score([])


@pytest.mark.parametrize("likelihood", [TOKENS, kf.Gaussian(0.5), kf.Poisson()], ids=["classes", "means", "counts"])
def test_positions_outside_the_mask_of_the_estimate_do_not_count(likelihood):
    torch.manual_seed(0)
    model, mask = Named(3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    y = torch.randint(3, (3, 4) if likelihood is TOKENS else (3, 4, 3))
    given = {"x": x, "mask": mask, "labels": y}

    def forward(model, batch):
        return model(batch["x"]), batch["labels"]

    fisher = kf.estimate(model, given, likelihood, mask="mask", labels="exact", forward=forward)
    posterior = kf.Laplace(model, fisher, 2.0)
    found = posterior.log_predictive_density(given, predictor="mc")
    outputs, covariance = posterior.functional_covariance(given)
    draws = draw_outputs(outputs, covariance, 100, 0)
    for k in range(3):
        kept = mask[k]
        truth = likelihood.log_density_from_draws(draws[:, k : k + 1, kept], y[k : k + 1, kept])
        close(found[k : k + 1], truth, 1e-10)
    if likelihood is TOKENS:
        ignored = {**given, "labels": y.where(mask, -100)}
        for predictor in ("probit", "bridge"):
            found = posterior.log_predictive_density(given, predictor=predictor)
            close(found, posterior.log_predictive_density(ignored, predictor=predictor))
    assert posterior.calibrate([given], predictor="mc", samples=10).calibrated_for == "mc"
    weighted = kf.Weighted(likelihood)
    weight = 0.5 + torch.rand(3, 4, dtype=torch.float64)
    pairs = {**given, "labels": (y, weight)}
    other = kf.estimate(model, pairs, weighted, mask="mask", labels="exact", forward=forward)
    found = kf.Laplace(model, other, 2.0).log_predictive_density(pairs, predictor="mc")
    pairs["labels"] = y, weight * mask
    alone = kf.estimate(model, pairs, weighted, labels="exact", forward=forward)
    close(found, kf.Laplace(model, alone, 2.0).log_predictive_density(pairs, predictor="mc"), 1e-10)


MONTE_CARLO = {
    "counts": (kf.Poisson(), torch.tensor([[2.0], [0.0], [7.0]], dtype=torch.float64)),
    "variances": (kf.HeteroscedasticGaussian(), torch.tensor([[0.3], [-1.0], [2.0]], dtype=torch.float64)),
}


@pytest.mark.parametrize("name", ["counts", pytest.param("variances", marks=pytest.mark.slow)])
def test_means_over_draws_converge_to_the_integral_within_their_standard_error(name):
    torch.manual_seed(1)
    likelihood, y = MONTE_CARLO[name]
    model = nn.Linear(2, y.shape[1] * (2 if name == "variances" else 1)).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    posterior = kf.Laplace(model, kf.estimate(model, (x, y), likelihood, labels="exact", fit="full"), 3.0)
    outputs, covariance = posterior.functional_covariance(x)
    grid = torch.linspace(-7, 7, 401, dtype=torch.float64)
    points = torch.cartesian_prod(*[grid] * outputs.shape[1]).reshape(-1, outputs.shape[1])
    logs = -0.5 * points.square().sum(1)
    for k in range(3):
        values, vectors = torch.linalg.eigh(covariance[k])
        f = outputs[k] + points @ (vectors * values.clamp_min(0).sqrt()).mT
        terms = likelihood.log_prob(f, y[k : k + 1].expand(len(f), -1)) + logs
        truth = terms.logsumexp(0) - logs.logsumexp(0)
        errors = []
        for seed in range(2):
            given = {"samples": 400, "seed": seed}
            found = posterior.log_predictive_density(x, y, **given)[k]
            error = posterior.log_predictive_error(x, y, **given)[k]
            assert abs(found - truth) < 4.5 * error < 2
            errors.append(float(error))
        assert max(errors) < 4 * min(errors)


def test_the_standard_error_is_that_of_the_delta_method():
    torch.manual_seed(0)
    model, y = nn.Linear(3, 2).double(), torch.randint(4, (6, 2)).double()
    posterior = kf.Laplace(model, kf.estimate(model, (X, y), kf.Poisson(), labels="exact"), 3.0)
    draws = draw_outputs(*posterior.functional_covariance(X), 1000, 0)
    logs = torch.stack([kf.Poisson().log_prob(f, y) for f in draws])
    density = posterior.log_predictive_density(X, y, samples=1000)
    close(density, log_mean_exp(logs), 1e-12)
    delta = (logs - density).exp().std(0) / 1000**0.5
    found = posterior.log_predictive_error(X, y, samples=1000)
    ratio = found / delta
    assert float(ratio.min()) > 0.5 and float(ratio.max()) < 1.7
    assert posterior.log_predictive_error(X, y, samples=1).isinf().all()
    gaussian = kf.Laplace(model, kf.estimate(model, (X, y), kf.Gaussian(), labels="exact"))
    assert torch.equal(gaussian.log_predictive_error(X, y), torch.zeros(6, dtype=torch.float64))
    assert (gaussian.log_predictive_error(X, y, predictor="mc") > 0).all()


@pytest.mark.parametrize(
    "likelihood, y",
    [
        (kf.Poisson(), torch.randint(4, (6, 2)).double()),
        (kf.HeteroscedasticGaussian(), NUMBERS),
        (kf.Weighted(kf.Categorical()), (torch.randint(2, (6,)), torch.rand(6))),
        (kf.Weighted(kf.Poisson()), (torch.randint(4, (6, 2)).double(), torch.rand(6, 2))),
        (kf.Weighted(kf.HeteroscedasticGaussian()), (NUMBERS, torch.rand(6))),
    ],
    ids=["counts", "variances", "weighted classes", "weighted positions of counts", "weighted variances"],
)
@pytest.mark.parametrize(
    ("dtype", "predictor"),
    [
        (torch.float64, None),
        (torch.float32, "mc"),
        (torch.float64, "sampled"),
        pytest.param(torch.float32, None, marks=pytest.mark.slow),
        pytest.param(torch.float64, "mc", marks=pytest.mark.slow),
        pytest.param(torch.float32, "sampled", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_no_likelihood_is_a_dead_end(likelihood, y, dtype, predictor):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).to(dtype), X.to(dtype)
    y = y.to(dtype) if isinstance(y, torch.Tensor) else tuple(t.to(dtype) if t.is_floating_point() else t for t in y)
    posterior = kf.Laplace(model, kf.estimate(model, (x, y), likelihood, labels="exact"))
    assert posterior.optimize_prior().log_marginal_likelihood().isfinite()
    given = {"predictor": predictor, "samples": 20}
    before = posterior.log_predictive_density(x, y, **given)
    posterior.calibrate([(x, y)], **given)
    best = posterior.log_predictive_density(x, y, **given)
    assert best.dtype == dtype and best.shape == (6,) and best.isfinite().all()
    assert torch.equal(best, posterior.log_predictive_density(x, y, **given))
    assert posterior.log_predictive_error(x, y, **given).isfinite().all()
    assert best.sum() >= before.sum() - 1e-4 * best.sum().abs()


NOISES = {
    "vector": kf.Gaussian(torch.tensor([0.1, 0.2])),
    "counts": kf.Poisson(),
    "predicted": kf.HeteroscedasticGaussian(),
}


@pytest.mark.parametrize("name", NOISES)
def test_noise_that_is_not_one_number(name):
    model, y = nn.Linear(3, 2).double(), torch.ones(6, 1 if name == "predicted" else 2).double()
    posterior = kf.Laplace(model, kf.estimate(model, (X, y), NOISES[name], labels="exact"))
    problem = "only the noise of a Gaussian likelihood with one variance for all outputs can be replaced or learned"
    with pytest.raises(
        kf.UnsupportedError, match=rf"^optimize_prior\(noise=True\): {problem}; this is .* leave out no"
    ):
        posterior.optimize_prior(noise=True)
    with pytest.raises(kf.UnsupportedError, match=f"^fit_noise: {problem}"):
        posterior.fit_noise()
    for noise in (0.3, torch.tensor([0.1, 0.2])):
        with pytest.raises(kf.UnsupportedError, match=problem):
            posterior.noise = noise
        with pytest.raises(kf.UnsupportedError, match=problem):
            posterior.log_marginal_likelihood(noise=noise)
    assert posterior.optimize_prior().log_marginal_likelihood().isfinite()  # as it says
    learned = kf.Laplace(model, kf.estimate(model, (X, torch.randn(6, 2).double()), kf.Gaussian(), labels="exact"))
    assert learned.optimize_prior(noise=True).noise > 0
    with pytest.raises(ValueError, match=r"noise must be one positive number, .*found a tensor \[2\]"):
        learned.noise = torch.tensor([0.1, 0.2])
    with pytest.raises(ValueError, match=r"noise must be one positive number"):
        learned.log_marginal_likelihood(noise=torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match=r"noise must be one positive number"):
        kf.Laplace(model, learned.fisher, noise=torch.tensor([0.1, 0.2]))


def test_a_forward_pass_that_takes_derivatives_of_its_own():
    """Forces are gradients of an energy: densities run under gradients."""
    torch.manual_seed(0)
    energy = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(model, batch):
        x = batch[0].clone().requires_grad_()
        return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0], batch[1]

    y = torch.randn(6, 3).double()
    fisher = kf.estimate(energy, (X, y), kf.Gaussian(), labels="exact", fit="diagonal", forward=forward)
    posterior = kf.Laplace(energy, fisher).score([(X, y)])
    for predictor in ("linearized", "mc", "sampled"):
        assert posterior.log_predictive_density((X, y), predictor=predictor, samples=3).isfinite().all()
