"""Lookups in a table of weights: inputs are indices, never rows of zeros with a one."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from kronfisher.errors import UnsupportedError
from kronfisher.fisher.blocks import Window
from kronfisher.layers.activations import Activations
from kronfisher.layers.elementwise import ElementwiseUse
from kronfisher.layers.onehot import Indices
from kronfisher.layers.row_order import RowOrder
from kronfisher.layers.use import Use, Windows, handles

__all__ = ["AddedLookupUse", "BagUse", "EntriesUse", "LookupUse"]


@dataclass
class LookupUse(Use):
    """``y[...] = table[i]``; indices ``[*lead, 1]`` are the inputs, the canonical weight is tableᵀ.

    Attributes:
        ignored: an index that contributes nothing and whose row gets no gradient.
    """

    ignored: int | None = None
    onehot = True
    looked_up = True
    pads = True

    @property
    def width(self) -> int:
        assert self.weight is not None
        return self.weight.size[-1]

    def entries(self) -> tuple[Tensor, Tensor]:
        """Indices and weights, ``[*lead, 1]``."""
        indices = self.original_inputs().long()
        weights = torch.ones_like(indices, dtype=self.dtype)
        return indices, weights if self.ignored is None else weights * (indices != self.ignored)

    def lead(self, output: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(output[:-1]) or (1,)

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() > 1 else tensor[None]

    def rows(self, gradient: Tensor) -> Tensor:
        return self._rows(gradient)

    def gradients(self, order: RowOrder, gradient: Tensor) -> Tensor:
        rows = self._rows(gradient)
        return order.group(rows, rows.dim() - 1)[None]

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        values, weights = (order.group(each, each.dim() - 1) for each in map(self._rows, self.entries()))
        return Indices(values, weights, self.width)

    def addition_uses(self, shape: tuple[int, ...], sign: float, onto: tuple[int, ...]) -> "Iterator[Use]":
        """The use of the lookup's output, which is independent of the data, by an addition that broadcasts it."""
        aligned = [1] * (len(onto) - len(shape)) + list(shape)
        if prod(onto) > prod(shape) and all(n in (1, m) for n, m in zip(aligned, onto, strict=True)):
            yield AddedLookupUse(self.weight, None, None, tuple(shape), sign=sign, table=self)


@dataclass
class BagUse(LookupUse):
    """``y[...] = Σ_j w_j table[i_j]`` with indices ``[*lead, J]``: one input for each bag, the sum of its entries.

    Attributes:
        factors: w, shaped like the indices.
        counted: which entries exist, shaped like them: bags may be shorter than J.
    """

    factors: Tensor = field(kw_only=True)
    counted: Tensor = field(kw_only=True)
    onehot = False

    def entries(self) -> tuple[Tensor, Tensor]:
        return self.original_inputs().long(), self.factors.to(self.dtype)

    def addition_uses(self, shape: tuple[int, ...], sign: float, onto: tuple[int, ...]) -> "Iterator[Use]":
        return iter(())

    def entries_apart(self) -> "EntriesUse":
        use = EntriesUse(**{each.name: getattr(self, each.name) for each in fields(self)})
        use.dtype, use._version = self.dtype, self._version
        return use


@dataclass
class EntriesUse(BagUse):
    """A bag whose entries are positions, as of a lookup that is summed afterwards: second moments are a diagonal."""

    onehot = True
    pads = False

    def gradients(self, order: RowOrder, gradient: Tensor) -> Tensor:
        rows = super().gradients(order, gradient)  # [1, n, T, O]
        rows = rows.repeat_interleave(self.counted.shape[-1], dim=2)
        return rows * self._positions(order, self.counted)[..., None]

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        values, weights = self.entries()
        return Indices(
            self._positions(order, values)[..., None], self._positions(order, weights)[..., None], self.width
        )

    def mask(self, order: RowOrder) -> Tensor | None:
        return self._positions(order, self.counted)

    def _positions(self, order: RowOrder, entries: Tensor) -> Tensor:
        """``[*lead, J] → [n, T·J]``."""
        rows = self._rows(entries)
        return order.group(rows, rows.dim() - 1).flatten(1)


@dataclass
class AddedLookupUse(ElementwiseUse):
    """``y = x + lookup`` with a lookup independent of the data, such as positions: broadcast axes are summed out.

    Attributes:
        table: the use that made the lookup, with output shape `aligned`.
    """

    table: LookupUse | None = None
    onehot = True
    looked_up = True

    @property
    def lookup(self) -> LookupUse:
        assert self.table is not None
        return self.table

    def positions_apart(self) -> None:
        """The entries of the lookup are the positions already."""

    def gradients(self, order: RowOrder, gradient: Tensor) -> Tensor:
        summed = super().gradients(order, gradient)  # [1, n, 1, T·O]
        return summed.reshape(1, order.samples, -1, self.aligned[-1])

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        values, weights = (each.reshape(1, -1, 1).expand(order.samples, -1, -1) for each in self.lookup.entries())
        return Indices(values, weights, self.lookup.width)


def _table(view: Windows, weight: Tensor, max_norm: float | None, scale_grad_by_freq: bool) -> Window | None:
    table = view(weight)
    if table is None or len(table.size) != 2:
        return None
    if max_norm is not None or scale_grad_by_freq:
        option = "max_norm, which changes the weights" if max_norm is not None else "scale_grad_by_freq"
        raise UnsupportedError(
            f"{table.parameter}: this embedding uses {option} depending on the rest of the batch, so that "
            "per-example gradients do not exist. Build it without that option, or freeze it with requires_grad_(False)."
        )
    return table.permuted(1, 0).reshaped(1, *table.size[::-1])


@handles(F.embedding)
def embedding(
    view: Windows,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Iterator[Use]:
    """Rows of a table; the row `padding_idx` gets no gradient."""
    table = _table(view, weight, max_norm, scale_grad_by_freq)
    if table:
        ignored = None if padding_idx is None else padding_idx % len(weight)
        yield LookupUse(table, None, input.unsqueeze(-1), ignored=ignored)


@handles(F.embedding_bag)
def embedding_bag(
    view: Windows,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Iterator[Use]:
    """Sums or means of rows, bags of equal length ``[n, J]``, or of any length with the offset of each.

    The largest number of a bag is a choice among its rows, for each column another: no product of rows and gradients.
    """
    table = _table(view, weight, max_norm, scale_grad_by_freq)
    if not table or mode not in ("sum", "mean"):
        return
    ignored = None if padding_idx is None else padding_idx % len(weight)
    if input.dim() == 2:
        indices, counted = input, torch.ones_like(input, dtype=torch.bool)
    else:
        assert offsets is not None
        starts = offsets[:-1] if include_last_offset else offsets
        ends = torch.cat([starts[1:], starts.new_tensor([len(input)])]) if not include_last_offset else offsets[1:]
        lengths = ends - starts
        steps = torch.arange(int(lengths.max()) if len(lengths) else 0, device=input.device)
        counted = steps < lengths[:, None]
        indices = torch.where(counted, input[(starts[:, None] + steps).clamp_max(max(len(input) - 1, 0))], 0)
    if ignored is not None:
        counted = counted & (indices != ignored)
    factors = counted.to(weight.dtype)
    if per_sample_weights is not None:
        given = per_sample_weights.detach()
        spread = given if input.dim() == 2 else given[(starts[:, None] + steps).clamp_max(max(len(input) - 1, 0))]
        factors = factors * spread
    if mode == "mean":
        factors = factors / factors.sum(dim=1, keepdim=True).clamp_min(1)
    yield BagUse(table, None, indices, factors=factors, counted=counted)
