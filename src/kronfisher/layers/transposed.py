"""Transposed convolutions in one, two and three dimensions: convolutions of images with zeros between their pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from kronfisher.layers.activations import Activations
from kronfisher.layers.convolution import ConvolutionUse, Geometry, Patches, once, per_axis
from kronfisher.layers.row_order import RowOrder
from kronfisher.layers.use import Use, Windows, handles
from kronfisher.linalg import WORKSPACE, mirror_

__all__ = ["TransposedUse"]


@dataclass(frozen=True)
class FlippedPatches(Patches):
    """Patches whose kernel axes run backwards, as the kernel of a transposed convolution does.

    Attributes:
        steps: of the pixels that are not zeros between others, along each axis.
    """

    steps: tuple[int, ...]

    def dense(self, low: int = 0, high: int | None = None) -> Tensor:
        rows = super().dense(low, high)
        width = rows.shape[-1] - self.bias
        kernel = self.window.kernel
        flipped = rows[..., :width].unflatten(-1, (-1, *kernel)).flip(tuple(range(-len(kernel), 0)))
        rows[..., :width] = flipped.flatten(-1 - len(kernel))
        return rows

    def times(self, matrix: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        return Activations.times(self, matrix, low, high)  # its kernels are flipped

    def weighted_sums(self, weights: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        return Activations.weighted_sums(self, weights, low, high)  # likewise

    def add_covariance_(self, total: Tensor, workspace: int = WORKSPACE) -> None:
        """As for all activations, by phases.

        Under a position p lie only the taps j with j ≡ p + padding modulo the stride, on neighbouring pixels: positions
        of one phase are those of a convolution of the pixels with every s-th tap, and taps of two phases never meet.
        """
        if set(self.window.dilation) != {1} or max(self.steps) == 1:
            Activations.add_covariance_(self, total, workspace)
            return
        images = self.images[(..., *(slice(None, None, step) for step in self.steps))]
        kernel, channels = self.window.kernel, images.shape[1] // self.groups
        places = torch.arange(channels * prod(kernel), device=total.device).view(channels, *kernel)
        for phase in product(*map(self._phases, range(len(kernel)))):
            if not prod(part.positions for part in phase):
                continue
            if not prod(part.taps for part in phase):
                if self.bias:
                    total[:, -1, -1] += len(images) * prod(part.positions for part in phase)
                continue
            window = Geometry(
                tuple(part.taps for part in phase),
                (1,) * len(kernel),
                tuple(part.padding for part in phase),
                (1,) * len(kernel),
            )
            chosen = places[(slice(None), *(slice(part.first, None, part.step) for part in phase))]
            index = chosen.flip(tuple(range(1, 1 + len(kernel)))).flatten()
            index = torch.cat([index, index.new_tensor([total.shape[-1] - 1])]) if self.bias else index
            sums = total.new_zeros(self.groups, len(index), len(index))
            Patches(images, window, self.groups, self.samples, self.bias).add_covariance_(sums, workspace)
            total[:, index[:, None], index] += mirror_(sums)

    def _phases(self, axis: int) -> "list[_Phase]":
        """The phases along an axis."""
        size, step, kernel = self.images.shape[2 + axis], self.steps[axis], self.window.kernel[axis]
        pixels = (size - 1) // step + 1
        before, after = self.window.padding[axis]
        positions = size + before + after - kernel + 1
        return [_Phase.of(first, step, pixels, kernel, kernel - 1 - before, positions) for first in range(step)]


@dataclass(frozen=True)
class _Phase:
    """Every `step`-th tap of a kernel along one axis, and the positions where it meets pixels.

    Attributes:
        first: the first tap.
        step: the stride.
        taps: how many.
        positions: how many.
        padding: of the pixels, before and after; negative where some meet none of the taps.
    """

    first: int
    step: int
    taps: int
    positions: int
    padding: tuple[int, int]

    @classmethod
    def of(cls, first: int, step: int, pixels: int, kernel: int, cut: int, positions: int) -> "_Phase":
        """For ``p = q · step + tap − cut`` with positions p and pixels q."""
        taps = max(0, -(-(kernel - first) // step))
        low, high = -((first - cut) // step), (positions - 1 + cut - first) // step  # of (p + cut − first) / step
        count = max(0, high - low + 1)
        before = taps - 1 - low
        return cls(first, step, taps, count, (before, count + taps - 1 - pixels - before))


@dataclass
class TransposedUse(ConvolutionUse):
    """``y = conv_transpose(x, W) + b`` with H groups; the window moves by one over the spread image.

    Attributes:
        steps: zeros between two pixels, plus one, along each axis (the stride).
    """

    steps: tuple[int, ...]

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        if not weight:
            return super().activations(order, gradient, weight, bias)
        images = self._images(order)
        size = [(n - 1) * step + 1 for n, step in zip(images.shape[2:], self.steps, strict=True)]
        spread = images.new_zeros(*images.shape[:2], *size)
        spread[(..., *(slice(None, None, step) for step in self.steps))] = images
        return FlippedPatches(spread, self.window, self._kernels, order.samples, bias, self.steps)


@handles(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def transposed_convolution(
    view: Windows,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Iterator[Use]:
    """Any stride, padding, output padding, groups and dilation; the weight is ``[C_in, C_out / groups, *kernel]``."""
    kernel, shift = view(weight), view(bias)
    if not (kernel or shift):
        return
    size = tuple(weight.shape[2:])
    axes = len(size)
    options = (per_axis(option, axes) for option in (stride, padding, output_padding, dilation))
    steps, cut, extra, spread = options
    margins = [d * (k - 1) - p for d, k, p in zip(spread, size, cut, strict=True)]
    pads = tuple((margin, margin + more) for margin, more in zip(margins, extra, strict=True))
    window = Geometry(size, (1,) * axes, pads, spread)
    outputs, inputs = weight.shape[1], weight.shape[0] // groups
    turned = (0, 2, 1, *range(3, 3 + axes))
    if inputs == 1 and (one := once(kernel)):
        yield TransposedUse(one.permuted(*turned), None, input, window, groups, steps, shared=True)
        kernel = None
    if kernel or shift:
        yield TransposedUse(
            kernel.reshaped(groups, inputs, outputs, *size).permuted(*turned) if kernel else None,
            shift.reshaped(groups, -1) if shift else None,
            input if kernel else None,
            window,
            groups,
            steps,
        )
