"""What the capture sees: every form in which a weight can be used is exact, or refused with its name and operator."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kronfisher as kf
from kronfisher.blocks import View
from kronfisher.capture import Capture
from kronfisher.fits import FITS, named
from tests.exact import Written, assert_exact, assert_fallback


def linears(function, *sizes, bias=True):
    layers = {f"l{k}": nn.Linear(i, o, bias=bias) for k, (i, o) in enumerate(sizes)}
    return Written(function, **layers)


# In place ------------------------------------------------------------------------------------------------------------


def relu(y):
    return y.relu_()


def flat_relu(y):
    y.view(-1).relu_()
    return y


def slice_assignment(y):
    y[..., :2] = 0
    return y


def slice_values(y):
    y[..., :2] = y[..., 2:4] * 2
    return y


def slice_tanh(y):
    y[..., :2].tanh_()
    return y


def slice_add(y):
    y[..., 1:3] += 1.5
    return y.relu_()


def select_relu(y):
    y[0].relu_()
    return y


def transposed_tanh(y):
    y.transpose(0, -1).tanh_()
    return y


def chunked(y):
    first, second = (part.clone() for part in y.chunk(2, dim=-1))
    return torch.cat([first.relu_(), second.mul_(2)], dim=-1)


def twice(y):
    y += 1
    y *= 2
    return y.sigmoid_()


IN_PLACE = [
    relu,
    flat_relu,
    slice_assignment,
    slice_values,
    slice_tanh,
    slice_add,
    select_relu,
    transposed_tanh,
    chunked,
]
IN_PLACE += [twice]


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3), (4, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_in_place_after_linear(change, shape, bias):
    model = linears(lambda m, x: m.l1(change(m.l0(x))).flatten(1), (3, 4), (4, 2), bias=bias)
    assert_exact(model, torch.randn(shape))


@pytest.mark.parametrize("change", [relu, flat_relu, slice_assignment, slice_tanh, twice])
@pytest.mark.parametrize(
    "layer, shape",
    [
        (lambda: nn.Conv1d(3, 4, 2), (4, 3, 5)),
        (lambda: nn.Conv2d(3, 4, 2, bias=False), (3, 3, 4, 4)),
        (lambda: nn.LayerNorm(5), (4, 3, 5)),
        (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
        (lambda: nn.BatchNorm1d(3).eval(), (4, 3, 5)),
    ],
    ids=["conv1d", "conv2d", "layernorm", "groupnorm", "batchnorm"],
)
def test_in_place_after_other_layers(change, layer, shape):
    assert_exact(Written(lambda m, x: change(m.layer(x)).flatten(1), layer=layer()), torch.randn(shape))


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_that_are_parts_of_larger_ones(shape, bias):
    """The gradient of the second arrives as a window somewhere inside that of both."""

    def forward(m, x):
        first, second = torch.cat([m.l0(x), m.l1(x).relu_()]).chunk(2)
        return (first.tanh() * second + torch.stack([m.l0(x), m.l2(x)]).sin()[1]).flatten(1)

    assert_exact(linears(forward, (3, 2), (3, 2), (3, 2), bias=bias), torch.randn(shape))


def test_gradients_that_come_in_some_columns_only():
    """Each column of exact labels reaches one half; the inputs of the other must be counted when its turn comes."""
    model = linears(lambda m, x: torch.cat([m.l0(x), Half.apply(m.l1(x))], 1), (3, 2), (3, 2))
    x = torch.randn(5, 3)
    fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact", fit="kfac")
    rows = torch.cat([x, torch.ones(5, 1)], 1)
    for name in fisher.blocks:
        assert torch.allclose(fisher[name].A[0], rows.T @ rows / 5, atol=1e-6)


class Half(torch.autograd.Function):
    """Keeps a zero gradient to itself."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g if g.any() else None


def test_parameter_added_in_place():
    def forward(m, x):
        x = x.clone()
        x[:, :2] += m.p
        x *= m.q
        return (x - 1).mul_(m.r)

    assert_exact(Written(forward, p=torch.randn(2), q=torch.randn(3), r=torch.randn(())), torch.randn(5, 3))


def test_parameter_added_to_a_view_that_lives_on():
    def forward(m, x):
        x = x * m.q
        part = x[:, :2]
        part += m.p  # x changes with it, and the model goes on with both
        part.tanh_()
        return x * 3 + part.sum(1, keepdim=True)

    assert_exact(Written(forward, p=torch.randn(2), q=torch.randn(3)), torch.randn(5, 3))


