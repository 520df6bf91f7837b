"""What is proved of a graph is true: no gradient of an example arrives where the proof puts another one."""

from contextlib import suppress
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kronfisher.capture import separation
from kronfisher.capture.separation import separate

N = 3
ELSEWHERE = {  # on other devices, or other versions of torch
    "ReshapeAlias", "CudnnBatchNorm", "MiopenBatchNorm", "ScaledDotProductFlashAttention", "FusedRmsNorm",
    "ScaledDotProductEfficientAttention", "ScaledDotProductCudnnAttention", "MkldnnAdaptiveAvgPool2D", "SafeSoftmax",
    "Aminmax",
}  # fmt: skip


def rows(*shape):
    return lambda: torch.rand(N, *shape) + 0.1


X, IMAGES, LINE, VIDEO = rows(4, 6), rows(4, 6, 6), rows(4, 8), rows(2, 4, 4, 4)
UNARY = (
    "abs", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "neg", "sin", "cos",
    "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan", "asinh", "atanh", "erf", "erfc", "sigmoid", "square", "sgn",
    "clone", "tril", "triu", "relu",
)  # fmt: skip
ACTIVATIONS = (
    "logsigmoid", "leaky_relu", "elu", "gelu", "silu", "mish", "softplus", "softshrink", "hardshrink", "hardtanh",
    "hardsigmoid", "hardswish", "selu", "celu",
)  # fmt: skip
PAIRS = (
    "add", "sub", "rsub", "mul", "div", "pow", "atan2", "maximum", "minimum", "fmax", "fmin", "logaddexp",
)  # fmt: skip


def sides(shape):
    """A window of a larger tensor along every axis, and paddings that shift it."""
    return [
        lambda x, k=k, ends=ends: F.pad(x, [0, 0] * (len(shape) - k) + ends)
        for k in range(len(shape) + 1)
        for ends in ([1, 0], [1, -1], [0, 2])
    ]


def paired(name, other, x):
    function, others = getattr(torch, name), [x.flip(-1), x[:1], x.mean(1, keepdim=True), x.flip(0)]
    return function(x, others[other])


def per_axis(function, axes=3):
    return [lambda x, k=k: function(x, k) for k in range(-axes, axes)]


def derived(function):
    """The derivative of a function."""
    return lambda x: torch.autograd.grad(function(x).square().sum(), x, create_graph=True)[0]


