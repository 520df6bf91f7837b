"""Inputs and gradients of any scale: the matrix of every fit scales with their squares, or is refused."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.fits import FITS

FITTED = {
    **{name: name for name in FITS if name != "kl"},  # whose damping has a scale of its own
    **{f"kronecker-sum, {method}": kf.KroneckerSum(method=method) for method in ("deflation", "gram", "nonnegative")},
}


@pytest.mark.parametrize(
    ("dtype", "power", "what"),
    [
        (torch.float64, -332, "inputs"),
        (torch.float64, -332, "gradients"),
        (torch.float64, 332, "gradients"),
        (torch.float32, -50, "inputs"),
    ],
)
@pytest.mark.parametrize("name", FITTED)
@pytest.mark.filterwarnings("ignore::kronfisher.NumericalWarning")
def test_the_matrix_scales_with_the_squares_of_inputs_and_gradients_or_is_refused(name, dtype, power, what):
    """Seen: a matrix of zeros of "kfoc-exact", an arbitrary choice of "auto", and reported errors of zero."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3, bias=False).to(dtype), torch.randn(12, 4, dtype=dtype)

    def estimate(scale):
        inputs, outputs = (scale, 1) if what == "inputs" else (1, scale)
        data = [(x[:5] * inputs, None), (x[5:] * inputs, None)]
        options = {"labels": "exact", "forward": lambda model, batch: (model(batch[0]) * outputs, None)}
        return kf.estimate(model, data, kf.Gaussian(), fit=FITTED[name], **options)

    usual = estimate(1.0)
    try:
        far = estimate(2.0**power)
    except kf.NumericalError:
        assert power > 0
        return
    found = (far.to_dense().double() * 2.0**-power) * 2.0**-power
    torch.testing.assert_close(found, usual.to_dense().double(), rtol=1e-4, atol=1e-6)
    reported, known = (fisher.info.blocks["weight"].error for fisher in (far, usual))
    assert reported is None or reported == pytest.approx(known, abs=2e-3)  # below that is rounding


@pytest.mark.parametrize("power", [-80, 80])
@pytest.mark.parametrize("name", FITTED)
def test_tiny_inputs_with_huge_gradients_and_the_other_way_round(name, power):
    """Seen: the zero matrix without a word from K-FOC, where inputs of 1e-24 met gradients of 1e24."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3, bias=False), torch.randn(12, 4)

    def estimate(scale):
        options = {"labels": "exact", "forward": lambda model, batch: (model(batch[0]) / scale, None)}
        return kf.estimate(model, [(x * scale, None)], kf.Gaussian(), fit=FITTED[name], **options).to_dense()

    usual = estimate(1.0)
    try:
        far = estimate(2.0**power)
    except kf.NumericalError:
        assert "kfoc" not in name or "ekfac" in name
        return
    torch.testing.assert_close(far, usual)
