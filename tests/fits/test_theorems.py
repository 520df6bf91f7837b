"""The exactness theorems of K-FAC, EKFAC, the diagonal and the full matrix, in float64."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import kronfisher as kf
from kronfisher.fits import FITS, resolve
from kronfisher.likelihoods import Draws
from tests.helpers.networks import perceptron, shake
from tests.helpers.pairs import missing_pairs
from tests.helpers.truth import dense_fisher, positions

RANK_ONE = ("kfac", "kfac-reduce", "ekfac", "tkfac", "kfoc", "kpsvd", "full")
ACTIVATIONS = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "relu": nn.ReLU}
LIKELIHOODS = {
    "gaussian": lambda: kf.Gaussian(0.7),
    "categorical": kf.Categorical,
    "bernoulli": kf.Bernoulli,
}

activations = pytest.mark.parametrize("activation", ACTIVATIONS)
likelihoods = pytest.mark.parametrize("likelihood", LIKELIHOODS)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative, in Frobenius norm."""
    assert truth.norm() > 1e-6, "nothing to compare"
    return float((found - truth).norm() / truth.norm())


def by_layer(model: nn.Module, matrix: Tensor) -> Tensor:
    """The blocks of every layer, its bias with its weight; zero elsewhere."""
    layers: dict[str, list[Tensor]] = {}
    for name, index in positions(model).items():
        layers.setdefault(name.rpartition(".")[0], []).append(index.flatten())
    kept = torch.zeros_like(matrix)
    for parts in layers.values():
        index = torch.cat(parts)
        kept[index[:, None], index] = matrix[index[:, None], index]
    return kept


def with_activation(activation: str) -> nn.Module:
    return perceptron(3, 4, 3, activation=ACTIVATIONS[activation], last=[nn.Tanh()], shaken=True)


def labelled(likelihood: str, data: int) -> Tensor:
    if likelihood == "categorical":
        return torch.arange(data) % 3
    return torch.randn(data, 3).double() if likelihood == "gaussian" else torch.randint(2, (data, 3)).double()


# Theorem 1: one example, or copies of it, and T = 1 ----------------------------------------------------------------


@cache
def one_example(activation: str, likelihood: str, copies: int) -> tuple[nn.Module, tuple[Tensor, Tensor], dict]:
    """A model, copies of one example, and the truth for every kind of labels."""
    model, chosen = with_activation(activation), LIKELIHOODS[likelihood]()
    x = torch.randn(1, 3).double().expand(copies, -1)
    y = labelled(likelihood, copies)
    kinds = ("exact", "sampled", "observed")  # of the sampled and the observed labels' own matrix
    truths = {labels: dense_fisher(model, x, y, chosen, labels, samples=3, seed=2) for labels in kinds}
    return model, (x, y), {labels: by_layer(model, truth) for labels, truth in truths.items()}


FITTED = [
    (fit, likelihood, list(ACTIVATIONS)[(i + j) % len(ACTIVATIONS)])
    for i, fit in enumerate(RANK_ONE)
    for j, likelihood in enumerate(LIKELIHOODS)
]
assert not missing_pairs(FITTED, RANK_ONE, LIKELIHOODS, ACTIVATIONS)


@pytest.mark.parametrize(("fit", "likelihood", "activation"), FITTED)
@reductions
@pytest.mark.parametrize("copies", [1, 3])
def test_one_example_is_exact(fit, likelihood, activation, reduction, copies):
    model, (x, y), truths = one_example(activation, likelihood, copies)
    options = {"fit": fit, "samples": 3, "seed": 2, "reduction": reduction}
    for labels, truth in truths.items():
        fisher = kf.estimate(model, (x, y), LIKELIHOODS[likelihood](), labels=labels, **options)
        assert distance(fisher.to_dense(), truth * (copies if reduction == "sum" else 1)) < 1e-10, labels
        assert fisher.error((x, y)).relative < 1e-10, labels


