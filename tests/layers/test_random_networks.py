"""Random networks of everything that is supported: per-sample gradients from captured samples against ``vmap(grad)``.

A network is drawn layer by layer, each fitting the shape that the one before it left. What the capture makes of it, put
together as ``G_k = Σ_t g aᵀ`` and written back into parameters, has to be the gradient of every datum.
"""

from dataclasses import dataclass, field
from math import prod

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kronfisher as kf
from kronfisher.capture.per_sample import FALLBACK
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.estimation.recipe import Recipe
from kronfisher.fisher.blocks import Block
from kronfisher.fisher.parameters import trainable
from kronfisher.fits.visitor import Visitor
from kronfisher.layers.samples import Samples
from kronfisher.operators.factors import Factor

ACTIVATIONS = {
    "none": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": nn.functional.softplus,
    "tanh_": torch.tanh_,
    "sigmoid_": torch.sigmoid_,
    "relu_": torch.relu_,
    "leaky relu_": lambda x: nn.functional.leaky_relu_(x, 0.3),
    "tanh_ of a flat view": lambda x: x.view(-1).tanh_().view(x.shape) if x.is_contiguous() else x.tanh(),
    "half tanh by assignment": lambda x: assign(x),
}
PADDINGS = ("zeros", "circular", "reflect", "replicate")
CONVOLUTIONS = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}


def assign(x: Tensor) -> Tensor:
    x[:, : x.shape[1] // 2 + 1] = x[:, : x.shape[1] // 2 + 1].tanh()
    return x


class Layer(nn.Module):
    """A function of parameters and modules, followed by an activation, perhaps in place."""

    def __init__(self, name, function, activation="none", **members):
        super().__init__()
        self.name, self.function, self.activation = name, function, activation
        for key, member in members.items():
            setattr(self, key, member if isinstance(member, nn.Module) else nn.Parameter(member))

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self.function(self, x))

    def extra_repr(self) -> str:
        return f"{self.name}, {self.activation}"


def weight(*shape: int) -> Tensor:
    return torch.randn(shape) / max(shape[-1], 1) ** 0.5


@st.composite
def linear(draw, shape):
    """The last axis mapped by a matrix, in one of the ways in which people write that."""
    inputs, outputs = shape[-1], draw(st.integers(1, 4))
    bias, deep = draw(st.booleans()), len(shape) > 1
    activation = draw(st.sampled_from(sorted(ACTIVATIONS)))
    module = {"linear": nn.Linear(inputs, outputs, bias=bias)}
    ways = {
        "module": (lambda s, x: s.linear(x), module),
        "x @ w": (lambda s, x: x @ s.w, {"w": weight(inputs, outputs)}),
        "F.linear(x, w.t())": (lambda s, x: nn.functional.linear(x, s.w.t()), {"w": weight(inputs, outputs)}),
        "flat storage": (lambda s, x: x @ s.w.view(inputs, -1), {"w": weight(inputs * outputs)}),
        "packed": (lambda s, x: packed(s, x, outputs), {"w": weight(2 * outputs, inputs), "b": weight(2 * outputs)}),
        "chunks": (lambda s, x: chunked(s, x), {"w": weight(2 * outputs, inputs)}),
        "data in another order": (lambda s, x: s.linear(x.roll(1, 0)).roll(-1, 0), module),
    }
    if deep:
        ways |= {
            "batch and time in one": (lambda s, x: s.linear(x.flatten(0, 1)).unflatten(0, x.shape[:2]), module),
            "all rows in one": (lambda s, x: s.linear(x.reshape(-1, inputs)).reshape(*x.shape[:-1], outputs), module),
            "time and batch in one": (lambda s, x: time_major(s.linear, x), module),
            "sequence first": (lambda s, x: s.linear(x.transpose(0, 1)).transpose(0, 1), module),
            "last axis first": (lambda s, x: s.linear(x.movedim(-2, 0)).movedim(0, -2), module),
            "addmm": (
                lambda s, x: torch.addmm(s.b, x.reshape(-1, inputs), s.w).reshape(*x.shape[:-1], outputs),
                {"w": weight(inputs, outputs), "b": weight(outputs)},
            ),
        }
    way = draw(st.sampled_from(sorted(ways)))
    function, members = ways[way]
    return Layer(way, function, activation, **members), (*shape[:-1], outputs)


