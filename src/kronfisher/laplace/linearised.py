"""The linearised network under a posterior: variances of its outputs without any Jacobian ``[n, C, P]``.

One backward pass for each output gives, layer by layer, inputs a and output gradients g with ``J = g aᵀ``. They go
straight into quadratic forms ``J Λ⁻¹ Jᵀ`` by the structure of Λ, through the same capture that estimates use.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.capture.forward import Forward
from kronfisher.capture.isolation import isolate
from kronfisher.errors import DataError, UnsupportedError
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.estimation.assignment import Known
from kronfisher.estimation.recipe import Recipe
from kronfisher.fisher.owned_precision import agree, own_parts
from kronfisher.fisher.precision import Group, Precision
from kronfisher.fits.quadratic_forms import pairs
from kronfisher.laplace.per_output import Columns, Directions, Kept, PerOutput, Variances
from kronfisher.linalg import plain_arithmetic

__all__ = ["Linearised", "covariances", "directions", "variances"]


@dataclass(frozen=True)
class Linearised:
    """A network and the parameters in which it is taken to be linear.

    Attributes:
        model: unwrapped.
        names: of the parameters.
        forward: as for `estimate`.
    """

    model: nn.Module
    names: tuple[str, ...]
    forward: Forward | None = None

    def run(self, visitor: type[PerOutput], batch: Any, entries: Mapping[Group, Any]) -> tuple[Tensor, dict[int, Any]]:
        """One batch under capture: the outputs ``[n, ...]``, and the visitor's result for each of them."""
        parameters = {name: p for name, p in self.model.named_parameters() if name in self.names}
        if frozen := [name for name, p in parameters.items() if not p.requires_grad]:
            raise DataError(
                f"{', '.join(frozen)}: frozen now, but part of the posterior; call requires_grad_(True) on them."
            )
        columns, results = Columns(), {}
        fits: dict[str, PerOutput] = {}
        for group, question in entries.items():
            fit = visitor(columns, results, {group: question})
            names = {name for block in group for name in block.parameters}
            for other in {id(fits[name]): fits[name] for name in names if name in fits}.values():
                fit.entries.update(other.entries)
                names |= {name for name, of in fits.items() if of is other}
            fits.update(dict.fromkeys(names, fit))
        recipe = Recipe(self.model, columns, "exact", forward=self.forward, exact_limit=sys.maxsize)
        run = Accumulator(recipe, fits, parameters)
        run.known = Known.of_blocks(entries)  # residuals meet weights in other ways than the outputs that are predicted
        with isolate(self.model, 0):
            run.add(batch, "the batch to predict")
        assert columns.outputs is not None
        if strange := [group for group in run.groups if not isinstance(group.fit, PerOutput)]:
            raise UnsupportedError(f"{strange[0].state.name}: there is no variance for these parameters.")
        return columns.outputs, results


def variances(network: Linearised, batch: Any, entries: Mapping[Group, Sequence[Precision]]) -> tuple[Tensor, Tensor]:
    """Outputs ``[n, ...]`` and their variances ``[K, n, ...]`` under K posteriors."""

    def read(own: Mapping[Group, Sequence[Precision] | None]) -> tuple[Tensor, Tensor]:
        outputs, results = network.run(Variances, batch, own)
        return outputs, _join(outputs, results, len(next(iter(entries.values()))))

    return _put_together(batch, entries, read)


def directions(network: Linearised, batch: Any, entries: Mapping[Group, Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs ``[n, ...]`` and their first-order changes ``[S, n, ...]`` along S changes of the parameters."""
    outputs, results = network.run(Directions, batch, entries)
    return outputs, _join(outputs, results, len(next(iter(entries.values()))))


def covariances(network: Linearised, batch: Any, entries: Mapping[Group, Sequence[Precision]]) -> tuple[Tensor, Tensor]:
    """Outputs ``[n, ...]`` and the covariances ``[K, n, C, C]`` of the C outputs of each example under K posteriors."""

    def read(own: Mapping[Group, Sequence[Precision] | None]) -> tuple[Tensor, Tensor]:
        outputs, results = network.run(Kept, batch, own)
        width, count = outputs[0].numel(), len(next(iter(entries.values())))
        total = _wide(outputs).new_zeros(count, len(outputs), width, width)
        with plain_arithmetic(outputs.device):
            for group, precisions in own.items():
                columns = [c for c in sorted(results) if group in results[c]]
                if precisions is None or not columns:
                    continue
                kept = [results[c].pop(group) for c in columns]
                index = torch.tensor(columns, device=outputs.device)
                for k, precision in enumerate(precisions):
                    total[k][:, index[:, None], index] += pairs(kept, precision, group).to(total.dtype)
        return outputs, total

    return _put_together(batch, entries, read)


def _put_together(
    batch: Any,
    entries: Mapping[Group, Sequence[Precision]],
    read: Callable[[Mapping[Group, Sequence[Precision] | None]], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Outputs and a sum over blocks, to which each rank adds the blocks that it holds, if ranks hold them apart."""
    agree((precision for several in entries.values() for precision in several), "the batch to predict", batch)
    ranks, own = own_parts(entries)
    if ranks is None:
        return read(own)
    found: list[Tensor] = []

    def part() -> Tensor:
        outputs, total = read(own)
        found.append(outputs)
        return total

    total = ranks.summed(part, "predicts a batch")
    return found[0], total


def _wide(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _join(outputs: Tensor, results: Mapping[int, Tensor], count: int) -> Tensor:
    zero = _wide(outputs).new_zeros(count, len(outputs))
    columns = [results.get(c, zero).to(zero.dtype) for c in range(outputs[0].numel())]
    return torch.stack(columns, dim=-1).reshape(count, *outputs.shape)
