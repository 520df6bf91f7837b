"""The trainable parameters of a model, without the wrappers around it."""

import torch
from torch import nn

from kronfisher.errors import UnsupportedError

__all__ = ["trainable", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` wrappers.

    Raises:
        UnsupportedError: a part of it is scripted: its operators cannot be seen.
        TypeError: it is no module.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; pass the torch.nn.Module that owns the parameters.")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"{name or 'the model'} is a scripted module, whose operators cannot be seen. "
                "Pass the module it was scripted from."
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
            "The model has no trainable parameters, so its Fisher matrix is empty. "
            "Set requires_grad_(True) on those to treat."
        )
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
