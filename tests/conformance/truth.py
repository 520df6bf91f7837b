"""Dense truth by automatic differentiation, datum by datum; K-FAC's rows by naive loops. Nothing here uses the capture.

A `Problem` is a tiny model with data and a likelihood. Its gradients are taken by ``torch.autograd.grad`` of one datum
at a time, the output Hessian by differentiating ``-log_prob`` twice. `taps` says, for a module, at which tensors the
output gradients of K-FAC arrive and which inputs belong to them, by slicing patches in Python loops; `Problem.rows`
proves them right: assembled, they must give autograd's own gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronfisher.layers import EXAMPLES
from kronfisher.likelihoods import REGISTRY, Draws, Likelihood

SEED = 5  # of label draws
DRAWS = 2


class Headed(nn.Module):
    """A module, tanh, flatten, and a fixed random head that mixes everything."""

    def __init__(self, module: nn.Module, features: int, shape: tuple[int, ...]):
        super().__init__()
        self.module, self.shape = module, shape
        self.register_buffer("head", torch.randn(features, prod(shape)) / features**0.5)

    def finish(self, hidden: Tensor) -> Tensor:
        return (hidden.tanh().flatten(1) @ self.head).unflatten(1, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.module(x))


@dataclass
class Tap:
    """Where a canonical weight ``W [H, O, I]`` meets one datum.

    Attributes:
        name: of a parameter of the block.
        tensor: where the output gradient arrives.
        a: inputs ``[H, T, I]``, the bias coordinate included.
        rows: output gradient, shaped like the tensor, to ``g [H, T, O]``.
        index: ``[H, O, I]``, places of W's elements in the flat vector of all trainable parameters.
    """

    name: str
    tensor: Tensor
    a: Tensor
    rows: Callable[[Tensor], Tensor]
    index: Tensor


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def positions(model: nn.Module) -> dict[str, Tensor]:
    """Name → places in the flat vector of the trainable parameters, shaped like the parameter."""
    found, start = {}, 0
    for name, p in trainable(model).items():
        found[name] = torch.arange(start, start + p.numel()).reshape(p.shape)
        start += p.numel()
    return found


def shake(module: nn.Module) -> nn.Module:
    """Nothing may be an identity: no zero shift, unit scale or unit variance."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return module


def output_vectors(
    likelihood: Likelihood,
    outputs: Tensor,
    targets: Tensor,
    labels: str,
    samples: int = 1,
    seed: int = 0,
    averaged: Callable[[Tensor, Tensor], Sequence[Tensor]] | None = None,
) -> Tensor:
    """What to back-propagate, ``[V, N, *shape]``: a root of autograd's Hessian, drawn labels, or the gradient.

    Where the Hessian depends on the label, `averaged` gives the labels over which to take its mean.
    """
    outputs = outputs.detach()
    if labels == "sampled":
        draws = [likelihood.sampled(outputs, targets, Draws(seed, stream)) for stream in range(samples)]
        return torch.stack(draws) / samples**0.5

    def loss(datum: Tensor, target: Tensor) -> Tensor:
        return -likelihood.log_prob(datum[None], target[None])[0]

    if labels == "observed":
        pairs = zip(outputs, targets, strict=True)
        return torch.stack([torch.func.grad(loss)(x, y) for x, y in pairs])[None]
    size = outputs[0].numel()
    roots = []
    several = averaged(outputs, targets) if averaged else [targets]
    for x, *ys in zip(outputs, *several, strict=True):
        hessian = torch.stack([torch.func.jacrev(torch.func.jacrev(loss))(x, y).reshape(size, size) for y in ys]).mean(
            0
        )
        values, vectors = torch.linalg.eigh(hessian)
        roots.append((vectors * values.clamp_min(0).sqrt()).T.reshape(size, *x.shape))
    return torch.stack(roots, dim=1)


