"""Leaving no trace: random state, buffers, modes and flags are the same after an estimate as before it."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.errors import UnsupportedError

__all__ = ["isolated", "tensors_in", "trainable", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` wrappers.

    Raises:
        UnsupportedError: a part of it is scripted: its operators cannot be seen.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"{name or 'the model'} is a scripted module, whose operators cannot be seen. Pass the module it was scripted from."
            )
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of all that require a gradient, in the model's order.

    Raises:
        UnsupportedError: there is none, or one has no elements yet.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UnsupportedError(
            "The model has no trainable parameters, so its Fisher matrix is empty. Set requires_grad_(True) on those to treat."
        )
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UnsupportedError(f"{name} is not initialised yet. Run the model once on a batch before estimating.")
        if not parameter.is_floating_point():
            raise UnsupportedError(f"{name} has dtype {parameter.dtype}; only real floating-point parameters are supported.")
    return parameters


@contextmanager
def isolated(model: nn.Module, seed: int) -> Iterator[None]:
    """Run the model without a trace: eagerly, with gradients on, from a random state of our own, buffers put back at the end."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    buffers = [
        (module._buffers, name, buffer, buffer._version, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.manual_seed(seed)
        try:
            yield
        finally:
            for owner, name, buffer, version, values in buffers:
                owner[name] = buffer
                if buffer._version != version:
                    with torch.no_grad():
                        buffer.copy_(values)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
