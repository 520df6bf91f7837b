"""An error is reported only where it holds; zero gradients, unknown settings and lost damping have plain answers."""

import warnings

import pytest
import torch
from torch import nn

import kronfisher as kf


def tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.middle, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(torch.tanh(self.middle(self.embedding(x))))

    torch.manual_seed(0)
    return Tied(), torch.randint(0, 6, (10, 5))


@pytest.mark.parametrize("fit", ["kfoc", kf.KroneckerSum(2), kf.Auto()], ids=repr)
def test_a_weight_in_two_roles_has_no_error_of_one_of_them(fit):
    model, x = tied()
    fisher = kf.estimate(model, x, kf.Categorical(class_dim=-1), fit=fit, labels="exact")
    info = fisher.info.blocks["embedding.weight"]
    assert info.error is None and "two roles" in info.notes and info.rows == 100
    assert fisher.error(x).blocks["embedding.weight"] > 0.3


@pytest.mark.parametrize("method", ["lanczos", "deflation", "gram", "nonnegative", None])
def test_gradients_of_zero_make_a_zero_sum(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    nn.init.zeros_(model[2].weight)  # so that nothing comes back to the first layer
    fit = kf.KFACCorrected() if method is None else kf.KroneckerSum(2, method)
    fisher = kf.estimate(model, torch.randn(32, 64), kf.Categorical(), fit=fit)
    assert float(fisher["0.weight"].frobenius_norm()) == 0 < float(fisher["2.weight"].frobenius_norm())


def test_a_report_says_how_to_learn_an_error_that_is_too_dear_in_passing(monkeypatch):
    """Of a convolution with many examples, say, whose ‖F‖ takes the products of all pairs of gradients."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 3)), torch.randn(20, 1, 5, 5)
    hint = "fisher.error(data) does that"
    known = kf.estimate(model, x, kf.Categorical())
    assert known.info.blocks["0.weight"].error is not None and hint not in str(known.report())
    monkeypatch.setattr("kronfisher.fits.merging._PAIRS", 0)
    fisher = kf.estimate(model, x, kf.Categorical())
    assert fisher.info.blocks["0.weight"].error is None and hint in fisher.info.blocks["0.weight"].notes
    assert hint in " ".join(str(fisher.report()).split()) and fisher.error(x).blocks["0.weight"] > 0


def test_sums_of_several_pieces_call_their_error_an_estimate():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4).double(), torch.randn(1500, 6).double() * torch.linspace(0.1, 3, 1500)[:, None]
    notes = {}
    for memory in (None, 2):
        fisher = kf.estimate(model, x, kf.Categorical(), fit=kf.KroneckerSum(2, memory=memory))
        notes[memory] = fisher.info.blocks["weight"]
    assert notes[None].error is not None and "error from their terms" in notes[None].notes
    assert notes[2].error is None


def test_names_of_fits_do_as_their_bases():
    assert kf.EKFAC("kfoc") == kf.EKFAC(kf.KFOC()) and kf.BlockTridiagonal("kfac") == kf.BlockTridiagonal()
    with pytest.raises(ValueError, match="not known"):
        kf.EKFAC("kfok")


def test_weights_without_labels_suffice():
    model, x, w = nn.Linear(3, 4), torch.randn(10, 3), torch.rand(10)
    for likelihood in (kf.Categorical(), kf.Poisson(), kf.Bernoulli(), kf.Gaussian()):
        fisher = kf.estimate(model, (x, (None, w)), kf.Weighted(likelihood), labels="exact")
        assert fisher.info.log_likelihood is None and float(fisher.trace()) > 0


def test_another_reduction_is_refused():
    fisher = kf.estimate(nn.Linear(3, 4), torch.randn(10, 3), kf.Gaussian(), fit="kfac")
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        fisher.reduced("Sum")


def test_damping_below_the_precision_is_said_to_be():
    torch.manual_seed(0)
    x = torch.randn(30, 5)
    x[:, 0] = x[:, 0].abs() * 1e4
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    nn.init.normal_(model[0].weight, std=1e-5)
    for fit in (kf.KroneckerSum(2), kf.KroneckerSum(2, "nonnegative")):
        operator = kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact")["0.weight"] + 1e-3
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            operator.solve(torch.ones(operator.dim))
        texts = [str(each.message) for each in caught if issubclass(each.category, kf.NumericalWarning)]
        assert any("below the torch.float32 precision" in text for text in texts)
        assert any("relative residual" in text for text in texts) == (operator.convergence.residual > 1e-2)
        assert operator.convergence.converged == (operator.convergence.residual <= 1e-2)


@pytest.mark.parametrize("fit", [kf.EKFAC(), kf.Prototypes()], ids=repr)
@pytest.mark.parametrize(("dtype", "value", "lost"), [("float32", 1e-4, 1), ("float32", 1e3, 0), ("float64", 1e-4, 0)])
def test_every_spectrum_tells_of_a_lost_damping_where_it_was_added(fit, dtype, value, lost):
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    model, x = nn.Linear(4, 3, dtype=dtype), 1e4 * torch.randn(30, 4, dtype=dtype)
    operator = kf.estimate(model, x, kf.Gaussian(), fit=fit)["weight"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _ = operator + value
    told = [each for each in caught if "precision of the largest eigenvalue" in str(each.message)]
    assert len(told) == lost and all(each.filename == __file__ for each in told)