def gradients(model: nn.Module, x: Tensor, vectors: Tensor) -> Tensor:
    """``vec(G_k)`` of every datum and vector, ``[V, N, P]``, by one backward pass each."""
    parameters = list(trainable(model).values())
    found = []
    for k in range(len(x)):
        outputs = model(x[k : k + 1])
        for v in vectors[:, k]:
            parts = torch.autograd.grad(outputs, parameters, v[None], retain_graph=True, materialize_grads=True)
            found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found).unflatten(0, (len(x), -1)).transpose(0, 1)


def dense(rows: Tensor, count: float) -> Tensor:
    """``Σ_k vec(G_k) vec(G_k)ᵀ / N`` of ``[V, N, P]``."""
    rows = rows.flatten(0, 1)
    return rows.T @ rows / count


def dense_fisher(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    likelihood: Likelihood,
    labels: str = "exact",
    samples: int = 1,
    seed: int = 0,
) -> Tensor:
    """The whole Fisher matrix of the mean over data, every datum counted."""
    vectors = output_vectors(likelihood, model(x), targets, labels, samples, seed)
    return dense(gradients(model, x, vectors), len(x))


@dataclass
class Problem:
    """A model, data, a likelihood and the truth about them."""

    model: Headed
    likelihood: Likelihood
    x: Tensor
    targets: Tensor
    averaged: Callable[[Tensor, Tensor], Sequence[Tensor]] | None = None

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.x, self.targets

    @cached_property
    def counted(self) -> Tensor:
        """Which positions count, bool ``[N, P]``."""
        with torch.no_grad():
            mask = self.likelihood.positions(self.model(self.x), self.targets)
        return torch.ones(len(self.x), 1, dtype=torch.bool) if mask is None else mask

    @property
    def count(self) -> int:
        """N: data with a position that counts."""
        return int(self.counted.any(1).sum())

    def vectors(self, labels: str) -> Tensor:
        """What is back-propagated, ``[V, N, *shape]``."""
        return self._once("vectors", labels, lambda: self._vectors(labels))

    def _vectors(self, labels: str) -> Tensor:
        return output_vectors(self.likelihood, self.model(self.x), self.targets, labels, DRAWS, SEED, self.averaged)

    def gradients(self, labels: str) -> Tensor:
        """``[V, N, P]``."""
        return self._once("gradients", labels, lambda: gradients(self.model, self.x, self.vectors(labels)))

    def truth(self, labels: str) -> Tensor:
        """The Fisher matrix of the mean over data, ``[P, P]``."""
        return self._once("truth", labels, lambda: dense(self.gradients(labels), self.count))

    def _once(self, what: str, labels: str, make: Callable[[], Any]) -> Any:
        if (what, labels) not in self._made:
            self._made[what, labels] = make()
        return self._made[what, labels]

    @cached_property
    def _made(self) -> dict[tuple[str, str], Any]:
        return {}

    def part(self, names: tuple[str, ...]) -> Tensor:
        """Places of some parameters in the flat vector."""
        places = positions(self.model)
        return torch.cat([places[name].flatten() for name in names])

    def rows(self, labels: str) -> "list[tuple[Tap, Tensor, Tensor]]":
        """For every block its tap, ``a [H, N, T, I]`` and ``g [V, H, N, T, O]``, proved to give the gradients."""
        return self._once("rows", labels, lambda: self._rows(labels))

    def _rows(self, labels: str) -> "list[tuple[Tap, Tensor, Tensor]]":
        vectors, truth = self.vectors(labels), self.gradients(labels)
        inputs, outputs, seen = [], [], []
        for k in range(len(self.x)):
            hidden, found = taps(self.model.module, self.x[k : k + 1], positions(self.model))
            f = self.model.finish(hidden)
            tensors = [tap.tensor for tap in found]
            each = [
                torch.autograd.grad(f, tensors, v[None], retain_graph=True, materialize_grads=True)
                for v in vectors[:, k]
            ]
            inputs.append([tap.a.detach() for tap in found])
            outputs.append([torch.stack([tap.rows(g[i]) for g in each]) for i, tap in enumerate(found)])
            seen = found
        answer = []
        assembled = torch.zeros_like(truth)
        for i, tap in enumerate(seen):
            a = torch.stack([datum[i] for datum in inputs], dim=1)
            g = torch.stack([datum[i] for datum in outputs], dim=2)
            assembled[..., tap.index.flatten()] = torch.einsum("vhnto,hnti->vnhoi", g, a).flatten(2)
            answer.append((tap, a, g))
        torch.testing.assert_close(assembled, truth, rtol=0, atol=1e-12)
        return answer


