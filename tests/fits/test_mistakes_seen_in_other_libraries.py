"""Wrong results without an error, seen in other libraries: each is a test here, on data that are no identity."""

import pytest
import torch
from torch import Tensor, nn

import kronfisher as kf
from kronfisher.operators import Kronecker
from tests.conformance.taps import patches
from tests.helpers.checks import SETTLED
from tests.helpers.networks import perceptron, shake
from tests.helpers.truth import dense_fisher, positions

fits = pytest.mark.parametrize("fit", SETTLED)
DAMPING = 0.3


def distance(found: Tensor, truth: Tensor) -> float:
    assert truth.norm() > 1e-6, "nothing to compare"
    return float((found - truth).norm() / truth.norm())


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def exact(model: nn.Module, data, likelihood=None, fit="kfac", **options) -> kf.Fisher:
    return kf.estimate(model, data, likelihood or kf.Gaussian(), fit=fit, labels="exact", **options)


# Scale -------------------------------------------------------------------------------------------------------------


def accuracy(fit):
    """Fits that iterate until their own tolerance stop elsewhere when a group or a sample more is with them."""
    iterated = fit.startswith(("kfoc", "ekfac-kfoc", "kpsvd", "kfac-corrected", "kronecker-sum"))
    return 1e-3 if iterated else 1e-10


