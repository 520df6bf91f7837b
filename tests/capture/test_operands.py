"""Parameters and data in unusual places: functions of one's own, checkpoints, functional calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kronfisher as kf
from tests.helpers.checks import assert_exact, assert_fallback
from tests.helpers.networks import Written, linears


def test_a_parameter_as_the_input_of_a_layer():
    """A learned token through a linear layer: it meets the examples where it is expanded for them."""
    model = Written(
        lambda m, x: m.layer(x) + F.linear(m.token.expand(len(x), -1), m.other),
        layer=nn.Linear(3, 4), token=torch.randn(1, 3), other=torch.randn(4, 3),
    )  # fmt: skip
    x = torch.randn(5, 3)
    for fit in ("diagonal", kf.Full(across_layers=True)):
        assert_exact(model, x, fit=fit)
    assert kf.coverage(model, x).complete


@pytest.mark.parametrize(
    "made",
    [
        lambda m, x: m.t.t().expand(len(x), 3, 4).sin().transpose(1, 2).view(len(x), 12) * x.repeat(1, 4),
        lambda m, x: F.linear(x[:, None] * m.t.sin(), m.w, m.b.expand(4)).squeeze(1),
    ],
    ids=["columns first", "a bias beside a vector"],
)
def test_an_expanded_parameter_lies_in_memory_as_without_an_estimate(made):
    """Torch views results by their strides, and takes a bias beside a vector as weight only if it is expanded."""
    model = Written(made, t=torch.randn(4, 3), w=torch.randn(3), b=torch.randn(1))
    assert_exact(model, torch.randn(5, 3), fit=kf.Full(across_layers=True))


def test_a_weight_that_is_its_own_input():
    model = Written(lambda m, x: x @ F.linear(m.w, m.w), w=torch.randn(3, 3))
    assert_exact(model, torch.randn(5, 3))


@pytest.mark.parametrize("kind", ["detach", "data", "no_grad view", "no_grad result", "no_grad use"])
def test_detached_uses_count_for_nothing(kind):
    """What gets no gradient from autograd contributes nothing, although the capture could see it."""

    def forward(m, x):
        if kind == "detach":
            return m.layer(x) + F.linear(x, m.layer.weight.detach())
        if kind == "data":
            return m.layer(x) + F.linear(x, m.layer.weight.data)
        with torch.no_grad():
            view = m.layer.weight.t()
            result = m.layer(x)
            used = x @ view
        return m.layer(x) + {"no_grad view": x @ view, "no_grad result": result, "no_grad use": used}[kind]

    assert_exact(Written(forward, layer=nn.Linear(3, 2)), torch.randn(5, 3))


def test_detached_in_the_middle():
    model, x = linears(lambda m, x: m.l1(m.l0(x).detach().tanh()), (3, 4), (4, 2)), torch.randn(5, 3)
    fisher = assert_exact(model, x)
    assert fisher["l0.weight"].trace() == 0 and fisher.info.blocks["l0.weight"].method == "unused: zero"
    assert [row.treatment for row in kf.coverage(model, x).rows][:2] == ["unused", "unused"]
    with pytest.raises(kf.UnsupportedError, match="depend on no trainable parameter"):
        kf.estimate(linears(lambda m, x: m.l0(x).detach(), (3, 2)), x, kf.Gaussian())


def test_second_derivatives_inside_the_model():
    """The backward pass of a layer uses its weight too, in the midst of the nodes that the layer made."""

    def forward(m, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(m.l0(x).tanh().sum(), x, create_graph=True)[0]

    assert_fallback(linears(forward, (3, 2)), torch.randn(5, 3), r"l0\.weight: used by TBackward0")


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


class Kink(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.relu()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)


class Recomputed(torch.autograd.Function):
    """Runs a module without a graph, and a backward pass of its own that writes ``.grad``: a reversible layer."""

    @staticmethod
    def forward(ctx, module, x):
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.module(x), g)
        return None, x.grad


def test_custom_functions():
    x = torch.randn(5, 3)
    assert_exact(linears(lambda m, x: m.l1(Kink.apply(m.l0(x))), (3, 4), (4, 2)), x)
    assert_fallback(Written(lambda m, x: Double.apply(x, m.w), w=torch.randn(2, 3)), x, "w: used by Double")
    assert_fallback(Written(lambda m, x: Double.apply(x, m.w.t().exp().t()), w=torch.randn(2, 3)), x, "w: used by")
    model = linears(lambda m, x: m.l2(Recomputed.apply(m.l1, m.l0(x))), (3, 3), (3, 3), (3, 2))
    with pytest.raises(kf.UnsupportedError, match=r"l1\.weight: used inside Recomputed"):
        kf.estimate(model, x, kf.Gaussian())
    assert all(p.grad is None for p in model.parameters())
    model.l1.requires_grad_(False)
    assert_exact(model, x)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("labels", ["exact", "sampled"])
def test_checkpointing(first, labels):
    def build(reentrant):
        inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        run = (lambda m, x: x) if first else (lambda m, x: m.l0(x))
        return Written(
            lambda m, x: m.l2(checkpoint(m.inner, run(m, x), use_reentrant=reentrant)),
            **({} if first else {"l0": nn.Linear(3, 3)}), inner=inner, l2=nn.Linear(3, 2),
        )  # fmt: skip

    x, model = torch.randn(5, 3), build(False)
    plain = Written(lambda m, x: m.l2(m.inner(x if first else m.l0(x))), **dict(model.named_children()))
    options = {"fit": "ekfac", "labels": labels, "samples": 3}
    found = kf.estimate(model, [x, x], kf.Gaussian(), **options).to_dense()
    assert torch.allclose(found, kf.estimate(plain, [x, x], kf.Gaussian(), **options).to_dense(), atol=1e-6)
    if not first:
        with pytest.raises(kf.UnsupportedError, match="use_reentrant=False"):
            kf.estimate(build(True), x, kf.Gaussian())


def test_reentrant_checkpoint_of_data_hides_its_layers_without_a_trace_in_the_graph():
    model = linears(lambda m, x: m.l1(checkpoint(m.l0, x, use_reentrant=True)), (3, 3), (3, 2))
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad"),
        pytest.raises(kf.UnsupportedError, match=r"l0\.weight: used inside CheckpointFunction.*use_reentrant=False"),
    ):
        kf.estimate(model, torch.randn(4, 3), kf.Gaussian())


def test_functional_calls():
    layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    call = torch.func.functional_call
    assert_exact(Written(lambda m, x: call(m.l, dict(m.l.named_parameters()), (x,)), l=layer), x)
    scaled = Written(lambda m, x: call(m.l, {k: p * 2 for k, p in m.l.named_parameters()}, (x,)), l=layer)
    assert_exact(scaled, x)
    others = {name: torch.randn_like(p, requires_grad=True) for name, p in layer.named_parameters()}
    with pytest.raises(kf.UnsupportedError, match="depend on no trainable parameter"):
        kf.estimate(layer, x, kf.Gaussian(), forward=lambda model, x: (call(model, others, (x,)), None))


def test_vmap_inside_the_model():
    model = linears(lambda m, x: torch.vmap(m.l0)(x), (3, 2))
    with pytest.raises(kf.UnsupportedError, match=r"l0\.weight: linear runs inside vmap"):
        kf.estimate(model, torch.randn(5, 3), kf.Gaussian())
    with pytest.raises(kf.UnsupportedError, match=r"l0\.weight: linear runs inside vmap"):
        kf.coverage(model, torch.randn(5, 3))
    inside = linears(lambda m, x: m.l0(torch.vmap(torch.sin)(x)), (3, 2))
    assert_exact(inside, torch.randn(5, 3))


def test_sparse_inputs_are_named():
    for product in (lambda m, x: x.to_sparse() @ m.w, lambda m, x: torch.sparse.mm(x.to_sparse(), m.w)):
        model = Written(product, w=torch.randn(3, 2))
        assert_fallback(model, torch.randn(5, 3), r"w: used by (matmul in a form that is not known|sparse_mm)")


UNSUPPORTED = {
    "_?weight_norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 2), dim=None),
        [r"parametrizations\.weight\.original1"],
    ),
}


@pytest.mark.parametrize("operator", UNSUPPORTED)
def test_modules_left_to_the_fallback_are_named_with_their_operator(operator):
    build, names = UNSUPPORTED[operator]

    model, x = Written(lambda m, x: m.module(x).flatten(1), module=build()), torch.randn(2, 3, 4)
    for name in names:
        assert_fallback(model, x, rf"module\.{name}: used by .*{operator}")


@pytest.mark.parametrize(
    "outputs, message",
    [
        (lambda m, x: m.p[0].expand(len(x), 2), "p: used by SelectBackward0"),
        (lambda m, x: m.p.relu(), "p: used by relu"),
    ],
)
def test_outputs_that_are_made_of_a_parameter_alone(outputs, message):
    assert_fallback(Written(outputs, p=torch.randn(5, 2)), torch.randn(5, 3), message)
