"""Inputs that are made again in place of being kept: the same numbers, from less memory, for any pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import kronfisher as kf
from kronfisher.capture import remade
from kronfisher.capture.observation import observe
from kronfisher.fisher.parameters import trainable
from tests.helpers.truth import dense_fisher

OPERATORS = {
    "gelu": nn.GELU(),
    "tanh gelu": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "in place": nn.SiLU(inplace=True),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "softplus": nn.Softplus(),
    "layer norm": nn.LayerNorm(6),
    "bare layer norm": nn.LayerNorm(6, elementwise_affine=False),
    "rms norm": nn.RMSNorm(6),
    "group norm": nn.GroupNorm(2, 6),
}


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(remade, "_LARGE", 1)


class Positions(nn.Module):
    """A layer, an operator, and two layers that share its result, at three positions."""

    def __init__(self, operator):
        super().__init__()
        self.first, self.operator = nn.Linear(4, 6), operator
        self.left, self.right = nn.Linear(6, 2), nn.Linear(6, 2, bias=False)

    def forward(self, x):
        h = self.operator(self.first(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        return (self.left(h) * self.right(h)).sum(1)


def made(operator):
    torch.manual_seed(0)
    return Positions(operator).double(), torch.randn(5, 3, 4).double()


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("labels", ["exact", "observed"])
def test_the_fisher_matrix_is_the_dense_one(name, labels):
    model, x = made(OPERATORS[name])
    targets = torch.zeros(5, 2).double() if labels == "observed" else None
    batch = x if targets is None else (x, targets)
    fisher = kf.estimate(model, batch, kf.Gaussian(), fit=kf.Full(across_layers=True), labels=labels, strict=True)
    if labels == "exact":
        torch.testing.assert_close(fisher.to_dense(), dense_fisher(model, x, model(x).detach(), kf.Gaussian()))
    else:
        remade._LARGE = 2**60  # as they are kept
        kept = kf.estimate(model, batch, kf.Gaussian(), fit=kf.Full(across_layers=True), labels=labels, strict=True)
        assert torch.equal(fisher.to_dense(), kept.to_dense())


@pytest.mark.parametrize("fit", ["kfac", "kfoc", "ekfac"])
def test_every_bit_of_a_fit_is_as_from_inputs_that_are_kept(fit, monkeypatch):
    model, x = made(nn.GELU())
    options = {"fit": fit, "labels": "sampled", "samples": 2}
    fisher = kf.estimate(model, [(x,), (x + 1,)], kf.Gaussian(), **options)
    monkeypatch.setattr(remade, "_LARGE", 2**60)
    kept = kf.estimate(model, [(x,), (x + 1,)], kf.Gaussian(), **options)
    assert torch.equal(fisher @ torch.ones(fisher.dim).double(), kept @ torch.ones(fisher.dim).double())


@pytest.mark.parametrize(("large", "freed"), [(1, True), (2**60, False)])
def test_the_result_is_freed_between_forward_and_backward(large, freed, monkeypatch):
    monkeypatch.setattr(remade, "_LARGE", large)
    model, x = made(nn.GELU())
    storages = []
    model.operator.register_forward_hook(lambda *a: storages.append(StorageWeakRef(a[2].untyped_storage())))
    observation = observe(model, trainable(model), x, None, "batch 0")
    assert len(observation.calls) == 3 and storages[0].expired() is freed


def test_a_pass_for_gradients_of_weights_has_them_made_again():
    model, x = made(nn.GELU())
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    outputs = observe(model, trainable(model), x, None, "batch 0").outputs
    found = torch.autograd.grad(outputs.square().sum(), list(model.parameters()), create_graph=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    second = torch.autograd.grad(found[2].sum(), model.first.weight)
    graph = torch.autograd.grad(model(x).square().sum(), model.left.weight, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(graph[0].sum(), model.first.weight))


class Doubled(nn.Module):
    def forward(self, h):
        return F.gelu(h).mul_(2)


def test_a_result_that_changed_before_the_layer_is_kept():
    model, x = made(Doubled())
    fisher = kf.estimate(model, x, kf.Gaussian(), fit=kf.Full(across_layers=True), labels="exact", strict=True)
    torch.testing.assert_close(fisher.to_dense(), dense_fisher(model, x, model(x).detach(), kf.Gaussian()))


def test_what_is_modified_after_the_layer_is_refused():
    model, x = made(nn.GELU())

    def forward(model, x):
        h = model.first(x)
        outputs = model.left(F.gelu(h))
        h.mul_(2)
        return outputs.sum(1), None

    with pytest.raises((RuntimeError, kf.UnsupportedError), match=r"modified.* in.?place"):
        kf.estimate(model, x, kf.Gaussian(), fit="kfac", forward=forward)


@pytest.mark.parametrize("around", ["checkpoint", "autocast"])
def test_where_something_else_decides_what_is_saved_results_are_kept(around):
    model, x = made(nn.GELU())
    model, x = model.float(), x.float()

    def forward(model, x):
        if around == "checkpoint":
            return checkpoint(model, x, use_reentrant=False), None
        with torch.autocast("cpu", torch.bfloat16):
            return model(x), None

    fisher = kf.estimate(model, x, kf.Gaussian(), forward=forward, fit="kfac", labels="exact")
    remade._LARGE = 2**60
    kept = kf.estimate(model, x, kf.Gaussian(), forward=forward, fit="kfac", labels="exact")
    assert torch.equal(fisher @ torch.ones(fisher.dim), kept @ torch.ones(fisher.dim))