def taps(module: nn.Module, x: Tensor, places: dict[str, Tensor]) -> tuple[Tensor, list[Tap]]:
    """The module's output on one datum, and where its weights meet it; a new kind of weight needs a branch here."""
    if isinstance(module, nn.Linear):
        y = module(x)
        a = x.reshape(1, -1, x.shape[-1])
        return y, [_with_bias(y, a, lambda g: g.reshape(1, -1, g.shape[-1]), places, module)]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        y, groups = module(x), module.groups
        return y, [
            _with_bias(
                y, patches(module, x[0]), lambda g: g[0].flatten(1).unflatten(0, (groups, -1)).mT, places, module
            )
        ]
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        y, groups = module(x), module.groups
        a = spread_patches(module, x[0], y.shape[2:])
        weight = places["module.weight"].unflatten(0, (groups, -1)).transpose(1, 2)
        own = {**places, "module.weight": weight}
        return y, [_with_bias(y, a, lambda g: g[0].flatten(1).unflatten(0, (groups, -1)).mT, own, module)]
    if hasattr(module, "left"):
        return _matrix_products(module, x, places)
    if isinstance(getattr(module, "table", None), nn.Embedding | nn.EmbeddingBag):
        return _lookups(module, x, places)
    if hasattr(module, "attention"):
        return _attention(module.attention, "module.attention", *sources(module, x), places)
    if isinstance(module, nn.TransformerEncoderLayer):
        return _transformer_layer(module, x, places)
    return module(x), vectors(module, "module.", places)  # scales and shifts


def vectors(module: nn.Module, prefix: str, places: dict[str, Tensor], *but: str) -> list[Tap]:
    """A tap for each parameter whose gradient is a vector of a datum, with an input of one."""
    return [
        Tap(
            prefix + name,
            p,
            p.new_ones(1, 1, 1),
            lambda g: g.reshape(1, 1, -1),
            places[prefix + name].reshape(1, -1, 1),
        )
        for name, p in trainable(module).items()
        if name not in but
    ]


def _lookups(module: nn.Module, x: Tensor, places: dict[str, Tensor]) -> tuple[Tensor, list[Tap]]:
    indices = (x * 7).long().abs() % 5
    table = module.table
    y = table(indices)
    a = F.one_hot(indices, 5).to(x.dtype)
    if table.padding_idx is not None:
        a[..., table.padding_idx] = 0
    if isinstance(table, nn.EmbeddingBag):
        a = a.sum(1) / (a.sum((1, 2)).clamp_min(1)[:, None] if table.mode == "mean" else 1)
    found = [_table("module.table.weight", y, a, places)]
    if module.positions is not None:
        z = module.positions(torch.arange(x.shape[1]))
        found.append(_table("module.positions.weight", z, torch.eye(x.shape[1], 8, dtype=x.dtype), places))
        y = y + z
    return y, found


def _table(name: str, y: Tensor, a: Tensor, places: dict[str, Tensor]) -> Tap:
    return Tap(name, y, a.reshape(1, -1, a.shape[-1]), lambda g: g.reshape(1, -1, g.shape[-1]), places[name].T[None])


