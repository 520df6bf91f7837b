"""The distance from the truth: the same number as with dense matrices, whatever was done to the matrix, on any data."""

import weakref

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.estimation import error as module
from kronfisher.fits import FITS
from kronfisher.layers.activations import Dense
from kronfisher.layers.samples import Samples
from kronfisher.operators import KroneckerSum
from tests.helpers.networks import Written
from tests.helpers.optional import require
from tests.helpers.truth import exact_fisher

FITS_TO_TRY = [
    *sorted(FITS),
    {"0.*": "ekfac", "2.weight": "kfac", "*": "diagonal"},
    {"*.bias": "full", "*": "kfac-reduce"},
]


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.fixture
def x():
    return torch.randn(9, 3).double()


def by_hand(fisher, truth):
    """Relative distance of the blocks together, densely, in float64."""
    positions = torch.zeros_like(truth)
    start, index = 0, {}
    for name, shape in fisher.shapes.items():
        index[name] = torch.arange(start, start := start + shape.numel())
    for blocks, _ in fisher.entries:
        rows = torch.cat([index[name] for name in dict.fromkeys(n for b in blocks for n in b.parameters)])
        positions[rows[:, None], rows] = 1
    return float((fisher.to_dense() - truth * positions).norm() / (truth * positions).norm())