def test_unsupported_use_before_one_in_place():
    """The graph of an operator in place goes on into what was there before; that is not its own."""

    def forward(m, x):
        x = x + m.p.abs()
        x[:, :2] += m.p[:2]
        x[:, 2:] *= m.p[2:]
        return x

    assert_fallback(Written(forward, p=torch.randn(3)), torch.randn(5, 3), "p: used by abs")


def test_inputs_modified_after_use_are_refused():
    def forward(m, x):
        hidden = x * 2
        y = m.l0(hidden)
        hidden += 1
        return m.l1(y) + m.l1(hidden)

    model, x = linears(forward, (3, 3), (3, 2)), torch.randn(5, 3)
    with pytest.raises(kf.UnsupportedError, match=r"l0\.weight: the input of this layer was modified in place"):
        kf.estimate(model, x, kf.Gaussian())
    model.l0.weight.requires_grad_(False)  # a bias alone does not need them
    assert_exact(model, x)


def test_out_argument_is_torch_s_own_refusal():
    model = Written(lambda m, x: torch.add(x, m.p, out=torch.empty(5, 3)), p=torch.randn(3))
    with pytest.raises(RuntimeError, match="out="):
        kf.estimate(model, torch.randn(5, 3), kf.Gaussian())


# Windows on parameters -----------------------------------------------------------------------------------------------

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
    assert list(error.blocks) == list(fisher.blocks) and 0 < error.relative < 1
    with pytest.raises(KeyError, match="shared by several blocks"):
        fisher["w"]
    assert truth["w"].dim == 24 and truth.error(x).relative < 1e-5


def test_labels_of_windows():
    weight = torch.zeros(6, 2)
    assert View.of("w", weight).label == View.of("w", weight, weight.t()).label == "w"
    assert View.of("w", weight, weight[:, 1:]).label == "w[:, 1:2]"
    assert View.of("w", weight, weight[::2]).label == "w[0:5, :]"
    assert View.of("w", weight, weight[1::2]).label == "w[1:6, :]"
    last = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert View.of("w", last, last[:, 1]).label == "w[:, 1:2, :, :]"


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
        "w is used in 2 different ways": lambda m, x: F.linear(F.linear(x, m.w)[:, 1:].tanh(), m.w[1:].t()),
        "w: used by linear in a form": lambda m, x: (
            F.linear(x, m.w[:1].expand(4, 3)) + F.linear(x, m.w).sum(1)[:, None]
        ),
        "w: used by cat": lambda m, x: F.linear(x, torch.cat([m.w, m.w])),
        "w: used by mul": lambda m, x: F.linear(x, m.w * 2),
        "w: used by getitem": lambda m, x: F.linear(x, m.w[[0, 1, 2]]),
        "w: used by contiguous": lambda m, x: x @ m.w.t().contiguous(),
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


# Operands in unusual places ------------------------------------------------------------------------------------------


def test_a_parameter_as_the_input_of_a_layer():
    """A learned token through a linear layer: claiming the weight must not claim the token."""
    model = Written(
        lambda m, x: m.layer(x) + F.linear(m.token.expand(len(x), -1), m.other),
        layer=nn.Linear(3, 4), token=torch.randn(1, 3), other=torch.randn(4, 3),
    )  # fmt: skip
    assert_fallback(model, torch.randn(5, 3), r"token: used by linear in a form that is not known")


def test_a_weight_that_is_its_own_input():
    model = Written(lambda m, x: x @ F.linear(m.w, m.w), w=torch.randn(3, 3))
    assert_fallback(model, torch.randn(5, 3), "w: used by linear")


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
    with pytest.raises(kf.UnsupportedError, match=r"l1\.weight: used by Recomputed"):
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
        pytest.raises(kf.UnsupportedError, match=r"l0\.weight: used by CheckpointFunction.*use_reentrant=False"),
    ):
        kf.estimate(model, torch.randn(4, 3), kf.Gaussian())


def test_functional_calls():
    layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    call = torch.func.functional_call
    assert_exact(Written(lambda m, x: call(m.l, dict(m.l.named_parameters()), (x,)), l=layer), x)
    scaled = Written(lambda m, x: call(m.l, {k: p * 2 for k, p in m.l.named_parameters()}, (x,)), l=layer)
    assert_fallback(scaled, x, r"l\.weight: used by mul")
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
    "lstm": (lambda: nn.LSTM(4, 4), ["weight_ih_l0", "bias_hh_l0"]),
    "gru": (lambda: nn.GRU(4, 4), ["weight_ih_l0", "bias_hh_l0"]),
    "rnn_tanh": (lambda: nn.RNN(4, 4), ["weight_hh_l0"]),
    "lstm_cell": (lambda: Cell(), ["cell.weight_ih"]),
    "_?weight_norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)),
        [r"parametrizations\.weight\.original0"],
    ),
}


