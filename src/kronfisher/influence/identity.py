"""What a value is, as a hash that another run finds again: numbers in a file depend on functions and settings, too.

The text of an object (``repr``) is no such thing: large tensors are shortened in it, and most objects have an address
there, which is another one in every run.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kronfisher.fisher.parameters import fingerprint

__all__ = ["identity", "modes"]

_PLAIN = (int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.Size, slice)
_COPIED = (tuple, frozenset, CodeType)  # whether equal ones are one object or two is no matter of theirs


def identity(value: Any) -> str:
    """A hash of a value by its contents.

    Of a function: what it does, with its defaults and what it finds around it (closures, and globals of its module).
    Of any other object: its class, and its attributes. Where an object has none that Python shows, its text.

    Example:
        >>> def above(limit):
        ...     return lambda outputs, targets: (outputs > limit).sum(-1)
        >>> identity(above(1)) == identity(above(1)), identity(above(1)) == identity(above(2))
        (True, False)
    """
    found = hashlib.sha256()
    for text in _texts(value, [], ""):
        found.update(text.encode())
        found.update(b"\x00")
    return found.hexdigest()


def modes(model: nn.Module) -> list[str]:
    """The names of the modules that are in training mode: what they compute may be something else."""
    return [name for name, module in model.named_modules() if module.training]


def _texts(value: Any, met: list[Any], home: str) -> Iterator[str]:
    """Texts that tell a value from others; `home` is the module whose functions are looked into."""
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}"
        return
    if not isinstance(value, _COPIED):
        if (place := next((k for k, other in enumerate(met) if other is value), None)) is not None:
            yield f"again {place}"  # it contains itself, or stands in two places
            return
        met.append(value)  # itself, or its address might be given to another one
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.array(value))
    if isinstance(value, Tensor):
        yield fingerprint({"": value.to_dense() if value.layout is not torch.strided else value})
    elif isinstance(value, type | ModuleType | BuiltinFunctionType):
        yield f"{getattr(value, '__module__', '')} {getattr(value, '__qualname__', value.__name__)}"
    else:
        kind = type(value)
        yield f"{kind.__module__} {kind.__qualname__}"
        inside = (value.__module__ or "") if isinstance(value, FunctionType) and not home else home
        for part in _parts(value, inside):
            yield from _texts(part, met, inside)


def _parts(value: Any, home: str) -> Iterator[Any]:
    """Of what a value consists."""
    if isinstance(value, Mapping):
        yield from (part for item in value.items() for part in item)
    elif isinstance(value, list | tuple):
        yield from (len(value), *value)
    elif isinstance(value, set | frozenset):
        yield tuple(sorted(identity(part) for part in value))
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, CodeType):
        yield from (value.co_code, value.co_names, value.co_consts)
    elif isinstance(value, FunctionType):
        yield value.__qualname__
        if home == (value.__module__ or ""):  # what other modules define is known by its name
            yield from (value.__code__, value.__defaults__, value.__kwdefaults__)
            yield from (cell.cell_contents for cell in value.__closure__ or () if _has_value(cell))
            yield {name: value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__}
    elif isinstance(value, nn.Module):
        yield from (dict(value.named_parameters()), dict(value.named_buffers()), modes(value))
        yield {key: own for key, own in vars(value).items() if not key.startswith("_")}
    elif hasattr(value, "__dict__"):
        yield {key: own for key, own in vars(value).items() if not _is_kept(type(value), key)}
    elif slots := [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]:
        yield {name: getattr(value, name) for name in slots if hasattr(value, name)}
    else:
        yield repr(value)


def _has_value(cell: Any) -> bool:
    """Whether the name that a cell stands for was given a value yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_kept(kind: type, name: str) -> bool:
    """Whether an attribute is a property's value, which is there or not as it was asked for or not."""
    return isinstance(getattr(kind, name, None), cached_property)


def _names(code: CodeType) -> list[str]:
    """The names of globals that some code, or what is nested in it, may use."""
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _names(const)]
    return sorted({*code.co_names, *inner})
