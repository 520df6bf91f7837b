"""The spectrum of rearranged blocks, against dense singular values in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from tests.fits.rearranged import estimate, rearranged
from tests.helpers.networks import Written, with_inputs

TIGHT = {"tolerance": 1e-12, "iterations": 400}


def kinds(R):
    """Singular values ``[H, ·]`` of the symmetric and of the antisymmetric half of ``ℛ(F) [H, O², I²]``."""
    outputs, inputs = round(R.shape[1] ** 0.5), round(R.shape[2] ** 0.5)
    M = R.view(len(R), outputs, outputs, inputs, inputs)
    even = ((M + M.transpose(1, 2)) / 2).reshape(R.shape)
    return torch.linalg.svdvals(even), torch.linalg.svdvals(R - even)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("fit", ["kfac", "diagonal", kf.KroneckerSum(2)])
def test_values_are_the_dense_ones_of_each_kind(shared, fit):
    model, x = with_inputs(shared)
    fisher = estimate(model, x, fit)
    truth = estimate(model, x, "full")
    found = fisher.spectrum([(part, None) for part in x.split(7)], rank=6, **TIGHT)
    assert found.keys() == rearranged(model, x).keys()
    for name, R in rearranged(model, x).items():
        even, odd = (values.norm(dim=0) for values in kinds(R))
        joined = torch.cat([even, odd])
        order = joined.argsort(descending=True)[:6]
        expected = joined[order] / truth[name].frobenius_norm()
        values, real = found[name].values, expected > 1e-7
        torch.testing.assert_close(values[: len(expected)], expected, rtol=1e-8, atol=1e-9)
        told = [odd for odd, some in zip(found[name].antisymmetric, real, strict=True) if some]
        assert told == [bool(k >= len(even)) for k, some in zip(order, real, strict=True) if some]
        assert found[name].residual < 1e-8 and found[name].samples >= len(x)
        assert any(told) == shared or not shared or name == "2.weight"
    if shared:
        assert any(any(spectrum.antisymmetric) for spectrum in found.values())


@pytest.mark.parametrize("rank", [1, 3])
def test_errors_are_those_of_the_best_sums(rank):
    model, x = with_inputs(False)
    fisher = estimate(model, x, kf.KroneckerSum(rank, tolerance=1e-9, iterations=300))
    measured = fisher.error(x).blocks
    for name, spectrum in fisher.spectrum(x, rank=4, **TIGHT).items():
        assert float(spectrum.errors[rank - 1]) == pytest.approx(measured[name], rel=1e-5)
        assert len(str(spectrum).splitlines()) == 4


def test_labels_are_those_of_the_estimate():
    model, x = with_inputs(False)
    fisher = kf.estimate(model, x, kf.Gaussian(), fit="full", seed=4)
    (best,) = (kf.estimate(model, x, kf.Gaussian(), fit=kf.KFOC(tolerance=1e-9), seed=4),)
    for name, spectrum in fisher.spectrum(x, rank=1, **TIGHT).items():
        assert float(spectrum.errors[0]) == pytest.approx(best.error(x).blocks[name], rel=1e-5)


def test_one_block_or_parted_ones():
    model, x = with_inputs(False)
    fisher = estimate(model, x, {"*.bias": "diagonal", "*": "kfac"})
    assert fisher.spectrum(x, "2.weight").keys() == {"2.weight"}
    everything = fisher.spectrum(x, rank=2)
    assert everything.keys() == set(fisher.blocks)
    assert everything["0.bias"].values[0] == pytest.approx(1)  # one input: a product is all there is


def test_what_cannot_be_told_is_refused():
    model, x = with_inputs(False)
    fisher = estimate(model, x, "kfac")
    with pytest.raises(kf.DataError, match=r"'3\.weight': there is no such block; there are 0\.weight, 2\.weight"):
        fisher.spectrum(x, "3.weight")
    with pytest.raises(ValueError, match="rank=0"):
        fisher.spectrum(x, rank=0)
    with pytest.raises(kf.MemoryBudgetError, match=r"0\.weight|2\.weight: the spectrum needs [\d,]+ bytes"):
        fisher.spectrum(x, memory_budget=100)
    positive = Written(lambda m, x: m.o(F.linear(x, m.w.abs())), w=torch.randn(2, 3), o=nn.Linear(2, 2)).double()
    inputs = torch.randn(5, 3).double()
    fisher = estimate(positive, inputs, "kfac")
    assert fisher.spectrum(inputs).keys() == {"o.weight"}
    with pytest.raises(kf.DataError, match="no samples of inputs and output gradients"):
        fisher.spectrum(inputs, "w")
    with torch.no_grad():
        model[2].weight.zero_()
    zero = estimate(model, x, "kfac").spectrum(x)["0.weight"]
    assert float(zero.values.sum()) == 0 and zero.residual == 0
