"""The input factor of a convolution without writing its patches out.

For stride 1 the block of ``Σ_t a aᵀ`` that belongs to kernel offsets δ and δ' is a sum over image positions q of ``x[q]
x[q + d(δ' − δ)]ᵀ`` (d the dilation). It depends on the pair only through its difference Δ, up to the range that q runs
over, which shifts with δ. So cut each axis where one of these ranges begins or ends, multiply once for every Δ and
segment, and add up the segments of each pair: exact, 13 differences instead of 45 pairs for a 3×3 kernel, and no
k²-fold copy. The same along rows only suits few channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_row_covariance_", "add_shifted_covariance_", "cheapest"]


@dataclass(frozen=True)
class Axis:
    """One spatial axis under one difference Δ of kernel offsets.

    Attributes:
        first: the smallest offset δ of the pairs (δ, δ + Δ).
        shift: dΔ, in pixels.
        segments: ranges of q between the ends of all ranges.
        members: for each δ from `first`, one where its range holds the segment.
    """

    first: int
    shift: int
    segments: tuple[tuple[int, int], ...]
    members: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, size: int, kernel: int, pad: int, positions: int, dilation: int, difference: int) -> "Axis":
        """The axis of an image of that size, where a kernel takes `positions` steps after `pad` zeros."""
        shift = dilation * difference
        offsets = range(max(0, -difference), min(kernel, kernel - difference))
        ranges = []
        for offset in offsets:  # both q and q + shift lie in the image: beyond it there are only zeros
            low = max(dilation * offset - pad, 0, -shift)
            ranges.append((low, max(low, min(dilation * offset - pad + positions, size, size - shift))))
        cuts = sorted({end for ends in ranges for end in ends})
        segments = tuple((low, high) for low, high in pairwise(cuts))
        members = tuple(tuple(float(low <= a and b <= high) for a, b in segments) for low, high in ranges)
        used = [k for k in range(len(segments)) if any(row[k] for row in members)]
        return cls(
            offsets[0], shift, tuple(segments[k] for k in used), tuple(tuple(row[k] for k in used) for row in members)
        )

    @property
    def covered(self) -> int:
        """Positions that are multiplied."""
        return sum(high - low for low, high in self.segments)


Shape = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]


@lru_cache(maxsize=256)
def differences(shape: Shape) -> tuple[tuple[Axis, Axis], ...]:
    """One of each pair ±Δ; `shape`: image, kernel, zeros before, positions and dilation, each (rows, columns)."""
    (height, width), (tall, wide), (top, left), (rows, columns), (down, across) = shape
    vertical = {dy: Axis.of(height, tall, top, rows, down, dy) for dy in range(tall)}
    horizontal = {dx: Axis.of(width, wide, left, columns, across, dx) for dx in range(1 - wide, wide)}
    return tuple((vertical[dy], horizontal[dx]) for dy in vertical for dx in horizontal if dy > 0 or dx >= 0)


@lru_cache(maxsize=256)
def vertical_axes(shape: Shape) -> tuple[Axis, ...]:
    """The first axis alone, for differences from 0 up."""
    (height, _), (tall, _), (top, _), (rows, _), (down, _) = shape
    return tuple(Axis.of(height, tall, top, rows, down, dy) for dy in range(tall))


@lru_cache(maxsize=256)
def cheapest(shape: Shape, images: int, channels: int) -> str:
    """The route by a static model of one core's nanoseconds: ``"patches"``, ``"rows"`` or ``"shifts"``.

    The model counts multiplications at a rate that falls off for narrow matrices, a price per small product, and
    copies; its constants were fitted to timings over C = 1–256, images of 7–28 pixels and kernels of 3 and 5.
    """
    (height, _), (tall, wide), _, (rows, columns), _ = shape
    width, strip = channels * tall * wide, channels * wide
    costs = {"patches": images * rows * columns * width * (0.7 * width / _rate(width) + 0.5)}
    costs["rows"] = images * height * columns * strip + 4 * width**2
    for vertical in vertical_axes(shape):
        costs["rows"] += images * vertical.covered * columns * strip**2 / _rate(strip) + 4000 * len(vertical.segments)
    costs["shifts"] = 2 * images * channels * shape[0][0] * shape[0][1] + 4 * width**2
    for vertical, horizontal in differences(shape):
        costs["shifts"] += images * vertical.covered * horizontal.covered * channels**2 / _rate(channels)
        costs["shifts"] += 4000 * sum(min(b - a, d - c) for a, b in vertical.segments for c, d in horizontal.segments)
    return min(costs, key=costs.__getitem__)


def _rate(width: int) -> float:
    """Multiplications per nanosecond of a product of matrices with that many columns."""
    return 30 * width / (width + 48)


def add_row_covariance_(total: Tensor, images: Tensor, shape: Shape, padding: tuple[int, int]) -> None:
    """As `add_shifted_covariance_`, with patches written out along each row and differences used between rows only.

    For few channels this beats both other routes: the copy is k-fold, not k²-fold, and every segment is one product.

    Args:
        total: ``[C·kernel, C·kernel]``, both triangles are added to; may be a strided window.
        images: ``[R, C, height, width]``.
        shape: as in `differences`.
        padding: zeros left and right of each row.
    """
    _, (tall, wide), _, _, (down, across) = shape
    strips = F.pad(images, padding).unfold(3, (wide - 1) * across + 1, 1)[
        ..., ::across
    ]  # [R, C, height, columns, wide]
    strips = strips.permute(1, 4, 2, 0, 3).contiguous().flatten(3).flatten(0, 1)  # [C·wide, height, R·columns]
    blocks = _blocks(total, images.shape[1], tall, wide)
    for axis in vertical_axes(shape):
        pairs = [
            strips[:, low:high].flatten(1) @ strips[:, low + axis.shift : high + axis.shift].flatten(1).mT
            for low, high in axis.segments
        ]
        if not pairs:
            continue
        sums = images.new_tensor(axis.members) @ torch.stack(pairs).flatten(1)
        sums = sums.view(-1, images.shape[1], wide, images.shape[1], wide)
        for row, block in enumerate(sums):
            y, z = axis.first + row, axis.first + row + axis.shift // down
            blocks[:, y, :, :, z, :] += block
            if z != y:
                blocks[:, z, :, :, y, :] += block.permute(2, 3, 0, 1)


def add_shifted_covariance_(total: Tensor, images: Tensor, shape: Shape) -> None:
    """``total += Σ_{k,t} a aᵀ`` over patches a ``[C·kernel]`` of all images and positions, stride 1.

    Args:
        total: ``[C·kernel, C·kernel]``, both triangles are added to; may be a strided window.
        images: ``[R, C, height, width]``.
        shape: as in `differences`.
    """
    _, (tall, wide), *_ = shape
    channels = images.shape[1]
    by_row = images.permute(
        2, 3, 0, 1
    ).contiguous()  # a run of pixels of one row, over all images, is one contiguous matrix
    by_column = by_row.transpose(0, 1).contiguous()
    blocks = _blocks(total, channels, tall, wide)
    for vertical, horizontal in differences(shape):
        products = images.new_zeros(len(vertical.segments), len(horizontal.segments), channels, channels)
        for row, rows in enumerate(vertical.segments):
            for column, columns in enumerate(horizontal.segments):
                for x, y in _runs(by_row, by_column, rows, columns, vertical.shift, horizontal.shift):
                    products[row, column].addmm_(x.mT, y)
        # Two products: einsum would plan for longer than it works.
        sums = images.new_tensor(vertical.members) @ products.flatten(1)
        sums = sums.view(len(sums), len(horizontal.segments), channels**2)
        sums = (images.new_tensor(horizontal.members) @ sums).unflatten(-1, (channels, channels))
        _scatter(blocks, sums, vertical, horizontal, shape)


def _runs(
    by_row: Tensor, by_column: Tensor, rows: tuple[int, int], columns: tuple[int, int], down: int, across: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of contiguous ``[pixels·R, C]`` whose products add up to that of a segment with its shifted self."""
    images, (a, b), (c, d) = by_row, rows, columns
    if d - c < b - a:
        images, (a, b), (c, d), down, across = by_column, columns, rows, across, down
    for line in range(a, b):
        yield images[line, c:d].flatten(0, 1), images[line + down, c + across : d + across].flatten(0, 1)


def _blocks(total: Tensor, channels: int, tall: int, wide: int) -> Tensor:
    """``[C·kernel, C·kernel]`` by channel, row and column of the kernel on both sides."""
    return total.unflatten(1, (channels, tall, wide)).unflatten(0, (channels, tall, wide))


def _scatter(blocks: Tensor, sums: Tensor, vertical: Axis, horizontal: Axis, shape: Shape) -> None:
    """Add the blocks of all pairs with one difference, and their transposes, at their places."""
    down, across = shape[-1]
    dy, dx = vertical.shift // down, horizontal.shift // across
    for a in range(sums.shape[0]):
        for b in range(sums.shape[1]):
            y, x = vertical.first + a, horizontal.first + b
            blocks[:, y, x, :, y + dy, x + dx] += sums[a, b]
            if dy or dx:
                blocks[:, y + dy, x + dx, :, y, x] += sums[a, b].mT