TWICE = [torch.tanh, torch.sigmoid, torch.relu, *(getattr(F, name) for name in ACTIVATIONS)]
CASES = {
    **{name: (X, [getattr(torch, name)]) for name in UNARY},
    "second derivatives": (X, [derived(function) for function in TWICE]),
    "second derivatives of parts": (
        X,
        [
            *(derived(lambda x, k=k: x.select(k, 1).exp()) for k in range(3)),
            *(derived(lambda x, k=k: x.narrow(k, 1, 2).exp()) for k in range(3)),
        ],
    ),
    "acosh": (X, [lambda x: torch.acosh(1 + x)]),
    **{name: (X, [getattr(F, name)]) for name in ACTIVATIONS},
    **{name: (X, [partial(paired, name, other) for other in range(4)]) for name in PAIRS},
    "three operands": (
        X,
        [
            lambda x: torch.where(x > 0.5, x, x.flip(1)),
            lambda x: torch.where(x > 0.5, x, x[0]),
            lambda x: x.masked_fill(x > 0.5, 0),
            lambda x: torch.lerp(x, x.flip(-1), 0.3),
            lambda x: torch.addcmul(x, x, x[:1]),
            lambda x: torch.addcdiv(x, x, x.flip(-1)),
            lambda x: x.clamp(0.2, 0.7),
            lambda x: torch.clamp(x, min=0.3),
            lambda x: F.threshold(x, 0.4, 0.0),
            lambda x: F.dropout(x, 0.5),
            lambda x: torch.native_dropout(x, 0.5, True)[0],
            lambda x: x.double().float(),
            lambda x: F.prelu(x - 0.5, torch.rand(4)),
            lambda x: x.clamp_min(0.3),
            lambda x: x.clamp_max(0.3),
            lambda x: x[..., :],
            lambda x: torch.ops.aten.alias(x),
        ],
    ),
    "reductions": (
        X,
        [
            lambda x, f=f, k=k: f(x, k)
            for k in range(-3, 3)
            for f in (
                torch.sum,
                torch.mean,
                torch.amax,
                torch.amin,
                torch.prod,
                torch.logsumexp,
                torch.var,
                torch.std,
                lambda x, k: x.max(k)[0],
                lambda x, k: x.min(k, keepdim=True)[0],
                lambda x, k: x.median(k)[0],
                lambda x, k: x.nanmedian(k)[0],
                lambda x, k: x.mode(k)[0],
                lambda x, k: x.kthvalue(1, k)[0],
                lambda x, k: x.norm(dim=k),
                lambda x, k: x.norm(0.5, dim=k, keepdim=True),
                lambda x, k: x.sum(k, keepdim=True),
                lambda x, k: torch.aminmax(x, dim=k)[0],
                lambda x, k: x.unsqueeze(0).sum((0, k % 3 + 1)),
            )
        ]
        + [
            lambda x: x.sum((1, 2)),
            lambda x: x.mean((0, -1), keepdim=True),
            lambda x: x * x.sum(),
            lambda x: x.norm() * x,
            lambda x: torch._C._VariableFunctions.norm(x, 1.5, (1,), False),
        ],
    ),
    "along an axis": (
        X,
        [
            *per_axis(torch.softmax),
            *per_axis(torch.log_softmax),
            *per_axis(torch.cumsum),
            *per_axis(torch.cumprod),
            *per_axis(lambda x, k: x.cummax(k)[0]),
            *per_axis(lambda x, k: x.cummin(k)[0]),
            *per_axis(torch.logcumsumexp),
            *per_axis(lambda x, k: torch.cat([x, x.flip(k)], k)),
            *per_axis(lambda x, k: torch.stack([x, x.tanh()], k), 4),
            *per_axis(lambda x, k: x.split(2, k)[0]),
            *per_axis(lambda x, k: x.split([1, x.shape[k] - 1], k)[1]),
            *per_axis(lambda x, k: sum(x.split([1, x.shape[k] - 1], k))),
            *per_axis(lambda x, k: x.topk(2, k)[0]),
            *per_axis(lambda x, k: x.sort(k)[0]),
            *per_axis(lambda x, k: F.glu(torch.cat([x, x], k), k)),
            *per_axis(lambda x, k: x.index_select(k, torch.tensor([1, 0]))),
            *per_axis(lambda x, k: x.gather(k, torch.zeros(x.shape, dtype=torch.long))),
            *per_axis(lambda x, k: x.gather(k, torch.zeros(2, 2, 2, dtype=torch.long))),
            *per_axis(lambda x, k: x.flip(k)),
            *per_axis(lambda x, k: x.roll(1, k)),
            lambda x: x.roll(1),
            *per_axis(lambda x, k: x.select(k, 1)),
            *per_axis(lambda x, k: x.unbind(k)[1]),
            *per_axis(lambda x, k: x.narrow(k, 1, 2)),
            *per_axis(lambda x, k: x.unfold(k, 2, 1)),
            *sides((4, 6)),
        ],
    ),
    "views": (
        X,
        [
            lambda x: x.flatten(),
            lambda x: x.flatten(0, 1),
            lambda x: x.flatten(1),
            lambda x: x.reshape(12, 6).sum(-1),
            lambda x: x.reshape(3, 2, 2, 6).sum(2),
            lambda x: x.reshape(9, 8),
            lambda x: x.reshape(2, 6, 6),
            lambda x: x.transpose(0, 1).reshape(12, 6),
            lambda x: x.transpose(0, 1).flatten(1),
            lambda x: x.permute(2, 0, 1),
            lambda x: x.permute(1, 2, 0).flatten(0, 1).mT,
            lambda x: x.movedim(0, -1),
            lambda x: x.unsqueeze(0).squeeze(),
            lambda x: x[:, :1].squeeze(1),
            lambda x: x[:, :1].squeeze((1,)),
            lambda x: x.mT.reshape(-1, 4).t(),
            lambda x: x[:1].expand(5, 4, 6),
            lambda x: x.unsqueeze(1).expand(3, 2, 4, 6),
            lambda x: x.repeat(1, 2, 1),
            lambda x: x.repeat(2, 1, 1),
            lambda x: x.repeat(2, 1, 1, 1),
            lambda x: torch.einsum("nti,oi->ton", x, torch.rand(2, 6)),
            lambda x: x.sum(2).t(),
            lambda x: torch.ops.aten.t(x.sum(2)),
            lambda x: torch.ops.aten._unsafe_view(x, [12, 6]),
        ],
    ),
    "products": (
        X,
        [
            lambda x: x @ torch.rand(6, 2),
            lambda x: torch.rand(2, 4) @ x,
            lambda x: x @ x.mT,
            lambda x: x.mT @ x,
            lambda x: x.flatten(0, 1) @ torch.rand(6, 2),
            lambda x: x.flatten(1) @ torch.rand(24, 2),
            lambda x: x.flatten(1) @ x.flatten(1).t(),
            lambda x: torch.rand(2, 3) @ x.flatten(1),
            lambda x: torch.rand(2, 24) @ x.flatten(1).t(),
            lambda x: F.linear(x.flatten(1), torch.rand(2, 24), torch.rand(2)),
            lambda x: torch.addmm(x[:, 0, :2], x[:, 0], torch.rand(6, 2)),
            lambda x: torch.addmm(x[:2, 0, :2], torch.rand(2, 3), x[:, 0, :2]),
            lambda x: torch.baddbmm(x, x, torch.rand(3, 6, 6)),
            lambda x: torch.bmm(x.transpose(0, 1), torch.rand(4, 6, 2)),
            lambda x: torch.bmm(torch.rand(4, 2, 3), x.transpose(0, 1)),
            lambda x: torch.bmm(torch.rand(4, 2, 6), x.permute(1, 2, 0)),
            lambda x: x @ x[0].mT,
            lambda x: torch.mv(x[:, 0], torch.rand(6)),
            lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
            lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
            lambda x: F.scaled_dot_product_attention(
                x.transpose(0, 1)[None], x.transpose(0, 1)[None], x.transpose(0, 1)[None]
            ),
            lambda x: F.bilinear(x, x, torch.rand(2, 6, 6)),
            lambda x: torch.cdist(x, x),
            lambda x: F.normalize(x, dim=0),
        ],
    ),
    "normalisation": (
        X,
        [
            lambda x: F.layer_norm(x, (6,), torch.rand(6)),
            lambda x: F.layer_norm(x, (4, 6)),
            lambda x: F.layer_norm(x, (3, 4, 6)),
            lambda x: F.layer_norm(x.transpose(0, 1), (3, 6)),
            lambda x: F.group_norm(x, 2),
            lambda x: F.rms_norm(x, (6,)),
            lambda x: F.batch_norm(x, torch.rand(4), torch.rand(4)),
            lambda x: F.batch_norm(x, None, None, training=True),
            lambda x: F.group_norm(x.transpose(0, 1), 3),
            lambda x: F.instance_norm(x),
        ],
    ),
    "lines": (
        LINE,
        [
            lambda x: F.conv1d(x, torch.rand(2, 4, 3)),
            lambda x: F.conv1d(x, torch.rand(4, 2, 3), groups=2),
            lambda x: F.conv_transpose1d(x, torch.rand(4, 2, 3)),
            lambda x: F.conv1d(x.transpose(0, 1), torch.rand(2, 3, 3)),
            lambda x: F.conv1d(x[:, 0], torch.rand(2, 3, 3)),
            lambda x: F.max_pool1d(x, 2),
            lambda x: F.avg_pool1d(x, 2),
            lambda x: F.interpolate(x, scale_factor=2),
            lambda x: F.interpolate(x, scale_factor=2, mode="linear"),
            lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
            lambda x: F.pad(x, (1, 1), mode="reflect"),
            lambda x: F.pad(x, (1, 1), mode="replicate"),
            lambda x: F.pad(x, (1, 1), mode="circular"),
            lambda x: F.adaptive_avg_pool1d(x, 2),
            lambda x: F.adaptive_max_pool1d(x, 2),
        ],
    ),
    "images": (
        IMAGES,
        [
            lambda x: F.conv2d(x, torch.rand(2, 4, 3, 3)),
            lambda x: F.max_pool2d(x, 2),
            lambda x: F.avg_pool2d(x, 2),
            lambda x: F.adaptive_avg_pool2d(x, 2),
            lambda x: F.adaptive_max_pool2d(x, 2),
            lambda x: F.unfold(x, 2),
            lambda x: F.fold(x.flatten(2), (7, 7), 2),
            lambda x: F.pixel_shuffle(x, 2),
            lambda x: F.pixel_unshuffle(x, 2),
            lambda x: F.interpolate(x, scale_factor=2),
            lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
            lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
            lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
            lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
            lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
            lambda x: F.max_pool2d(x[:, 0], 2),
            lambda x: F.avg_pool2d(x[:, 0], 2),
            lambda x: F.conv2d(x.flatten(0, 1)[:, None], torch.rand(2, 1, 3, 3)),
            lambda x: F.unfold(x[:, 0], 1),
            lambda x: F.avg_pool3d(x[None], (2, 2, 2)),
            lambda x: F.pixel_shuffle(x.transpose(0, 1).repeat(1, 4, 1, 1)[:, :4], 2),
        ],
    ),
    "videos": (
        VIDEO,
        [
            lambda x: F.conv3d(x, torch.rand(2, 2, 3, 3, 3)),
            lambda x: F.max_pool3d(x, 2),
            lambda x: F.avg_pool3d(x, 2),
            lambda x: F.adaptive_avg_pool3d(x, 2),
            lambda x: F.adaptive_max_pool3d(x, 2),
            lambda x: F.interpolate(x, scale_factor=2),
            lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"),
            lambda x: F.pad(x, (1,) * 6, mode="replicate"),
            lambda x: F.pad(x, (1,) * 6, mode="reflect"),
        ],
    ),
}


