"""Weights with constant masks: rows and columns by layers, others by the diagonal in estimates; in training all."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import kronfisher as kf
from tests.helpers.checks import assert_by_layers, assert_fallback
from tests.helpers.networks import Written

pytestmark = pytest.mark.usefixtures("double")

ROWS, COLUMNS = torch.tensor([1.0, 0, 1, 1, 0, 1])[:, None], torch.tensor([1.0, 0, 1])
SCATTERED = torch.tensor([[1.0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 0, 0]])


def P(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def masked(forward, mask, **shapes):
    def build():
        model = Written(forward, **{name: P(*shape) for name, shape in shapes.items()})
        model.register_buffer("mask", mask.double() if mask.is_floating_point() else mask)
        return model

    return build


def pruned(layer, method, *before, **options):
    def build():
        own = layer()
        method(own, "weight", **options)
        return nn.Sequential(*before, own)

    return build


def turned():
    return Written(lambda m, x: x.mT)


# x [5, 4, 3] → outputs
WHOLE = {
    "rows": masked(lambda m, x: F.linear(x, m.w * m.mask), ROWS.expand(6, 3).clone(), w=(6, 3)),
    "rows and columns, twice": masked(
        lambda m, x: F.linear(F.linear(x, m.mask * m.w).tanh(), m.w * m.mask), ROWS[:3] * COLUMNS, w=(3, 3)
    ),
    "filled": masked(lambda m, x: F.linear(x, m.w.masked_fill(m.mask, 0.0)), ROWS * COLUMNS < 0.5, w=(6, 3)),
    "one of two": masked(
        lambda m, x: F.linear(x, torch.where(m.mask, m.w, m.v)), (ROWS > 0.5).expand(6, 3), w=(6, 3), v=(6, 3)
    ),
    "a lookup": masked(
        lambda m, x: F.embedding((x * 7).long().abs() % 6, m.w * m.mask).flatten(2), ROWS.expand(6, 3).clone(), w=(6, 3)
    ),
    "pruned outputs": pruned(lambda: nn.Linear(3, 6), prune.ln_structured, amount=0.5, n=2, dim=0),
    "pruned channels": pruned(lambda: nn.Conv1d(3, 6, 2), prune.ln_structured, turned(), amount=0.5, n=2, dim=1),
}  # fmt: skip
OTHERS = {
    "scattered": masked(lambda m, x: F.linear(x, m.w * m.mask), SCATTERED, w=(6, 3)),
    "scattered and filled": masked(lambda m, x: F.linear(x, m.w.masked_fill(m.mask, 0.0)), SCATTERED < 0.5, w=(6, 3)),
    "pruned": pruned(lambda: nn.Linear(3, 6), prune.random_unstructured, amount=0.5),
    "a triangle": lambda: Written(lambda m, x: F.linear(x, m.w.tril()), w=P(3, 3)),
}


def network(build):
    torch.manual_seed(0)
    return nn.Sequential(build(), nn.Tanh(), nn.Flatten(1)).double()


@pytest.mark.parametrize("case", WHOLE)
def test_masks_of_rows_and_columns_are_exact_and_by_layers(case):
    model, x = network(WHOLE[case]), torch.randn(5, 4, 3)
    assert_by_layers(model, [x[:3], x[3:]])


def test_factors_are_those_of_the_smaller_layer():
    """Rows and columns that are pruned are zero in the factors, the others as without them."""
    x, w = torch.randn(5, 4, 3), P(6, 3)
    rows, columns = ROWS[:, 0] > 0, COLUMNS > 0
    small = Written(lambda m, x: F.linear(x[..., columns], m.w).tanh().flatten(1), w=w[rows][:, columns])
    for fit in ("kfac", "ekfac"):
        one = kf.estimate(network(WHOLE["filled"]), x, kf.Gaussian(), labels="exact", fit=fit)["0.w"].to_dense()
        two = kf.estimate(small, x, kf.Gaussian(), labels="exact", fit=fit)["w"].to_dense()
        kept = (rows[:, None] & columns).flatten()
        torch.testing.assert_close(one[kept][:, kept], two, rtol=1e-8, atol=1e-10)
        assert not one[~kept].any()


@pytest.mark.parametrize("case", OTHERS)
def test_other_masks_leave_the_exact_diagonal(case):
    assert_fallback(network(OTHERS[case]), torch.randn(5, 4, 3), r"used by (a mask|mul|masked_fill|tril)")


@pytest.mark.parametrize("case", ["pruned outputs", "pruned channels", "filled", *OTHERS])
def test_training_treats_masked_weights_by_layers(case):
    torch.manual_seed(0)
    model, x = nn.Sequential(network((WHOLE | OTHERS)[case]), nn.LazyLinear(4)).double(), torch.randn(20, 4, 3)
    y = torch.randn(*model(x).shape)
    optimizer = kf.NaturalGradient(model, kf.Gaussian())
    losses = [float(optimizer.step(lambda: model(x), y)) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert "fallback" not in str(optimizer.report()) and "Adam" not in str(optimizer.report())
