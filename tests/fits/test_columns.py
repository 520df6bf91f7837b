"""Columns of the same examples wait and are treated together: the same answers, from fewer and shorter pieces."""

from dataclasses import replace

import pytest
import torch

import kronfisher as kf
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fits.columns import MOST, Columns, joined, shares_columns, spread
from kronfisher.fits.rearrangement import Gram, Weights
from kronfisher.layers.activations import Dense
from kronfisher.layers.samples import Samples
from tests.fits.pieces import SHARP, random_samples


def columns(number, n=12, seed=0, **sizes):
    """Samples of the same inputs, in as many columns, joined as they come."""
    uses = [random_samples(n, seed=seed + column, **sizes) for column in range(number)]
    together = uses[0]
    for use in uses[1:]:
        together = joined(together, replace(use, first=False))
    return together


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
    together, apart = source(piece), source(spread(piece))
    assert sum(map(len, piece)) == 20 and sum(map(len, spread(piece))) == (48 if outputs == 2 else 24) + 10 + 3
    A, B = (torch.randn(1, size, size, dtype=torch.float64) for size in (7, outputs))
    torch.testing.assert_close(together.outputs(A + A.mT), apart.outputs(A + A.mT))
    torch.testing.assert_close(together.inputs(B + B.mT), apart.inputs(B + B.mT))
    squared = together.squared_norm(piece, 2**40), apart.squared_norm(spread(piece), 2**40)
    torch.testing.assert_close(*squared)
    pairs = [each.leading(None, 1e-12, 500) for each in (together, apart)]
    for name in ("A", "B", "sigma"):
        torch.testing.assert_close(getattr(pairs[0], name), getattr(pairs[1], name))
    terms = [each.leading_terms(5, None, 1e-12, 500)[1:] for each in (together, apart)]
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


def test_inputs_wait_once():
    """Columns share the copy of their inputs; others, and those of other examples, have their own."""
    fit, state = kf.KFOC(), empty_state(kf.KFOC())
    inputs = Dense(torch.randn(1, 10, 1, 7, dtype=torch.float64))
    for column in range(3):
        gradients = torch.randn(1, 10, 1, 5, dtype=torch.float64)
        state = fit.update(state, (Samples(inputs, gradients, first=column == 0),))
    (waits,) = state.waiting
    assert isinstance(waits, Columns) and waits.columns == 3 and len(waits) == 10 and waits.bytes == 8 * 10 * (7 + 15)
    other = Dense(inputs.values.clone())
    state = fit.update(state, (Samples(other, gradients, first=False),))
    state = fit.update(state, (Samples(other, gradients, first=True),))
    assert len(state.waiting) == 3


def test_columns_are_for_few_outputs_and_positions_of_their_own():
    assert shares_columns((1, 40, 10)) and shares_columns((1, 100, 700)) and not shares_columns((1, 100, 100))
    assert not shares_columns((2, 4, 4))
    assert joined(random_samples(4, T=2), random_samples(4, T=2)) is None
    assert joined(columns(MOST, n=2), random_samples(2)) is None


def test_a_saved_state_goes_on_with_its_columns():
    torch.manual_seed(0)
    fit, state = kf.KFOC(), empty_state(kf.KFOC())
    state.waiting = [columns(3), columns(3, seed=5)]
    state.count = 24.0
    again = type(state).from_dict(state.to_dict(), state.blocks)
    assert torch.equal(fit.finish(state).A, fit.finish(again).A)
