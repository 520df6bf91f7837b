"""Where a canonical weight ``W [H, O, I]`` lies inside the parameters of a model.

An operator knows only canonical matrices; a model knows only parameters. A `Window` is the strided window through which
an operator of the model saw a parameter (whole, transposed, a chunk of it), a `Block` is one canonical matrix made of
such windows: a weight, with its bias as a last column where both are treated together. Gathering and scattering are the
change of basis between the two worlds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch
from torch import Tensor

__all__ = ["Block", "Key", "Window"]

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """A strided window on one parameter.

    Attributes:
        parameter: the parameter's name.
        shape: the parameter's shape.
        layout: the parameter's strides in memory (row-major unless the parameter is, say, channels-last).
        size: the window's shape; its first two axes are H and O, the others flatten to I.
        stride: the window's strides, in elements of the parameter's memory.
        offset: the window's first element.
    """

    parameter: str
    shape: Sizes
    layout: Sizes
    size: Sizes
    stride: Sizes
    offset: int = 0

    @classmethod
    def of(cls, name: str, parameter: Tensor, window: Tensor | None = None) -> "Window":
        """The window that `window`, a view of `parameter`, looks through (default: all of it, in its own shape).

        Example:
            >>> weight = torch.zeros(2, 3)
            >>> Window.of("w", weight, weight.t()).stride
            (1, 3)
        """
        if window is None or window is parameter:
            return _on_all(name, tuple(parameter.shape), parameter.stride())
        offset = int(window.storage_offset() - parameter.storage_offset())
        return cls(name, tuple(parameter.shape), parameter.stride(), tuple(window.shape), window.stride(), offset)

    @cached_property
    def numel(self) -> int:
        return prod(self.size)

    @cached_property  # training asks at every step
    def whole(self) -> bool:
        """Whether the window shows every element of the parameter in its own row-major order."""
        return self.row_major and self.numel == prod(self.shape) and self.stride == _row_major(self.size)

    @cached_property
    def adjacent(self) -> bool:
        """Whether the window shows adjacent elements of the parameter in its own row-major order."""
        return self.row_major and all(
            n == 1 or s == t for n, s, t in zip(self.size, self.stride, _row_major(self.size), strict=True)
        )

    @property
    def complete(self) -> bool:
        """Whether the window shows every element of the parameter once, in whatever order."""
        return self.numel == prod(self.shape) and not self.overlaps

    @cached_property
    def row_major(self) -> bool:
        return all(n == 1 or s == t for n, s, t in zip(self.shape, self.layout, _row_major(self.shape), strict=True))

    @cached_property
    def overlaps(self) -> bool:
        """Whether the window shows an element more than once (``expand``, ``unfold``)."""
        reach = 0  # of the axes with smaller strides
        for stride, size in sorted((s, n) for s, n in zip(self.stride, self.size, strict=True) if n > 1):
            if stride <= reach:
                return True
            reach += stride * (size - 1)
        return False

    @cached_property
    def label(self) -> str:
        """The parameter's name, with the ranges of its axes that the window shows if not all of it.

        Example:
            >>> Window.of("w", weight := torch.zeros(6, 2), weight.chunk(3)[1]).label
            'w[2:4, :]'
        """
        if self.numel == prod(self.shape):
            return self.parameter
        last = self.offset + sum(stride * (size - 1) for stride, size in zip(self.stride, self.size, strict=True))
        ranges = []
        for low, high, size in zip(self._place(self.offset), self._place(last), self.shape, strict=True):
            ranges.append(":" if high - low + 1 == size else f"{low}:{high + 1}")
        return f"{self.parameter}[{', '.join(ranges)}]"

    def _place(self, offset: int) -> Sizes:
        """Where an element of the parameter's memory stands in its shape."""
        index = [0] * len(self.shape)
        for axis in sorted(range(len(self.shape)), key=lambda axis: self.layout[axis], reverse=True):
            if self.shape[axis] > 1:
                index[axis], offset = divmod(offset, self.layout[axis])
        return tuple(index)

    def reshaped(self, *size: int) -> "Window":
        """The same elements under another shape; axes may be split or added, or merged where memory allows."""
        if size == (1, *self.size):  # as most operators do; a view on the meta device takes its time
            return self.grouped
        viewed = torch.empty_strided(self.size, self.stride, device="meta").view(*size)
        return Window(self.parameter, self.shape, self.layout, tuple(viewed.shape), viewed.stride(), self.offset)

    @cached_property
    def grouped(self) -> "Window":
        """The same elements with a leading axis of one, for H."""
        stride = (self.size[0] * self.stride[0] if self.size else 1, *self.stride)
        return Window(self.parameter, self.shape, self.layout, (1, *self.size), stride, self.offset)

    @property
    def all(self) -> "Window":
        """The whole parameter, with a leading axis for H."""
        return Window(self.parameter, self.shape, self.layout, self.shape, self.layout).reshaped(1, *self.shape)

    def permuted(self, *axes: int) -> "Window":
        """The same elements with their axes in another order."""
        size, stride = tuple(self.size[k] for k in axes), tuple(self.stride[k] for k in axes)
        return Window(self.parameter, self.shape, self.layout, size, stride, self.offset)

    def gather(self, vectors: Tensor) -> Tensor:
        """Canonical elements ``[K, *size]`` of K parameter vectors ``[K, *shape]``."""
        if self.whole:
            return vectors.reshape(len(vectors), *self.size)
        memory = self._memory(vectors)
        return memory.as_strided((len(vectors), *self.size), (memory.stride(0), *self.stride), self.offset)

    def scatter(self, values: Tensor, out: Tensor) -> None:
        """Write canonical elements ``[K, *size]`` into K parameter vectors ``[K, *shape]``, in place."""
        if self.whole:
            out.copy_(values.reshape(out.shape))
            return
        memory = self._memory(out)
        window = memory.as_strided((len(out), *self.size), (memory.stride(0), *self.stride), self.offset)
        window.copy_(values.reshape(window.shape))
        out.copy_(memory)

    def mark(self, counts: Tensor) -> None:
        """Add one to every element of `counts`, shaped and laid out as the parameter, that the window shows."""
        counts.as_strided(self.size, self.stride, self.offset).add_(1)

    def counter(self) -> Tensor:
        """Zeros shaped and laid out as the parameter, for `mark`."""
        return torch.empty_strided(self.shape, self.layout, dtype=torch.int32, device="cpu").zero_()

    def _memory(self, vectors: Tensor) -> Tensor:
        # The window counts elements in the order of the parameter's memory, so lay the vectors out as the parameter is.
        numel = prod(self.shape)
        memory = torch.empty_strided(
            (len(vectors), *self.shape), (numel, *self.layout), dtype=vectors.dtype, device=vectors.device
        )
        return memory.copy_(vectors)


