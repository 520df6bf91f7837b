"""Weights that are stacked, or put one after the other: exact, each a layer of its own, in estimates and training."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from tests.helpers.checks import assert_by_layers, assert_fallback, assert_trained_by_layers
from tests.helpers.networks import Written

pytestmark = pytest.mark.usefixtures("double")

TWO, FOUR = "uv", "uvwz"


def P(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def written(forward, **shapes):
    return lambda: Written(forward, **{name: P(*shape) * (k + 1) for k, (name, shape) in enumerate(shapes.items())})


def stacked(m, names, dim=0):
    return torch.stack([getattr(m, name) for name in names], dim)


def alike(forward, names, *shape):
    return written(forward, **dict.fromkeys(names, shape))


def ensemble(m, x):
    hidden = torch.einsum("bti,eoi->ebto", x, stacked(m, TWO)).tanh()
    products = torch.bmm(hidden.flatten(1, 2), stacked(m, "wz").mT) + stacked(m, "ab").unsqueeze(1)
    return products.unflatten(1, x.shape[:2]).transpose(0, 1)


# x [5, 4, 3] → outputs
CASES = {
    "outputs": alike(lambda m, x: torch.einsum("bti,eio->beto", x, stacked(m, TWO)), TWO, 3, 2),
    "outputs, stacked in the middle": alike(
        lambda m, x: torch.einsum("bti,ieo->bteo", x, stacked(m, TWO, 1)), TWO, 3, 2
    ),
    "outputs, stacked at the end": alike(lambda m, x: torch.einsum("bti,ioe->bteo", x, stacked(m, TWO, -1)), TWO, 3, 2),
    "groups": alike(lambda m, x: torch.bmm(x.transpose(0, 1), stacked(m, FOUR).mT).transpose(0, 1), FOUR, 2, 3),
    "groups, broadcast": alike(lambda m, x: x.unsqueeze(1) @ stacked(m, TWO), TWO, 3, 2),
    "inputs": alike(lambda m, x: torch.einsum("bti,tio->bo", x, stacked(m, FOUR)), FOUR, 3, 2),
    "an ensemble": written(ensemble, u=(2, 3), v=(2, 3), w=(2, 2), z=(2, 2), a=(2,), b=(2,)),
    "three operands": alike(
        lambda m, x: torch.einsum("bti,eij,btj->bte", x, stacked(m, TWO), x.sin()), TWO, 3, 3
    ),
    "computed": written(
        lambda m, x: torch.einsum("bti,eoi->beto", x, torch.stack([1 + m.u, m.v * 2, m.B @ m.A, m.u])),
        u=(2, 3), v=(2, 3), B=(2, 1), A=(1, 3),
    ),
    "some frozen": written(
        lambda m, x: torch.einsum("bti,eoi->beto", x, torch.stack([m.u.detach(), m.v])), u=(2, 3), v=(2, 3)
    ),
    "rows": written(
        lambda m, x: F.linear(x, torch.cat([m.u, m.v]), torch.cat([m.a, m.b])), u=(3, 3), v=(2, 3), a=(3,), b=(2,)
    ),
    "one weight twice": written(lambda m, x: F.linear(x, torch.cat([m.u, m.u])), u=(3, 3)),
    "columns": written(lambda m, x: F.linear(x, torch.cat([m.u, m.v], 1)), u=(4, 2), v=(4, 1)),
    "columns on the right": written(lambda m, x: x @ torch.cat([m.u, m.v], dim=-1), u=(3, 2), v=(3, 1)),
    "channels": written(lambda m, x: F.conv1d(x, torch.cat([m.u, m.v])), u=(3, 4, 2), v=(2, 4, 2)),
    "experts": written(lambda m, x: torch.einsum("bti,tio->bto", x, torch.cat([m.u, m.v])), u=(3, 3, 2), v=(1, 3, 2)),
}  # fmt: skip
FALLBACK = {
    "picked": alike(lambda m, x: torch.einsum("boi,bti->bto", stacked(m, TWO)[(x[:, 0, 0] > 0).long()], x), TWO, 2, 3),
    "a mean": alike(lambda m, x: F.linear(x, stacked(m, TWO).mean(0)), TWO, 2, 3),
}


def network(build):
    return nn.Sequential(build(), nn.Tanh(), nn.Flatten(1)).double()


@pytest.mark.parametrize("case", CASES)
def test_joined_weights_are_exact_and_by_layers(case):
    model, x = network(CASES[case]), torch.randn(5, 4, 3)
    assert_by_layers(model, [x[:3], x[3:]])


@pytest.mark.parametrize("case", FALLBACK)
def test_what_is_done_with_joined_weights_besides_is_left_to_the_fallback(case):
    assert_fallback(network(FALLBACK[case]), torch.randn(5, 4, 3), "used by stack")


APART = {
    "outputs": lambda m, x: torch.stack([x @ m.u, x @ m.v], 1),
    "groups": lambda m, x: torch.stack([F.linear(x[:, t], getattr(m, name)) for t, name in enumerate(FOUR)], 1),
    "columns on the right": lambda m, x: torch.cat([x @ m.u, x @ m.v], -1),
}


@pytest.mark.parametrize("case", APART)
def test_factors_are_those_of_layers_that_stand_apart(case):
    model, x = network(CASES[case]), torch.randn(5, 4, 3)
    apart = network(lambda: Written(APART[case], **dict(model[0].named_parameters())))
    for fit in ("kfac", "ekfac", "kfoc"):
        one, two = (kf.estimate(m, x, kf.Gaussian(), labels="exact", fit=fit) for m in (model, apart))
        for name in (f"0.{each}" for each in TWO):
            torch.testing.assert_close(one[name].to_dense(), two[name].to_dense(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", ["an ensemble", "rows"])
def test_training_treats_joined_weights_by_layers(case):
    torch.manual_seed(0)
    assert_trained_by_layers(nn.Sequential(network(CASES[case]), nn.LazyLinear(4)).double(), torch.randn(20, 4, 3))
