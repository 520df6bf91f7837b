"""Attention as torch's modules call it: one function, replaced by a copy whose projections can be recorded."""

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kronfisher.layers.linear import RowUse, grouped
from kronfisher.layers.use import Recorder, rewrites

__all__: list[str] = []


def _projections(
    recorder: Recorder, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Sequence[Tensor]:
    """Queries, keys and values as torch makes them, recorded as three blocks of a packed weight.

    It has to be torch's own product, out of sight: a checkpoint runs it again without us, and expects the same tensors.
    """
    windows = list(map(recorder.view, weight.chunk(3)))
    shifts = [None] * 3 if bias is None else list(map(recorder.view, bias.chunk(3)))
    operands = [q, k, v, weight] if bias is None else [q, k, v, weight, bias]
    if not any(windows + shifts) or not recorder.understands(operands):
        return F._in_projection_packed(q, k, v, weight, bias)  # type: ignore[attr-defined]
    with torch._C.DisableTorchFunction():
        results = F._in_projection_packed(q, k, v, weight, bias)  # type: ignore[attr-defined]
    noted = [
        (result, (RowUse(grouped(window), grouped(shift), x if window else None),))
        for result, window, shift, x in zip(results, windows, shifts, (q, k, v), strict=True)
    ]
    recorder.record("linear", noted, operands, results)
    return results


def _observable_copy(function: Any, **replaced: Any) -> Callable:
    """A copy of a function of torch that looks up other objects for some names and does not dispatch to modes."""
    names = {**function.__globals__, "has_torch_function": lambda tensors: False, **replaced}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@rewrites(F.multi_head_attention_forward)
def attention(recorder: Recorder, *args: Any, **kwargs: Any) -> Any:
    """The same function, in the sight of the recorder."""
    observable = _observable_copy(F.multi_head_attention_forward, _in_projection_packed=partial(_projections, recorder))
    with recorder:
        return observable(*args, **kwargs)
