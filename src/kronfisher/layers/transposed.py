"""Transposed convolutions in one, two and three dimensions: convolutions of images with zeros between their pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kronfisher.layers.activations import Activations
from kronfisher.layers.convolution import ConvolutionUse, Geometry, Patches, per_axis
from kronfisher.layers.row_order import RowOrder
from kronfisher.layers.use import Use, Windows, handles
from kronfisher.linalg import WORKSPACE, promote

__all__ = ["TransposedUse"]


class FlippedPatches(Patches):
    """Patches whose kernel axes run backwards, as the kernel of a transposed convolution does."""

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
        Activations.add_covariance_(self, total, workspace)


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
        images = order.group(self._batched(promote(self.cast_inputs())), 1).flatten(0, 1)
        size = [(n - 1) * step + 1 for n, step in zip(images.shape[2:], self.steps, strict=True)]
        spread = images.new_zeros(*images.shape[:2], *size)
        spread[(..., *(slice(None, None, step) for step in self.steps))] = images
        return FlippedPatches(spread, self.window, self.groups, order.samples, bias)


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
    if kernel:
        outputs, inputs = weight.shape[1], weight.shape[0] // groups
        kernel = kernel.reshaped(groups, inputs, outputs, *size).permuted(0, 2, 1, *range(3, 3 + axes))
    yield TransposedUse(
        kernel,
        shift.reshaped(groups, -1) if shift else None,
        input if kernel else None,
        Geometry(size, (1,) * axes, pads, spread),
        groups,
        steps,
    )
