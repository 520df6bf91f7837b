"""Where canonical weights meet one example, found without the capture: patches are sliced in Python loops.

`taps` says, for a module, at which tensors the output gradients of K-FAC arrive and which inputs belong to them;
`Problem.rows` proves them right: assembled, they must give autograd's own gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.truth import trainable


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
    if hasattr(module, "chain"):
        return _propagated(module.chain, x[0], places)
    if hasattr(module, "heads"):
        return _contractions(module, x, places)
    if hasattr(module, "cells"):
        return _recurrent(module, x, places)
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


def _recurrent(module: nn.Module, x: Tensor, places: dict[str, Tensor]) -> tuple[Tensor, list[Tap]]:
    """Layers and cells by their formulas, with zeros added to the gates: there the gradients arrive."""
    x, total, found = x[0], 0.0, []
    for kind, parts in (("layers", module.layers), ("cells", module.cells)):
        for k, part in enumerate(parts):
            outputs = []
            ends = [""] if kind == "cells" else ["_l0", "_l0_reverse"][: 1 + part.bidirectional]
            for end in ends:
                name = f"module.{kind}.{k}."
                y, taps_ = _steps(part, x.flip(0) if "reverse" in end else x, name, end, places)
                if "reverse" in end:
                    y = y.flip(0)
                outputs.append(y)
                found += taps_
            total = total + torch.cat(outputs, dim=1)
    return total[None], found


def _steps(module: nn.Module, x: Tensor, prefix: str, end: str, places: dict[str, Tensor]) -> tuple[Tensor, list[Tap]]:
    size, kind = module.hidden_size, type(module).__name__
    weights = [getattr(module, f"{name}_{part}{end}") for part in ("ih", "hh") for name in ("weight", "bias")]
    zeros = [x.new_zeros(len(x), len(weights[0]), requires_grad=True) for _ in range(2)]
    h, c, before, outputs = x.new_zeros(size), x.new_zeros(size), [], []
    for t, own in enumerate(x):
        before.append(h)
        i, j = (weights[2 * n] @ v + weights[2 * n + 1] + zeros[n][t] for n, v in enumerate((own, h)))
        if "LSTM" in kind:
            into, keep, new, out = (i + j).chunk(4)
            c = keep.sigmoid() * c + into.sigmoid() * new.tanh()
            h = out.sigmoid() * c.tanh()
        elif "GRU" in kind:
            (r, z, n), (s, u, m) = i.chunk(3), j.chunk(3)
            n = (n + (r + s).sigmoid() * m).tanh()
            h = (1 - (z + u).sigmoid()) * n + (z + u).sigmoid() * h
        else:
            h = getattr(i + j, module.nonlinearity)()
        outputs.append(h)
    found = []
    for part, zero, a in (("ih", zeros[0], x), ("hh", zeros[1], torch.stack(before))):
        names = f"{prefix}weight_{part}{end}", f"{prefix}bias_{part}{end}"
        index = torch.cat([places[names[0]], places[names[1]][:, None]], dim=1)
        a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
        found.append(Tap(names[0], zero, a[None], lambda g: g[None], index[None]))
    return torch.stack(outputs), found


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


def _propagated(chain: nn.Module, x: Tensor, places: dict[str, Tensor]) -> tuple[Tensor, list[Tap]]:
    """Value, two slopes, the mixed derivative and the Laplacian of a network of one hidden layer, by their formulas."""
    first, last = chain[0], chain[2]
    into = torch.cat([x[None], torch.eye(2, dtype=x.dtype), x.new_zeros(2, 2)])
    at_value = x.new_tensor([1.0, 0, 0, 0, 0])[:, None]
    z = into @ first.weight.T + at_value * first.bias
    y = z[0].tanh()
    slope, bend = 1 - y**2, -2 * y * (1 - y**2)
    mixed = bend * z[1] * z[2] + slope * z[3]
    laplacian = bend * (z[1] ** 2 + z[2] ** 2) + slope * z[4]
    hidden = torch.stack([y, slope * z[1], slope * z[2], mixed, laplacian])
    out = hidden @ last.weight.T + at_value * last.bias
    found = []
    for name, rows, a in (("0", z, into), ("2", out, hidden)):
        index = torch.cat([places[f"module.chain.{name}.weight"], places[f"module.chain.{name}.bias"][:, None]], dim=1)
        a = torch.cat([a, at_value], dim=1)
        found.append(Tap(f"module.chain.{name}.weight", rows, a[None], lambda g: g[None], index[None]))
    return out[:, 0][None], found


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


def _contractions(module: nn.Module, x: Tensor, places: dict[str, Tensor]) -> tuple[Tensor, list[Tap]]:
    """One datum's products, group by group; zeros are added where the gradients of the three batches arrive."""
    found, hidden = [], x[0]  # [2, 3]
    for name in ("heads", "more", "last"):
        weight, index = getattr(module, name), places[f"module.{name}"].mT
        y = torch.stack([own @ matrix for own, matrix in zip(hidden, weight, strict=True)])
        if name == "last":
            shift = y.new_zeros(2, 2, requires_grad=True)
            y = y + shift + module.bias[:, 0]
            bias = places["module.bias"].reshape(1, 4, 1)
            found.append(Tap("module.bias", shift, y.new_ones(1, 1, 1), lambda g: g.reshape(1, 1, -1), bias))
        found.append(Tap(f"module.{name}", y, hidden[:, None], lambda g: g[:, None], index))
        hidden = y.tanh()
    y = hidden.flatten() @ module.joined.flatten(0, 1)
    found.append(
        Tap(
            "module.joined",
            y,
            hidden.reshape(1, 1, -1),
            lambda g: g[None, None],
            places["module.joined"].flatten(0, 1).T[None],
        )
    )
    pairs = torch.outer(y, y.sin()).reshape(1, 1, -1)
    z = module.form(y[None], y.sin()[None])
    own = {"module.weight": places["module.form.weight"].flatten(1), "module.bias": places["module.form.bias"]}
    tap = _with_bias(z, pairs, lambda g: g[None], own, module.form)
    tap.name = "module.form.weight"
    return z, [*found, tap]


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