def proved_and_true(function, x):
    """The proof about ``x`` in ``function(x)`` and after it, whichever axis of the result is said to count examples."""
    x = x.requires_grad_()
    middle = x * 0.9
    result = function(middle)
    seen = {node.name().rstrip("0123456789").removesuffix("Backward") for node in nodes(result)}
    agreed = 0
    for axis, size in enumerate(result.shape):
        if size % N or size == 0:
            continue
        outputs = result.movedim(axis, 0)
        states = separate(outputs.unflatten(0, (N, -1)))
        found = states.get((middle.grad_fn, 0))
        if found is None:
            continue
        agreed += 1
        place, inner = found
        numbers = torch.arange(middle.shape[place]) // inner % N
        for k in range(N):
            loss = (outputs.unflatten(0, (N, -1))[k] * torch.rand(outputs.unflatten(0, (N, -1))[k].shape)).sum()
            (gradient,) = torch.autograd.grad(loss, middle, retain_graph=True)
            others = gradient.movedim(place, 0)[numbers != k]
            assert not bool(others.any()), f"example {k} acts on others along axis {axis}"
    return agreed, seen


def nodes(tensor):
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        if (node := stack.pop()) is not None and node not in seen:
            seen.add(node)
            stack += [child for child, _ in node.next_functions]
    return seen


