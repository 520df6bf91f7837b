"""Attention as torch's modules call it: one function, run again under observation so that its projections appear."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kronfisher.layers.use import EXAMPLES, rewrites

__all__: list[str] = []


def _projections(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """Queries, keys and values by one product each: three blocks of a packed weight."""
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [F.linear(x, w, b) for x, w, b in zip((q, k, v), weight.chunk(3), biases, strict=True)]


def _seen_inside(function: Any, **replaced: Any) -> Callable:
    """A function of torch as it is, but for some of the names it looks up: one that stops handing itself to modes."""
    names = {**function.__globals__, "has_torch_function": lambda tensors: False, **replaced}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


rewrites(F.multi_head_attention_forward)(
    _seen_inside(F.multi_head_attention_forward, _in_projection_packed=_projections)
)


class _Attention(nn.Module):
    # Self-attention, or attention from x to a part of it, without the weights that it answers with.
    def __init__(self, cross: bool = False, **options: Any) -> None:
        super().__init__()
        self.cross, self.attention = cross, nn.MultiheadAttention(4, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        if not self.cross:
            return self.attention(x, x, x)[0]
        other = x[:, 1:, :3].sin()
        return self.attention(x, other, other.cos()[..., :2])[0]


EXAMPLES["attention"] = lambda: (_Attention(batch_first=True), (4, 3, 4))
EXAMPLES["attention, cross"] = lambda: (
    _Attention(cross=True, batch_first=True, kdim=3, vdim=2, bias=False),
    (3, 3, 4),
)
EXAMPLES["attention, more keys"] = lambda: (
    _Attention(batch_first=True, add_bias_kv=True, add_zero_attn=True),
    (3, 2, 4),
)
EXAMPLES["transformer layer"] = lambda: (
    nn.TransformerEncoderLayer(4, 2, 5, dropout=0, batch_first=True, norm_first=True),
    (3, 2, 4),
)