def packed(layer, x, outputs):
    first = nn.functional.linear(x, layer.w[:outputs], layer.b[:outputs])
    return first.tanh() * nn.functional.linear(x, layer.w[outputs:], layer.b[outputs:])


def chunked(layer, x):
    one, two = layer.w.chunk(2)
    return nn.functional.linear(x, one) + nn.functional.linear(x.sin(), two)


def time_major(module, x):
    rows = x.transpose(0, 1).flatten(0, 1)
    return module(rows).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)


@st.composite
def left_product(draw, shape):
    """The axis before the last mapped by ``w @ x``."""
    outputs = draw(st.integers(1, 3))
    layer = Layer("w @ x", lambda s, x: s.w @ x, draw(st.sampled_from(["none", "tanh"])), w=weight(outputs, shape[-2]))
    return layer, (*shape[:-2], outputs, shape[-1])


@st.composite
def convolution(draw, shape):
    """A convolution with everything drawn; frames of a video fold into the batch."""
    folded = len(shape) in (3, 4) and draw(st.booleans())
    channels, *sizes = shape[1:] if folded else shape
    kernel = [draw(st.integers(1, min(3, size))) for size in sizes]
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
    outputs = groups * draw(st.integers(1, 2))
    mode = draw(st.sampled_from(PADDINGS[:3] if len(sizes) == 3 else PADDINGS))
    options = {"groups": groups, "bias": draw(st.booleans()), "padding_mode": mode}
    dilation = [
        draw(st.integers(1, 2)) if size >= 2 * (k - 1) + 1 else 1 for size, k in zip(sizes, kernel, strict=True)
    ]
    if draw(st.booleans()) and mode == "zeros":
        options |= {"padding": "same", "dilation": dilation}
    else:
        options["padding"] = [draw(st.integers(0, min(1, size - 1))) for size in sizes]
        options |= {"stride": [draw(st.integers(1, 2)) for _ in sizes], "dilation": dilation}
    module = CONVOLUTIONS[len(sizes) + 1](channels, outputs, kernel, **options)
    with torch.no_grad():
        result = module(torch.zeros(1, channels, *sizes)).shape[1:]
    activation = draw(st.sampled_from(sorted(ACTIVATIONS)))
    if mode == "zeros" and not folded and draw(st.booleans()):
        size = module.weight.shape
        call = getattr(nn.functional, f"conv{len(sizes)}d")
        place = {key: options[key] for key in ("stride", "padding", "dilation", "groups") if key in options}
        layer = Layer(
            "kernel in flat storage",
            lambda s, x: call(x, s.w.view(size), s.b, **place),
            activation,
            w=weight(size.numel()),
            b=weight(size[0]),
        )
        return layer, tuple(result)
    if not folded:
        return Layer("convolution", lambda s, x: s.module(x), activation, module=module), tuple(result)
    layer = Layer(
        "convolution of frames",
        lambda s, x: s.module(x.flatten(0, 1)).unflatten(0, x.shape[:2]),
        activation,
        module=module,
    )
    return layer, (shape[0], *result)


