"""The trainable parameters of a model, without the wrappers around it."""

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from kronfisher.errors import DataError, UnsupportedError

__all__ = ["covered", "fingerprint", "trainable", "unwrapped"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHORT = 2**14  # elements for which numpy's calls take less time than torch's
_ODD = np.arange(1, 2 * _SHORT, 2, dtype=np.int64)
_PIECE = 2**20  # elements at a time: the integers take several times the memory of the parameter


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` wrappers.

    Raises:
        UnsupportedError: a part of it is scripted, so that its operators cannot be seen, or its parameters are flat, or
            it is a stage of a pipeline.
        TypeError: it is no module.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in _modules(model)):
        raise UnsupportedError(
            "the model is wrapped in FullyShardedDataParallel, whose parameters are flat and hold no matrix of a "
            "layer. Use DistributedDataParallel or fully_shard, or pass the module as it was before it was wrapped."
        )
    if type(model).__module__.startswith("torch.distributed.pipelining"):
        raise UnsupportedError(
            f"model is a {type(model).__name__}, of which each process holds some layers of a pipeline: no process "
            "sees the whole network. Use DistributedDataParallel or fully_shard for the whole module."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; pass the torch.nn.Module that owns the parameters.")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"{name or 'the model'} is a scripted module, whose operators cannot be seen. "
                "Pass the module it was scripted from."
            )
    return model


def _modules(model: object) -> Iterable[nn.Module]:
    return model.modules() if isinstance(model, nn.Module) else ()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of all that require a gradient, in the model's order.

    Raises:
        UnsupportedError: there is none, or one has no elements yet or is spread over processes.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UnsupportedError(
            "The model has no trainable parameters, so its Fisher matrix is empty. "
            "Set requires_grad_(True) on those to treat."
        )
    _require_whole(parameters)
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UnsupportedError(f"{name} is not initialised yet. Run the model once on a batch before estimating.")
        if not parameter.is_floating_point():
            raise UnsupportedError(
                f"{name} has dtype {parameter.dtype}; only real floating-point parameters are supported."
            )
        if parameter.layout is not torch.strided or parameter.numel() == 0 or parameter.is_meta:
            raise UnsupportedError(
                f"{name} {list(parameter.shape)} has layout {parameter.layout} and lies on {parameter.device}; only "
                "dense parameters that hold numbers are supported. Freeze it with requires_grad_(False)."
            )
    return parameters


def _require_whole(parameters: Mapping[str, Tensor]) -> None:
    """UnsupportedError if a parameter is spread over processes."""
    for name, parameter in parameters.items():
        if (placements := getattr(parameter, "placements", None)) is not None:
            raise UnsupportedError(
                f"{name} is a DTensor with placements {list(placements)}: each process holds a part of it. Estimates "
                "and training take models of fully_shard; posteriors, influence and tensor parallel models need whole "
                "parameters: use DistributedDataParallel, or pass a model that is not sharded."
            )


def covered(
    model: nn.Module, shapes: Mapping[str, torch.Size], device: torch.device, estimated: str = ""
) -> dict[str, nn.Parameter]:
    """Name → parameter of those that a matrix covers, in the order of the matrix.

    Args:
        model: wrapped or not.
        shapes: name → shape of what the matrix covers.
        device: of the matrix.
        estimated: fingerprint of the parameters that the matrix belongs to; empty: any of these shapes will do.

    Raises:
        DataError: a name, shape or device is not the model's, or the parameters have other values now.
        UnsupportedError: a parameter is spread over processes.
    """
    parameters = dict(unwrapped(model).named_parameters())
    _require_whole({name: parameters[name] for name in shapes if name in parameters})
    for name, shape in shapes.items():
        if name not in parameters or parameters[name].shape != shape:
            raise DataError(f"{name} {list(shape)} of the Fisher is no parameter of this model.")
        if parameters[name].device != device:
            raise DataError(f"{name} is on {parameters[name].device}, the Fisher on {device}; move one of them.")
    mine = {name: parameters[name] for name in shapes}
    if estimated not in ("", fingerprint(mine) if estimated else ""):
        raise DataError(
            "the Fisher was estimated at other parameters than the model has now, or belongs to another model: "
            "estimate it again after training."
        )
    return mine


def fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and all bits of some tensors, the same on every device.

    Example:
        >>> one = fingerprint({"w": torch.ones(2)})
        >>> one == fingerprint({"w": torch.ones(2)}), one == fingerprint({"w": torch.zeros(2)})
        (True, False)
    """
    found = hashlib.sha256()
    sums: list[Tensor | int] = []
    odd = torch.zeros(0, dtype=torch.long)
    for name, tensor in parameters.items():
        flat = tensor.detach()
        flat = (torch.view_as_real(flat) if flat.is_complex() else flat).contiguous().flatten()
        bits = flat.view(_BITS[flat.element_size()])
        found.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        if len(bits) <= _SHORT and bits.device.type == "cpu":
            # With less ado than torch's. Of a copy: FSDP frees storages, which it cannot once numpy has seen them.
            sums.append(int(np.dot(bits.to(torch.int64, copy=True).numpy(), _ODD[: len(bits)])))
            continue
        if len(odd) < min(len(bits), _PIECE) or odd.device != bits.device:
            odd = torch.arange(1, 2 * min(len(bits), _PIECE), 2, device=bits.device)
        parts = []
        for number, piece in enumerate(bits.split(_PIECE)):
            factors = odd[: len(piece)] + 2 * _PIECE * number if number else odd[: len(piece)]
            parts.append((piece.long() * factors).sum())  # odd factors, modulo 2^64
        sums.append(parts[0] if len(parts) == 1 else torch.stack(parts).sum())
    far = [total for total in sums if isinstance(total, Tensor)]
    read = iter(torch.stack([total.to(far[0].device) for total in far]).tolist() if far else [])
    found.update(repr([next(read) if isinstance(total, Tensor) else total for total in sums]).encode())
    return found.hexdigest()
