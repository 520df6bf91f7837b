"""Dataclasses as tensors and plain values, and back by the types that their fields declare."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

__all__ = ["from_plain", "to_plain"]

T = TypeVar("T")
_TYPE = "type"


def to_plain(value: Any, without: tuple[str, ...] = ()) -> Any:
    """A value made of dataclasses, lists, tuples, tensors and plain values, without some fields of states in it."""
    if is_dataclass(value):
        names = [entry.name for entry in fields(value) if entry.name not in without]
        return {_TYPE: type(value).__name__} | {name: to_plain(getattr(value, name), without) for name in names}
    if isinstance(value, list | tuple):
        return type(value)(to_plain(entry, without) for entry in value)
    if isinstance(value, Tensor):
        return value.detach()
    return value


def from_plain(saved: Any, declared: type[T], device: torch.device | str | None = None, **given: Any) -> T:
    """The value that `to_plain` gave, its tensors copied.

    Args:
        saved: by `to_plain`.
        declared: its type, or a base of it.
        device: where tensors shall be; None: where they are.
        given: fields that were left out, by name.

    Raises:
        ValueError: a type in it is not known.
    """
    return _value(saved, declared, device, given)


def _value(saved: Any, declared: Any, device: Any, given: Mapping[str, Any]) -> Any:
    if isinstance(saved, Tensor):
        return saved.to(saved.device if device is None else device, copy=True)
    if isinstance(saved, list | tuple):
        return type(saved)(_value(entry, declared, device, given) for entry in saved)
    if not isinstance(saved, Mapping):
        return saved
    kinds = {kind.__name__: kind for base in _classes(declared) for kind in _descendants(base) if is_dataclass(kind)}
    kind = kinds.get(saved[_TYPE])
    if kind is None:
        raise ValueError(
            f"a saved state holds {saved[_TYPE]!r}, which is not known here; import the fit or layer that defines it."
        )
    hints = get_type_hints(kind)
    values = {name: _value(value, hints[name], device, given) for name, value in saved.items() if name != _TYPE}
    missing = {entry.name for entry in fields(kind)} - values.keys()
    return kind(**values, **{name: given[name] for name in missing & given.keys()})


def _classes(declared: Any) -> Iterator[type]:
    """All classes that a type is made of: of ``list[X] | None`` X and None."""
    for argument in get_args(declared):
        yield from _classes(argument)
    if isinstance(declared, type):
        yield declared


def _descendants(base: type) -> Iterator[type]:
    yield base
    for child in base.__subclasses__():
        yield from _descendants(child)