def sources(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where queries, keys and values come from in the registered examples of attention."""
    if not module.cross:
        return x, x, x
    other = x[:, 1:, :3].sin()
    return x, other, other.cos()[..., :2]


def _attention(
    module: nn.Module, prefix: str, query: Tensor, key: Tensor, value: Tensor, places: dict[str, Tensor]
) -> tuple[Tensor, list[Tap]]:
    """One datum's attention by its formula, head by head; four projections and the additional key and value."""
    width, found, projected = module.embed_dim, [], []
    for k, (source, name) in enumerate(zip((query, key, value), "qkv", strict=True)):
        if module.in_proj_weight is not None:
            some = slice(k * width, (k + 1) * width)
            weight, index = module.in_proj_weight[some], places[f"{prefix}.in_proj_weight"][some]
            own = f"{prefix}.in_proj_weight[{k * width}:{(k + 1) * width}, :]"
        else:
            own = f"{prefix}.{name}_proj_weight"
            weight, index = getattr(module, f"{name}_proj_weight"), places[own]
        a, y = source[0], source[0] @ weight.T
        if module.in_proj_bias is not None:
            some = slice(k * width, (k + 1) * width)
            y, a = y + module.in_proj_bias[some], torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
            index = torch.cat([index, places[f"{prefix}.in_proj_bias"][some, None]], dim=1)
        found.append(Tap(own, y, a[None], lambda g: g[None], index[None]))
        projected.append(y)
    q, k, v = projected
    if module.bias_k is not None:
        k, v = torch.cat([k, module.bias_k[0]]), torch.cat([v, module.bias_v[0]])
        found += [tap for tap in vectors(module, f"{prefix}.", places) if tap.name.endswith(("bias_k", "bias_v"))]
    if module.add_zero_attn:
        k, v = (torch.cat([each, torch.zeros_like(each[:1])]) for each in (k, v))
    groups = []
    for part in torch.arange(width).chunk(module.num_heads):
        scores = q[:, part] @ k[:, part].T / len(part) ** 0.5
        groups.append(scores.softmax(dim=1) @ v[:, part])
    hidden = torch.cat(groups, dim=1)
    y = hidden @ module.out_proj.weight.T
    index = places[f"{prefix}.out_proj.weight"]
    if module.out_proj.bias is not None:
        y, hidden = y + module.out_proj.bias, torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)
        index = torch.cat([index, places[f"{prefix}.out_proj.bias"][:, None]], dim=1)
    found.append(Tap(f"{prefix}.out_proj.weight", y, hidden[None], lambda g: g[None], index[None]))
    return y[None], found


def _transformer_layer(module: nn.Module, x: Tensor, places: dict[str, Tensor]) -> tuple[Tensor, list[Tap]]:
    found = [tap for tap in vectors(module, "module.", places) if ".norm" in tap.name]
    hidden = module.norm1(x)
    answer, taps_ = _attention(module.self_attn, "module.self_attn", hidden, hidden, hidden, places)
    x = x + answer
    found += taps_
    hidden = module.norm2(x)
    for name, layer in (("linear1", module.linear1), ("linear2", module.linear2)):
        own = {"module.weight": places[f"module.{name}.weight"], "module.bias": places[f"module.{name}.bias"]}
        y = layer(hidden)
        tap = _with_bias(y, hidden, lambda g: g, own, layer)
        tap.name = f"module.{name}.weight"
        found.append(tap)
        hidden = y.relu()
    return x + y, found


def spread_patches(module: nn.Module, x: Tensor, size: tuple[int, ...]) -> Tensor:
    """What each output position of a transposed convolution sees of one image, ``[H, T, C/H · kernel]``."""
    channels = x.shape[0] // module.groups
    found = torch.zeros(module.groups, prod(size), channels, prod(module.kernel_size), dtype=x.dtype)
    for t, position in enumerate(product(*map(range, size))):
        for j, corner in enumerate(product(*map(range, module.kernel_size))):
            place = []
            options = (module.padding, module.dilation, module.stride)
            for o, c, pad, spread, step in zip(position, corner, *options, strict=True):
                whole, rest = divmod(o + pad - spread * c, step)
                place.append(whole if rest == 0 else -1)
            if all(0 <= k < n for k, n in zip(place, x.shape[1:], strict=True)):
                found[:, t, :, j] = x[(slice(None), *place)].unflatten(0, (module.groups, channels))
    return found.flatten(2)


