"""What stands around a model and is not part of it."""

import torch
from torch import nn

from kronfisher.errors import UnsupportedError

__all__ = ["unwrapped"]


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
