"""Columns of the same examples wait and are treated together: the same answers, from fewer and shorter pieces."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

import kronfisher as kf
from kronfisher.capture import inner_product
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fits.columns import MOST, shares_columns, spread, together
from kronfisher.fits.rearrangement import Gram, Weights
from tests.fits.pieces import SHARP, random_samples


def columns(number, n=12, seed=0, **sizes):
    """Samples of the same inputs, in as many columns."""
    uses = [random_samples(n, seed=seed + column, **sizes) for column in range(number)]
    return together(uses[0], [use.gradients for use in uses[1:]])


def empty_state(fit):
    """Of a weight with 5 outputs and 7 inputs."""
    block = Block("w", "linear", Window.of("w", torch.zeros(1, 5, 7)))
    return fit.init((block,), fit.plan((block,), 8), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("outputs", [2, 5], ids=["packed", "by pairs"])
@pytest.mark.parametrize("source", [Weights, Gram])
def test_columns_are_samples_with_the_same_inputs(source, outputs):
    """Also where one batch has fewer columns than another, as where gradients of some were zero and never came."""
    piece = [
        columns(4 if outputs == 2 else 2, O=outputs),
        columns(2, n=5, seed=9, O=outputs),
        random_samples(3, O=outputs),
    ]
    joint, apart = source(piece), source(spread(piece))
    assert sum(map(len, piece)) == 20 and sum(map(len, spread(piece))) == (48 if outputs == 2 else 24) + 10 + 3
    A, B = (torch.randn(1, size, size, dtype=torch.float64) for size in (7, outputs))
    torch.testing.assert_close(joint.outputs(A + A.mT), apart.outputs(A + A.mT))
    torch.testing.assert_close(joint.inputs(B + B.mT), apart.inputs(B + B.mT))
    squared = joint.squared_norm(piece, 2**40), apart.squared_norm(spread(piece), 2**40)
    torch.testing.assert_close(*squared)
    pairs = [each.leading(None, 1e-12, 500) for each in (joint, apart)]
    for name in ("A", "B", "sigma"):
        torch.testing.assert_close(getattr(pairs[0], name), getattr(pairs[1], name))
    terms = [each.leading_terms(5, None, 1e-12, 500)[1:] for each in (joint, apart)]
    sums = [torch.einsum("rhij,rhkl->ijkl", *pair) for pair in terms]
    torch.testing.assert_close(*sums, rtol=1e-2, atol=1e-2 * float(sums[1].abs().max()))


@pytest.mark.parametrize("number, groups, outputs", [(1, 1, 5), (1, 2, 5), (3, 1, 5), (3, 1, 20)])
@pytest.mark.parametrize("source", [Weights, Gram])
def test_norms_of_more_samples_than_a_panel_are_those_of_all_pairs(source, number, groups, outputs):
    piece = [columns(number, n=300, H=groups, O=outputs) if number > 1 else random_samples(300, H=groups, O=outputs)]
    same, pairs = source(piece).squared_products()
    G = torch.cat([torch.cat(list(use.per_sample()), dim=1) for use in spread(piece)], dim=1)  # [H, n, O, I]
    products = torch.einsum("hkoi,hloi->kl", G, G).square()
    if number == 1:
        torch.testing.assert_close(same, products.diagonal().sum())
    torch.testing.assert_close(same + pairs, products.sum())


@pytest.mark.parametrize("labels", ["exact", "sampled"])
def test_eigenvalues_are_the_same_where_columns_do_not_share_the_squares_of_inputs(labels, monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()
    batches = [(torch.randn(n, 6, dtype=torch.float64), torch.randint(4, (n,))) for n in (30, 20)]
    options = {"fit": kf.EKFAC(), "labels": labels, "samples": 3 if labels == "sampled" else 1}
    shared = kf.estimate(model, batches, kf.Categorical(), **options)
    monkeypatch.setattr("kronfisher.fits.ekfac._SHARED", 0)
    apart = kf.estimate(model, batches, kf.Categorical(), **options)
    for name in shared.info.blocks:
        torch.testing.assert_close(shared[name].to_dense(), apart[name].to_dense())


@pytest.mark.parametrize("fit", [kf.KFOC(**SHARP), kf.KroneckerSum(tolerance=1e-12)], ids=["K-FOC", "two terms"])
def test_exact_labels_of_a_piece_of_examples_are_one_piece(fit):
    """A thousand samples of 250 examples: the best product or sum of all of them, whatever the batches."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5)).double()
    data = torch.randn(250, 6, dtype=torch.float64)
    options = {"fit": fit, "labels": "exact"}
    fisher = kf.estimate(model, list(data.split([100, 90, 60])), kf.Categorical(), **options)
    truth = kf.estimate(model, data, kf.Categorical(), fit="full", labels="exact")
    for name, info in fisher.info.blocks.items():
        outputs, inputs = 5, truth[name].dim // 5
        matrix = truth[name].to_dense().view(outputs, inputs, outputs, inputs).permute(0, 2, 1, 3)
        sigma = torch.linalg.svdvals(matrix.reshape(outputs**2, inputs**2))
        rank = getattr(fit, "rank", 1)
        best = sigma[rank:].square().sum().sqrt() / sigma.square().sum().sqrt()
        error = torch.linalg.matrix_norm(truth[name].to_dense() - fisher[name].to_dense())
        error = error / torch.linalg.matrix_norm(truth[name].to_dense())
        assert abs(float(error - best)) < 1e-8 and "pieces" not in info.notes
        assert info.error == pytest.approx(float(error), abs=1e-8)