@fits
@pytest.mark.parametrize("samples", [1, 4, 16])
def test_trace_does_not_depend_on_the_number_of_label_draws(fit, samples):
    """Seen: the Monte-Carlo matrix divided by the number of draws twice, 16 times too small for 16 draws."""
    model, x = perceptron(3, 4, 3, shaken=True), torch.randn(480 // samples, 3).double()
    truth = exact(model, x, fit=fit).trace()
    trace = kf.estimate(model, x, kf.Gaussian(), fit=fit, samples=samples).trace()
    # A trace is a mean over 480 draws of terms whose deviation is below √2 times their mean.
    spread = (2 / 480) ** 0.5 * truth
    assert abs(trace - truth) < 4 * spread
    assert 4 * spread < truth / 3


@fits
@pytest.mark.parametrize("labels", ["exact", "observed"])
def test_scale_does_not_depend_on_the_batch_size(fit, labels):
    """Seen: the output factor shrinking as one over the squared batch size."""
    model, x, y = perceptron(3, 4, 3, shaken=True), torch.randn(3, 3).double(), torch.randn(3, 3).double()
    small, large = (
        kf.estimate(model, (x.repeat(k, 1), y.repeat(k, 1)), kf.Gaussian(), fit=fit, labels=labels) for k in (1, 64)
    )
    assert large.count == 64 * small.count
    assert distance(large.to_dense(), small.to_dense()) < accuracy(fit)


@fits
def test_linear_with_three_axes_is_a_convolution_of_one_pixel(fit):
    """Seen: the positions of a linear layer counted T times."""
    linear = shake(nn.Linear(3, 4)).double()
    conv = nn.Conv1d(3, 4, 1).double()
    with torch.no_grad():
        conv.weight.copy_(linear.weight[..., None])
        conv.bias.copy_(linear.bias)
    head = torch.randn(20, 2).double()

    class Flat(nn.Module):
        def __init__(self, layer, swap):
            super().__init__()
            self.layer, self.swap = layer, swap

        def forward(self, x):
            y = self.layer(x.mT).mT if self.swap else self.layer(x)
            return y.tanh().flatten(1) @ head

    x = torch.randn(6, 5, 3).double()
    ours, theirs = exact(Flat(linear, False), x, fit=fit), exact(Flat(conv, True), x, fit=fit)
    assert distance(ours.to_dense(), theirs.to_dense()) < 1e-10
    assert ours.rows["layer.weight"] == theirs.rows["layer.weight"]
    mine, other = ours["layer.weight"], theirs["layer.weight"]
    if isinstance(mine, Kronecker) and isinstance(other, Kronecker):
        assert distance(mine.A, other.A) < 1e-12 and distance(mine.B, other.B) < 1e-12


@pytest.mark.parametrize("fit", ["kfac", "kfac-reduce"])
def test_factors_are_second_moments_and_nothing_else(fit):
    """Seen: both factors scaled by two, or a scale moved between them. A of a bias alone has to be one."""
    layer = shake(nn.Linear(3, 4)).double()
    x = torch.randn(7, 3).double()
    operator = exact(layer, x, kf.Gaussian(0.25), fit=fit)["weight"]
    rows = torch.cat([x, torch.ones(7, 1).double()], dim=1)
    assert isinstance(operator, Kronecker)
    assert distance(operator.A[0], rows.T @ rows / 7) < 1e-12
    assert distance(operator.B[0], 4 * eye(4)) < 1e-12
    assert operator.A[0, -1, -1] == pytest.approx(1)


# Layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", SETTLED)
def test_grouped_convolution_is_so_many_convolutions(fit):
    """Seen: parameters of a grouped convolution counted as of a plain one, crashes, wrong per-sample gradients."""
    grouped = shake(nn.Conv2d(6, 9, 2, groups=3, stride=2, padding=1)).double()
    singles = nn.ModuleList(nn.Conv2d(2, 3, 2, stride=2, padding=1) for _ in range(3)).double()
    with torch.no_grad():
        for part, weight, bias in zip(singles, grouped.weight.chunk(3), grouped.bias.chunk(3), strict=True):
            part.weight.copy_(weight)
            part.bias.copy_(bias)

    class Parts(nn.Module):
        def __init__(self, parts):
            super().__init__()
            self.parts = parts

        def forward(self, x):
            parts = [part(c) for part, c in zip(self.parts, x.chunk(3, 1), strict=True)]
            return torch.cat(parts, dim=1).tanh().flatten(1) @ head

    head = torch.randn(9 * 9, 2).double()
    x = torch.randn(4, 6, 5, 4).double()
    whole = exact(nn.Sequential(grouped, nn.Tanh(), nn.Flatten(), Fixed(head)), x, fit=fit)
    apart = exact(Parts(singles), x, fit=fit)
    assert whole.dim == apart.dim == grouped.weight.numel() + grouped.bias.numel() == 81
    assert whole.to_dense().shape == (81, 81)
    # From (all weights, all biases) to weight and bias of each part in turn.
    weights, biases = torch.arange(72).reshape(3, -1), 72 + torch.arange(9).reshape(3, -1)
    order = torch.cat([weights, biases], dim=1).flatten()
    found = whole.to_dense()[order[:, None], order]
    if fit == "full":  # keeps the terms between groups too
        found = found * torch.block_diag(*torch.ones(3, 27, 27)).double()
    assert distance(found, apart.to_dense()) < accuracy(fit)


class Fixed(nn.Module):
    """A product with a matrix that is no parameter."""

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


@pytest.mark.parametrize(
    "options", [{"dilation": 2}, {"dilation": (1, 2), "padding": 1}, {"stride": 2, "dilation": 2}], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
def test_dilated_and_biasless_convolutions(options, bias):
    """Seen: dilation ignored (more patches than outputs, no error), crashes without a bias."""
    conv = shake(nn.Conv2d(2, 3, 2, bias=bias, **options)).double()
    x = torch.randn(4, 2, 5, 6).double()
    features = conv(x)[0].numel()
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), Fixed(torch.randn(features, 2).double()))
    truth = dense_fisher(model, x, torch.zeros(4, 2).double(), kf.Gaussian())
    assert distance(exact(model, x, fit="full").to_dense(), truth) < 1e-10
    assert distance(exact(model, x, fit="diagonal").to_dense(), truth.diagonal().diag()) < 1e-10
    rows = torch.cat([patches(conv, image)[0] for image in x])
    rows = torch.cat([rows, torch.ones(len(rows), 1).double()], dim=1) if bias else rows
    fisher = exact(model, x)
    assert fisher.rows["0.weight"] == len(rows) == features // 3 * 4
    assert distance(fisher["0.weight"].A[0], rows.T @ rows / len(rows)) < 1e-12


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (2, 1), (4, 1), ((2, 3), (3, 2))])
def test_padding_same_also_where_it_is_lopsided(kernel, dilation):
    conv = shake(nn.Conv2d(2, 3, kernel, padding="same", dilation=dilation)).double()
    x = torch.randn(4, 2, 4, 5).double()
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), Fixed(torch.randn(60, 2).double()))
    truth = dense_fisher(model, x, torch.zeros(4, 2).double(), kf.Gaussian())
    assert distance(exact(model, x, fit="full").to_dense(), truth) < 1e-10


