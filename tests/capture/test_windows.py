"""Windows on parameters: views, parts, shared memory, and what windows leave out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from kronfisher.fisher.blocks import Window
from tests.helpers.checks import assert_exact, assert_fallback
from tests.helpers.networks import Written

SEEDED = torch.Generator().manual_seed(0)


W, B = torch.randn(6, 3, generator=SEEDED), torch.randn(6, generator=SEEDED)


def each(windows):
    """Outputs of several windows, each with inputs of its own, so that mixing them up would show."""
    return lambda x: sum(F.linear((x * (k + 1)).sin(), *window) for k, window in enumerate(windows))


VIEWS = {
    "t": lambda m, x: x @ m.w.t(),
    "T": lambda m, x: x @ m.w.T,
    "mT": lambda m, x: x @ m.w.mT,
    "transpose": lambda m, x: x @ m.w.transpose(0, 1),
    "twice transposed": lambda m, x: F.linear(x, m.w.t().t()),
    "from the left": lambda m, x: (m.w @ x.t()).t(),
    "chunk": lambda m, x: each(zip(m.w.chunk(3), m.b.chunk(3), strict=True))(x),
    "split": lambda m, x: torch.cat([F.linear(x, w) for w in m.w.split([2, 4])], 1) + m.b,
    "index": lambda m, x: each([(m.w[:3], m.b[:3]), (m.w[3:], m.b[3:])])(x),
    "narrow": lambda m, x: each([(m.w.narrow(0, 0, 3),), (m.w.narrow(0, 3, 3),)])(x),
    "columns": lambda m, x: F.linear(x[:, :1], m.w[:, :1], m.b) + F.linear(x[:, 1:], m.w[:, 1:]),
    "every other row": lambda m, x: each([(m.w[::2], m.b[::2]), (m.w[1::2], m.b[1::2])])(x),
    "view": lambda m, x: each(zip(m.w.view(2, 3, 3), m.b.view(2, 3), strict=True))(x),
    "unbind": lambda m, x: each(zip(m.w.view(2, 3, 3).unbind(), m.b.view(2, 3).unbind(), strict=True))(x),
    "permute": lambda m, x: F.linear(x, m.w.permute(1, 0).permute(1, 0), m.b),
    "to": lambda m, x: F.linear(x.double(), m.w.to(torch.float64), m.b.double()).float(),
    "bfloat16": lambda m, x: F.linear(x, m.w.float().contiguous(), m.b.clone()),
    "scalar column": lambda m, x: F.linear(x, m.w) * m.b[:, None].squeeze(1),
    "keywords": lambda m, x: F.linear(input=x, weight=m.w, bias=m.b),
    "addmm": lambda m, x: torch.addmm(m.b, x, m.w.t()),
    "matmul": lambda m, x: torch.matmul(x, other=m.w.t()),
    "expand": lambda m, x: x @ m.w.t() + m.b.expand(len(x), 6),
    "unsqueezed": lambda m, x: x @ m.w.t() + m.b[None],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_parameters(name):
    model, x = Written(VIEWS[name], w=W.clone(), b=B.clone()), torch.randn(5, 3)
    fisher = assert_exact(model, x)
    assert set(fisher.names) == {"w", "b"}
    kf.estimate(model, x, kf.Gaussian(), fit="kfac").error(x)


def test_blocks_of_a_packed_parameter_have_names_of_their_own():
    model, x = Written(VIEWS["chunk"], w=W.clone(), b=B.clone()), torch.randn(5, 3)
    fisher = kf.estimate(model, x, kf.Gaussian(), fit="kfac", labels="exact")
    assert list(fisher.blocks) == ["w[0:2, :]", "w[2:4, :]", "w[4:6, :]"]
    truth = assert_exact(model, x)
    error = fisher.error(x)
    assert list(error.blocks) == list(fisher.blocks)
    assert error.relative < 1e-3  # exact for a linear model
    with pytest.raises(KeyError, match="shared by several blocks"):
        fisher["w"]
    assert truth["w"].dim == 24 and truth.error(x).relative < 1e-5


def test_labels_of_windows():
    weight = torch.zeros(6, 2)
    assert Window.of("w", weight).label == Window.of("w", weight, weight.t()).label == "w"
    assert Window.of("w", weight, weight[:, 1:]).label == "w[:, 1:2]"
    assert Window.of("w", weight, weight[::2]).label == "w[0:5, :]"
    assert Window.of("w", weight, weight[1::2]).label == "w[1:6, :]"
    last = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert Window.of("w", last, last[:, 1]).label == "w[:, 1:2, :, :]"


def test_parameters_inside_containers_and_shared_memory():
    flat = torch.randn(20)
    model = Written(
        lambda m, x: F.linear(F.linear(x, m.l[0], m.l[1]), m.d["a[1]"]),
        l=nn.ParameterList([flat[2:8].view(2, 3), flat[8:10]]),
        d=nn.ParameterDict({"a[1]": nn.Parameter(flat[10:16].view(3, 2))}),
    )
    x = torch.randn(5, 3)
    fisher = assert_exact(model, x)
    assert fisher.names == ("l.0", "l.1", "d.a[1]") and fisher.error(x).relative < 1e-5
    assert_exact(model, x, fit={"d.a[1]": "diagonal", "*": "full"})


def test_windows_that_leave_something_out_or_overlap():
    x = torch.randn(5, 3)
    cases = {
        "used in 2 different ways": lambda m, x: F.linear(x, m.w[:4]) + F.linear(x, m.w[2:]),
        "w: used in 2 different ways": lambda m, x: F.linear(F.linear(x, m.w)[:, 1:].tanh(), m.w[1:].t()),
        "w: used in 2 different ways .by expand, linear": lambda m, x: (
            F.linear(x, m.w[:1].expand(4, 3)) + F.linear(x, m.w).sum(1)[:, None]
        ),
        "w: used by roll": lambda m, x: F.linear(x, m.w.roll(1, 0)),
        "w: used by exp": lambda m, x: F.linear(x, m.w.exp()),
        "w: used by getitem": lambda m, x: F.linear(x, m.w[[0, 1, 2]]),
    }
    for message, forward in cases.items():
        assert_fallback(Written(forward, w=W.clone()), x, message)


def test_windows_that_leave_something_out():
    x = torch.randn(5, 3)
    model = Written(lambda m, x: F.linear(x[:, 1:], m.w[1:3, 1:]), w=W.clone())
    for fit in ("full", "diagonal", kf.Full(across_layers=True)):
        fisher = assert_exact(model, x, fit=fit)
    assert sorted(fisher.blocks) == ["w[0:1, :]", "w[1:3, 0:1]", "w[1:3, 1:3]", "w[3:6, :]"]
    assert [row.method for row in fisher.report().rows].count("unused: zero") == 3
    kron = kf.estimate(model, x, kf.Gaussian(), labels="exact", strict=True)
    assert kron["w[1:3, 1:3]"].structure == "kronecker 2x2" and kron.error(x).relative < 1e-5
    scattered = Written(lambda m, x: F.linear(x, m.w.view(-1)[::2][: 4 * 3].view(4, 3)), w=torch.randn(40, 5))
    assert_exact(scattered, x)
    assert_exact(scattered, x, fit="diagonal")


def test_parts_of_a_parameter_may_be_empty():
    for size in (1, 3):
        ways = {
            "joined": lambda m, x: m.o(torch.cat([m.p[:1], m.p[1:]]) * x),
            "in front": lambda m, x: m.o(torch.cat([m.p[:0].expand(len(x), -1), x * m.p], 1)),
            "both": lambda m, x: m.o(torch.cat([m.p[:1].expand(len(x), -1), m.p[1:].expand(len(x), -1)], 1) * x),
        }
        for way in ways.values():
            model = Written(way, p=torch.rand(size) + 0.5, o=nn.Linear(size, 2)).double()
            assert_exact(model, torch.randn(4, size).double(), fit=kf.Full(across_layers=True))