def _with_bias(
    y: Tensor, a: Tensor, rows: Callable[[Tensor], Tensor], places: dict[str, Tensor], module: nn.Module
) -> Tap:
    index = places["module.weight"].reshape(len(a), -1, a.shape[-1])
    if module.bias is not None:
        a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
        index = torch.cat([index, places["module.bias"].reshape(len(a), -1, 1)], dim=-1)
    return Tap("module.weight", y, a, rows, index)


def _matrix_products(module: nn.Module, x: Tensor, places: dict[str, Tensor]) -> tuple[Tensor, list[Tap]]:
    # x @ right, then addmm(bias, ·, leftᵀ), then tanh and a constant matrix
    first = x @ module.right
    second = first @ module.left.T + module.bias
    ones = torch.ones_like(x[:, :1])
    index = torch.cat([places["module.left"], places["module.bias"][:, None]], dim=1)
    return second.tanh() @ x.new_ones(4, 2), [
        Tap("module.right", first, x[None], lambda g: g[None], places["module.right"].T[None]),
        Tap("module.left", second, torch.cat([first, ones], dim=1)[None], lambda g: g[None], index[None]),
    ]


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """What a kernel sees of one image ``[C, *size]``, ``[H, T, C/H · kernel]``, one slice per position."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if module.padding == "same":
        totals = [spread * (k - 1) for k, spread in zip(kernel, dilation, strict=True)]
        pads = [(total // 2, total - total // 2) for total in totals]
    else:
        pads = [(p, p) for p in module.padding]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x[None], [amount for pair in reversed(pads) for amount in pair], mode=mode)[0]
    spans = [spread * (k - 1) + 1 for k, spread in zip(kernel, dilation, strict=True)]
    starts = [range(0, size - span + 1, step) for size, span, step in zip(x.shape[1:], spans, stride, strict=True)]
    channels = x.shape[0] // module.groups
    found = []
    for h in range(module.groups):
        image = x[h * channels : (h + 1) * channels]
        for corner in product(*starts):
            window = (slice(low, low + span, spread) for low, span, spread in zip(corner, spans, dilation, strict=True))
            found.append(image[(slice(None), *window)].flatten())
    return torch.stack(found).unflatten(0, (module.groups, -1))


_PROBLEMS: dict[tuple[str, str], Problem] = {}


def problem(example: str, likelihood: str, dtype: torch.dtype = torch.float64) -> Problem:
    """A registered use under a registered likelihood, the same whoever asks; float64 ones are kept."""
    if dtype == torch.float64 and (example, likelihood) in _PROBLEMS:
        return _PROBLEMS[example, likelihood]
    with torch.random.fork_rng():
        torch.manual_seed(len(example) + 7 * len(likelihood))
        module, shape = EXAMPLES[example]()
        module = shake(module).double()
        x = torch.randn(shape, dtype=torch.float64)
        entry = REGISTRY[likelihood]
        generator = torch.Generator().manual_seed(3)
        drawn = [entry.example(generator, torch.float64) for _ in x]  # at least one datum each
        outputs, targets = (torch.cat(parts)[: len(x)] for parts in zip(*drawn, strict=True))
        model = Headed(module, module(x)[0].numel(), tuple(outputs.shape[1:])).double()
    targets = targets.to(dtype) if targets.is_floating_point() else targets
    found = Problem(model.to(dtype), entry.factory(), x.to(dtype), targets, entry.hessian_labels)
    if dtype == torch.float64:
        _PROBLEMS[example, likelihood] = found
    return found
