"""Everything that can be wrong with data, said in words that help."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import kronfisher as kf
from tests.capture.batches.data import X, Y
from tests.helpers.networks import Written


@pytest.mark.parametrize("data", [[], iter([]), DataLoader([], 3), ()], ids=["list", "iterator", "loader", "tuple"])
def test_no_data(model, data):
    with pytest.raises(kf.DataError, match=r"no batch|tuple of 0"):
        kf.estimate(model, data, kf.Gaussian())
    with pytest.raises(kf.DataError, match=r"no batch|tuple of 0"):
        kf.coverage(model, data)


@pytest.mark.parametrize("data", [None, 3, lambda: None], ids=["None", "number", "function"])
def test_what_is_no_data(model, data):
    with pytest.raises(kf.DataError, match="pass a loader"):
        kf.estimate(model, data, kf.Gaussian())


@pytest.mark.parametrize(
    "batch, message",
    [
        ((X, Y, Y), r"batch 0 is a tuple of 3 entries; pass \(inputs, targets\)"),
        ([X, Y, Y], "batch 0 is a list of 3 entries"),
        ("text", "batch 0 is a str"),
        (X[:0], r"batch 0 is empty: the outputs have shape \[0, 2\]"),
    ],
)
def test_batches_of_no_known_form(model, batch, message):
    with pytest.raises(kf.DataError, match=message):
        kf.estimate(model, [batch], kf.Gaussian())


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda m, x: (m.l(x), 0), "returned tuple, not a tensor. Give forward="),
        (lambda m, x: {"scores": m.l(x)}, r"returned dict with keys \['scores'\], not a tensor. Give forward="),
        (lambda m, x: {"logits": None}, r"returned dict with keys \['logits'\], not a tensor. Give forward="),
        (lambda m, x: None, "returned NoneType, not a tensor"),
        (lambda m, x: m.l(x).sum(), r"torch.float32 \[\].*one row per example \(not a loss\)"),
        (lambda m, x: m.l(x).argmax(1), "torch.int64"),
    ],
)
def test_outputs_of_no_known_form(function, message):
    with pytest.raises(kf.DataError, match=rf"batch 0: the model returned .*{message}|batch 0: the model {message}"):
        kf.estimate(Written(function, l=nn.Linear(3, 2)), X, kf.Gaussian())


def test_other_devices(model):
    with pytest.raises(kf.DataError, match=r"batch 1 is on meta, the model on cpu. Move one: batch.to\('cpu'\)"):
        kf.estimate(model, [(X, Y), (X.to("meta"), Y)], kf.Categorical())
    with pytest.raises(kf.DataError, match="batch 0: targets are on meta, outputs on cpu"):
        kf.estimate(model, (X, Y.to("meta")), kf.Categorical())
    with pytest.raises(kf.DataError, match="is on meta"):
        kf.coverage(model, X.to("meta"))


def test_other_dtypes_and_shapes_are_said_with_the_error_of_torch(model):
    for batch, said in ((X.double(), r"torch.float64 \[12, 3\]"), (X[:, :2], r"torch.float32 \[12, 2\]")):
        with pytest.raises(RuntimeError) as caught:
            kf.estimate(model, [(X, Y), (batch, Y)], kf.Categorical())
        note = " ".join(caught.value.__notes__)
        assert "in batch 1" in note and "parameters are torch.float32 on cpu" in note
        assert said.replace("\\", "") in note
    with pytest.raises(TypeError) as caught:
        kf.estimate(model, ((X, X), Y), kf.Categorical())
    assert "in batch 0" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "likelihood, targets, labels, message",
    [
        (kf.Categorical(), Y + 2, "observed", r"batch 1: label [23] is out of range for 2 classes"),
        (kf.Categorical(), Y[:, None], "sampled", "batch 1: Categorical needs targets of shape"),
        (kf.Categorical(), Y[:7], "sampled", "batch 1: targets .* differ in the number of examples"),
        (kf.Categorical(), Y.float(), "observed", "batch 1: Categorical needs integer class indices"),
        (kf.Categorical(), None, "observed", "batch 1: observed labels.* need targets"),
        (kf.Categorical(), [1] * 12, "observed", "batch 1: Categorical needs the targets to be a tensor, found list"),
        (kf.Gaussian(), torch.randn(12, 1), "observed", "batch 1: Gaussian needs targets of shape"),
        (kf.Gaussian(), torch.full((12, 2), torch.inf), "observed", "batch 1: Gaussian needs real, finite targets"),
        (kf.Bernoulli(), torch.full((12, 2), 1.5), "observed", "batch 1: "),
    ],
)
def test_targets_that_do_not_fit(model, likelihood, targets, labels, message):
    good = Y if isinstance(likelihood, kf.Categorical) else torch.rand(12, 2).round()
    with pytest.raises(kf.DataError, match=message):
        kf.estimate(model, [(X, good), (X, targets)], likelihood, labels=labels)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(model, bad):
    x = X.clone()
    x[3, 1] = bad
    if bad != bad:
        with pytest.raises(
            kf.NumericalError, match=r"batch 1: the batch contains 1 values that are NaN or Inf.*\[12, 3\]"
        ):
            kf.estimate(model, [(X, Y), (x, Y)], kf.Categorical())
    linear = nn.Linear(3, 2)
    with pytest.raises(kf.NumericalError, match="batch 0: the batch contains 1 values"):
        kf.estimate(linear, x, kf.Gaussian())
    linear.weight.data[0, 0] = bad
    with pytest.raises(
        kf.NumericalError, match="batch 0: the model's outputs contain NaN or Inf although the batch is finite"
    ):
        kf.estimate(linear, X, kf.Gaussian())


@pytest.mark.parametrize("fit", ["kfac", "ekfac", "diagonal", "full"])
def test_overflow_behind_finite_outputs_names_the_layer(fit):
    model = Written(
        lambda m, x: m.l1(torch.tanh(m.l0(x) * 1e30) * 1e30) * 1e-30, l0=nn.Linear(3, 3), l1=nn.Linear(3, 2)
    )
    model.l0.weight.data *= 1e-30
    model.l0.bias.data.zero_()
    with pytest.raises(kf.NumericalError, match=r"l[01]\.weight"):
        kf.estimate(model, X, kf.Gaussian(), fit=fit)
