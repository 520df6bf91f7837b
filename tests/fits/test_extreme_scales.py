"""Inputs and gradients of any scale: the matrix of every fit scales with their squares, or is refused."""

import warnings

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


@pytest.mark.parametrize("power", [-515, -530])  # entries of 1e-310 and 1e-319, of which digits are left
@pytest.mark.parametrize("name", [*(n for n in FITTED if n not in ("diagonal", "full")), "kpsvd"])
@pytest.mark.filterwarnings("ignore::kronfisher.NumericalWarning:kronfisher.operators")
def test_a_matrix_at_the_end_of_the_range_is_right_or_refused_or_said_to_vanish(name, power):
    """Seen: zero without a word from K-FOC, sums of products and TKFAC for inputs of 1e-155."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3, bias=False).double(), torch.randn(12, 4).double()
    fit = FITTED.get(name) or kf.KPSVD()
    usual = kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact").trace()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            far = kf.estimate(model, x * 2.0**power, kf.Gaussian(), fit=fit, labels="exact").trace()
        except kf.NumericalError as error:
            assert str(error).startswith("weight: ")
            return
    vanished = [w for w in told if "weight: its gradients are 1e+00 at most and its inputs" in str(w.message)]
    assert bool(vanished) == (float(far) == 0)
    if not vanished:
        assert float(far) * 2.0**-power * 2.0**-power == pytest.approx(float(usual), rel=2e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(kf.estimate(model, x * 0, kf.Gaussian(), fit=fit, labels="exact").trace()) == 0


@pytest.mark.parametrize(("dtype", "inputs", "gradients"), [
    (torch.float32, 2.0**-33, 2.0**-37), (torch.float32, 1, 2.0**-70), (torch.float64, 1, 2.0**-515),
])  # fmt: skip
@pytest.mark.parametrize("name", ["kfoc", "kfoc-exact", "kpsvd", "kfac-corrected", "kronecker-sum"])
@pytest.mark.filterwarnings("ignore::kronfisher.NumericalWarning")
def test_factors_of_a_matrix_below_the_range_are_right_or_zero_and_never_nan(name, dtype, inputs, gradients):
    """Seen: infinite and undefined factors from K-FOC, because one over a weight of 1e-43 was infinite."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3, bias=False).to(dtype), torch.randn(12, 4, dtype=dtype)
    fit = FITTED.get(name) or kf.KPSVD()

    def estimate(a, g):
        options = {"labels": "exact", "forward": lambda model, batch: (model(batch[0]) * g, None)}
        found = kf.estimate(model, [(x * a, None)], kf.Gaussian(), fit=fit, **options)["weight"]
        A, B = (factor.double().flatten(-2) for factor in (found.A, found.B))
        return torch.einsum("...i,...o->io", A / (a * g), B / (a * g))  # scaled before they are multiplied

    usual, far = estimate(1, 1), estimate(inputs, gradients)
    assert torch.equal(far, torch.zeros_like(far)) or float((far - usual).norm() / usual.norm()) < 0.05