def test_two_examples_are_not_exact():
    """The theorem above would otherwise say nothing."""
    model = with_activation("tanh")
    x = torch.randn(2, 3).double()
    truth = by_layer(model, dense_fisher(model, x, labelled("gaussian", 2), kf.Gaussian()))
    for fit in RANK_ONE[:-1]:
        assert distance(kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact").to_dense(), truth) > 0.003, fit


@likelihoods
@pytest.mark.parametrize("fit", ["kfac", "full"])
def test_monte_carlo_converges_at_its_rate(likelihood, fit):
    model, chosen = with_activation("tanh"), LIKELIHOODS[likelihood]()
    x, y, repeats = torch.randn(1, 3).double(), labelled(likelihood, 1), 16
    truth = by_layer(model, dense_fisher(model, x, y, chosen))

    # E‖ĝ‖⁴ − ‖F‖² is the variance of one draw; for the blocks by layer their sum, estimated with other draws.
    many = x.expand(2000, -1)
    vectors = chosen.sampled(model(many).detach(), y.expand(2000, *y.shape[1:]), Draws(99))
    jacobian = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(model(x)[0, c], list(model.parameters()))])
            for c in range(3)
        ]
    )
    rows, spread = vectors @ jacobian, -truth.square().sum()
    for layer in (slice(0, 16), slice(16, None)):
        spread = spread + rows[:, layer].square().sum(1).square().mean()

    errors = {}
    for samples in (3, 48):
        found = [
            kf.estimate(model, x, chosen, fit=fit, samples=samples, seed=seed).to_dense() for seed in range(repeats)
        ]
        squared = torch.stack([(matrix - truth).square().sum() for matrix in found]).mean()
        errors[samples] = squared.sqrt()
        # The mean over `repeats` of a quadratic form of one degree of freedom or more: within √(2/16) = .35 of one.
        assert 0.35 < squared * samples / spread < 2.2, (samples, squared * samples / spread)
    assert 2.2 < errors[3] / errors[48] < 7  # 16 times the draws: a quarter of the error


# Theorem 2: deep linear networks -----------------------------------------------------------------------------------


class Pooled(nn.Module):
    """Four linear layers; positions are pooled after some of them."""

    def __init__(self, pool_after: int | None, pool: str = "sum", bias: bool = True):
        super().__init__()
        widths = [3, 4, 2, 3, 2]
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=bias) for i, o in pairwise(widths)).double()
        self.pool_after, self.pool = pool_after, pool
        shake(self)

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers, 1):
            x = layer(x)
            if number == self.pool_after:
                x = getattr(x, self.pool)(1)
        return x


def errors(model: nn.Module, x: Tensor, fit: str, variance: float = 1.0) -> list[float]:
    """Relative error of every layer's block against the dense truth, first layer first."""
    likelihood = kf.Gaussian(variance)
    fisher = kf.estimate(model, x, likelihood, fit=fit, labels="exact")
    truth = dense_fisher(model, x, torch.zeros_like(model(x)), likelihood)
    found, places = fisher.to_dense(), positions(model)
    layers = dict.fromkeys(name.rpartition(".")[0] for name in places)
    answer = []
    for layer in layers:
        index = torch.cat([place.flatten() for name, place in places.items() if name.rpartition(".")[0] == layer])
        answer.append(distance(found[index[:, None], index], truth[index[:, None], index]))
    return answer


@pytest.mark.parametrize("fit", RANK_ONE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("variance", [1.0, 0.3])
def test_linear_network_is_exact(fit, bias, variance):
    assert max(errors(Pooled(None, bias=bias), torch.randn(5, 3).double(), fit, variance)) < 1e-10


@pytest.mark.parametrize("fit", ["kfac", "ekfac"])
@pytest.mark.parametrize("axes", [(4,), (2, 2)], ids=str)
def test_expand_is_exact_for_independent_positions(fit, axes):
    assert max(errors(Pooled(None), torch.randn(5, *axes, 3).double(), fit)) < 1e-10


def test_reduce_is_not_exact_for_independent_positions():
    assert min(errors(Pooled(None), torch.randn(5, 4, 3).double(), "kfac-reduce")) > 0.01


@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_reduce_is_exact_for_positions_pooled_at_the_end(pool):
    model, x = Pooled(4, pool), torch.randn(5, 4, 3).double()
    assert max(errors(model, x, "kfac-reduce")) < 1e-10
    assert min(errors(model, x, "kfac")) > 0.01


@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_pooled_after_the_second_of_four_layers(pool):
    model, x = Pooled(2, pool), torch.randn(5, 4, 3).double()
    assert max(errors(model, x, "kfac-reduce")) < 1e-10
    expand = errors(model, x, "kfac")
    assert min(expand[:2]) > 0.01 and max(expand[2:]) < 1e-10


def test_expand_is_exact_for_a_linear_convolution_of_one_pixel():
    model = shake(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))).double()
    assert max(errors(model, torch.randn(5, 3, 2, 2).double(), "kfac")) < 1e-10


