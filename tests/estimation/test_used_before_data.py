"""Parameters that are used before any data enter: batches of one example, and the error of the estimate."""

import pytest
import torch
import torch.nn.functional as F

import kronfisher as kf
from tests.helpers.checks import assert_exact
from tests.helpers.networks import Written

WEIGHTS = {
    "one plus": lambda m: 1 + m.w,
    "made here": lambda m: m.w + torch.ones(2, 3),
    "product": lambda m: torch.ones(2, 2) @ m.w,
    "two parameters": lambda m: m.w + m.c,
}


@pytest.mark.parametrize("first", [1, 5])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_order_of_batch_sizes(kind, first):
    members = dict(w=torch.randn(2, 3)) | (dict(c=torch.randn(2, 3)) if kind == "two parameters" else {})
    x = torch.randn(6, 3)
    assert_exact(Written(lambda m, x: F.linear(x, WEIGHTS[kind](m)), **members), [x[:first], x[first:]])


def test_the_error_of_parts_of_a_weight():
    model = Written(lambda m, x: F.linear(x, torch.cat([m.a, m.b])), a=torch.randn(1, 3), b=torch.randn(2, 3))
    x = torch.randn(6, 3)
    full = assert_exact(model, x)
    assert full.error(x).relative < 1e-6
    diagonal = kf.estimate(model, x, kf.Gaussian(), fit="diagonal", labels="exact")
    off = full.to_dense() - diagonal.to_dense()
    assert diagonal.error(x).relative == pytest.approx(float(off.norm() / full.to_dense().norm()), rel=1e-5)
