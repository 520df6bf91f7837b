"""Densities of predictions in log space, against closed forms written out by hand; weights in them."""

import math

import pytest
import torch

import kronfisher as kf
from kronfisher.likelihoods import Likelihood
from kronfisher.likelihoods.prediction import log_mean_exp

FAR = [[0.0, 1e3, -1e3], [1e3, 999.0, 0.0], [-1e3, -1e3, 1.0], [100.0, 0.0, 0.0], [0.3, -0.2, 0.1]]
HALVES = [torch.bfloat16, torch.float16]
ACCURACY = {torch.float64: 1e-12, torch.float32: 2e-6}

dtypes = pytest.mark.parametrize("dtype", ACCURACY, ids=str)


def log_sum(logs):
    top = max(logs)
    return top + math.log(math.fsum(math.exp(x - top) for x in logs))


def log_sigmoid(f):
    return -math.log1p(math.exp(-f)) if f > 0 else f - math.log1p(math.exp(f))


def agree(found, truth, dtype):
    """To the digits of the largest of 1 and the density, whatever else is there."""
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    for one, other in zip(found.flatten().tolist(), truth, strict=True):
        assert abs(one - other) <= ACCURACY[dtype] * max(1, abs(other)), (one, other)


def every_class(likelihood, prediction, dim=1):
    """Densities of all classes of all rows, ``[n, C]``."""
    n, classes = prediction.mean.shape
    return torch.stack(
        [likelihood.log_predictive_density(prediction, torch.full((n,), c)) for c in range(classes)], dim
    )


@dtypes
@pytest.mark.parametrize("variance", [0.0, 0.7, 50.0])
def test_classes_by_the_probit_link(dtype, variance):
    outputs = torch.tensor(FAR, dtype=dtype)
    variances = variance * torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype).expand(5, 3)
    prediction = kf.Categorical().predict_from_variances(outputs, variances)
    truth = []
    for row in FAR:
        shrunk = [f / math.sqrt(1 + math.pi / 8 * variance * k) for k, f in enumerate(row, 1)]
        truth += [f - log_sum(shrunk) for f in shrunk]
    for _ in range(2):
        agree(every_class(kf.Categorical(), prediction), truth, dtype)
    torch.testing.assert_close(prediction.logits.softmax(1), prediction.mean)


@dtypes
def test_classes_by_the_bridge(dtype):
    outputs, variance = torch.tensor(FAR, dtype=dtype), 0.5
    prediction = kf.Categorical().predict_from_covariances(
        outputs, variance * torch.eye(3, dtype=dtype).expand(5, 3, 3)
    )
    truth = []
    for row in FAR:  # equal variances: they cancel, and conditioning on a sum of zero subtracts the mean
        f = [x - math.fsum(row) / 3 for x in row]
        alpha = [log_sum([math.log(1 / 3), x + log_sum([-y for y in f]) - math.log(9)]) for x in f]
        truth += [a - log_sum(alpha) for a in alpha]
    agree(every_class(kf.Categorical(), prediction), truth, dtype)
    for part in (prediction.mean, prediction.variance, prediction.epistemic_variance, prediction.noise_variance):
        assert part.isfinite().all() and (part >= 0).all()


@dtypes
def test_two_classes_by_the_bridge(dtype):
    outputs = torch.tensor([[1e3, -1e3], [0.5, 0.0]], dtype=dtype)
    prediction = kf.Categorical().predict_from_covariances(outputs, torch.eye(2, dtype=dtype).expand(2, 2, 2))
    truth = [log_sigmoid(x) for x in (2e3, -2e3, 0.5, -0.5)]  # the bridge leaves the two probabilities as they are
    agree(every_class(kf.Categorical(), prediction), truth, dtype)


@dtypes
def test_classes_by_draws(dtype):
    draws = torch.tensor([FAR, FAR[::-1], FAR], dtype=dtype)
    truth = []
    for rows in zip(FAR, FAR[::-1], FAR, strict=True):
        truth += [log_sum([row[c] - log_sum(row) for row in rows]) - math.log(3) for c in range(3)]
    prediction = kf.Categorical().predict_from_draws(draws)
    agree(every_class(kf.Categorical(), prediction), truth, dtype)
    found = torch.stack([kf.Categorical().log_density_from_draws(draws, torch.full((5,), c)) for c in range(3)], 1)
    agree(found, truth, dtype)