@activations
@likelihoods
@pytest.mark.parametrize("labels", ["exact", "sampled", "observed"])
def test_expand_is_reduce_without_positions(activation, likelihood, labels):
    model, chosen = with_activation(activation), LIKELIHOODS[likelihood]()
    batch = torch.randn(6, 3).double(), labelled(likelihood, 6)
    expand, reduce = (kf.estimate(model, batch, chosen, fit=f, labels=labels) for f in ("kfac", "kfac-reduce"))
    assert distance(expand.to_dense(), reduce.to_dense()) < 1e-12


# Theorem 5: padding ------------------------------------------------------------------------------------------------

IGNORED = -100


def sequences() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """A model that acts on positions separately; sequences of several lengths as batches, and padded into one batch."""
    model = shake(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3))).double()
    ragged, padded = [], []
    for length in (2, 4, 1, 4, 3):
        x, y = torch.randn(1, length, 3).double(), torch.randint(3, (1, length))
        ragged.append((x, y))
        waste = 4 - length
        padded.append(
            (
                torch.cat([x, 9 * torch.randn(1, waste, 3).double()], dim=1),
                torch.cat([y, torch.full((1, waste), IGNORED)], dim=1),
            )
        )
    padded.insert(1, (torch.randn(1, 4, 3).double(), torch.full((1, 4), IGNORED)))  # an example that counts nowhere
    x, y = (torch.cat(parts) for parts in zip(*padded, strict=True))
    return model, ragged, (x, y)


@pytest.mark.parametrize("fit", [name for name in FITS if not resolve(name).by_batch])
@pytest.mark.parametrize("labels", ["exact", "observed"])
def test_padding_changes_nothing(fit, labels):
    model, ragged, padded = sequences()
    likelihood = kf.Categorical(class_dim=-1)
    bare = kf.estimate(model, ragged, likelihood, fit=fit, labels=labels)
    full = kf.estimate(model, padded, likelihood, fit=fit, labels=labels)
    assert full.count == bare.count == 5
    assert distance(full.to_dense(), bare.to_dense()) < 1e-10
    assert full.rows == bare.rows
    assert full.error(padded).blocks == pytest.approx(bare.error(ragged).blocks, abs=1e-9)


def test_masked_positions_leave_both_factors_and_the_rows():
    model, ragged, padded = sequences()
    fisher = kf.estimate(model, padded, kf.Categorical(class_dim=-1), labels="exact", fit="kfac")
    assert fisher.rows["0.weight"] == fisher.rows["3.weight"] == 2 + 4 + 1 + 4 + 3
    rows = torch.cat([x[0] for x, _ in ragged])
    inputs = torch.cat([rows, torch.ones(len(rows), 1).double()], dim=1)
    assert distance(fisher["0.weight"].A[0], inputs.T @ inputs / 14) < 1e-12
    outputs = [model[0](row).detach().requires_grad_() for row in rows]
    B = torch.zeros(4, 4).double()
    for hidden in outputs:
        logits = model[1:](hidden)
        p = logits.softmax(0).detach()
        J = torch.stack([torch.autograd.grad(logits[c], hidden, retain_graph=True)[0] for c in range(3)])
        B += J.T @ (p.diag() - p.outer(p)) @ J
    assert distance(fisher["0.weight"].B[0], B / 5) < 1e-12


@pytest.mark.parametrize("fit", ["full", "diagonal"])
def test_masked_positions_keep_the_gradient_that_flows_through_them(fit):
    """An ignored pixel is still seen by its neighbours' outputs."""
    model = shake(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 3, padding=1))).double()
    x, y = torch.randn(4, 2, 3, 4).double(), torch.randint(3, (4, 3, 4))
    y[:, 1] = IGNORED
    likelihood = kf.Categorical()
    fisher = kf.estimate(model, (x, y), likelihood, fit=fit, labels="exact").to_dense()
    truth = dense_fisher(model, x, y, likelihood)
    truth = by_layer(model, truth) if fit == "full" else truth.diagonal().diag()
    assert distance(fisher, truth) < 1e-10


