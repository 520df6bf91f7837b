"""What holds for every registered likelihood, and for one that a user wrote with the least effort."""

import math

import pytest
import torch
from torch import Tensor

from kronfisher.errors import DataError, NumericalError, UnsupportedError
from kronfisher.likelihoods import REGISTRY, Categorical, Draws, Likelihood, Registered, register
from tests.likelihoods.exponential import Exponential, exponential_example

CASES = {
    **REGISTRY,
    # Its Hessian is linear in the label: the mean label has the mean Hessian.
    "user's own": Registered(Exponential, exponential_example, lambda outputs: [(-outputs).exp()]),
}
# Exponentials of outputs overflow: those are refused in `check`.
EXPONENTIAL = {"poisson", "heteroscedastic", "heteroscedastic-series"}
DTYPES = [torch.float64, torch.float32]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}

cases = pytest.mark.parametrize("name", CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def expected_hessian(name: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Hessian of `-log_prob`, averaged over labels of the model where it depends on them: `[N, D, D]`."""
    labels = CASES[name].hessian_labels(outputs.double(), targets)
    return sum(hessian(CASES[name].factory(), outputs, y) for y in labels) / len(labels)


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[Likelihood, Tensor, Tensor]:
    factory, example, _ = CASES[name]
    return factory(), *example(torch.Generator().manual_seed(1), dtype)


def outer(vectors: Tensor) -> Tensor:
    """`Σ_v v vᵀ` of `[V, N, ...]`, per example: `[N, D, D]`."""
    flat = vectors.flatten(2).double()
    return torch.einsum("vni,vnj->nij", flat, flat)


def exact_hessian(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    return outer(torch.stack(list(likelihood.exact(outputs, targets))))


def hessian(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    """Hessian of `-log_prob`, example by example, by automatic differentiation: `[N, D, D]`."""

    def loss(example, target):
        return -likelihood.log_prob(example[None], target[None])[0]

    size = outputs[0].numel()
    pairs = zip(outputs.double(), targets, strict=True)
    return torch.stack([torch.func.jacrev(torch.func.jacrev(loss))(x, y).reshape(size, size) for x, y in pairs])


@cases
@dtypes
def test_exact_vectors_are_a_root_of_the_hessian(name, dtype):
    likelihood, outputs, targets = make(name, dtype)
    vectors = list(likelihood.exact(outputs, targets))
    assert len(vectors) == likelihood.columns(outputs, targets)
    assert all(v.shape == outputs.shape and v.dtype == dtype and not v.requires_grad for v in vectors)
    truth = expected_hessian(name, outputs, targets)
    assert truth.norm() > 0.1
    torch.testing.assert_close(outer(torch.stack(vectors)), truth, rtol=0, atol=TOLERANCE[dtype])


@cases
@dtypes
def test_observed_is_the_gradient(name, dtype):
    likelihood, outputs, targets = make(name, dtype)
    leaf = outputs.double().requires_grad_()
    (truth,) = torch.autograd.grad(-likelihood.log_prob(leaf, targets).sum(), leaf)
    found = likelihood.observed(outputs, targets)
    assert found.dtype == dtype and not found.requires_grad and truth.norm() > 0.1
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=TOLERANCE[dtype])
    # The base class, through automatic differentiation, says the same as a closed form.
    torch.testing.assert_close(Likelihood.observed(likelihood, outputs, targets), found, rtol=0, atol=TOLERANCE[dtype])


@cases
def test_sampled_converges_at_the_monte_carlo_rate(name):
    likelihood, outputs, targets = make(name)
    truth = exact_hessian(likelihood, outputs, targets)
    repeats = 20
    for draws in (32, 512):
        ratios = []
        for repeat in range(repeats):
            vectors = likelihood.sampled(
                outputs.repeat(draws, *[1] * (outputs.ndim - 1)),
                targets.repeat(draws, *[1] * (targets.ndim - 1)),
                Draws(repeat),
            ).reshape(draws, *outputs.shape)
            flat = vectors.flatten(2)
            # E‖v vᵀ - H‖² = E‖v‖⁴ - ‖H‖² is the variance of one draw, summed over entries and data.
            variance = flat.square().sum(-1).square().mean(0).sum() - truth.square().sum()
            ratios.append((outer(vectors) / draws - truth).square().sum() / (variance / draws))
        # Squared error over squared standard error: one on average, with a spread below √(2/repeats) = .32.
        assert 0.4 < torch.stack(ratios).mean() < 1.8, (draws, ratios)


@pytest.mark.parametrize("name", REGISTRY)
def test_mean_and_noise_variance_are_those_of_the_samples(name):
    likelihood, outputs, _ = make(name)
    draws = 20000
    labels = likelihood.sample(outputs.repeat(draws, *[1] * (outputs.ndim - 1)), Draws(4))
    mean, variance = likelihood.mean(outputs), likelihood.noise_variance(outputs)
    assert mean.shape == variance.shape and mean.dtype == variance.dtype == torch.float64
    if isinstance(likelihood, Categorical):
        axis = (likelihood.class_dim or 1) % outputs.ndim
        labels = torch.nn.functional.one_hot(labels, outputs.shape[axis]).movedim(-1, axis)
    labels = labels.double().reshape(draws, *mean.shape)
    assert mean.shape == labels.shape[1:] and variance.min() > 1e-3
    errors = (labels.mean(0) - mean) / (variance / draws).sqrt()
    assert errors.abs().max() < 5 and errors.abs().max() > 0.01
    torch.testing.assert_close(labels.var(0), variance, rtol=0.2, atol=0)
    assert likelihood.mean(outputs.bfloat16()).dtype == likelihood.noise_variance(outputs.half()).dtype == torch.float32
    likelihood.mean(outputs.requires_grad_()).square().sum().backward()
    assert outputs.grad is not None and outputs.grad.norm() > 0


@cases
@dtypes
def test_splitting_a_batch_changes_nothing(name, dtype):
    likelihood, outputs, targets = make(name, dtype)
    whole, draws = Draws(3), Draws(3)
    expected = likelihood.sampled(outputs, targets, whole)
    parts = [likelihood.sampled(outputs[s], targets[s], draws) for s in (slice(0, 1), slice(1, None))]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=TOLERANCE[dtype] / 10)
    # Both have used the same numbers, and the next pass over the data begins anew.
    assert torch.equal(whole.uniform([3]), draws.uniform([3]))
    assert torch.equal(likelihood.sampled(outputs, targets, Draws(3)), expected)
    assert not torch.equal(likelihood.sampled(outputs, targets, Draws(3, stream=1)), expected)


# With class weights the vector is scaled by the weight of the observed label, not of the drawn one; drawn labels are
# not smoothed.
@pytest.mark.parametrize("name", [name for name in CASES if "weighted" not in name and "smoothed" not in name])
@dtypes
def test_sampled_is_the_gradient_at_the_sample(name, dtype):
    likelihood, outputs, targets = make(name, dtype)
    labels = likelihood.sample(outputs, Draws(2))
    assert labels.dtype == targets.dtype and labels.shape == targets.shape
    likelihood.check(outputs, labels, labels="observed")
    found = likelihood.sampled(outputs, likelihood.sample(outputs, Draws(9)), Draws(2))
    torch.testing.assert_close(found, likelihood.observed(outputs, labels), rtol=0, atol=10 * TOLERANCE[dtype])


@cases
def test_positions_are_those_that_matter(name):
    likelihood, outputs, targets = make(name)
    mask = likelihood.positions(outputs, targets)
    if mask is None:
        return
    assert mask.dtype == torch.bool and len(mask) == len(outputs)
    if outputs.ndim > 2:
        assert mask.any() and not mask.all()
    axis = (getattr(likelihood, "class_dim", None) or 1) % outputs.ndim
    for vectors in (
        torch.stack(list(likelihood.exact(outputs, targets))),
        likelihood.sampled(outputs, targets, Draws(0))[None],
        likelihood.observed(outputs, targets)[None],
    ):
        size = vectors.abs().sum((0, axis + 1)).unsqueeze(-1).flatten(1)
        assert torch.equal(size > 0, mask)


@cases
def test_permuting_the_data_permutes_the_answers(name):
    likelihood, outputs, targets = make(name)
    order = torch.randperm(len(outputs), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        likelihood.observed(outputs[order], targets[order]), likelihood.observed(outputs, targets)[order]
    )
    for one, other in zip(
        likelihood.exact(outputs[order], targets[order]), likelihood.exact(outputs, targets), strict=True
    ):
        torch.testing.assert_close(one, other[order])


@cases
def test_leaves_global_generator_graph_and_arguments_alone(name):
    likelihood, outputs, targets = make(name)
    outputs.requires_grad_()
    kept, labels, state = outputs.detach().clone(), targets.clone(), torch.get_rng_state()
    likelihood.check(outputs, targets, "batch 0", "observed")
    vectors = [*likelihood.exact(outputs, targets), likelihood.observed(outputs, targets)]
    vectors.append(likelihood.sampled(outputs, targets, Draws(0)))
    assert not any(v.requires_grad for v in vectors)
    assert not likelihood.sample(outputs, Draws(0)).requires_grad
    assert likelihood.log_prob(outputs, targets).requires_grad
    assert torch.equal(state, torch.get_rng_state()) and outputs.grad is None
    assert torch.equal(outputs, kept) and torch.equal(targets, labels)


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(name, dtype):
    likelihood, outputs, targets = make(name, dtype)
    likelihood.check(outputs, targets, labels="observed")
    wide = outputs.float()
    float_targets = targets.float() if targets.is_floating_point() else targets
    pairs = list(zip(likelihood.exact(outputs, targets), likelihood.exact(wide, float_targets), strict=True))
    pairs.append((likelihood.observed(outputs, targets), likelihood.observed(wide, float_targets)))
    if name != "user's own":  # whose sample() computes in the precision it is given
        pairs.append(
            (likelihood.sampled(outputs, targets, Draws(0)), likelihood.sampled(wide, float_targets, Draws(0)))
        )
    for low, high in pairs:
        assert torch.equal(low, high.to(dtype))
    assert likelihood.log_prob(wide, float_targets).dtype == torch.float32


@pytest.mark.parametrize("name", [name for name in REGISTRY if name not in EXPONENTIAL])
@pytest.mark.parametrize("scale", [1e4, -1e4, 1e2])
@dtypes
def test_extreme_outputs_stay_finite(name, scale, dtype):
    likelihood, outputs, targets = make(name, dtype)
    outputs = outputs.sign() * scale * torch.arange(1, outputs.numel() + 1).reshape(outputs.shape).to(dtype).fmod(4)
    vectors = [*likelihood.exact(outputs, targets), likelihood.observed(outputs, targets)]
    vectors += [likelihood.sampled(outputs, targets, Draws(seed)) for seed in range(5)]
    assert all(v.isfinite().all() for v in vectors)
    assert likelihood.log_prob(outputs, targets).isfinite().all()
    torch.testing.assert_close(
        exact_hessian(likelihood, outputs, targets),
        hessian(likelihood, outputs, targets),
        rtol=0,
        atol=TOLERANCE[dtype],
    )


@cases
def test_check_accepts_the_example_and_names_the_batch(name):
    likelihood, outputs, targets = make(name)
    likelihood.check(outputs, targets, "batch 3", "observed")
    broken = outputs.clone()
    broken.view(-1)[1] = math.nan
    with pytest.raises(NumericalError, match=r"^batch 3: 1 of \d+ outputs are NaN or infinite; look for"):
        likelihood.check(broken, targets, "batch 3")
    with pytest.raises(DataError, match=r"^batch 3: observed labels.* need targets, found none; give \(inputs"):
        likelihood.check(outputs, None, "batch 3", "observed")
    with pytest.raises(DataError, match=r"^batch 3: \w+ needs the outputs to be one tensor, found tuple; choose"):
        likelihood.check((outputs,), targets, "batch 3")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"^batch 3: \w+ needs floating-point outputs, found torch.int64; return"):
        likelihood.check(outputs.long(), targets, "batch 3")
    with pytest.raises(DataError, match=r"^batch 3: \w+ needs outputs \[N, ...\], one row per example, found a scalar"):
        likelihood.check(outputs.sum(), targets, "batch 3")
    with pytest.raises(DataError, match=r"^batch 3: \w+ needs the targets to be a tensor, found list; convert"):
        likelihood.check(outputs, targets.tolist(), "batch 3")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"^batch 3: targets are on meta, outputs on cpu; move them with targets.to"):
        likelihood.check(outputs, targets.to("meta"), "batch 3")
    with pytest.raises(DataError, match=r"^batch 3: targets \[\d.*\] and outputs .* differ in the number of examples"):
        likelihood.check(outputs, targets[1:], "batch 3")


def test_likelihood_without_root_still_has_sampled_and_observed_labels():
    class Minimal(Exponential):
        root = Likelihood.root

    outputs, targets = exponential_example(torch.Generator().manual_seed(0), torch.float64)
    assert torch.equal(Minimal().observed(outputs, targets), Exponential().observed(outputs, targets))
    assert torch.equal(Minimal().sampled(outputs, None, Draws(0)), Exponential().sampled(outputs, None, Draws(0)))
    with pytest.raises(UnsupportedError, match=r'Minimal.*define Minimal.root.*ask for labels="sampled"'):
        next(Minimal().exact(outputs, targets))
    with pytest.raises(UnsupportedError, match=r"predictions: Minimal does not say what its mean is; define Minimal"):
        Minimal().mean(outputs)
    with pytest.raises(UnsupportedError, match=r"define Minimal\.noise_variance"):
        Minimal().noise_variance(outputs)


def test_empty_batch_has_empty_vectors():
    for name in CASES:
        likelihood, outputs, targets = make(name)
        vectors = [*likelihood.exact(outputs[:0], targets[:0]), likelihood.observed(outputs[:0], targets[:0])]
        vectors.append(likelihood.sampled(outputs[:0], targets[:0], Draws(0)))
        assert all(v.shape == outputs[:0].shape for v in vectors)
        assert likelihood.log_prob(outputs[:0], targets[:0]).shape == (0,)


def test_names_are_unique():
    with pytest.raises(ValueError, match="'gaussian' is registered already; choose another name"):
        register("gaussian", Exponential, exponential_example)
    assert REGISTRY["gaussian"].factory is not Exponential


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@cases
def test_device_gives_the_same_vectors(name):
    likelihood, outputs, targets = make(name)
    there = outputs.cuda(), targets.cuda()
    likelihood.check(*there, labels="observed")
    pairs = list(zip(likelihood.exact(*there), likelihood.exact(outputs, targets), strict=True))
    pairs.append((likelihood.observed(*there), likelihood.observed(outputs, targets)))
    pairs.append((likelihood.sampled(*there, Draws(0)), likelihood.sampled(outputs, targets, Draws(0))))
    pairs.append((likelihood.log_prob(*there), likelihood.log_prob(outputs, targets)))
    for found, expected in pairs:
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-10)


@cases
@dtypes
def test_products_with_the_hessian_are_those_of_the_exact_columns(name, dtype):
    likelihood, outputs, targets = make(name, dtype)
    vector = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = (exact_hessian(likelihood, outputs, targets) @ vector.unsqueeze(-1).flatten(1).unsqueeze(-1)).squeeze(-1)
    found = likelihood.hessian_product(outputs, vector.to(dtype), targets)
    assert found.dtype == dtype and found.shape == outputs.shape
    scale = expected.abs().max() + 1e-3
    assert ((found.double().unsqueeze(-1).flatten(1) - expected).abs().max() / scale) < 10 * TOLERANCE[dtype]


@cases
def test_the_excess_is_what_the_loss_can_fall_by_at_most(name):
    likelihood, outputs, targets = make(name)
    excess = likelihood.excess(outputs, targets)
    if excess is None:
        assert name in {"user's own", "weighted-positions"} or "heteroscedastic" in name
        return
    assert excess.shape == outputs.shape[:1] and not excess.requires_grad and bool((excess >= 0).all())
    moved = outputs.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([moved], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -likelihood.log_prob(moved, targets).sum()
        value.backward()
        return value

    before = float(loss().detach())
    optimizer.step(loss)
    fallen = before - float(loss().detach())
    assert fallen <= float(excess.sum()) * (1 + 1e-6) + 1e-9
