"""The state of an optimiser as torch.distributed.checkpoint keeps it: tensors under the names of parameters."""

import io
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kronfisher.distributed import axes_by_stride
from kronfisher.errors import DataError, require_kind
from kronfisher.optim.natural_gradient import NaturalGradient
from kronfisher.optim.preconditioner import Preconditioner
from kronfisher.optim.sample_space import SampleSpaceGradient

__all__ = ["load_named_state", "named_state"]

_TENSOR = "a tensor of a checkpoint"
_REST = "structure"
_KINDS = NaturalGradient, SampleSpaceGradient, Preconditioner
_ADVICE = "for others use torch.distributed.checkpoint.state_dict"


def named_state(optimizer: NaturalGradient | SampleSpaceGradient | Preconditioner) -> dict[str, Tensor]:
    """What ``optimizer.state_dict()`` holds, as one tensor for each key, for `torch.distributed.checkpoint`.

    Keys are made of names of parameters and layers, not of their numbers or of ranks: any number of ranks can load what
    others saved, with or without ``fully_shard``. All ranks hold the same state; the checkpoint keeps one copy of it.

    Args:
        optimizer: a `NaturalGradient` with any fit, or a `Preconditioner`.

    Returns:
        Key → tensor; what is no tensor is in one of bytes, ``"structure"``.

    Example:
        >>> import torch, kronfisher as kf
        >>> model, x, y = torch.nn.Linear(2, 3), torch.randn(8, 2), torch.arange(8) % 3
        >>> optimizer = kf.NaturalGradient(model, kf.Categorical())
        >>> _ = optimizer.step(lambda: model(x), y)
        >>> list(kf.named_state(optimizer))[:2]
        ['state.weight.momentum', 'state.bias.momentum']
    """
    require_kind("optimizer", optimizer, _KINDS, _ADVICE)
    state = optimizer.state_dict()
    own = state.get("natural_gradient", state).get("statistics", {"layers": []})  # the space of samples has no layers
    layers = _distinct("+".join(block["name"] for block in layer["blocks"]) for layer in own["layers"])
    found: dict[str, Tensor] = {}

    def apart(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Tensor):
            key, order = ".".join(path), axes_by_stride(value)
            if key in found:
                raise DataError(f"two parts of the state would be kept as {key}; rename a parameter or a layer.")
            found[key] = value.detach().permute(order).contiguous()
            return _TENSOR, key, order
        if isinstance(value, Mapping):
            names = parameters if path == ("state",) else {}
            return {key: apart(inner, (*path, str(names.get(key, key)))) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            names = layers if path[-1:] == ("layers",) else [str(place) for place in range(len(value))]
            return type(value)(apart(inner, (*path, name)) for inner, name in zip(value, names, strict=True))
        return value

    parameters: dict[Any, str] = {}
    if isinstance(optimizer, NaturalGradient):
        numbers = (number for group in state["param_groups"] for number in group["params"])
        parameters = dict(zip(numbers, optimizer.trained(), strict=True))
    file = io.BytesIO()
    torch.save(apart(state, ()), file)
    found[_REST] = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    return found


def load_named_state(
    optimizer: NaturalGradient | SampleSpaceGradient | Preconditioner, path: str | os.PathLike, key: str = "optimizer"
) -> None:
    """Take over what `named_state` gave, from a checkpoint; each rank reads it by itself.

    Args:
        optimizer: of the same kind, for the same parameters.
        path: the folder that `torch.distributed.checkpoint.save` wrote to.
        key: of the state in what was saved.

    Raises:
        DataError: the checkpoint has no such state, or one of other parameters or fits.

    Example:
        >>> import tempfile, warnings, torch, kronfisher as kf, torch.distributed.checkpoint as dcp
        >>> model, x, y = torch.nn.Linear(2, 3), torch.randn(8, 2), torch.arange(8) % 3
        >>> optimizer = kf.NaturalGradient(model, kf.Categorical())
        >>> _ = optimizer.step(lambda: model(x), y)
        >>> folder = tempfile.mkdtemp()
        >>> state = {"model": model.state_dict(), "optimizer": kf.named_state(optimizer)}
        >>> with warnings.catch_warnings(action="ignore"):  # that there is one process
        ...     _ = dcp.save(state, checkpoint_id=folder)
        >>> again = kf.NaturalGradient(model, kf.Categorical())
        >>> kf.load_named_state(again, folder)
        >>> again.steps
        1
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    require_kind("optimizer", optimizer, _KINDS, _ADVICE)
    reader = FileSystemReader(path)
    there, prefix = reader.read_metadata().state_dict_metadata, f"{key}."
    if f"{prefix}{_REST}" not in there:
        raise DataError(
            f"{os.fspath(path)} has no state of an optimiser under {key!r}: save "
            f'{{"{key}": kf.named_state(optimizer)}}.'
        )
    state: dict[str, Any] = {
        name.removeprefix(prefix): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in there.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that no other process is asked
        load({key: state}, storage_reader=reader, no_dist=True)

    def together(value: Any) -> Any:
        if isinstance(value, tuple) and len(value) == 3 and value[0] == _TENSOR:
            _, name, order = value
            return state[name].permute([order.index(axis) for axis in range(len(order))])
        if isinstance(value, Mapping):
            return {name: together(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(together, value))
        return value

    structure = torch.load(io.BytesIO(state[_REST].numpy().tobytes()), weights_only=True)
    optimizer.load_state_dict(together(structure))


def _distinct(names: Iterable[str]) -> list[str]:
    """Names, repeated ones with a number."""
    found: dict[str, int] = {}
    out = []
    for name in names:
        found[name] = found.get(name, 0) + 1
        out.append(name if found[name] == 1 else f"{name}#{found[name]}")
    return out