@dtypes
@pytest.mark.parametrize("drawn", [False, True])
def test_binary_targets(dtype, drawn):
    logits = [1e3, -1e3, 100.0, -100.0, 0.0, 17.0]
    outputs, bernoulli = torch.tensor([logits], dtype=dtype).T, kf.Bernoulli()
    if drawn:
        others = logits[::-1]
        prediction = bernoulli.predict_from_draws(torch.stack([outputs, torch.tensor([others], dtype=dtype).T]))
        truth = [
            log_sum([log_sigmoid(s * f), log_sigmoid(s * g)]) - math.log(2)
            for s in (1, -1)
            for f, g in zip(logits, others, strict=True)
        ]
    else:
        prediction = bernoulli.predict_from_variances(outputs, torch.full_like(outputs, 0.5))
        shrunk = [f / math.sqrt(1 + math.pi / 16) for f in logits]
        truth = [log_sigmoid(s * f) for s in (1, -1) for f in shrunk]
    found = [bernoulli.log_predictive_density(prediction, torch.full((6, 1), y, dtype=dtype)) for y in (1.0, 0.0)]
    agree(torch.cat(found), truth, dtype)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_half_precisions_are_promoted_first(half):
    for likelihood, y in ((kf.Categorical(), torch.tensor([1, 0])), (kf.Bernoulli(), torch.ones(2, 3))):
        low = torch.tensor([[100.0, 0.0, -100.0], [3.0, 1.0, 200.0]], dtype=half)
        for draws in (False, True):
            predict = likelihood.predict_from_draws if draws else likelihood.predict_from_variances
            arguments = (low[None],) if draws else (low, torch.ones(2, 3))
            wide = (low.float()[None],) if draws else (low.float(), torch.ones(2, 3))
            found = likelihood.log_predictive_density(predict(*arguments), y)
            assert found.dtype == torch.float32
            assert torch.equal(found, likelihood.log_predictive_density(predict(*wide), y))


def test_a_prediction_made_by_hand_is_read_by_its_probabilities():
    p = torch.tensor([[0.25, 0.75], [0.0, 1.0]], dtype=torch.float64)
    prediction = kf.Prediction(p, p * (1 - p), p * 0, p * (1 - p))
    assert prediction.logits is None
    found = kf.Categorical().log_predictive_density(prediction, torch.tensor([0, 0]))
    truth = torch.tensor([0.25, torch.finfo(torch.float64).tiny], dtype=torch.float64).log()
    torch.testing.assert_close(found, truth)
    p = torch.tensor([[0.25, 0.75], [0.0, 1.0], [1e-40, 0.5], [1e-40, 0.5]], dtype=torch.float64)
    prediction = kf.Prediction(p, p * (1 - p), p * 0, p * (1 - p))
    binary = kf.Bernoulli().log_predictive_density(prediction, torch.tensor([[1.0, 1.0]] * 3 + [[0.0, 0.5]]))
    truth = [math.log(0.25 * 0.75), -math.inf, math.log(0.5e-40), math.log(0.5)]
    torch.testing.assert_close(binary, torch.tensor(truth, dtype=torch.float64))


@pytest.mark.parametrize("axis", [1, -1])
def test_soft_smoothed_and_ignored_targets_at_positions(axis):
    """Under certain outputs the density of a prediction is the likelihood's own."""
    torch.manual_seed(0)
    outputs = 300 * torch.randn(4, 3, 5, dtype=torch.float64)
    for likelihood in (
        kf.Categorical(class_dim=axis),
        kf.Categorical(class_dim=axis, label_smoothing=0.1),
        kf.Categorical(class_dim=axis, weight=torch.rand(3 if axis == 1 else 5)),
    ):
        hard = torch.randint(3, (4, 5) if axis == 1 else (4, 3))
        hard[:, 0] = -100
        soft = torch.rand(4, 3, 5, dtype=torch.float64).softmax(axis)
        for targets in (hard, soft):
            truth = likelihood.log_prob(outputs, targets)
            certain = likelihood.predict_from_variances(outputs, torch.zeros_like(outputs))
            drawn = likelihood.predict_from_draws(outputs.expand(3, 4, 3, 5))
            for prediction in (certain, drawn):
                found = likelihood.log_predictive_density(prediction, targets)
                torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
                parts = likelihood.log_predictive_densities(prediction, targets)
                torch.testing.assert_close(parts.sum(1), found, rtol=1e-13, atol=0)


