"""Ways in which a weight comes out of a parameter: views of it, and what may be computed from it without data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SEEN", "Seen", "Shape"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Seen:
    """A way in which a weight comes out of a parameter: the parameter's shape from the weight's, and the way back."""

    stored: Callable[[Shape], Shape]
    shown: Callable[[Tensor, Shape], Tensor]


def _longer(shape: Shape, axis: int, by: int = 1) -> Shape:
    return tuple(n + by * (k == axis % len(shape)) for k, n in enumerate(shape))


def _flat(shape: Shape, columns: int, rows: int = 0) -> Shape:
    return shape[0] + rows, torch.Size(shape[1:]).numel() + columns


def _beside(shape: Shape, rank: int) -> Shape:
    return shape[0] + torch.Size(shape[1:]).numel(), rank


def _outer(p: Tensor, shape: Shape) -> Tensor:
    return p[: shape[0], :1] * p[shape[0] :, 1:].T


def _normed(v: Tensor, g: Tensor) -> Tensor:
    return torch._weight_norm(v, g, 0)  # pyright: ignore[reportPrivateImportUsage]


def _halved(p: Tensor) -> Tensor:
    p[:1].mul_(0.5)
    return p


def _some(shape: Shape, by: int = 2, first: int = 1) -> Tensor:
    """Which rows: all but the first of so many."""
    return (torch.arange(shape[0]) % by >= first).view(-1, *[1] * (len(shape) - 1))


def _scattered(shape: Shape) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape) % 3 > 0


def _assigned(p: Tensor) -> Tensor:
    weight = torch.zeros_like(p)
    weight[:1], weight[1:] = p[:1] * 2, p[1:]
    return weight


def _square(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Shape], Tensor]:
    """A function of square matrices; other weights are what they are."""
    return lambda p, s: f(p) if len(s) == 2 and s[0] == s[1] else p


def _matrix(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Shape], Tensor]:
    """A function of matrices; vectors are what they are."""
    return lambda p, s: f(p) if len(s) > 1 else p


def _of_stack(f: Callable[[Tensor], Tensor], count: int = 2) -> "Seen":
    """What is computed from several weights of one shape."""
    return Seen(lambda s: (count, *s), lambda p, s: f(p))


def _alike(f: Callable[[Tensor], Tensor]) -> "Seen":
    """What is computed from a weight of the same shape."""
    return Seen(lambda s: s, lambda p, s: f(p))


def _shared(p: Tensor, shape: Shape) -> Tensor:
    """Every element several times, at places that a fixed order says."""
    count = torch.Size(shape).numel()
    return p[(torch.arange(count) * 7 % count) % len(p)].view(shape)


SEEN: dict[str, Seen] = {
    "as it is": Seen(lambda s: s, lambda p, s: p),
    "transposed": Seen(lambda s: (*s[:-2], s[-1], s[-2]), lambda p, s: p.mT),
    "reversed axes": Seen(lambda s: s[::-1], lambda p, s: p.permute(*range(len(s))[::-1])),
    "sliced": Seen(lambda s: _longer(s, 0, 2), lambda p, s: p[1:-1]),
    "columns": Seen(lambda s: _longer(s, -1), lambda p, s: p[..., 1:]),
    "every other": Seen(lambda s: (2 * s[0], *s[1:]), lambda p, s: p[::2]),
    "flat": Seen(lambda s: (torch.Size(s).numel(),), lambda p, s: p.view(s)),
    "chunk": Seen(lambda s: (2 * s[0], *s[1:]), lambda p, s: p.chunk(2)[1]),
    "split": Seen(lambda s: _longer(s, -1, 2), lambda p, s: p.split([2, s[-1]], -1)[1]),
    "unbound": Seen(lambda s: (2, *s), lambda p, s: p.unbind()[1]),
    "narrowed": Seen(lambda s: _longer(s, -1), lambda p, s: p.narrow(-1, 1, s[-1])),
    "expanded": Seen(lambda s: (1, *s[1:]), lambda p, s: p.expand(s)),
    "one more": Seen(lambda s: s, lambda p, s: 1 + p),
    "doubled": Seen(lambda s: s, lambda p, s: p * 2),
    "exponential": Seen(lambda s: s, lambda p, s: p.exp()),
    "normalised": Seen(lambda s: s, lambda p, s: p / p.norm()),
    "twice": Seen(lambda s: (2, *s), lambda p, s: p[0] + p[1]),
    "detached": Seen(lambda s: s, lambda p, s: p.detach()),
    "partly detached": Seen(lambda s: s, lambda p, s: p + p.detach()),
    "picked": Seen(lambda s: s, lambda p, s: p[torch.arange(s[0]).flip(0)]),
    "flipped": Seen(lambda s: s, lambda p, s: p.flip(-1)),
    "joined": Seen(lambda s: s, lambda p, s: torch.cat([p[:1], p[1:]])),
    "cloned": Seen(lambda s: s, lambda p, s: p.clone()),
    "one less": Seen(lambda s: s, lambda p, s: 1 - p / 2),
    "low rank": Seen(lambda s: _beside(s, 2), lambda p, s: (p[: s[0]] @ p[s[0] :].T).view(s) * 0.5),
    "twice low rank": Seen(lambda s: _beside(s, 2), lambda p, s: (p[: s[0]] @ p[s[0] :].T + _outer(p, s)).view(s)),
    "rows scaled": Seen(lambda s: _flat(s, 1), lambda p, s: (p[:, 1:] * p[:, :1]).reshape(s)),
    "columns scaled": Seen(lambda s: _flat(s, 0, 1), lambda p, s: (p[:1].tanh() - p[1:] * p[:1]).reshape(s)),
    "weight norm": Seen(lambda s: _flat(s, 1), lambda p, s: _normed(p[:, 1:].clone(), p[:, :1]).view(s)),
    "doubled in place": Seen(lambda s: s, lambda p, s: p.clone().mul_(2)),
    "partly in place": Seen(lambda s: s, lambda p, s: _halved(1 + p)),
    "without gradient": Seen(lambda s: s, lambda p, s: torch.no_grad()(torch.Tensor.mul)(p, 2)),
    # Put together from pieces.
    "stacked": _alike(lambda p: torch.stack(list(p.unbind(0)))),
    "stacked at the end": _alike(lambda p: torch.stack(list((p * 1).unbind(-1)), -1)),
    "stacked and picked": _of_stack(lambda p: torch.stack([p[0] * 2, p[1]])[1]),
    "stacked and picked by an index": _of_stack(lambda p: torch.stack([p[0] * 2, p[1]])[torch.tensor([1])][0]),
    "joined halves": Seen(
        lambda s: (2 * s[0], *s[1:]), lambda p, s: torch.cat([p[: s[0] // 2], (1 + p)[s[0] : 2 * s[0] - s[0] // 2]])
    ),
    "joined at the end": _alike(lambda p: torch.cat([p[..., 1:], p[..., :1]], -1)),
    "where": _of_stack(lambda p: torch.where(_some(p.shape[1:]), p[0], p[1])),
    "assigned": _alike(lambda p: torch.zeros_like(p).index_put((torch.arange(len(p)),), p)),
    "assigned in place": _alike(_assigned),
    "padded": Seen(lambda s: _longer(s, -1, -1) if s[-1] > 1 else s, lambda p, s: F.pad(p, (1, 0)) if s[-1] > 1 else p),
    "rolled": _alike(lambda p: p.roll(1, 0)),
    "repeated": Seen(lambda s: (-(-s[0] // 2), *s[1:]), lambda p, s: p.repeat_interleave(2, 0)[: s[0]]),
    "shared elements": Seen(lambda s: (torch.Size(s).numel() // 2 + 1,), _shared),
    "rolled copies": Seen(
        lambda s: s[1:] or s, lambda p, s: torch.stack([p.roll(k) for k in range(s[0])])[: s[0]] if len(s) > 1 else p
    ),
    "on the diagonal": Seen(
        lambda s: (s[0],),
        lambda p, s: p.view(-1, *[1] * (len(s) - 1)) * torch.eye(s[0], torch.Size(s[1:]).numel()).view(s),
    ),
    # Several weights in one.
    "averaged": _of_stack(lambda p: torch.stack([p[0], p[1]]).mean(0)),
    "averaged table": _of_stack(lambda p: p.mean(0), 3),
    "soup": _of_stack(lambda p: torch.einsum("k,k...->...", torch.tensor([0.3, -0.5]), p)),
    "moved between two": _of_stack(lambda p: torch.lerp(p[0], p[1], 0.3)),
    "mixed by numbers": Seen(
        lambda s: (2, 1 + torch.Size(s).numel()),
        lambda p, s: (p[:, :1].softmax(0) * p[:, 1:]).sum(0).view(s),
    ),
    # Masked, and changed element by element.
    "masked": _alike(lambda p: p * _scattered(p.shape)),
    "masked rows": _alike(lambda p: p.masked_fill(_some(p.shape), 0.0)),
    "masked rows of one more": _alike(lambda p: (1 + p) * _some(p.shape, 3)),
    "triangle": _alike(lambda p: p.tril() if p.dim() > 1 else p),
    "clamped": _alike(lambda p: p.clamp(-0.3, 0.6)),
    "rounded": _alike(lambda p: p + ((4 * p).round() / 4 - p).detach()),
    "summed up": _alike(lambda p: p.cumsum(0)),
    # Normalised, and matrices of certain kinds.
    "standardised": _alike(lambda p: (p - p.mean()) / (p.var(correction=0) + 0.1).sqrt()),
    "softmax": _alike(lambda p: p.softmax(-1)),
    "unit rows": Seen(lambda s: s, _matrix(lambda p: F.normalize(p, dim=-1))),
    "symmetric": Seen(lambda s: s, _square(lambda p: p + p.T)),
    "rotation": Seen(lambda s: s, _square(lambda p: torch.matrix_exp(p - p.T))),
}