@lru_cache(maxsize=4096)  # every forward pass asks for the same ones, which are then equal by being the same object
def _on_all(name: str, shape: Sizes, layout: Sizes) -> Window:
    return Window(name, shape, layout, shape, layout)


def _row_major(shape: Sizes) -> Sizes:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


Key = tuple[Window | None, Window | None]


@dataclass(frozen=True)
class Block:
    """One canonical matrix ``W [H, O, I]``: a weight, a bias as its last column, or either alone.

    Attributes:
        name: how reports call it: the weight's name, or the bias's where it stands alone.
        operator: the operator that used it, as torch calls it.
        weight: window of size ``[H, O, *]`` whose other axes flatten to I.
        bias: window of size ``[H, *]`` whose other axes flatten to O; a last column of the matrix if there is a weight,
            else all of it.
        onehot: the inputs are rows of the identity: weights are looked up, and the inputs' second moments are diagonal.

    Example:
        >>> weight, bias = torch.zeros(2, 3), torch.zeros(2)
        >>> block = Block("w", "linear", Window.of("w", weight[None]), Window.of("b", bias[None]))
        >>> block.shape
        (1, 2, 4)
        >>> block.gather({"w": torch.ones(5, 2, 3), "b": torch.zeros(5, 2)})[0].tolist()
        [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    """

    name: str
    operator: str
    weight: Window | None
    bias: Window | None = None
    onehot: bool = False

    @cached_property
    def views(self) -> tuple[Window, ...]:
        return tuple(v for v in (self.weight, self.bias) if v is not None)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(v.parameter for v in self.views))

    @property
    def key(self) -> Key:
        """Uses with the same key share one matrix."""
        return self.weight, self.bias

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """H, O, I; I counts the bias column."""
        if self.weight is None:
            return self.views[0].size[0], prod(self.views[0].size[1:]), 1
        return self.weight.size[0], self.weight.size[1], prod(self.weight.size[2:]) + (self.bias is not None)

    @property
    def dim(self) -> int:
        return prod(self.shape)

    def gather(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Canonical rows ``[K, H·O·I]`` of K parameter vectors ``{name: [K, *shape]}``."""
        groups, outputs, _ = self.shape
        parts = []
        for view in self.views:
            values = view.gather(vectors[view.parameter])
            parts.append(values.reshape(len(values), groups, outputs, -1))
        rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return rows.reshape(len(rows), -1)

    def scatter(self, rows: Tensor, out: Mapping[str, Tensor]) -> None:
        """Write canonical rows ``[K, H·O·I]`` into K parameter vectors ``{name: [K, *shape]}``, in place."""
        matrix = rows.reshape(len(rows), *self.shape)
        if self.weight is not None:
            values = matrix if self.bias is None else matrix[..., :-1]
            self.weight.scatter(values, out[self.weight.parameter])
        if self.bias is not None:
            self.bias.scatter(matrix[..., -1], out[self.bias.parameter])