@pytest.mark.parametrize("written", [0, 2048], ids=["pairs of samples", "written out"])
@pytest.mark.parametrize("fit", FITS_TO_TRY, ids=str)
def test_agrees_with_dense_matrices(model, x, fit, written, monkeypatch):
    monkeypatch.setattr(module, "_WRITTEN_OUT", written)
    fisher = kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact")
    other = torch.randn(7, 3).double() * 2
    for data in (x, other, [other[:2], other[2:]]):
        truth = exact_fisher(model, data)
        found = fisher.error(data)
        assert found.relative == pytest.approx(by_hand(fisher, truth), rel=1e-6, abs=1e-7)
        assert found.count == (9 if data is x else 7) and list(found.blocks) == list(fisher.blocks)
    for changed in (fisher + 0.3, 2.5 * fisher, fisher + fisher, fisher + kf.FactoredTikhonov(0.1), fisher / 3):
        truth = exact_fisher(model, x)
        assert changed.error(x).relative == pytest.approx(by_hand(changed, truth), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("written", [0, 2048])
@pytest.mark.parametrize("fit", ["kfac", "ekfac", "diagonal"])
def test_convolutions_and_shared_weights(fit, written, monkeypatch):
    monkeypatch.setattr(module, "_WRITTEN_OUT", written)
    model = nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)).double()
    x = torch.randn(6, 2, 5).double()
    fisher = kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact")
    full = kf.estimate(model, x, kf.Gaussian(), fit="full", labels="exact")
    for name, error in fisher.error([x[:1], x[1:]]).blocks.items():
        dense, truth = fisher[name].to_dense(), full[name].to_dense()
        assert error == pytest.approx(float((dense - truth).norm() / truth.norm()), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("written", [0, 2048])
def test_reductions(model, x, written, monkeypatch):
    monkeypatch.setattr(module, "_WRITTEN_OUT", written)
    mean = kf.estimate(model, x, kf.Gaussian())
    total, direct = mean.reduced("sum"), kf.estimate(model, x, kf.Gaussian(), reduction="sum")
    error = mean.error(x)
    for fisher in (total, direct):
        found = fisher.error(x)
        assert found.relative == pytest.approx(error.relative)
        assert found.norms["0.weight"] == pytest.approx(9 * error.norms["0.weight"])
    damped = total + 9 * 0.2  # of the sum
    assert damped.error(x).relative == pytest.approx((mean + 0.2).error(x).relative)


def test_sampled_labels_are_drawn_again_alike(model, x):
    """The truth is taken under the very draws of the estimate, so that an exact structure has no error."""
    for samples in (1, 3):
        fisher = kf.estimate(model, [x[:4], x[4:]], kf.Gaussian(), fit="full", samples=samples, seed=7)
        assert fisher.error(x).relative < 1e-12
        assert fisher.error(torch.randn(9, 3).double()).relative > 0.01
    dropping = nn.Sequential(model, nn.Dropout(0.5))
    assert kf.estimate(dropping, [x, x], kf.Gaussian(), fit="full", seed=3).error([x, x]).relative < 1e-12


def test_better_structures_have_smaller_errors(model, x):
    errors = {fit: kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact").error(x).relative for fit in FITS}
    assert errors["full"] < 1e-12 < errors["ekfac"] <= errors["kfac"] and errors["ekfac"] < errors["diagonal"]


def test_weights_in_pieces(x):
    """Several blocks of one parameter, some with biases that are shared out alike."""
    model = Written(
        lambda m, x: sum(torch.tanh(k * nn.functional.linear(x, w, b)) for k, (w, b) in enumerate(m.pieces(), 1)),
        w=torch.randn(4, 3).double(), b=torch.randn(4).double(),
    )  # fmt: skip
    model.pieces = lambda: zip(model.w.split(2), model.b.split(2), strict=True)
    fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact")
    full = kf.estimate(model, x, kf.Gaussian(), labels="exact", fit="full")
    assert list(fisher.error(x).blocks) == ["w[0:2, :]", "w[2:4, :]"] and full.error(x).relative < 1e-12
    parts = exact_fisher(model, x)
    rows = torch.tensor([0, 1, 2, 12, 3, 4, 5, 13]), torch.tensor([6, 7, 8, 14, 9, 10, 11, 15])
    for (name, error), index in zip(fisher.error(x).blocks.items(), rows, strict=True):
        truth = parts[index[:, None], index]
        assert error == pytest.approx(float((fisher[name].to_dense() - truth).norm() / truth.norm()), rel=1e-6)


def test_across_layers(model, x):
    fisher = kf.estimate(model, x, kf.Gaussian(), fit=kf.Full(across_layers=True), labels="exact")
    assert fisher.error(x).relative < 1e-12
    assert fisher.error(-x).relative == pytest.approx(by_hand(fisher, exact_fisher(model, -x)))


def test_zero():
    silent = Written(lambda m, x: m.l1((m.l0(x) - 100).relu()), l0=nn.Linear(3, 3), l1=nn.Linear(3, 2))
    x = torch.randn(5, 3)
    fisher = kf.estimate(silent, x, kf.Gaussian(), labels="exact")
    found = fisher.error(x)
    assert found.blocks["l0.weight"] == 0 and found.norms["l0.weight"] == 0
    damped = (fisher + 1.0).error(x)
    assert damped.blocks["l0.weight"] == float("inf")
    assert damped.relative == pytest.approx(float(torch.tensor([12.0, 8.0]).sum().sqrt()) / damped.norms["l1.weight"])
    silent.l1.weight.requires_grad_(False)
    silent.l1.bias.requires_grad_(False)
    nothing = kf.estimate(silent, x, kf.Gaussian(), labels="exact")
    assert nothing.trace() == 0 and nothing.error(x).relative == 0
    assert (nothing + 1.0).error(x).relative == float("inf")


def test_unused_parameters():
    model = Written(lambda m, x: m.a(x) + (m.b(x) if x.sum() > 0 else 0), a=nn.Linear(3, 2), b=nn.Linear(3, 2))
    x = torch.rand(5, 3)
    without, with_both = (kf.estimate(model, data, kf.Gaussian(), labels="exact") for data in (-x, x))
    assert without.error(-x).blocks["b.weight"] == 0
    assert with_both.error(-x).blocks["b.weight"] == float("inf")
    with pytest.raises(
        kf.DataError, match=r"b\.weight: the model uses these parameters in another way.*did not use them"
    ):
        without.error(x)


def test_precision_and_place_of_the_matrix_do_not_matter(model, x):
    fisher = kf.estimate(model, x, kf.Gaussian(), fit="ekfac")
    assert fisher.to(dtype=torch.float32).error(x).relative == pytest.approx(fisher.error(x).relative, rel=1e-3)
    single = kf.estimate(model.float(), x.float(), kf.Gaussian(), fit="ekfac")
    assert single.to(dtype=torch.float64).error(x.float()).relative == pytest.approx(single.error(x.float()).relative)


@pytest.mark.parametrize("change", ["inverse", "sqrt", "inverse_sqrt"])
def test_what_approximates_nothing_has_no_error(model, x, change):
    fisher = getattr(kf.estimate(model, x, kf.Gaussian()) + 1.0, change)()
    with pytest.raises(kf.DataError, match="no longer an approximation of the Fisher matrix"):
        fisher.error(x)


def test_after_loading_it_says_that_it_knows_no_model(model, x, tmp_path):
    require("safetensors")
    kf.estimate(model, x, kf.Gaussian()).save(tmp_path / "fisher.safetensors")
    with pytest.raises(kf.DataError, match="knows no model"):
        kf.load(tmp_path / "fisher.safetensors", model).error(x)


def test_a_model_that_was_changed(model, x):
    fisher = kf.estimate(model, x, kf.Gaussian())
    model[0].weight.requires_grad_(False)
    with pytest.raises(kf.DataError, match=r"trainable parameters .* not those of the matrix \(0\.weight\)"):
        fisher.error(x)
    model[0].weight.requires_grad_(True)
    fisher.error(x)


def test_budget(model, x, monkeypatch):
    monkeypatch.setattr(module, "_WRITTEN_OUT", 0)
    fisher = kf.estimate(
        model, x, kf.Gaussian(), memory_budget=1200, fit="kfac"
    )  # enough for the matrices, and no more
    assert fisher.error(x).relative > 0  # which binds the estimate only
    with pytest.raises(
        kf.MemoryBudgetError, match=r"2\.weight: the exact error needs [\d,]+ bytes .* than the 100 there"
    ):
        fisher.error(x, memory_budget=100)
    both = 8 * 9 * (4 + 4 + 5 + 2)  # inputs with ones, and gradients, of two layers
    assert fisher.error([x], memory_budget=both).relative > 0
    with pytest.raises(kf.MemoryBudgetError, match=rf"0\.weight: the exact error needs {both:,} bytes"):
        fisher.error([x], memory_budget=both - 1)  # one budget for all layers
    monkeypatch.setattr(module, "_WRITTEN_OUT", 2048)
    with pytest.raises(kf.MemoryBudgetError, match="more than the memory_budget of 100 bytes"):
        fisher.error(x, memory_budget=100)


def test_numbers_that_are_none(model, x):
    fisher = kf.estimate(model, x, kf.Gaussian())
    with pytest.raises(kf.NumericalError, match="batch 0: the batch contains 1 values"):
        fisher.error(torch.where(x == x[0, 0], float("nan"), x))


def test_all_targets_ignored(model, x):
    nothing = torch.full((9,), -100)
    with pytest.raises(kf.DataError, match="No example counts"):
        kf.estimate(model, (x, nothing), kf.Categorical())
    fisher = kf.estimate(model, (x, nothing * 0), kf.Categorical())
    with pytest.raises(kf.DataError, match="No example counts"):
        fisher.error((x, nothing))
    half = torch.cat([nothing[:4], nothing[4:] * 0])
    assert fisher.error((x, half)).count == 5


def test_nothing_is_kept_and_it_shows_in_the_report(model, x, monkeypatch):
    monkeypatch.setattr(module, "_WRITTEN_OUT", 0)
    made = []
    begin = module.Kept.__init__
    monkeypatch.setattr(module.Kept, "__init__", lambda self, *a: (begin(self, *a), made.append(weakref.ref(self)))[0])
    fisher = kf.estimate(model, x, kf.Gaussian())
    found = fisher.error(x)
    assert len(made) == 1 and made[0]() is None
    assert str(found).splitlines()[-1].split() == ["all", f"{found.relative:.4f}"]
    assert [row.error for row in fisher.report().rows] == list(found.blocks.values())


@pytest.mark.parametrize("positions", [1, 3])
def test_quadratic_forms_of_sums_of_products_term_by_term(positions):
    a, g = torch.randn(2, 5, positions, 3).double(), torch.randn(2, 5, positions, 2).double()
    A, B = torch.randn(3, 2, 3, 3).double(), torch.randn(3, 2, 2, 2).double()
    A, B = (torch.cat([side[:2] + side[:2].mT, side[2:] - side[2:].mT]) for side in (A, B))  # the last antisymmetric
    X = KroneckerSum(A, B, shift=0.7)
    rows = (g.mT @ a).transpose(0, 1).flatten(1)
    truth = (rows @ X.to_dense() * rows).sum()
    without = (rows @ KroneckerSum(A[:2], B[:2], shift=0.7).to_dense() * rows).sum()
    torch.testing.assert_close(X.quadratic(Samples(Dense(a), g)), truth)
    assert abs(truth - without) > 1e-3 or positions == 1  # one position has no antisymmetric part
