"""Chains of layers for block-tridiagonal K-FAC: where they are cut, and what is said of it."""

import re

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.operators import Tridiagonal
from tests.helpers.networks import Written, perceptron


def layout(model, x, fit=None, **options):
    """Names of every group, and what the report says of cuts, for an estimate and for its announcement."""
    fit = fit or kf.BlockTridiagonal()
    fisher = kf.estimate(model, x, kf.Gaussian(), fit=fit, **options)
    groups = [[block.name for block in blocks] for blocks, _ in fisher.entries]
    text = str(fisher.report())
    cuts = kf.coverage(model, x, fit=fit).cuts
    for cut in cuts:
        assert cut in [note for block in fisher.info.blocks.values() for note in block.notes.split("; ")]
        assert cut in " ".join(text.split())
    assert all(cut in str(kf.coverage(model, x, fit=fit)) for cut in cuts)
    return groups, " | ".join(cuts)


def linear(*sizes):
    return {f"l{k}": nn.Linear(*pair) for k, pair in enumerate(sizes)}


def residual(m, x):
    h = m.l0(x).tanh()
    return m.l2(h + m.l1(h).tanh())


def branches(m, x):
    h = m.l0(x).tanh()
    return m.l1(h) + m.l2(h)


def leaving(m, x):
    h = m.l0(x).tanh()
    return m.l1(h) + h[:, :2]


def shuffled(m, x):
    return m.l1(m.l0(x).tanh()[torch.randperm(len(x))])


def tied(m, x):
    return m.l2(m.l1(m.l1(m.l0(x).tanh()).tanh()).tanh())


def transposed_tokens(m, x):
    return m.l1(m.l0(x).tanh().transpose(0, 1)).transpose(0, 1).flatten(1)


def swapped_positions(m, x):
    return m.l1(m.l0(x).tanh().flip(1)).flatten(1)


def pooled(m, x):
    return m.l1(m.l0(x).tanh().mean(1))


def autoencoder(m, x):
    return nn.functional.linear(m.l0(x).tanh(), m.l0.weight.t())


@pytest.mark.parametrize(
    ("function", "members", "shape", "groups", "message"),
    [
        (residual, linear((3, 4), (4, 4), (4, 2)), (6, 3), [["l0"], ["l1"], ["l2"]], "goes to l1.weight.*l2.weight"),
        (branches, linear((3, 4), (4, 2), (4, 2)), (6, 3), [["l0"], ["l1"], ["l2"]], "output of l0.weight.* goes to"),
        (leaving, linear((3, 4), (4, 2)), (6, 3), [["l0"], ["l1"]], "goes to l1.weight and the outputs"),
        (shuffled, linear((3, 4), (4, 2)), (30, 3), [["l0"], ["l1"]], "rows are reordered"),
        (tied, linear((3, 4), (4, 4), (4, 2)), (6, 3), [["l0"], ["l1"], ["l2"]], "l1.weight is used 2 times"),
        (transposed_tokens, linear((3, 4), (4, 2)), (6, 5, 3), [["l0"], ["l1"]], "rows are reordered"),
        (transposed_tokens, linear((3, 4), (4, 2)), (5, 5, 3), [["l0"], ["l1"]], "rows are reordered"),
        (swapped_positions, linear((3, 4), (4, 2)), (6, 5, 3), [["l0"], ["l1"]], "rows are reordered"),
        (pooled, linear((3, 4), (4, 2)), (6, 5, 3), [["l0"], ["l1"]], "l0.weight has 30 rows, l1.weight 6 "),
    ],
)
def test_chains_are_cut_where_the_model_is_none(function, members, shape, groups, message):
    torch.manual_seed(0)
    model, x = Written(function, **members).double(), torch.randn(shape).double()
    found, cuts = layout(model, x)
    assert found == [[f"{name}.weight" for name in group] for group in groups]
    assert re.search(message, cuts), cuts
    kfac = kf.estimate(model, x, kf.Gaussian(), fit="kfac")
    assert torch.equal(kf.estimate(model, x, kf.Gaussian(), fit="block-tridiagonal").to_dense(), kfac.to_dense())