@pytest.fixture
def brought(monkeypatch):
    """What reaches the states of a fit: (block, number of examples, columns, whether inputs are counted)."""
    found = []

    def watch(kind):
        update = kind.update

        def note(self, state, samples):
            (use,) = samples
            found.append((state.name, len(use), use.columns, use.first))
            return update(self, state, samples)

        monkeypatch.setattr(kind, "update", note)
        return found

    return watch


def estimate(fit, *sizes, n=20, **options):
    """Of a perceptron of these sizes in float64, with exact labels."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(*pair) for pair in pairwise(sizes)]
    model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), *layers[1:]).double()
    data = torch.randn(n, sizes[0], dtype=torch.float64)
    return kf.estimate(model, data, kf.Categorical(), fit=fit, labels="exact", **options)


@pytest.mark.parametrize("fit", [kf.KFAC(), kf.EKFAC(), kf.KFOC(), kf.KroneckerSum(), kf.Diagonal()], ids=repr)
def test_columns_of_the_same_examples_come_together(fit, brought):
    """Each with the inputs once; more of them in several parts, of which the first one counts the inputs."""
    assert columns(3, n=10).bytes == 8 * 10 * (7 + 3 * 5)
    found = brought(type(fit))
    estimate(fit, 6, 5, 4)
    passes = 2 if isinstance(fit, kf.EKFAC) else 1
    assert found == passes * [("2.weight", 20, 3, True), ("0.weight", 20, 3, True)]
    found.clear()
    estimate(fit, 6, 5, MOST + 6)
    hidden = [(n, columns, first) for name, n, columns, first in found if name == "0.weight"]
    assert hidden == passes * [(20, MOST, True), (20, 5, False)]


@pytest.mark.parametrize(
    "fit",
    [kf.KFAC(), kf.EKFAC(), kf.Diagonal(), kf.Full(), kf.KFOC(**SHARP), kf.KFACCorrected(tolerance=1e-12)],
    ids=repr,
)
@pytest.mark.parametrize("few", [0, 2**9], ids=["one by one", "two by two"])
def test_answers_do_not_depend_on_how_many_columns_come_together(fit, few, monkeypatch):
    together = estimate(fit, 6, 5, 4, n=12)
    monkeypatch.setattr("kronfisher.estimation.routing._FEW", few)
    apart = estimate(fit, 6, 5, 4, n=12)
    for name in together.info.blocks:
        torch.testing.assert_close(together[name].to_dense(), apart[name].to_dense(), rtol=1e-9, atol=1e-12)


PLAIN = [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 4)]


@pytest.mark.parametrize("fit", [kf.KFAC(), kf.EKFAC(), kf.KFOC(), kf.Diagonal()], ids=repr)
@pytest.mark.parametrize("samples", [0, 3], ids=["exact", "three draws"])
def test_all_columns_of_a_perceptron_take_one_pass(fit, samples, monkeypatch):
    """The same bits as of one pass after the other."""
    torch.manual_seed(0)
    model = nn.Sequential(*PLAIN)
    batches = [(torch.randn(n, 6), torch.randint(4, (n,))) for n in (12, 7)]
    options = {"labels": "sampled" if samples else "exact", "samples": samples or 1}
    passes, engine = [], inner_product._engine_run_backward

    def counted(*args, **kwargs):
        passes.append(args)
        return engine(*args, **kwargs)

    kf.estimate(model, batches, kf.Categorical(), fit=fit, **options)  # which knows the order of rows then
    monkeypatch.setattr(inner_product, "_engine_run_backward", counted)
    at_once = kf.estimate(model, batches, kf.Categorical(), fit=fit, **options)
    assert len(passes) == 2
    monkeypatch.setattr("kronfisher.estimation.accumulator._FEW", 0)
    one_by_one = kf.estimate(model, batches, kf.Categorical(), fit=fit, **options)
    assert len(passes) == 2 + 2 * 3
    for name in at_once.info.blocks:
        torch.testing.assert_close(at_once[name].to_dense(), one_by_one[name].to_dense())


class Double(torch.autograd.Function):
    """Twice a tensor, with a gradient of its own."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Other(nn.Module):
    """What happens to the hidden units is said by a function."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(6, 5), nn.Linear(5, 3), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def read(x):
    """Its gradient is read by a hook, which a pass with several cannot give it."""
    y = x.tanh()
    y.register_hook(lambda gradient: 2 * gradient if float(gradient.sum()) == 1e9 else None)
    return y


@pytest.mark.parametrize(
    "function",
    [
        Double.apply,
        read,
        lambda x: x.relu_(),
        lambda x: x[:, :4].tanh() @ torch.ones(4, 5).double(),
        lambda x: checkpoint(lambda y: dropout(y.tanh(), 0.5) + y, x, use_reentrant=False),
        lambda x: x * (x.detach() > 0),
        lambda x: x.softmax(-1).cumsum(-1),
    ],
    ids=["own function", "hook that reads", "in place", "narrowed", "checkpoint", "mask", "no rule"],
)
def test_other_networks_give_the_same_matrix_as_with_one_pass_after_the_other(function, monkeypatch):
    torch.manual_seed(0)
    model, data = Other(function).double(), torch.randn(20, 6, dtype=torch.float64)
    first = kf.estimate(model, data, kf.Categorical(), fit="kfac", labels="exact")
    monkeypatch.setattr("kronfisher.estimation.accumulator._FEW", 0)
    again = kf.estimate(model, data, kf.Categorical(), fit="kfac", labels="exact")
    for name in first.info.blocks:
        assert bool(first[name].to_dense().any())
        torch.testing.assert_close(first[name].to_dense(), again[name].to_dense(), rtol=1e-12, atol=1e-14)


def test_columns_come_one_by_one_where_rows_share_inputs_or_a_fit_wants_it(brought):
    """A convolution has positions, groups their own inputs; K-FAC-reduce and wide outputs of K-FOC want samples."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3, groups=2), torch.nn.Flatten(), torch.nn.Linear(8, 3))
    found, data = brought(kf.KFAC), torch.randn(10, 2, 4)
    kf.estimate(model, data, kf.Categorical(), fit="kfac", labels="exact")
    assert sorted((name, columns) for name, _, columns, _ in found) == 2 * [("0.weight", 1)] + [("2.weight", 2)]
    found.clear()
    kf.estimate(model, data, kf.Categorical(), fit="kfac-reduce", labels="exact")
    assert {columns for _, _, columns, _ in found} == {1}
    found.clear()
    brought(kf.KFOC)
    estimate(kf.KFOC(), 4, 60, 3)
    assert found == [("0.weight", 20, 1, True), ("2.weight", 20, 2, True), ("0.weight", 20, 1, False)]


def test_the_structure_chosen_for_a_layer_gets_the_columns_that_it_gets_by_name():
    chosen = estimate(kf.Auto(error=1.0, candidates=[kf.KFOC()]), 6, 5, 4, n=250)
    by_name = estimate(kf.KFOC(), 6, 5, 4, n=250)
    for name in chosen.info.blocks:
        assert torch.equal(chosen[name].to_dense(), by_name[name].to_dense())


def test_columns_are_for_few_outputs_and_positions_of_their_own():
    assert shares_columns((1, 40, 10)) and shares_columns((1, 100, 700)) and not shares_columns((1, 100, 100))
    assert not shares_columns((2, 4, 4))


def test_a_saved_state_goes_on_with_its_columns():
    torch.manual_seed(0)
    fit, state = kf.KFOC(), empty_state(kf.KFOC())
    state.waiting = [columns(3), columns(3, seed=5)]
    state.count = 24.0
    again = type(state).from_dict(state.to_dict(), state.blocks)
    assert torch.equal(fit.finish(state).A, fit.finish(again).A)
