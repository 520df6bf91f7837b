"""Rows of natural gradients, brought nearer to one length."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Block, Window
from kronfisher.optim.foreach import mul_
from kronfisher.optim.layerwise.units import is_matrix, seen

__all__ = ["WeightRows"]

LEAST = 0.25  # times the mean length: shorter rows, as of classes that are rare, are lengthened as if they were so long


class WeightRows:
    """Divides every row of natural gradients of weights by the root of its length over the mean one, or by a half.

    To divide a row by the root of its length goes half of the way from the natural gradient to rows of one length, as
    of a B that whitens and does not invert; no row is lengthened more than twice. A rule of this library's own; rows of
    one length, on average over steps and after Muon's orthogonal step, are NorMuon's (2025, Li et al.).
    """

    def __init__(self) -> None:
        self._followed: tuple[list[Block], list[str]] | None = None
        self._windows: list[Window] = []
        self._sizes: list[int] = []
        self._index = self._counts = torch.zeros(0)

    def even(self, blocks: list[Block], natural: Mapping[str, Tensor]) -> None:
        """Treat the weights that are matrices, in place.

        Args:
            blocks: of layers.
            natural: natural gradients ``{name: [*shape]}``; of parameters that are not there nothing is done.
        """
        seen_before = blocks, list(natural)
        if seen_before != self._followed:
            windows = [block.weight for block in blocks if block.weight is not None and is_matrix(block)]
            self._windows = [window for window in windows if window.parameter in natural and not window.overlaps]
            self._followed = seen_before
        windows = self._windows
        if not windows:
            return
        weights = [_rows(window, natural[window.parameter]) for window in windows]
        each = [_lengths(weight) for weight in weights]
        sizes, lengths = [one.shape[0] for one in each], torch.cat(each)
        if sizes != self._sizes or lengths.device != self._index.device:  # a copy to a device would be waited for
            index = [place for place, size in enumerate(sizes) for _ in range(size)]
            self._index = torch.tensor(index, device=lengths.device)
            self._sizes, self._counts = sizes, torch.tensor(sizes, device=lengths.device)
        squares = lengths.new_zeros(len(sizes)).index_add_(0, self._index, lengths.square()) / self._counts
        means = squares.sqrt_().clamp_min_(torch.finfo(lengths.dtype).tiny)
        factors = lengths.div_(means[self._index]).clamp_min_(LEAST).rsqrt_()
        shaped = [
            own if weight.dim() == 2 else own.view(*weight.shape[:2], *[1] * (weight.dim() - 2))
            for weight, own in zip(weights, factors[:, None].split(sizes), strict=True)
        ]
        mul_(weights, shaped)
        for window, weight in zip(windows, weights, strict=True):
            if not window.row_major:
                window.scatter(weight[None], natural[window.parameter][None])


def _rows(window: Window, tensor: Tensor) -> Tensor:
    """The rows that the window shows: of a whole matrix itself ``[O, I]``, otherwise ``[H, O, *]``."""
    return tensor if tensor.dim() == 2 and window.size[0] == 1 and window.whole else seen(window, tensor)


def _lengths(rows: Tensor) -> Tensor:
    """Of all rows, one after the other ``[H O]``."""
    if rows.dim() == 2:
        return torch.linalg.vector_norm(rows, dim=1)
    return torch.linalg.vector_norm(rows, dim=tuple(range(2, rows.dim()))).view(-1)
