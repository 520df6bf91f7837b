"""Weights of data and positions, around every registered likelihood."""

import pytest
import torch

import kronfisher as kf
from kronfisher.likelihoods import REGISTRY, Draws, Likelihood, Weighted
from tests.conformance.problems import Headed
from tests.helpers.truth import gradients
from tests.likelihoods.exponential import Exponential, exponential_example


def weights(*shape):
    found = torch.rand(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 3 + 0.1
    return found.index_fill(0, torch.tensor([1]), 0.0)


def example(name):
    factory, make, _ = REGISTRY[name]
    return factory(), *make(torch.Generator().manual_seed(1), torch.float64)


def places(base: Likelihood, outputs, targets):
    """All shapes that weights may have."""
    shape = [size for d, size in enumerate(outputs.shape) if d != base.joint_dim(outputs, targets)]
    return [shape[: k + 1] for k in range(len(shape))]


@pytest.mark.parametrize("name", REGISTRY)
def test_vectors_are_scaled(name):
    base, outputs, targets = example(name)
    weighted = Weighted(base)
    joint = base.joint_dim(outputs, targets)
    for shape in places(base, outputs, targets):
        weight = weights(*shape)
        pair = (targets, weight)
        weighted.check(outputs, pair, labels="observed")
        # The same weights, one for every entry of the outputs, written out.
        entries = [size for d, size in enumerate(outputs.shape) if d != joint]
        full = weight.reshape(*shape, *[1] * (len(entries) - len(shape))).expand(entries)
        terms = base.log_probs(outputs, targets)
        torch.testing.assert_close(terms.reshape(len(outputs), -1).sum(1), base.log_prob(outputs, targets))
        truth = (full * terms).reshape(len(outputs), -1).sum(1)
        torch.testing.assert_close(weighted.log_prob(outputs, pair), truth)
        each = full if joint is None else full.unsqueeze(joint).expand(outputs.shape)
        leaf = outputs.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(-weighted.log_prob(leaf, pair).sum(), leaf)
        torch.testing.assert_close(weighted.observed(outputs, pair), gradient)
        torch.testing.assert_close(gradient, each * base.observed(outputs, targets))
        for found, plain in zip(weighted.exact(outputs, pair), base.exact(outputs, targets), strict=True):
            torch.testing.assert_close(found, each.sqrt() * plain)
        drawn = base.sampled(outputs, targets, Draws(2))
        torch.testing.assert_close(weighted.sampled(outputs, pair, Draws(2)), each.sqrt() * drawn)
        assert weighted.columns(outputs, pair) == base.columns(outputs, targets)


@pytest.mark.parametrize("labels", ["exact", "sampled", "observed"])
@pytest.mark.parametrize("name", ["categorical", "gaussian", "poisson", "heteroscedastic"])
def test_the_matrix_is_the_weighted_sum_over_data(name, labels):
    base, outputs, targets = example(name)
    x = torch.randn(len(outputs), 3, dtype=torch.float64)
    model = Headed(torch.nn.Linear(3, 5), 5, tuple(outputs.shape[1:])).double()
    weight = weights(len(x))
    options = {"fit": "full", "labels": labels, "seed": 4, "reduction": "sum"}
    found = kf.estimate(model, (x, (targets, weight)), Weighted(base), **options)
    values = model(x).detach()
    if labels == "exact":
        vectors = torch.stack(list(base.exact(values, targets)))
    elif labels == "observed":
        vectors = base.observed(values, targets)[None]
    else:
        vectors = base.sampled(values, targets, Draws(4))[None]
    rows = gradients(model, x, vectors)
    power = 2 if labels == "observed" else 1  # the empirical Fisher is quadratic in the weighted gradients
    truth = torch.einsum("n,vni,vnj->ij", weight**power, rows, rows)
    torch.testing.assert_close(found.to_dense(), truth)
    assert found.count == (weight > 0).sum()


def test_zero_weighs_as_much_as_ignored():
    x, y = torch.randn(3, 4, 2).double(), torch.randint(3, (3, 4))
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    base = kf.Categorical(class_dim=-1)
    ignored = y.clone()
    ignored[0, 1:], ignored[2] = -100, -100
    weight = (ignored != -100).double()
    for fit in ("kfac", "kfac-reduce", "ekfac", "full"):
        one = kf.estimate(model, (x, ignored), base, fit=fit, labels="exact")
        other = kf.estimate(model, (x, (y, weight)), Weighted(base), fit=fit, labels="exact")
        assert one.count == other.count == 2 and one.rows == other.rows
        torch.testing.assert_close(one.to_dense(), other.to_dense())
        both = kf.estimate(model, (x, (ignored, torch.ones(3))), Weighted(base), fit=fit, labels="exact")
        torch.testing.assert_close(one.to_dense(), both.to_dense())


def test_which_positions_count():
    gaussian, weight = Weighted(kf.Gaussian()), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    tokens = torch.zeros(2, 2, 3)
    for outputs, w, expected in (
        (tokens, weight, [[True, False], [False, False]]),
        (tokens, weight[:, 0], [[True], [False]]),
        (tokens, weight[:, :, None].expand(2, 2, 3), [[True], [False]]),  # for each entry: only data are dropped
        (torch.zeros(2, 2), weight, [[True], [False]]),
        (torch.zeros(2, 2, 2, 3), weight, [[True, True, False, False], [False] * 4]),
    ):
        found = gaussian.positions(outputs, (None, w))
        assert found is not None and found.tolist() == expected
    images = Weighted(kf.Categorical(class_dim=1)).positions(torch.zeros(2, 5, 2, 3), (None, weight))
    assert images is not None and images.tolist() == [[True] * 3 + [False] * 3, [False] * 6]


def test_labels_without_weights_and_weights_without_labels():
    outputs = torch.randn(4, 2, dtype=torch.float64)
    weighted = Weighted(kf.Gaussian())
    targets = weighted.sample(outputs, Draws(0))
    weighted.check(outputs, targets, labels="observed")
    assert torch.equal(weighted.log_prob(outputs, targets), kf.Gaussian().log_prob(outputs, targets[0]))
    weighted.check(outputs, (None, torch.ones(4)))
    assert torch.equal(weighted.mean(outputs), outputs) and weighted.noise_variance(outputs).unique() == 1
    counts = (targets[0], torch.tensor([0, 1, 2, 3]))
    expected = torch.arange(4)[:, None] * kf.Gaussian().observed(outputs, targets[0])
    assert torch.equal(weighted.observed(outputs, counts), expected)


def test_a_likelihood_of_ones_own():
    outputs, targets = exponential_example(torch.Generator().manual_seed(0), torch.float64)
    weighted, weight = Weighted(Exponential()), weights(4)
    expected = weight * Exponential().log_prob(outputs, targets)
    assert torch.equal(weighted.log_prob(outputs, (targets, weight)), expected)
    with pytest.raises(kf.UnsupportedError, match="weights per position: Exponential does not say what its log_pr"):
        weighted.log_prob(outputs, (targets, weights(4, 2)))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(4, 2), r"Weighted needs targets \(targets, weight\) with a tensor of weights, found Tensor; give"),
        (None, "found NoneType; give"),
        ((torch.zeros(4, 2), [1] * 4), "found tuple of 2"),
        ((torch.zeros(4, 2),) * 3, "found tuple of 3"),
        ((torch.zeros(4, 2), torch.ones(3)), r"weights \[3\] do not fit outputs \[4, 2\]; give \[N\], or leading"),
        ((torch.zeros(4, 2), torch.ones(4, 1)), r"weights \[4, 1\] do not fit outputs"),
        ((torch.zeros(4, 2), torch.tensor(1.0)), r"weights \[\] do not fit outputs"),
        ((torch.zeros(4, 2), -torch.ones(4)), "weights must be non-negative and finite"),
        ((torch.zeros(4, 2), torch.ones(4) * torch.nan), "weights must be non-negative and finite"),
        ((torch.zeros(4, 2), torch.ones(4, device="meta")), "weights are on meta, outputs on cpu; move them"),
        ((torch.zeros(4, 1), torch.ones(4)), r"Gaussian needs targets of shape \[4, 2\], found \[4, 1\]"),
    ],
)
def test_messages(targets, message):
    with pytest.raises(kf.DataError, match="^batch 7: .*" + message):
        Weighted(kf.Gaussian()).check(torch.zeros(4, 2), targets, "batch 7")


def test_labels_are_needed_where_they_are():
    with pytest.raises(kf.DataError, match="observed labels, and so the loss of an example, need targets, found none"):
        Weighted(kf.Gaussian()).check(torch.zeros(4, 2), (None, torch.ones(4)), "batch 7", "observed")
    with pytest.raises(TypeError, match="pass an instance such as Categorical"):
        Weighted(kf.Gaussian)  # pyright: ignore[reportArgumentType]
