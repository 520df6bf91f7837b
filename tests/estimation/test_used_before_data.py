"""Parameters that only a later batch shows to need the fallback: the order of batches, the error of the estimate."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from kronfisher.errors import UnsupportedError
from tests.helpers.checks import assert_exact
from tests.helpers.networks import Written

WEIGHTS = {
    "one plus": lambda m: 1 + m.w,
    "made here": lambda m: m.w + torch.ones(2, 3),
    "product": lambda m: torch.ones(2, 2) @ m.w,
    "two parameters": lambda m: m.w + m.c,
    "squares": lambda m: m.w**2,  # of which only the fallback knows the gradient
}
N = 6


def network(kind):
    members = dict(w=torch.randn(2, 3)) | (dict(c=torch.randn(2, 3)) if kind == "two parameters" else {})
    return Written(lambda m, x: F.linear(x, WEIGHTS[kind](m)), **members)


@pytest.mark.parametrize("first", [1, 5])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_order_of_batch_sizes(kind, first):
    x = torch.randn(N, 3)
    for fit in ("full", "diagonal", kf.Full(across_layers=True)):
        assert_exact(network(kind), [x[:first], x[first:]], fit=fit)
        assert_exact(network(kind), [x[:1], x[1:2], x[2:]], fit=fit)


def branching(m, x):
    """A layer as usual in small batches; in large ones its weight is squared, or used with another bias."""
    if len(x) > 2:
        return F.linear(x, m.l.weight, m.b) if m.kind == "bias" else F.linear(x, m.l.weight**2, m.b)
    return m.l(x) + 0 * m.b


@pytest.mark.parametrize("kind", ["bias", "square"])
@pytest.mark.parametrize("fit", ["kfac", "ekfac", "kfoc", "diagonal", kf.Full(across_layers=True)])
def test_the_order_of_ways_to_use_a_weight(kind, fit):
    model = Written(branching, l=nn.Linear(3, 2), b=torch.randn(2))
    model.kind, x = kind, torch.randn(N, 3)
    batches = [x[:2], x[2:]]
    found = [
        kf.estimate(model, some, kf.Gaussian(), fit=fit, labels="exact").to_dense() for some in (batches, batches[::-1])
    ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3 * float(found[0].abs().max()))
    if fit not in ("kfac", "ekfac", "kfoc"):
        assert_exact(model, batches, fit=fit)
    if fit == "ekfac":
        return
    with pytest.raises(UnsupportedError, match=r"put a batch (like this one )?first|Put a batch first"):
        kf.estimate(model, iter(batches), kf.Gaussian(), fit=fit)  # which can be read only once


@pytest.mark.parametrize("kind", [*WEIGHTS, "parts"])
def test_the_error_of_what_is_made_before_the_data(kind):
    if kind == "parts":
        model = Written(lambda m, x: F.linear(x, torch.cat([m.a, m.b])), a=torch.randn(1, 3), b=torch.randn(2, 3))
    else:
        model = network(kind)
    x = torch.randn(N, 3)
    full = assert_exact(model, x)
    diagonal = kf.estimate(model, x, kf.Gaussian(), fit="diagonal", labels="exact")
    off = full.to_dense() - diagonal.to_dense()
    for batches in (x, [x[:1], x[1:]], [x[:3], x[3:]]):
        assert full.error(batches).relative < 1e-6
        assert diagonal.error(batches).relative == pytest.approx(float(off.norm() / full.to_dense().norm()), rel=1e-5)
    alone = kind == "squares"
    assert bool(full.spectrum([x[:1], x[1:]])) != alone  # also where the first batch shows samples


def test_the_error_of_a_weight_apart_from_its_biases():
    model = Written(
        lambda m, x: F.linear(x, m.w, m.b) + F.linear(x.tanh(), m.w, m.c) * (len(x) > 1),
        w=torch.randn(2, 3), b=torch.randn(2), c=torch.randn(2),
    )  # fmt: skip
    x = torch.randn(N, 3)
    full = assert_exact(model, [x[:1], x[1:]])
    assert full.error([x[:1], x[1:]]).relative < 1e-6
    assert set(full.error([x[:1]]).blocks) == set(full.blocks)