@pytest.mark.parametrize("operator", UNSUPPORTED)
def test_modules_left_to_the_fallback_are_named_with_their_operator(operator):
    build, names = UNSUPPORTED[operator]

    def forward(m, x):
        answer = m.module(x.transpose(0, 1))
        return (answer[0] if isinstance(answer, tuple) else answer).transpose(0, 1).flatten(1)

    model, x = Written(forward, module=build()), torch.randn(2, 3, 4)
    for name in names:
        assert_fallback(model, x, rf"module\.{name}: used by .*{operator}")


class Cell(nn.Module):
    """A recurrent cell, called step by step."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(4, 3)

    def forward(self, x):
        state = None
        for step in x:
            state = self.cell(step, state)
        return state[0][None]


def test_bilinear_forms():
    assert_fallback(
        Written(lambda m, x: m.e(x, x), e=nn.Bilinear(3, 3, 2)), torch.randn(4, 3), r"e\.weight: used by bilinear"
    )


@pytest.mark.parametrize(
    "outputs, message",
    [
        (lambda m, x: m.p[0].expand(len(x), 2), "p: used by SelectBackward0"),
        (lambda m, x: m.p.relu(), "p: used by relu"),
        (lambda m, x: x @ torch.eye(3)[:, :2] + m.p.sum(), "p: used by sum"),
    ],
)
def test_outputs_that_are_made_of_a_parameter_alone(outputs, message):
    assert_fallback(Written(outputs, p=torch.randn(5, 2)), torch.randn(5, 3), message)


# Tied, frozen, mixed -------------------------------------------------------------------------------------------------


def test_tied_weights():
    x = torch.randn(5, 4, 3)
    assert_exact(linears(lambda m, x: m.l0(m.l0(x).tanh()).flatten(1), (3, 3)), x)
    other_lengths = linears(lambda m, x: m.l0(x).sum(1) + m.l0(x[:, :2]).tanh().sum(1) + m.l0(x[:, 0]), (3, 3))
    assert_exact(other_lengths, x)
    assert_exact(other_lengths, x, fit="diagonal")
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    other_bias = nn.Sequential(first, nn.Tanh(), second, nn.Flatten())
    for fit in ("full", "diagonal", kf.Full(across_layers=True)):
        assert_exact(other_bias, x, fit=fit)
    assert list(kf.estimate(other_bias, x, kf.Gaussian(), strict=True).blocks) == ["0.weight", "0.bias", "2.bias"]
    second.bias = first.bias
    assert_exact(nn.Sequential(first, nn.Tanh(), second, nn.Flatten()), x)
    shared = nn.Sequential(first, nn.Tanh())
    assert_exact(nn.Sequential(shared, shared, nn.Flatten()), x)
    second.weight = nn.Parameter(torch.randn(3, 3))
    same_bias = nn.Sequential(first, nn.Tanh(), second, nn.Flatten())
    for fit in ("full", "diagonal", kf.Full(across_layers=True)):
        assert_exact(same_bias, x, fit=fit)
    assert list(kf.estimate(same_bias, x, kf.Gaussian(), strict=True).blocks) == ["0.weight", "0.bias", "2.weight"]


def autoencoder():
    """A weight and its transpose, as in tied auto-encoders, with biases of their own."""
    return Written(
        lambda m, x: F.linear(F.linear(x, m.w, m.b).tanh(), m.w.t(), m.c),
        w=torch.randn(4, 3), b=torch.randn(4), c=torch.randn(3),
    )  # fmt: skip


def test_a_weight_in_two_roles_has_a_term_for_each():
    model, x = autoencoder(), torch.randn(5, 3)
    for fit in ("full", "diagonal", kf.Full(across_layers=True)):
        assert_exact(model, x, fit=fit)
    fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact", strict=True)
    assert fisher["w"].structure == "kronecker 3x4 + kronecker 3x4"
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    solved = (fisher + 0.1).solve(v)
    again = (fisher + 0.1) @ solved
    assert all(torch.allclose(again[name], v[name], atol=1e-3) for name in v)
    assert fisher.error(x).relative < 1
    assert kf.estimate(model, x, kf.Gaussian(), fit="ekfac")["w"].trace() > 0


@pytest.mark.parametrize("fit", [name for name in FITS if not named(name).exact])
def test_roles_add_up_whatever_the_fit(fit):
    """The block of a tied weight is the sum of those that two weights of the same values have."""
    model, x = autoencoder(), torch.randn(6, 3)
    apart = Written(
        lambda m, x: F.linear(F.linear(x, m.w, m.b).tanh(), m.v, m.c),
        w=model.w.detach(), b=model.b.detach(), v=model.w.detach().t().clone(), c=model.c.detach(),
    )  # fmt: skip
    options = {"fit": {"b": "diagonal", "c": "diagonal", "*": fit}, "labels": "exact"}
    tied, roles = (kf.estimate(m.double(), x.double(), kf.Gaussian(), **options) for m in (model, apart))
    order = torch.arange(12).view(3, 4).t().flatten()
    expected = roles["w"].to_dense() + roles["v"].to_dense()[order][:, order]
    torch.testing.assert_close(tied["w"].to_dense(), expected, rtol=1e-8, atol=1e-10)


def test_embedding_tied_to_the_last_layer():
    model = Written(lambda m, x: (m.e(x).tanh().cumsum(1) @ m.e.weight.t()).flatten(1), e=nn.Embedding(7, 4))
    x = torch.randint(7, (5, 3), generator=torch.Generator().manual_seed(1))
    for fit in ("full", "diagonal"):
        assert_exact(model, x, fit=fit)
    fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact", strict=True)
    assert fisher["e.weight"].structure == "kronecker 4x7 + kronecker 4xdiag(7)"


def test_tied_kfac_is_the_sum_over_all_rows():
    """K-FAC needs no owners: uses with different numbers of positions add up."""
    model = linears(lambda m, x: m.l0(x).sum(1) + m.l0(x[:, :2]).sum(1) * 3, (3, 2), bias=False)
    x = torch.randn(5, 4, 3)
    fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact", fit="kfac")
    rows = torch.cat([x.flatten(0, 1), x[:, :2].flatten(0, 1)])
    assert torch.allclose(fisher["l0.weight"].A, rows.T @ rows / 30, atol=1e-6)
    assert torch.allclose(fisher["l0.weight"].B, (4 * 1 + 2 * 9) * torch.eye(2), atol=1e-5)


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_frozen_halves(frozen):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model.get_parameter(frozen).requires_grad_(False)
    x = torch.randn(5, 3)
    fisher = assert_exact(model, x)
    assert frozen not in fisher.shapes
    assert_exact(model, x, fit={"*.bias": "diagonal", "*": "full"} if "weight" in frozen else {"*": "diagonal"})


def test_frozen_layers_cost_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    with Capture(dict(model.named_parameters())) as capture:
        outputs = model(torch.randn(5, 3))
    assert [call.uses[0].name for call in capture.calls] == ["2.weight"]
    assert outputs.grad_fn.next_functions[1][0] is None  # no gradient flows into the frozen part


def test_weight_and_bias_under_different_fits():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Conv1d(4, 2, 1)), torch.randn(5, 4, 3).transpose(1, 2)
    model = Written(lambda m, x: m.c(m.l(x.transpose(1, 2)).tanh().transpose(1, 2)).flatten(1), l=model[0], c=model[2])
    fisher = assert_exact(model, x, fit={"*.bias": "diagonal", "*": "full"})
    assert list(fisher.blocks) == ["l.weight", "l.bias", "c.weight", "c.bias"]


# The machinery -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["success", "failure"])
def test_captures_are_freed_at_once(how, monkeypatch):
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
    proof, seen = capture.prove(outputs), []
    with Watch():
        capture.backward(outputs.sum(), lambda call, g: seen.append(call.index), proof.sources, retain=False)
    assert seen == [1, 0] and proof.sources == [0]
    assert not [func for func in computed if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)]


def test_hooks_fire_only_in_passes_of_ours():
    def forward(m, x):
        m.l0(x).sum().backward()  # a model may run backward passes of its own
        return m.l0(x)

    model = linears(forward, (3, 2))
    kf.estimate(model, torch.randn(5, 3), kf.Gaussian())
    model.l0.weight.grad = None


def test_every_use_of_a_parameter_that_is_only_partly_claimed_is_found():
    """One supported and one unsupported use of the same weight: the second must not hide behind the first."""
    for second in (
        lambda m, x: torch.einsum("ni,oi->no", x, m.w),
        lambda m, x: x @ (m.w * 1).t(),
        lambda m, x: torch.bmm(x[None], m.w.t()[None])[0],
        lambda m, x: F.linear(x, m.w.abs()),
    ):
        model = Written(lambda m, x, second=second: F.linear(x, m.w) + second(m, x), w=torch.randn(2, 3))
        assert_fallback(model, torch.randn(5, 3), "w: used by")
