"""Layers of batch normalisation, whose running statistics become those of all ranks' batches after each step."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from kronfisher.distributed import Ranks, Sum

__all__ = ["KINDS", "SharedNormalisation", "normalisations"]

KINDS = ("running_mean", "running_var")


@dataclass
class SharedNormalisation:
    """Running statistics that all ranks have in common after each step.

    Attributes:
        seen: how many batches were in them after the last step, by what names of a layer's buffers begin with; None:
            there was none.
    """

    seen: dict[str, Tensor] | None = field(default=None)

    def begin(self, model: nn.Module) -> None:
        """Before a forward pass: where this is the first, all ranks still have the same ones."""
        if self.seen is None:
            self.seen = _counts(model)

    @torch.no_grad()
    def share(self, model: nn.Module, ranks: Ranks) -> None:
        """Give the model on every rank the means of all ranks' running statistics, to the same bits.

        So every rank evaluates the same network, of the batches of all. DDP gives all of them those of rank 0 instead,
        at the next forward pass. Ranks whose batches did not reach a layer since the last step, or made its statistics
        infinite, do not count in it.

        Args:
            model: whose layers of batch normalisation count; without any, nothing is sent.
            ranks: that train together.
        """
        layers = list(normalisations(model))
        if not layers:
            return
        parts, seen = [], self.seen or {}
        for prefix, module in layers:
            tracked = module.num_batches_tracked
            assert tracked is not None and module.running_mean is not None and module.running_var is not None
            own = torch.cat([tracked.view(1).double(), module.running_mean.double(), module.running_var.double()])
            counts = (tracked != seen.get(prefix, torch.zeros_like(tracked))) & own.isfinite().all()
            parts.append(torch.cat([counts.double().view(1), torch.where(counts, own, 0.0)]))
        ranks.sum_([Sum(flat := torch.cat(parts))])
        for (_, module), part in zip(layers, flat.split([len(part) for part in parts]), strict=True):
            number, total = part[0], part[1:]
            tracked, mean, var = module.num_batches_tracked, module.running_mean, module.running_var
            assert tracked is not None and mean is not None and var is not None
            for tensor, value in zip((tracked, mean, var), total.split([1, len(mean), len(var)]), strict=True):
                tensor.copy_(torch.where(number > 0, value / number, tensor.double()).view_as(tensor))
        self.seen = _counts(model)


def normalisations(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Layers of batch normalisation that keep running statistics, and what names of their buffers begin with."""
    for name, module in model.named_modules():
        if (
            isinstance(module, _BatchNorm)
            and module.running_mean is not None
            and module.num_batches_tracked is not None
        ):
            yield name + "." * bool(name), module


def _counts(model: nn.Module) -> dict[str, Tensor]:
    found = ((prefix, module.num_batches_tracked) for prefix, module in normalisations(model))
    return {prefix: tracked.clone() for prefix, tracked in found if tracked is not None}