@pytest.mark.parametrize(
    ("model", "shape", "groups", "message"),
    [
        (
            nn.Sequential(
                nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 3), nn.Linear(3, 2)
            ),
            (6, 1, 6, 6),
            [["0.weight"], ["2.weight"], ["4.weight", "5.weight"]],
            "0.weight has 96 rows, 2.weight 24 ",
        ),
        (
            nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 2)),
            (6, 3),
            [["0.weight"], ["1.weight"], ["1.bias"], ["3.weight", "4.weight"]],
            "layer_norm of 1.weight, 1.bias has several parameters",
        ),
        (
            nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 2, 3, padding=1, groups=2), nn.Flatten()),
            (6, 2, 4),
            [["0.weight"], ["1.weight"]],
            "1.weight has 2 groups",
        ),
        (
            nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 20), nn.Linear(20, 2), nn.Linear(2, 2)),
            (6, 3),
            [["0.weight"], ["1.weight"], ["2.weight"], ["3.weight"]],
            "1.weight has a factor of 20",
        ),
    ],
)
def test_chains_are_cut_at_layers_that_are_treated_otherwise(model, shape, groups, message):
    found, cuts = layout(model.double(), torch.randn(shape).double(), kf.BlockTridiagonal(kf.KFAC(max_dim=19)))
    assert found == groups
    assert message in cuts


def test_lookups_other_fits_and_the_fallback_cut_a_chain_and_frozen_layers_do_not():
    table = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    found, cuts = layout(table.double(), torch.randint(5, (7,)))
    assert found == [["0.weight"], ["1.weight", "3.weight"]] and "0.weight is looked up" in cuts
    model, x = perceptron(4, 5, 4, 3), torch.randn(9, 4).double()
    found, cuts = layout(model, x, {"2.*": "kfac", "*": kf.BlockTridiagonal()})
    assert found == [["0.weight"], ["2.weight"], ["4.weight"]] and "2.weight has another fit" in cuts
    layers = linear((3, 4), (4, 2))
    scaled = Written(lambda m, x: m.l1(m.l0(x) * torch.linalg.inv(m.w).sum()), w=torch.eye(2), **layers)
    found, cuts = layout(scaled.double(), torch.randn(6, 3).double())
    assert found == [["w"], ["l0.weight"], ["l1.weight"]] and "w is no matrix but a vector" in cuts
    weird = Written(lambda m, x: m.l1(torch.atan2(m.l0(x), m.w.sum())), w=torch.eye(2), **layers)
    found, cuts = layout(weird.double(), torch.randn(6, 3).double())
    assert ["l0.weight", "l1.weight"] in found and not cuts  # `w` is no call on the way from one to the other
    for p in model[2].parameters():
        p.requires_grad_(False)
    found, cuts = layout(model, x)
    assert found == [["0.weight", "4.weight"]] and not cuts


def test_dead_units_do_not_cut_a_chain():
    torch.manual_seed(0)
    model, x = perceptron(4, 3, 3, 2), torch.randn(12, 4).double()
    for k in (1, 3):
        model[k] = nn.ReLU()
    found, _ = layout(model, x)
    assert found == [["0.weight", "2.weight", "4.weight"]]
    with torch.no_grad():
        model[0].bias.fill_(-100)  # nothing passes
    found, cuts = layout(model, x)
    assert found == [["0.weight"], ["2.weight", "4.weight"]] and "no gradient passes from 2.weight to 0.weight" in cuts


def test_narrow_rectified_convolutions_are_a_chain():
    torch.manual_seed(0)
    for width in (1, 2, 3):
        model = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2, 3, padding=1), nn.Flatten()
        )
        for size in (1, 2, 20):
            found, cuts = layout(model.double(), torch.randn(size, 1, 6, 6).double())
            assert found == [["0.weight", "2.weight"]], cuts


def test_rows_that_are_picked_by_index_are_looked_at_in_every_batch():
    model = Written(lambda m, x: m.l1(m.l0(x).tanh()[x[:, 0].argsort()]), **linear((3, 4), (4, 2))).double()
    x = torch.randn(8, 3).double()
    x = x[x[:, 0].argsort()]  # in order, by chance
    fisher = kf.estimate(model, [(x,), (x + 1,)], kf.Gaussian(), fit=kf.BlockTridiagonal())
    assert isinstance(fisher["l0.weight"], Tridiagonal)
    with pytest.raises(kf.UnsupportedError, match="rows are reordered"):
        kf.estimate(model, [(x,), (x.flip(0),)], kf.Gaussian(), fit=kf.BlockTridiagonal())


def test_a_chain_that_another_batch_breaks_is_refused():
    model = Written(
        lambda m, x: m.l2(m.l1(m.l0(x)) if len(x) > 3 else m.l0(x)), **linear((3, 4), (4, 4), (4, 2))
    ).double()
    batches = [torch.randn(5, 3).double(), torch.randn(2, 3).double()]
    with pytest.raises(kf.UnsupportedError, match=r"batch 1: l0.weight, l1.weight: in earlier batches"):
        kf.estimate(model, batches, kf.Gaussian(), fit=kf.BlockTridiagonal())
    with pytest.raises(
        kf.UnsupportedError, match=r"batch 1: l0.weight, l2.weight: in earlier batches .*another comes between"
    ):
        kf.estimate(model, batches[::-1], kf.Gaussian(), fit=kf.BlockTridiagonal())
