"""Nested containers of tensors: tuples, lists, mappings and data classes, in which batches come."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset

__all__ = ["as_mapping", "as_tensors", "is_record", "tensors_in", "without_inference_tensors"]


def tensors_in(value: Any, *, lengths: bool = True) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and data classes.

    Args:
        value: any of these, or a tensor.
        lengths: those of a ``PackedSequence`` included, which are always on the CPU.
    """
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, PackedSequence) and not lengths:
        items: Iterable[Any] = (value.data, value.sorted_indices, value.unsorted_indices)
    elif isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, list | tuple):
        items = value
    elif is_dataclass(value) and not isinstance(value, type):
        items = (getattr(value, entry.name) for entry in fields(value))
    else:
        return
    for item in items:
        yield from tensors_in(item, lengths=lengths)


def as_tensors(value: Any, like: Tensor | None = None) -> Any:
    """Convert NumPy arrays to tensors: on the device of `like`, in its dtype if they are floating point."""

    def convert(array: np.ndarray) -> Any:
        if array.dtype.kind not in "biufc":
            return array
        tensor = torch.from_numpy(np.array(array))  # a copy, as arrays may be read-only
        if like is None:
            return tensor
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)

    return _map_leaves(value, np.ndarray, convert)


def without_inference_tensors(value: Any) -> Any:
    """Replace tensors made under ``torch.inference_mode`` by copies, because autograd cannot record the originals."""
    return _map_leaves(value, Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def is_record(value: Any) -> bool:
    """Whether the value is an instance of a plain data class, not also a module, a data set or a mapping."""
    return is_dataclass(value) and not isinstance(value, type | nn.Module | Dataset | Mapping)


def as_mapping(value: Any, key: str | None = None) -> Any:
    """Convert data classes, and named tuples with a field `key`, to mappings; return anything else unchanged."""
    if is_record(value):
        return {entry.name: getattr(value, entry.name) for entry in fields(value)}
    if isinstance(value, tuple) and key is not None and key in getattr(value, "_fields", ()):
        return dict(zip(value._fields, value, strict=True))  # pyright: ignore[reportAttributeAccessIssue]
    return value


def _map_leaves(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Apply a function to every leaf of a kind; containers in which nothing changes are returned themselves."""
    if isinstance(value, kind):
        return function(value)
    record = is_record(value)
    if not record and not isinstance(value, Mapping | tuple | list):
        return value
    old = as_mapping(value) if record else value
    items = dict(old) if isinstance(old, Mapping) else dict(enumerate(old))
    new = {key: _map_leaves(item, kind, function) for key, item in items.items()}
    if all(new[key] is item for key, item in items.items()):
        return value
    if isinstance(value, Mapping):
        return new
    if record:
        other = copy(value)
        for name, item in new.items():
            object.__setattr__(other, str(name), item)
        return other
    return type(value)(*new.values()) if hasattr(value, "_fields") else type(value)(new.values())
