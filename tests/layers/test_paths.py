"""Several weights in one contraction: exact, each a layer as if they had been multiplied one after the other."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from kronfisher.capture.capture import Capture
from kronfisher.errors import UnsupportedError
from tests.helpers.checks import assert_by_layers, assert_fallback, assert_trained_by_layers
from tests.helpers.networks import Written

pytestmark = pytest.mark.usefixtures("double")


def P(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def written(forward, **shapes):
    return lambda: Written(forward, **{name: P(*shape) * (k + 1) / 2 for k, (name, shape) in enumerate(shapes.items())})


def einsum(equation, *places, **shapes):
    """Of what these names stand for: "x", or parameters."""
    return written(lambda m, x: torch.einsum(equation, *(x if n == "x" else getattr(m, n) for n in places)), **shapes)


# x [5, 4, 3] → outputs
CASES = {
    "one after the other": einsum("bti,ir,ro->bto", "x", "u", "v", u=(3, 2), v=(2, 3)),
    "weights first": einsum("or,ri,bti->bto", "v", "u", "x", u=(2, 3), v=(3, 2)),
    "three": einsum("...i,ij,jk,ko->...o", "x", "u", "v", "w", u=(3, 2), v=(2, 3), w=(3, 2)),
    "heads": einsum("bti,hir,hro->btho", "x", "u", "v", u=(2, 3, 2), v=(2, 2, 3)),
    "positions": einsum("bti,ts,io->bso", "x", "u", "v", u=(4, 2), v=(3, 2)),
    "two paths": written(
        lambda m, x: torch.einsum("bti,ir,btj,jr->btr", x, m.u, x.sin(), m.v), u=(3, 2), v=(3, 2)
    ),
    "a scale and a matrix": einsum("bti,i,io->bto", "x", "s", "u", s=(3,), u=(3, 2)),
    "a scale and two matrices": einsum("bti,ir,r,ro->bto", "x", "u", "s", "v", u=(3, 2), s=(2,), v=(2, 3)),
    "outputs that no data meet": einsum("bti,ij,kl->btjkl", "x", "u", "v", u=(3, 2), v=(2, 2)),
    "frozen ones first": written(
        lambda m, x: torch.einsum("po,kp,jk,ij,bti->bto", m.f, m.v, m.g, m.u, x), f=(2, 3), v=(2, 2), g=(2, 2), u=(3, 2)
    ),
    "a vector of outputs alone": einsum("bti,io,p->btop", "x", "u", "s", u=(3, 2), s=(2,)),
    "one twice": einsum("bti,ij,jk->btk", "x", "u", "u", u=(3, 3)),
    "a frozen one between": written(
        lambda m, x: torch.einsum("bti,ij,jk,ko->bto", x, m.u, m.f, m.v), u=(3, 2), f=(2, 3), v=(3, 2)
    ),
    "computed": written(
        lambda m, x: torch.einsum("bti,ir,ro->bto", x, 1 + m.u, torch.cat([m.v, m.w], 1)), u=(3, 2), v=(2, 1), w=(2, 2)
    ),
    "on hidden data": written(
        lambda m, x: torch.einsum("bti,ir,ro->bto", F.linear(x, m.w).tanh(), m.u, m.v), w=(3, 3), u=(3, 2), v=(2, 3)
    ),
}  # fmt: skip
FALLBACK = {
    "a sum of one alone": einsum("bti,eir,ro->bto", "x", "u", "v", u=(2, 3, 2), v=(2, 3)),
    "one that is repeated and summed": written(
        lambda m, x: torch.einsum("bti,eio->bto", x, m.u.expand(3, -1, -1)), u=(3, 2)
    ),
}  # fmt: skip


def network(build):
    model = nn.Sequential(build(), nn.Tanh(), nn.Flatten(1)).double()
    for name, parameter in model[0].named_parameters():
        parameter.requires_grad_(name not in ("f", "g"))
    return model


@pytest.mark.parametrize("case", CASES)
def test_several_weights_are_exact_and_by_layers(case):
    x = torch.randn(5, 4, 3)
    assert_by_layers(network(CASES[case]), [x[:3], x[3:]])


@pytest.mark.parametrize("case", FALLBACK)
def test_sums_of_a_weight_alone_are_left_to_the_fallback(case):
    assert_fallback(network(FALLBACK[case]), torch.randn(5, 4, 3), "used by (einsum|expand)")


APART = {
    "one after the other": lambda m, x: x @ m.u @ m.v,
    "weights first": lambda m, x: F.linear(F.linear(x, m.u), m.v),
    "two paths": lambda m, x: (x @ m.u) * (x.sin() @ m.v),
    "a frozen one between": lambda m, x: x @ m.u @ m.f @ m.v,
    "on hidden data": lambda m, x: F.linear(x, m.w).tanh() @ m.u @ m.v,
}


@pytest.mark.parametrize("case", APART)
def test_factors_are_those_of_layers_one_after_the_other(case):
    model, x = network(CASES[case]), torch.randn(5, 4, 3)
    apart = network(lambda: Written(APART[case], **dict(model[0].named_parameters())))
    for fit in ("kfac", "ekfac", "kfoc", "full"):
        one, two = (kf.estimate(m, x, kf.Gaussian(), labels="exact", fit=fit) for m in (model, apart))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(one[name].to_dense(), two[name].to_dense(), rtol=1e-8, atol=1e-10)


INPUTS = {  # by parameter, whether its inputs depend on the data alone
    "data": (lambda m, x: torch.einsum("bti,ir,btr->btr", x, m.u, x[..., :2]), {"u": True}),
    "hidden data": (lambda m, x: torch.einsum("bti,ir,btr->btr", x, m.u, (x @ m.w).tanh()), {"w": True, "u": False}),
    "one after the other": (lambda m, x: torch.einsum("bti,ir,rj->btj", x, m.u, m.v), {"u": True, "v": False}),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_that_depend_on_parameters_are_known_as_such(case):
    """Training renews factors of data alone more seldom than others."""
    forward, expected = INPUTS[case]
    model, x = Written(forward, u=P(3, 2), v=P(2, 2), w=P(3, 2)), torch.randn(5, 4, 3)
    with Capture(dict(model.named_parameters())) as capture:
        model(x)
    assert {use.name: use.reads_data for call in capture.calls for use in call.uses} == expected


def test_an_operand_that_is_changed_in_place_afterwards_is_refused():
    def changed(m, x):
        y = torch.einsum("bti,ir,btr,ro->bto", x, m.u, z := (x[..., :2] * 2), m.v)
        z.zero_()
        return y

    with pytest.raises(UnsupportedError, match="modified in place"):
        kf.estimate(network(written(changed, u=(3, 2), v=(2, 3))), torch.randn(5, 4, 3), kf.Gaussian())


@pytest.mark.parametrize("case", ["one after the other", "a scale and two matrices", "computed"])
def test_training_treats_several_weights_by_layers(case):
    torch.manual_seed(0)
    assert_trained_by_layers(nn.Sequential(network(CASES[case]), nn.LazyLinear(4)).double(), torch.randn(20, 4, 3))