BASES = {
    "categorical": (kf.Categorical(class_dim=-1), lambda f: torch.randint(3, f.shape[:2])),
    "gaussian": (kf.Gaussian(0.5), torch.randn_like),
    "bernoulli": (kf.Bernoulli(), lambda f: (f > 0).to(f.dtype)),
    "poisson": (kf.Poisson(), lambda f: torch.randint(4, f.shape).to(f.dtype)),
    "heteroscedastic": (kf.HeteroscedasticGaussian(), lambda f: torch.randn_like(f[..., :2])),
}


@pytest.mark.parametrize("name", BASES)
def test_weights_in_densities(name):
    """Ones change nothing; weights of examples multiply; zeros at positions are as if these were not there."""
    torch.manual_seed(0)
    base, targets = BASES[name]
    f = torch.randn(7, 4, 3, 4 if name == "heteroscedastic" else 3, dtype=torch.float64)
    y = targets(f[0])
    weighted = kf.Weighted(base)
    alone = base.log_density_from_draws(f, y)
    ones = torch.ones(4, 3, dtype=torch.float64)
    torch.testing.assert_close(weighted.log_density_from_draws(f, (y, ones)), alone)
    each = torch.tensor([0.0, 1.0, 2.5, 0.3], dtype=torch.float64)
    torch.testing.assert_close(weighted.log_density_from_draws(f, (y, each)), each * alone)
    ones[:, 1:] = 0
    torch.testing.assert_close(
        weighted.log_density_from_draws(f, (y, ones)), base.log_density_from_draws(f[:, :, :1], y[:, :1])
    )
    if not base.averages_over_draws:
        prediction = weighted.predict_from_draws(f)
        for weight in (each, ones):
            found = weighted.log_predictive_density(prediction, (y, weight))
            torch.testing.assert_close(found, weighted.log_density_from_draws(f, (y, weight)))


def test_weights_of_positions_need_densities_of_positions():
    class Whole(kf.Gaussian):
        log_predictive_densities = Likelihood.log_predictive_densities

        def log_predictive_density(self, prediction, targets):
            return kf.Gaussian().log_predictive_density(prediction, targets)

    class Parts(Whole):  # as it says
        log_predictive_densities = kf.Gaussian.log_predictive_densities

    f, y, weight = torch.zeros(2, 4, 3), torch.zeros(4, 3), torch.ones(4, 3)
    with pytest.raises(kf.UnsupportedError, match=r"weights per position: .*define Whole\.log_predictive_densities"):
        kf.Weighted(Whole()).log_density_from_draws(f, (y, weight))
    truth = kf.Gaussian().log_density_from_draws(f, y)
    torch.testing.assert_close(kf.Weighted(Parts()).log_density_from_draws(f, (y, weight)), truth)
    torch.testing.assert_close(kf.Weighted(Whole()).log_density_from_draws(f, (y, weight[:, 0])), truth)


def test_the_mean_of_exponentials_has_no_floor():
    logs = torch.tensor([[-5e3, -2e4, -torch.inf], [-5e3, -1e4, -torch.inf]], dtype=torch.float64)
    expected = torch.tensor([-5e3, -1e4 - math.log(2), -torch.inf], dtype=torch.float64)
    torch.testing.assert_close(log_mean_exp(logs), expected)


@pytest.mark.parametrize("name", ["gaussian", "heteroscedastic", "poisson"])
def test_boolean_numbers_are_refused(name):
    base, targets = BASES[name]
    outputs = torch.zeros(4, 4)
    with pytest.raises(kf.DataError, match=r"^batch 2: \w+ needs targets that are numbers, found torch.bool; if they"):
        base.check(outputs, torch.ones_like(targets(outputs)).bool(), "batch 2")
