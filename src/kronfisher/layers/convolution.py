"""Convolutions in one, two and three dimensions: patches are the inputs, one block per group."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch.nn.functional as F
from torch import Tensor

from kronfisher.fisher.blocks import Window
from kronfisher.layers import shifts
from kronfisher.layers.activations import Activations, Ones
from kronfisher.layers.row_order import RowOrder
from kronfisher.layers.use import Use, Windows, handles
from kronfisher.linalg import WORKSPACE, promote

__all__ = ["ConvolutionUse", "Geometry", "Patches", "once", "per_axis"]


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves: sizes per spatial axis; padding before and after."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    def steps(self, size: Sequence[int]) -> tuple[int, ...]:
        """Positions along each axis of images of that size."""
        axes = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + sum(pad) - (k - 1) * spread - 1) // step + 1 for n, k, step, pad, spread in axes)

    def planar(self, size: Sequence[int]) -> shifts.Shape:
        """The geometry as `shifts` needs it, by rows and columns; a single axis gets a second one of size one."""

        def pair(values: Sequence[int], fill: int) -> tuple[int, int]:
            return values[0], values[1] if len(values) > 1 else fill

        before = [low for low, _ in self.padding]
        return pair(size, 1), pair(self.kernel, 1), pair(before, 0), pair(self.steps(size), 1), pair(self.dilation, 1)

    def pad(self, images: Tensor) -> Tensor:
        """Pad images ``[R, C, *size]`` with zeros."""
        pads = [amount for pair in reversed(self.padding) for amount in pair]
        return F.pad(images, pads) if any(pads) else images

    def windows(self, images: Tensor) -> Tensor:
        """``[R, C, *size] → [R, C, *positions, *kernel]``, a view on the padded images."""
        images = self.pad(images)
        for axis, (size, step, spread) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            images = images.unfold(axis + 2, (size - 1) * spread + 1, step)[..., ::spread]
        return images


@dataclass(frozen=True)
class Patches(Activations):
    """Patches of images, unfolded on demand.

    Attributes:
        images: ``[n·F, C, *size]``, the images of a sample next to each other.
        window: how the kernel moves over them.
        groups: H; channels are split evenly.
        samples: n.
        bias: whether a last coordinate of one is appended.
    """

    images: Tensor
    window: Geometry
    groups: int
    samples: int
    bias: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        positions = prod(self.window.steps(self.images.shape[2:]))
        width = self.images.shape[1] // self.groups * prod(self.window.kernel)
        return self.groups, self.samples, len(self.images) // self.samples * positions, width + self.bias

    @property
    def numel(self) -> int:
        return self.images.numel()

    def dense(self, low: int = 0, high: int | None = None) -> Tensor:
        groups, samples, positions, width = self.shape
        high = samples if high is None else min(high, samples)
        frames = len(self.images) // samples
        windows = self.window.windows(self.images[low * frames : high * frames])
        axes = len(self.window.kernel)
        windows = windows.unflatten(1, (groups, -1))  # [R, H, C/H, *positions, *kernel]
        order = (1, 2, *range(3 + axes, 3 + 2 * axes), 0, *range(3, 3 + axes))
        windows = windows.permute(order)  # features first, so that whole lines of the image are copied
        rows = self.images.new_empty(groups, width, (high - low) * positions)
        rows[:, : width - self.bias].view(windows.shape).copy_(windows)
        if self.bias:
            rows[:, -1] = 1
        return rows.unflatten(2, (high - low, positions)).permute(0, 2, 3, 1)

    def part(self, low: int, high: int) -> "Patches":
        images = self.images.unflatten(0, (self.samples, -1))[low:high]
        return replace(self, images=images.flatten(0, 1), samples=len(images))

    def select(self, index: Tensor) -> "Patches":
        images = self.images.unflatten(0, (self.samples, -1))[index]
        return replace(self, images=images.flatten(0, 1), samples=len(images))

    def times(self, matrix: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        """A convolution with R kernels; patches are not written out."""
        groups, samples, positions, width = self.shape
        rank, high = matrix.shape[-1], samples if high is None else min(high, samples)
        frames = len(self.images) // samples
        images = self.window.pad(self.images[low * frames : high * frames])
        channels = images.shape[1] // groups
        kernels = matrix[:, : width - self.bias].mT.reshape(groups * rank, channels, *self.window.kernel)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.window.kernel) - 1]
        product = convolve(images, kernels, None, self.window.stride, 0, self.window.dilation, groups)
        product = product.view(high - low, frames, groups, rank, -1).permute(2, 0, 1, 4, 3)  # [H, n', F, T/F, R]
        product = product.reshape(groups, high - low, positions, rank)
        return product + matrix[:, None, width - 1 :] if self.bias else product

    def weighted_sums(self, weights: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        """``Σ_t w[k, t] a[k, t]ᵀ [H, n', R, I]`` for weights ``[H, n', T, R]``.

        Patches are written out along one axis only: along the other they are windows on the same lines.
        """
        groups, samples, positions, width = self.shape
        high = samples if high is None else min(high, samples)
        _, kernel, _, (_, across), (spread, _) = self.window.planar(self.images.shape[2:])
        if len(self.images) > samples or len(self.window.kernel) > 2 or self.window.stride[0] > 1 or kernel[0] == 1:
            return super().weighted_sums(weights, low, high)
        images = self.window.pad(self.images[low:high])
        if len(self.window.kernel) == 1:
            lines = images[:, :, None]
        else:
            size, step, apart = kernel[1], self.window.stride[1], self.window.dilation[1]
            lines = images.unfold(3, (size - 1) * apart + 1, step)[..., ::apart].permute(0, 1, 4, 2, 3).contiguous()
        lines = lines.flatten(3).unflatten(1, (groups, -1)).flatten(2, 3)  # [n', H, C/H · columns, rows · across]
        sums = weights.new_empty(groups, high - low, weights.shape[-1], width)
        cells = sums[..., : width - self.bias].unflatten(-1, (-1, *kernel))  # [H, n', R, C/H, *kernel]
        for group in range(groups):
            for row in range(kernel[0]):
                first = row * spread * across
                part = weights[group].mT @ lines[:, group, :, first : first + positions].mT
                cells[group, ..., row, :] = part.unflatten(-1, (-1, kernel[1]))
        if self.bias:
            sums[..., -1] = weights.sum(2)
        return sums

    def copy(self) -> "Patches":
        return replace(self, images=self.images.clone())

    def add_covariance_(self, total: Tensor, workspace: int = WORKSPACE) -> None:
        """As for all activations, without writing patches out if that is faster (`shifts`)."""
        size, window, axes = self.images.shape[2:], self.window, len(self.window.kernel)
        channels, route = self.images.shape[1] // self.groups, "patches"
        shape = window.planar(size)
        if axes <= 2 and set(window.stride) == {1} and self.images.device.type == "cpu":
            route = shifts.cheapest(shape, len(self.images), channels)
        if route == "patches":
            super().add_covariance_(total, workspace)
            return
        width = self.shape[-1] - self.bias
        images = self.images.to(total.dtype)
        for part, factor in zip(images.chunk(self.groups, dim=1), total[:, :width, :width], strict=True):
            part = part.reshape(len(images), channels, *(*size, 1)[:2])
            if route == "rows":
                shifts.add_row_covariance_(factor, part, shape, window.padding[1] if axes == 2 else (0, 0))
            else:
                shifts.add_shifted_covariance_(factor, part, shape)
        if self.bias:
            sums = window.windows(images.sum(dim=0, keepdim=True)).sum(dim=tuple(range(2, 2 + axes)))
            total[:, :width, width] += sums.reshape(self.groups, -1)
            total[:, width, width] += prod(self.shape[1:3])


@dataclass
class ConvolutionUse(Use):
    """``y = conv(x, W) + b`` with H groups.

    Attributes:
        window: how the kernel moves.
        groups: H.
        shared: groups have the same kernel, so that they count as images.
    """

    window: Geometry
    groups: int
    shared: bool = field(default=False, kw_only=True)
    pads = True

    def _batched(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() == len(self.window.kernel) + 2 else tensor.unsqueeze(0)

    def lead(self, output: tuple[int, ...]) -> tuple[int, ...]:
        images = output[:1] if len(output) == len(self.window.kernel) + 2 else (1,)
        return (*images, self.groups) if self.shared else images

    def rows(self, gradient: Tensor) -> Tensor:
        images = self._batched(gradient)
        return images.unflatten(1, (self.groups, -1)).flatten(2) if self.shared else images.flatten(1)

    def gradients(self, order: RowOrder, gradient: Tensor) -> Tensor:
        images = self._batched(promote(gradient)).flatten(2).unflatten(1, (self.groups, -1))  # [R, H, O, T]
        images = order.group(images, 2).unsqueeze(2) if self.shared else order.group(images, 1)  # [n, F, H, O, T]
        grouped = images.permute(2, 3, 0, 1, 4).contiguous()  # [H, O, n, F, T]: whole lines are copied
        return grouped.flatten(3).permute(0, 2, 3, 1)

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        if not weight:
            groups, samples, positions, _ = self.gradients(order, gradient).shape
            return Ones(promote(gradient), (groups, samples, positions))
        return Patches(self._images(order), self.window, self._kernels, order.samples, bias)

    @property
    def _kernels(self) -> int:
        return 1 if self.shared else self.groups

    def _images(self, order: RowOrder) -> Tensor:
        """``[n·F, C, *size]``, the images of a sample next to each other."""
        images = self._batched(promote(self.cast_inputs()))
        if self.shared:
            return order.group(images.unflatten(1, (self.groups, -1)), 2).flatten(0, 1)
        return order.group(images, 1).flatten(0, 1)


@handles(F.conv1d, F.conv2d, F.conv3d)
def convolution(
    view: Windows,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Iterator[Use]:
    """Any stride, padding (numbers, 'valid', 'same'), dilation and groups; modules apply other padding modes."""
    kernel, shift = view(weight), view(bias)
    if not (kernel or shift):
        return
    axes = weight.dim() - 2
    stride, dilation = per_axis(stride, axes), per_axis(dilation, axes)
    size = tuple(weight.shape[2:])
    window = Geometry(size, stride, _padding(padding, size, dilation), dilation)
    outputs = weight.shape[0] // groups
    if outputs == 1 and (one := once(kernel)):
        yield ConvolutionUse(one, None, input, window, groups, shared=True)
        kernel = None
    if kernel or shift:
        yield ConvolutionUse(
            kernel.reshaped(groups, outputs, *weight.shape[1:]) if kernel else None,
            shift.reshaped(groups, -1) if shift else None,
            input if kernel else None,
            window,
            groups,
        )


def once(kernel: Window | None) -> Window | None:
    """A kernel ``[1, 1, *]`` that was expanded along the first axis; None if it was not."""
    if kernel is None or kernel.size[0] == 1 or kernel.stride[0] != 0:
        return None
    return replace(kernel, size=(1, *kernel.size[1:])).grouped


def per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """A setting for each of some spatial axes."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _padding(
    padding: int | str | Sequence[int], kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    if padding == "same":  # torch puts an odd zero at the end
        totals = [spread * (size - 1) for size, spread in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, str):
        return ((0, 0),) * len(kernel)
    return tuple((amount, amount) for amount in per_axis(padding, len(kernel)))
