"""Buffers that forward passes change, as running statistics, which all ranks have in common after each step."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

from kronfisher.distributed import Ranks, Sum

__all__ = ["SharedBuffers"]


@dataclass
class SharedBuffers:
    """What a model saves beside its parameters: numbers and counters, not masks, not what is made anew by every pass.

    Attributes:
        seen: their values after the last step, by name; None: there was none.
    """

    seen: dict[str, Tensor] | None = field(default=None)

    def begin(self, model: nn.Module) -> None:
        """Before a forward pass: where this is the first, all ranks still have the same ones."""
        if self.seen is None:
            self.seen = {name: buffer.clone() for name, buffer, _ in _buffers(model)}

    @torch.no_grad()
    def share(self, model: nn.Module, ranks: Ranks) -> None:
        """Give the model on every rank the means of all ranks' values of what was changed, to the same bits.

        So every rank evaluates the same network, of the batches of all. DDP gives all of them those of rank 0 instead,
        at the next forward pass. Ranks whose batches did not change a buffer since the last step, or made it infinite,
        do not count in it. Running statistics of normalisation travel at once; of other buffers only whether any rank
        has changed them, and then those.

        Args:
            model: whose buffers count; without any, nothing is sent.
            ranks: that train together.
        """
        seen = self.seen or {}
        found = [one for one in _buffers(model) if one[0] in seen and one[1].shape == seen[one[0]].shape]
        if not found:
            return
        counts, sent = [], []
        for name, buffer, running in found:
            counts.append((buffer.ne(seen[name]).any() & buffer.isfinite().all()).double().view(1))
            own = buffer.double().flatten() if running else buffer.new_zeros(0, dtype=torch.float64)
            sent.append(torch.cat([counts[-1], torch.where(counts[-1] > 0, own, 0.0)]))
        ranks.sum_([Sum(flat := torch.cat(sent))])
        totals = list(flat.split([len(part) for part in sent]))
        others = [place for place, (_, _, running) in enumerate(found) if not running]
        counted = torch.cat([totals[place][:1] for place in others]).tolist() if others else []  # the host waits once
        if changed := [place for place, ranks_of_it in zip(others, counted, strict=True) if ranks_of_it > 0]:
            parts = [torch.where(counts[place] > 0, found[place][1].double().flatten(), 0.0) for place in changed]
            ranks.sum_([Sum(flat := torch.cat(parts))])
            for place, part in zip(changed, flat.split([len(part) for part in parts]), strict=True):
                totals[place] = torch.cat([totals[place][:1], part])
        for (_, buffer, _), total in zip(found, totals, strict=True):
            if len(total) > 1:
                mean = (total[1:] / total[0]).view_as(buffer)
                buffer.copy_(torch.where(total[0] > 0, mean, buffer.double()))
        self.seen = {name: buffer.clone() for name, buffer, _ in found}


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Names, values, and whether they are running statistics, of what is saved and is not each rank's own for DDP."""
    own, known = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ())), set()
    for prefix, module in model.named_modules():
        for kind, buffer in module._buffers.items():
            name = f"{prefix}.{kind}" if prefix else kind
            if buffer is None or kind in module._non_persistent_buffers_set or name in own or id(buffer) in known:
                continue
            known.add(id(buffer))
            if buffer.is_floating_point() or (buffer.dim() == 0 and buffer.dtype in (torch.int32, torch.int64)):
                yield name, buffer, isinstance(module, _NormBase)
