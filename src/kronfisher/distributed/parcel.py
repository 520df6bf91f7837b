"""Any value that can be pickled, its tensors apart from the rest, so that they travel as one run of bytes."""

import io
import pickle
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

__all__ = ["Parcel", "axes_by_stride"]

_ALIGNED = 16  # bytes, so that every tensor can be looked at in its own dtype


@dataclass(frozen=True)
class Parcel:
    """A value in two parts.

    Attributes:
        frame: everything but the numbers of its tensors, pickled.
        numbers: those of all tensors, one after the other, as bytes.

    Example:
        >>> parcel = Parcel.of({"w": torch.ones(2), "n": 3})
        >>> parcel.numbers.dtype, Parcel.open(parcel.frame, parcel.numbers)
        (torch.uint8, {'w': tensor([1., 1.]), 'n': 3})
    """

    frame: bytes
    numbers: Tensor

    @classmethod
    def of(cls, value: Any, device: torch.device | str = "cpu") -> "Parcel":
        """A value, its numbers on a device; every tensor is packed once, however often it occurs."""
        tensors: list[Tensor] = []
        places: dict[int, int] = {}

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: Any) -> int | None:
                if not isinstance(obj, Tensor):
                    return None
                if id(obj) not in places:
                    places[id(obj)] = len(tensors)
                    tensors.append(obj)
                return places[id(obj)]

        file = io.BytesIO()
        Pickler(file).dump(value)
        orders = [axes_by_stride(tensor) for tensor in tensors]
        tensors = [tensor.detach().permute(order) for tensor, order in zip(tensors, orders, strict=True)]
        shapes = [(tuple(tensor.shape), order, tensor.dtype) for tensor, order in zip(tensors, orders, strict=True)]
        pieces = [_bytes_of(tensor).to(device) for tensor in tensors]
        numbers = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8, device=device)
        return cls(pickle.dumps((file.getvalue(), shapes)), numbers)

    @staticmethod
    def open(frame: bytes, numbers: Tensor, device: torch.device | None = None) -> Any:
        """The value, its tensors in memory of their own, on a device; None: where the numbers are."""
        content, shapes = pickle.loads(frame)
        tensors, begin = [], 0
        for shape, order, dtype in shapes:
            size = prod(shape) * dtype.itemsize
            tensor = numbers[begin : begin + size].view(dtype).view(shape)
            tensor = tensor.clone() if device is None else tensor.to(device, copy=True)
            tensors.append(tensor.permute([order.index(axis) for axis in range(len(order))]))
            begin += _aligned(size)

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, pid: int) -> Tensor:
                return tensors[pid]

        return Unpickler(io.BytesIO(content)).load()

    @staticmethod
    def size(frame: bytes) -> int:
        """How many bytes the numbers take."""
        return sum(_aligned(prod(shape) * dtype.itemsize) for shape, _, dtype in pickle.loads(frame)[1])


def axes_by_stride(tensor: Tensor) -> list[int]:
    """Its axes from the longest stride to the shortest: products of tensors in another layout have other last bits."""
    return sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _bytes_of(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)  # one number may have any stride
    missing = _aligned(len(flat)) - len(flat)
    return torch.cat([flat, flat.new_zeros(missing)]) if missing else flat
