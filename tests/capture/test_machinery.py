"""What a capture leaves behind, computes and sees."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from kronfisher.capture.capture import Capture
from kronfisher.capture.graph import walk
from kronfisher.capture.inner_product import Seed
from tests.helpers.checks import assert_exact, assert_fallback
from tests.helpers.networks import Written, linears


@pytest.mark.parametrize("how", ["success", "failure"])
def test_captures_are_freed_at_once(how, monkeypatch, read_again):
    """The graph holds hooks, the capture holds the graph: as a cycle they would keep all activations forever."""
    born = []
    begin = Capture.__init__
    monkeypatch.setattr(Capture, "__init__", lambda self, *a: (begin(self, *a), born.append(weakref.ref(self)))[0])
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))
    gc.collect()
    gc.disable()
    try:
        if how == "success":
            kf.estimate(model, [torch.randn(5, 3) for _ in range(4)], kf.Gaussian(), fit="ekfac", samples=2)
            assert len(born) == 8
        else:
            with pytest.raises(kf.NumericalError):
                kf.estimate(model, torch.full((5, 3), float("nan")), kf.Gaussian())
        alive = [capture() for capture in born if capture() is not None]
        assert alive == []
    finally:
        gc.enable()


def test_no_parameter_gradient_is_computed():
    computed = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and tuple(result.shape) in ((7, 11), (11, 7), (5, 7), (7, 5)):
                computed.append(func)
            return result

    model = nn.Sequential(nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 5))
    parameters = dict(model.named_parameters())
    with Capture(parameters) as capture:
        outputs = model(torch.randn(3, 11))
    graph, seen = walk(capture.recording, outputs), []
    with Watch():
        capture.backward(Seed(outputs.sum()), lambda call, g: seen.append(call.index), graph.sources, retain=False)
    assert seen == [1, 0] and graph.sources == [0]
    assert not [func for func in computed if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)]


def test_hooks_fire_only_in_passes_of_ours():
    def forward(m, x):
        m.l0(x).sum().backward()  # a model may run backward passes of its own
        return m.l0(x)

    model, x = linears(forward, (3, 2)), torch.randn(5, 3)
    found = kf.estimate(model, x, kf.Gaussian(), labels="exact").to_dense()
    assert torch.equal(found, kf.estimate(model.l0, x, kf.Gaussian(), labels="exact").to_dense())


def test_every_use_of_a_parameter_that_is_only_partly_claimed_is_found():
    """One supported and one unsupported use of the same weight: the second must not hide behind the first."""
    for second in (
        lambda m, x: torch.einsum("ni,oi->n", x, m.w)[:, None],
        lambda m, x: x @ (m.w * m.w).t(),
        lambda m, x: torch.bmm(x[None], m.w.abs().t()[None])[0],
        lambda m, x: F.linear(x, m.w.abs()),
    ):
        model = Written(lambda m, x, second=second: F.linear(x, m.w) + second(m, x), w=torch.randn(2, 3))
        assert_fallback(model, torch.randn(5, 3), "w: used by")


def test_every_use_of_a_parameter_that_is_used_in_several_forms_counts():
    for second in (
        lambda m, x: torch.einsum("ni,oi->no", x, m.w),
        lambda m, x: x @ (m.w * 1).t(),
        lambda m, x: torch.bmm(x[None], m.w.t()[None])[0],
    ):
        model = Written(lambda m, x, second=second: F.linear(x, m.w) + second(m, x), w=torch.randn(2, 3))
        for fit in ("diagonal", "full", kf.Full(across_layers=True)):
            assert_exact(model, torch.randn(5, 3), fit=fit)
