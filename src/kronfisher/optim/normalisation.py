"""Layers of batch normalisation and their running statistics."""

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

__all__ = ["KINDS", "normalisations"]

KINDS = ("running_mean", "running_var")


def normalisations(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Layers of batch normalisation that keep running statistics, and what names of their buffers begin with."""
    for name, module in model.named_modules():
        if (
            isinstance(module, _BatchNorm)
            and module.running_mean is not None
            and module.num_batches_tracked is not None
        ):
            yield name + "." * bool(name), module
