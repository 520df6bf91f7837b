"""Parameters that `fully_shard` spread over ranks, put together for as long as an estimate lasts."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from kronfisher.errors import UnsupportedError

__all__ = ["shards", "whole"]


def shards(model: nn.Module) -> list[Any]:
    """The parts of a model that `fully_shard` treats, the outermost first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # which takes long to import, and otherwise no part is one
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [part for part in model.modules() if isinstance(part, kind)]


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Let every rank hold the whole parameters of parts that `fully_shard` treats, and run these as plain modules.

    So no pass over the model is a collective, and ranks may read other numbers of batches. Putting the parameters
    together is one: all ranks that share them do it.

    Args:
        model: any module; one without such parts stays as it is.

    Raises:
        UnsupportedError: these parts compute in another precision than that of their parameters.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> with whole(layer):
        ...     layer.weight.shape
        torch.Size([3, 2])
    """
    if not (parts := shards(model)):
        yield
        return
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    hooks = [hooks for part in model.modules() for hooks in (part._forward_pre_hooks, part._forward_hooks)]
    saved = [dict(own) for own in hooks]
    try:
        for part in parts:
            part.unshard()
        for name, parameter in model.named_parameters():
            if parameter.dtype != dtypes[name]:
                raise UnsupportedError(
                    f"{name} is {dtypes[name]} and fully_shard computes with it in {parameter.dtype}: leave "
                    "the MixedPrecisionPolicy out, or take a model that is not sharded."
                )
        for own in hooks:
            for key in [key for key, hook in own.items() if _is_of_fsdp(hook)]:
                del own[key]
        yield
    finally:
        for own, before in zip(hooks, saved, strict=True):
            own.clear()
            own.update(before)
        for part in parts:
            part.reshard()


def _is_of_fsdp(hook: Any) -> bool:
    """Whether a hook belongs to `fully_shard`."""
    return "fsdp" in (getattr(hook, "__module__", None) or "")
