"""Attention as torch's modules call it: one function, replaced by a copy whose projections can be recorded."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kronfisher.layers.use import Recorder, rewrites

__all__: list[str] = []


def _projections(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """Queries, keys and values by one product each: three blocks of a packed weight."""
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [F.linear(x, w, b) for x, w, b in zip((q, k, v), weight.chunk(3), biases, strict=True)]


def _observable_copy(function: Any, **replaced: Any) -> Callable:
    """A copy of a function of torch that looks up other objects for some names and does not dispatch to modes."""
    names = {**function.__globals__, "has_torch_function": lambda tensors: False, **replaced}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_observable = _observable_copy(F.multi_head_attention_forward, _in_projection_packed=_projections)


@rewrites(F.multi_head_attention_forward)
def attention(recorder: Recorder, *args: Any, **kwargs: Any) -> Any:
    """The same function, in the sight of the recorder."""
    with recorder:
        return _observable(*args, **kwargs)