VISITED = {}


@pytest.mark.parametrize("kind", CASES)
def test_a_proof_is_true(kind):
    make, functions = CASES[kind]
    proofs = 0
    for function in functions:
        x = make()
        proved, VISITED[kind, function] = proved_and_true(function, x)
        proofs += proved
        # the same where examples lie along another axis, or several rows of each along one
        with suppress(RuntimeError):  # shapes that do not fit
            proofs += proved_and_true(lambda x, f=function: f(x.transpose(0, 1)), x.transpose(0, 1).contiguous())[0]
        with suppress(RuntimeError):
            proofs += proved_and_true(function, make().repeat(2, *[1] * (x.dim() - 1)))[0]
    assert proofs >= len(functions) / 2, "hardly anything is proved"


def test_every_rule_is_tried():
    if len({kind for kind, _ in VISITED}) < len(CASES):
        pytest.skip("needs the other tests of this file")
    tried = set().union(*VISITED.values())
    assert not separation._RULES.keys() - tried - ELSEWHERE


def test_functions_of_users_prove_nothing():
    class Mul(torch.autograd.Function):  # named as one of torch's nodes
        @staticmethod
        def forward(ctx, x):
            return x.flip(0)

        @staticmethod
        def backward(ctx, gradient):
            return gradient.flip(0)

    x = torch.rand(N, 2, requires_grad=True)
    middle = x * 2
    assert (middle.grad_fn, 0) not in separate(Mul.apply(middle) + 1)
    assert (middle.grad_fn, 0) in separate(middle + 1)