@st.composite
def norm(draw, shape):
    kinds = [
        "layer",
        "rms",
        "scale alone",
        *["batch"] * (len(shape) in BATCH_NORMS),
        *["group"] * (prod(shape[1:]) > 1),
    ]
    kind = draw(st.sampled_from(kinds))
    axes = draw(st.integers(1, len(shape)))
    eps = 0.1  # one element alone is normalised to zero or one; a small eps would blow up its noise
    if kind == "layer":
        module = nn.LayerNorm(shape[-axes:], eps, bias=draw(st.booleans()))
    elif kind == "rms":
        module = nn.RMSNorm(shape[-axes:], eps)
    elif kind == "batch":
        module = BATCH_NORMS[len(shape)](shape[0]).eval()
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    elif kind == "group":
        module = nn.GroupNorm(draw(st.sampled_from([g for g in (1, 2, 3) if shape[0] % g == 0])), shape[0], eps)
    else:
        return Layer(kind, lambda s, x: (x - x.mean(-1, keepdim=True)) * s.w, w=weight(shape[-1])), shape
    return Layer(kind, lambda s, x: s.module(x), draw(st.sampled_from(["none", "tanh_"])), module=module), shape


@st.composite
def elementwise(draw, shape):
    """A parameter multiplied, added or subtracted, with some axes broadcast."""
    axes = draw(st.integers(0, len(shape)))
    own = tuple(size if draw(st.booleans()) else 1 for size in shape[len(shape) - axes :])
    p = torch.randn(own)
    ways = {
        "x * p": lambda s, x: x * s.p,
        "p * x": lambda s, x: s.p * x,
        "x + p": lambda s, x: (x + s.p).sin(),
        "x - p": lambda s, x: (x - s.p).sin(),
        "p - x": lambda s, x: (s.p - x).sin(),
        "x *= p": lambda s, x: x.sin().mul_(s.p),
        "x += p": lambda s, x: x.sin().add_(s.p).cos(),
        "expanded": lambda s, x: (x + s.p.expand(*x.shape)).sin(),
        "squeezed": lambda s, x: (x * s.p[None].expand(*x.shape)).sin(),
    }
    way = draw(st.sampled_from(sorted(ways)))
    return Layer(way, ways[way], p=p), shape


@st.composite
def shared(draw, shape):
    """One module applied twice: one after the other, or to the whole and to a part."""
    module = nn.Linear(shape[-1], shape[-1], bias=draw(st.booleans()))
    ways = {
        "twice": lambda s, x: s.module(s.module(x).tanh()),
        "two inputs": lambda s, x: s.module(x).tanh() * s.module(x.cos()),
        "two orders": lambda s, x: s.module(x).tanh() * s.module(x.roll(1, 0).cos()).roll(-1, 0),
    }
    if len(shape) > 1:
        ways |= {
            "whole and mean": lambda s, x: s.module(x).tanh() + s.module(x.mean(1, keepdim=True)),
            "whole and first": lambda s, x: s.module(x).tanh() + s.module(x[:, 0]).unsqueeze(1),
        }
    way = draw(st.sampled_from(sorted(ways)))
    return Layer(way, ways[way], module=module), shape


@st.composite
def residual(draw, shape):
    first, middle = draw(linear(shape))
    back = nn.Linear(middle[-1], shape[-1])
    ways = {
        "sum": lambda s, x: x + s.back(s.first(x)),
        "in place": lambda s, x: s.back(s.first(x)).add_(x),
        "concatenated": lambda s, x: torch.cat([x, s.back(s.first(x))], dim=-1),
        "stacked": lambda s, x: (torch.stack([x, s.back(s.first(x))]) * torch.tensor([1.0, 5.0])[mixing]).sum(0),
        "gate": lambda s, x: gate(s.back(s.first(x)), x),
    }
    way = draw(st.sampled_from(sorted(ways)))
    mixing = (slice(None), *[None] * (len(shape) + 1))
    result = (*shape[:-1], 2 * shape[-1]) if way == "concatenated" else shape
    return Layer(f"residual {way}", ways[way], first=first, back=back), result


def gate(branch, x):
    halves = torch.cat([branch, x], dim=-1).chunk(2, dim=-1)
    return halves[0].sigmoid() * halves[1]