# Theorem 6: posterior samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("damping", ["exact", "factored"])
def test_samples_have_the_posterior_covariance(fit, damping):
    model = shake(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))).double()
    x = 3 * torch.randn(40, 2).double()
    fisher = kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact", reduction="sum")
    prior = 0.5 if damping == "exact" else kf.FactoredTikhonov(0.5)
    posterior = fisher + prior
    if damping == "exact":
        precision = 40 * kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact").to_dense() + 0.5 * torch.eye(17)
    else:
        precision = posterior.to_dense()  # an inverse of its own
    covariance = torch.linalg.inv(precision)
    missed = []
    for draws in (2000, 32000):
        rows = torch.cat([v.flatten(1) for v in posterior.sample(draws, seed=3).values()], dim=1)
        empirical = rows.T @ rows / draws
        # E‖Σ̂ − Σ‖² = (‖Σ‖² + (tr Σ)²) / draws for normal vectors
        spread = ((covariance.square().sum() + covariance.trace() ** 2) / draws).sqrt()
        missed.append(float((empirical - covariance).norm() / spread))
        # In coordinates where the covariance should be one, L and Lᵀ are told apart however small an eigenvalue is.
        root = torch.linalg.cholesky(precision)
        white = rows @ root
        assert (white.T @ white / draws - torch.eye(17)).abs().max() < 6 * (2 / draws) ** 0.5
    assert all(0.5 < ratio < 1.6 for ratio in missed), missed  # at both sizes: the error shrinks as 1/√draws


# Theorem 7: invariance ---------------------------------------------------------------------------------------------


class Reparametrised(nn.Module):
    """``Φ⁻¹ (W' Ω x̄)`` for ``W' = Φ W̄ Ω⁻¹``: the function of a layer in other coordinates of its inputs and outputs."""

    def __init__(self, layer: nn.Linear, inputs: Tensor, shift: Tensor, outputs: Tensor):
        super().__init__()
        size = len(inputs)
        self.register_buffer("inputs", inputs)
        self.register_buffer("shift", shift)
        self.register_buffer("outputs", torch.linalg.inv(outputs))
        self.omega = torch.eye(size + 1).double()
        self.omega[:size, :size], self.omega[:size, size] = inputs, shift
        self.phi = outputs
        with torch.no_grad():
            joined = torch.cat([layer.weight, layer.bias[:, None]], dim=1)
            joined = outputs @ joined @ torch.linalg.inv(self.omega)
            self.layer = nn.Linear(size, len(outputs)).double()
            self.layer.weight.copy_(joined[:, :-1])
            self.layer.bias.copy_(joined[:, -1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x @ self.inputs.T + self.shift) @ self.outputs.T


@pytest.mark.parametrize("axes", [(), (4,)], ids=str)
@pytest.mark.parametrize(
    ("fit", "group"),
    [
        ("kfac", "affine"),
        ("kfac-reduce", "affine"),
        ("ekfac", "orthogonal"),
        ("full", "affine"),
        ("tkfac", "orthogonal"),
        (kf.KL(0.0, 500, 1e-13), "affine"),
        (kf.KL(0.01, 500, 1e-13), "orthogonal"),
    ],
    ids=str,
)
def test_equivariance_under_reparametrisations_of_a_layer(axes, fit, group):
    layer = shake(nn.Linear(3, 4)).double()
    inputs, outputs, shift = torch.randn(3, 3).double(), torch.randn(4, 4).double(), torch.randn(3).double()
    if group == "orthogonal":  # also of the homogeneous coordinate, so without a shift
        inputs, outputs, shift = torch.linalg.qr(inputs).Q, torch.linalg.qr(outputs).Q, torch.zeros(3).double()
    other = Reparametrised(layer, inputs, shift, outputs)
    rest = (
        nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(4 * (axes[0] if axes else 1), 2))
        .double()
        .requires_grad_(False)
    )
    x = torch.randn(6, *axes, 3).double()
    old, new = nn.Sequential(layer, rest), nn.Sequential(other, rest)
    torch.testing.assert_close(new(x), old(x), rtol=0, atol=1e-10)

    mine, theirs = (kf.estimate(m, x, kf.Gaussian(), fit=fit, labels="exact") for m in (old, new))
    # G' = Φ⁻ᵀ G Ωᵀ, row-major
    change = torch.kron(torch.linalg.inv(outputs).T, other.omega)
    block, changed = mine["0.weight"].to_dense(), theirs["0.layer.weight"].to_dense()
    assert distance(changed, change @ block @ change.T) < 1e-10
    assert distance(changed, block) > 0.1  # the coordinates do differ


@pytest.mark.parametrize("fit", ["ekfac", "tkfac", kf.KL(0.01, 500, 1e-13)], ids=str)
def test_others_are_not_equivariant_under_affine_changes(fit):
    """What the test above could not tell if its change of coordinates were none."""
    with pytest.raises(AssertionError):
        test_equivariance_under_reparametrisations_of_a_layer((), fit, "affine")