@pytest.mark.parametrize("combine", ["stack", "cat", "split"])
def test_gradients_that_arrive_as_views(combine):
    """The gradient of a part of a stack is a window on the gradient of the whole, and begins somewhere inside."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            one, two, scales = self.one(x), self.two(x), torch.tensor([1.0, 5.0]).double()[:, None, None, None]
            if combine == "stack":
                return (torch.stack([one, two]) * scales).sum((0, 2))
            if combine == "cat":
                return (torch.cat([one, two]).unflatten(0, (2, -1)) * scales).sum((0, 2))
            first, second = torch.stack([one, two]).tanh().split(1)
            return (first * second.exp())[0].sum(1)

    model, x = Experts().double(), torch.randn(5, 4, 3).double()
    truth = dense_fisher(model, x, torch.zeros(5, 2).double(), kf.Gaussian())
    assert distance(exact(model, x, fit=kf.Full(across_layers=True)).to_dense(), truth) < 1e-10


# Likelihoods -------------------------------------------------------------------------------------------------------


def test_class_weights_and_ignored_labels_reach_the_matrix():
    """Seen: class weights and ignore_index left out (the trace of one example .977 instead of 4.886, or of 0)."""
    model = perceptron(3, 4, 3, shaken=True)
    x, weight = torch.randn(1, 3).double(), torch.tensor([5.0, 0.5, 2.0]).double()
    for label in range(3):
        y = torch.tensor([label])
        plain, weighted = kf.Categorical(), kf.Categorical(weight=weight)
        trace = exact(model, (x, y), weighted).trace()
        assert trace == pytest.approx(float(dense_fisher(model, x, y, weighted).trace()))
        assert trace == pytest.approx(float(weight[label] * exact(model, (x, y), plain).trace()))
        ignoring = exact(model, (x.expand(2, -1), torch.tensor([label, 9])), kf.Categorical(9, weight))
        assert ignoring.trace() == pytest.approx(float(trace)) and ignoring.count == 1
    with pytest.raises(kf.DataError, match="No example counts"):
        exact(model, (x, torch.tensor([9])), kf.Categorical(9))


# Operators ---------------------------------------------------------------------------------------------------------


@fits
def test_damping_is_added_once(fit):
    """Seen: λ added again at every product."""
    fisher = exact(perceptron(3, 4, 3, shaken=True), torch.randn(10, 3).double(), fit=fit)
    before, damped = fisher.to_dense(), fisher + DAMPING
    v = torch.randn(fisher.dim, 3).double()
    for _ in range(3):
        assert distance(damped @ v, before @ v + DAMPING * v) < 1e-12
        assert distance(damped.solve(v), torch.linalg.solve(before + DAMPING * eye(len(v)), v)) < 1e-10
        damped.logdet(), damped.sample(2)
    assert torch.equal(fisher.to_dense(), before)
    assert distance((damped + DAMPING).to_dense(), before + 2 * DAMPING * eye(len(v))) < 1e-12


@fits
def test_products_are_those_of_the_dense_matrix(fit):
    """Seen: products of the eigenvalue-corrected matrix off by more than its norm; a path that did not precondition."""
    fisher = exact(perceptron(3, 4, 3, shaken=True), torch.randn(10, 3).double(), fit=fit)
    dense, v = fisher.to_dense(), torch.randn(fisher.dim).double()
    assert distance(fisher @ v, dense @ v) < 1e-12
    damped = fisher + DAMPING
    solved = damped.solve(v)
    assert distance(damped @ solved, v) < 1e-10
    assert torch.cosine_similarity(solved, v, dim=0) < 0.99  # not merely scaled
    assert distance(damped.trace(), (dense + DAMPING * eye(len(v))).trace()) < 1e-12
    assert distance(damped.logdet(), torch.logdet(dense + DAMPING * eye(len(v)))) < 1e-10


@fits
def test_roots_are_roots(fit):
    """Seen: an inverse square root in place of a fourth root, which no test on identities notices."""
    fisher = exact(perceptron(3, 4, 3, shaken=True), torch.randn(10, 3).double(), fit=fit) + DAMPING
    dense = fisher.to_dense()
    root, inverse_root = fisher.sqrt().to_dense(), fisher.inverse_sqrt().to_dense()
    assert distance(root @ root, dense) < 1e-10
    assert distance(inverse_root @ inverse_root @ dense, eye(len(dense))) < 1e-10


@pytest.mark.parametrize("fit", [name for name in SETTLED if name != "kl"])  # which fits F + λ: never zero
@pytest.mark.parametrize("damping", [DAMPING, kf.FactoredTikhonov(DAMPING)], ids=["exact", "factored"])
def test_zero_curvature_meets_a_prior(fit, damping):
    """Seen: a crash, or a prior that is lost, where a layer has no curvature at all."""
    model = perceptron(3, 4, 3, shaken=True)
    with torch.no_grad():
        model[2].weight.zero_()  # nothing flows back into the first layer
    fisher = exact(model, torch.randn(10, 3).double(), fit=fit)
    first = positions(model)["0.weight"].flatten()
    diagonal = fisher.diagonal()
    assert float(diagonal["0.weight"].sum()) == 0 and float(diagonal["2.weight"].sum()) > 0.1
    damped = fisher + damping
    v = torch.randn(fisher.dim).double()
    assert distance(damped.solve(v)[first], v[first] / DAMPING) < 1e-10
    draws = damped.sample(4000)["0.weight"]
    assert float(draws.var()) == pytest.approx(1 / DAMPING, rel=0.1)


@fits
def test_equal_damping_of_a_scaled_matrix(fit):
    """Seen: factored damping that depends on how a scale is split between the factors."""
    fisher = exact(perceptron(3, 4, 3, shaken=True), torch.randn(10, 3).double(), fit=fit)
    one = (100 * fisher + kf.FactoredTikhonov(100 * DAMPING)).to_dense()
    two = (fisher + kf.FactoredTikhonov(DAMPING)).to_dense()
    assert distance(one, 100 * two) < 1e-10
    for operator in fisher.blocks.values():
        if isinstance(operator, Kronecker):
            split = Kronecker(operator.A * 50, operator.B / 50, operator.name) + kf.FactoredTikhonov(DAMPING)
            assert distance(split.to_dense(), (operator + kf.FactoredTikhonov(DAMPING)).to_dense()) < 1e-10


# Frozen layers -----------------------------------------------------------------------------------------------------


@fits
@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_frozen_parameters_stay_frozen_and_out(fit, frozen):
    """Seen: layers unfrozen by the tool."""
    model, x = perceptron(3, 4, 3, shaken=True), torch.randn(10, 3).double()
    everything = dense_fisher(model, x, torch.zeros(10, 3).double(), kf.Gaussian())
    places = positions(model)
    model.get_parameter(frozen).requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    fisher = exact(model, x, fit=fit)
    fisher.error(x)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert frozen not in fisher.names and set(fisher.names) == set(places) - {frozen}
    # What is left is a part of the whole.
    rest = torch.cat([places[name].flatten() for name in fisher.names])
    across = exact(model, x, fit=kf.Full(across_layers=True)).to_dense()
    assert distance(across, everything[rest[:, None], rest]) < 1e-10
    if fit in ("diagonal", "full"):
        found = torch.cat([d.flatten() for d in fisher.diagonal().values()])
        assert distance(found, everything.diagonal()[rest]) < 1e-10