@st.composite
def rearranged(draw, shape):
    ways = {"flatten": (lambda s, x: x.flatten(1), (prod(shape),))}
    if len(shape) > 1:
        ways["swap"] = (lambda s, x: x.transpose(1, 2), (shape[1], shape[0], *shape[2:]))
        ways["mean"] = (lambda s, x: x.mean(1), shape[1:])
        ways["merge"] = (lambda s, x: x.flatten(1, 2), (shape[0] * shape[1], *shape[2:]))
    if len(shape) < 4 and shape[0] % 2 == 0:
        ways["split"] = (lambda s, x: x.unflatten(1, (2, -1)), (2, shape[0] // 2, *shape[1:]))
    way = draw(st.sampled_from(sorted(ways)))
    function, result = ways[way]
    return Layer(way, function), tuple(result)


@st.composite
def transposed(draw, shape):
    """A transposed convolution with everything drawn."""
    channels, *sizes = shape
    kernel = [draw(st.integers(1, 3 if len(sizes) < 3 else 2)) for _ in sizes]
    stride = [draw(st.integers(1, 2)) for _ in sizes]
    dilation = [draw(st.integers(1, 2)) for _ in sizes]
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
    steps = list(zip(sizes, kernel, stride, dilation, strict=True))
    spans = [(n - 1) * s + d * (k - 1) + 1 for n, k, s, d in steps]
    padding = [draw(st.integers(0, min(1, (span - 1) // 2))) for span in spans]
    extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    module = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[len(sizes) - 1](
        channels,
        groups * draw(st.integers(1, 2)),
        kernel,
        stride,
        padding,
        extra,
        groups,
        draw(st.booleans()),
        dilation,
    )
    with torch.no_grad():
        result = module(torch.zeros(1, *shape)).shape[1:]
    return Layer("transposed convolution", lambda s, x: s.module(x), "tanh", module=module), tuple(result)


@st.composite
def transformer(draw, shape):
    """Attention, or a whole block of a transformer, with the sequence or the data first, perhaps behind a token."""
    length, width = shape
    groups = draw(st.sampled_from([h for h in (1, 2, 3) if width % h == 0]))
    first = draw(st.booleans())

    def ordered(x):
        return x if first else x.transpose(0, 1)

    token = {"token": torch.randn(1, 1, width), "table": torch.randn(length + 3, width)} if draw(st.booleans()) else {}

    def start(s, x):
        if not token:
            return x
        return torch.cat([s.token.expand(len(x), -1, -1), x], dim=1) + s.table[: length + 1]

    if draw(st.booleans()):
        module = nn.MultiheadAttention(
            width, groups, bias=draw(st.booleans()), add_bias_kv=draw(st.booleans()), batch_first=first
        )

        def forward(s, x):
            x = ordered(start(s, x))
            return x + ordered(s.module(x, x, x, need_weights=False)[0]) if first else ordered(s.module(x, x, x)[0])

    else:
        options = {"norm_first": draw(st.booleans()), "batch_first": first, "layer_norm_eps": 0.1}
        module = nn.TransformerEncoderLayer(width, groups, draw(st.integers(1, 3)), 0.0, "gelu", **options)

        def forward(s, x):
            return ordered(s.module(ordered(start(s, x))))

    return Layer("transformer", forward, module=module, **token), (length + bool(token), width)


@st.composite
def lookup(draw, shape):
    """Rows of a table at places that the data tell, and of one at their positions."""
    width, rows = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    tables = {"table": nn.Embedding(rows, width), "places": nn.Embedding(shape[-1] + 1, width)}

    def forward(s, x):
        y = s.table((x.detach() * 9).long().abs() % rows)
        return (y + s.places(torch.arange(x.shape[-1]))).sin() * x.unsqueeze(-1)

    return Layer("lookup", forward, **tables), (*shape, width)


@st.composite
def networks(draw):
    """A network, its inputs and its targets."""
    torch.manual_seed(draw(st.integers(0, 5)))
    data = draw(st.integers(1, 4))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    x = torch.randn(data, *shape)
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        kinds = [linear(shape), linear(shape), elementwise(shape), norm(shape), shared(shape), residual(shape)]
        kinds += [convolution(shape)] * (2 * (len(shape) in CONVOLUTIONS))
        kinds += [transposed(shape)] * (len(shape) in CONVOLUTIONS) + [transformer(shape)] * (2 * (len(shape) == 2))
        kinds += [lookup(shape)] * (len(shape) < 4)
        kinds += [left_product(shape)] * (len(shape) > 1) + [rearranged(shape)]
        layer, shape = draw(st.one_of(kinds))
        layers.append(layer)
    layers.append(Layer("outputs", lambda s, x: x.flatten(1).sin()))
    model = nn.Sequential(*layers)
    parameters = list(model.parameters())
    if not parameters:
        model.append(nn.Linear(prod(shape), 2))
        parameters, shape = list(model.parameters()), (2,)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn_like(p))
    frozen = draw(st.lists(st.sampled_from(range(len(parameters))), max_size=len(parameters) - 1, unique=True))
    for index in frozen:
        parameters[index].requires_grad_(False)
    return model, x, torch.randn(data, prod(shape))


@dataclass(frozen=True, eq=False)
class Recorder(Visitor):
    """A fit that keeps what it is given."""

    found: dict[Block, Samples] = field(default_factory=dict)
    exact = True  # it is shown the gradients of single data too, where there are no others

    def update(self, state, samples):
        (self.found[state.blocks[0]],) = samples
        return state


def captured(model, x, targets) -> dict[Block, Samples]:
    recorder = Recorder()
    run = Accumulator(Recipe(model, kf.Gaussian(), labels="observed"), recorder)
    run.read([(x, targets)])
    return recorder.found


pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@settings(max_examples=400, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks())
def test_samples_are_the_gradients_of_every_datum(network):
    model, x, targets = network
    note(f"{model}\ninputs {list(x.shape)}")
    parameters = trainable(model)
    rest = {name: p for name, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())

    def loss(parameters, datum, target):
        outputs = torch.func.functional_call(model, parameters | rest, (datum[None],))
        return 0.5 * (outputs[0] - target).square().sum()

    detached = {name: p.detach() for name, p in parameters.items()}
    truth = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(detached, x.clone(), targets)

    found = {name: torch.zeros(len(x), *p.shape) for name, p in parameters.items()}
    samples = captured(model, x, targets)
    alone = {block.name for block in samples if block.operator == FALLBACK}
    # Only data in another order, one of which is too silent to tell its place, are left to the fallback.
    assert not alone or "order" in str(model)
    for block, use in samples.items():
        rows = torch.cat([part.transpose(0, 1).flatten(1) for part in use.per_sample()])
        block.scatter(rows, found)
    for name, expected in truth.items():
        error = (found[name] - expected).abs().max()
        assert error <= 1e-10 * (1 + expected.abs().max()), f"{name}: off by {error:.1e} of {expected.abs().max():.1e}"

    # K-FAC sums over rows whoever owns them: the same sums as from rows sorted by sample.
    fisher = kf.estimate(model, (x, targets), kf.Gaussian(), fit="kfac", labels="observed")
    for block, use in samples.items():
        kronecker = fisher[block.name]
        if block.name in alone:
            continue
        for side, rows in ((kronecker.A, use.activations.dense()), (kronecker.B, use.gradients)):
            rows = rows.flatten(1, 2)
            expected = rows.mT @ rows / (rows.shape[1] if side is kronecker.A else len(x))
            side = Factor.of(side).dense()
            assert (side - expected).abs().max() <= 1e-10 * (1 + expected.abs().max()), block.name
