"""Batches: reading them pass by pass, naming them in messages, and splitting them into inputs, targets and a mask."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset, IterableDataset

from kronfisher.capture.containers import as_mapping, as_tensors, is_record, tensors_in
from kronfisher.distributed import Shard
from kronfisher.errors import DataError

__all__ = ["LABELS", "Batches", "Mask", "as_batches", "as_keyed", "checksum", "positions_of", "split"]

Mask = Callable[[Any], Tensor] | str

LABELS = "labels"  # the key of a batch that holds its targets


def as_batches(data: Any) -> tuple[Iterable[Any], bool]:
    """The batches of `data`, and whether they can be read more than once.

    A tensor, an array, a mapping, a tuple or a data class is one batch; a list, a ``DataLoader`` or any other iterable
    contains batches.

    Raises:
        DataError: `data` is none of these, or a list that is as likely one batch as two.
    """
    if isinstance(data, list) and _is_a_pair(data):
        raise DataError(
            f"data is a list of two tensors of one length, {list(data[0].shape)} and {list(data[1].shape)}. If it is a "
            "batch of inputs and targets, as a DataLoader yields it, pass tuple(data); if these are the inputs of two "
            "batches, pass [(inputs,) for inputs in data]."
        )
    if isinstance(data, Tensor | np.ndarray | Mapping | tuple) or is_record(data):
        return [data], True
    name = type(data).__name__
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise DataError(
            f"data is {name}, which holds single examples; pass torch.utils.data.DataLoader(data, batch_size=N)."
        )
    if not isinstance(data, Iterable) or isinstance(data, str | bytes | nn.Module):
        raise DataError(f"data is {name}; pass a loader of (inputs, targets) batches, one such tuple, or a tensor.")
    return data, not isinstance(data, Iterator)


def _is_a_pair(data: list[Any]) -> bool:
    """Whether a list may be inputs and targets: two tensors of one length that are not parts of one tensor."""
    if len(data) != 2:
        return False  # unread: a list of one's own may make its entries as it is read
    tensors = [as_tensors(entry) for entry in data]
    if not all(isinstance(tensor, Tensor) and tensor.dim() for tensor in tensors):
        return False
    pointers = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.layout is torch.strided}
    return len(tensors[0]) == len(tensors[1]) and len(pointers) == 2


class Batches:
    """The batches of a data set, named for messages; a later pass must read the same ones as the first.

    Args:
        data: one batch, or an iterable of batches.

    Attributes:
        index: number of batches read so far in the current pass.
        again: whether they can be read more than once.

    Raises:
        DataError: `data` is neither.
    """

    def __init__(self, data: Any) -> None:
        self._batches, self.again = as_batches(data)
        self._checksums: dict[int, Tensor] = {}
        self._versions: list[int] = []
        self._written: set[int] = set()  # batches that changed while the model ran on them
        self._number = self._first = self.index = 0

    @property
    def number(self) -> int:
        """How many batches there are; one if only reading them would tell."""
        return max(self._length() or 1, 1)

    @property
    def ends(self) -> bool:
        """Whether they are known to end: they have a length."""
        return self._length() is not None

    def _length(self) -> int | None:
        try:
            return len(self._batches) if isinstance(self._batches, Sized) else None
        except TypeError:  # a loader of an iterable data set has a length that raises
            return None

    def read(self, number: int) -> Iterator[tuple[str, Any]]:
        """Yield the name and the batch, for every batch of the pass with this number (from zero)."""
        self._number, self.index = number, 0
        try:
            for batch in self._batches:
                self.index += 1
                self._versions = _versions(batch)
                yield f"batch {self.index - 1}" + (f" of pass {number + 1}" if number else ""), batch
        except Exception as error:
            error.add_note(f"while the loader was read in pass {number + 1}")
            raise

    def modified(self, batch: Any) -> bool:
        """Whether the batch just read was modified in place since."""
        return self._versions != _versions(batch)

    def recognise(self, batch: Any) -> None:
        """Remember the batch just read in the first pass; in a later pass, require that it is the same.

        Raises:
            DataError: it is a different batch, or the data cannot be read again.
        """
        if not self.again:
            raise DataError(
                "The data are read more than once here, and a generator can be read only once. "
                "Pass a list or a DataLoader."
            )
        bits, place = checksum(batch), self.index - 1
        if self.modified(batch):
            self._written.add(place)
        if self._number == 0:
            self._checksums[place] = bits
        elif place in self._checksums and not torch.equal(bits, self._checksums[place]):
            if place in self._written:
                raise DataError(
                    f"batch {place} of pass {self._number + 1} differs from that of the first pass, because the model "
                    "modifies its inputs in place. Let its forward copy them first (x = x.clone()), or pass a loader "
                    "that makes its batches anew."
                )
            raise DataError(f"batch {place} of pass {self._number + 1} differs from that of the first pass. {_SAME}")

    @property
    def order(self) -> str:
        """A digest of the order in which batches are dealt out to the ranks of a process group, or nothing."""
        return self._batches.order if isinstance(self._batches, Shard) else ""

    def require_same_number(self, some: bool = True) -> None:
        """Raise a DataError if the pass just read had not as many batches as the first pass; or no batch.

        Args:
            some: whether there has to be one.
        """
        if self._number and self.index != self._first:
            raise DataError(f"Pass {self._number + 1} read {self.index} batches, the first one {self._first}. {_SAME}")
        if some and not self.index and isinstance(self._batches, Shard):
            raise DataError(
                f"kf.shard(loader) deals out fewer batches than there are ranks ({self._batches.ranks}), and rank "
                f"{self._batches.rank} gets none: make batches smaller."
            )
        if some and not self.index:
            raise DataError(
                "The data contain no batch. Pass a loader with at least one batch; a generator can be read only once."
            )
        self._first = self.index


def _versions(batch: Any) -> list[int]:
    """How often each tensor of a batch was modified in place."""
    return [tensor._version for tensor in tensors_in(batch) if not tensor.is_inference()]


_SAME = (
    "What reads the data several times needs the same batches in the same order (a loader that shuffles with "
    "the global generators provides that, a loader with a generator of its own does not): fix the loader's order, or "
    "pass a list."
)


def split(batch: Any, where: str) -> tuple[Any, Any]:
    """Split a batch into inputs and targets; the targets are None if there are none.

    A mapping, a data class or a named tuple may have its targets under ``"labels"``; everything else in it is an input.
    """
    batch = as_keyed(batch)
    if isinstance(batch, PackedSequence):
        return batch, None
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != LABELS}, batch.get(LABELS)
    if isinstance(batch, Tensor | np.ndarray):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return split(batch[0], where) if isinstance(as_keyed(batch[0]), Mapping) else (batch[0], None)
    raise DataError(
        f"{where} is a {type(batch).__name__}"
        + (f" of {len(batch)} entries" if isinstance(batch, tuple | list) else "")
        + "; pass (inputs, targets) or give forward(model, batch) -> (outputs, targets)."
    )


def as_keyed(batch: Any) -> Any:
    """Convert data classes, and named tuples with labels, to mappings; return anything else unchanged."""
    return as_mapping(batch, LABELS)


def positions_of(batch: Any, mask: Mask, outputs: Tensor, where: str) -> Tensor:
    """The positions of a batch that count, bool ``[N, P]`` on the device of the outputs.

    Args:
        batch: as the loader returned it.
        mask: a function of the batch, or the key in the batch or in its inputs that holds the mask.
        outputs: ``[N, ...]``.
        where: the name of the batch in messages.

    Raises:
        DataError: there is no mask, or it does not consist of zeros and ones for each example.
    """
    if isinstance(mask, str):
        parts = [
            as_keyed(part) for part in ([batch, batch[0]] if isinstance(batch, tuple | list) and batch else [batch])
        ]
        positions = next((part[mask] for part in parts if isinstance(part, Mapping) and mask in part), None)
        if positions is None:
            keys = [list(part) for part in parts if isinstance(part, Mapping)]
            raise DataError(
                f"{where}: mask={mask!r} is not a key of the batch or its inputs"
                + (f" (keys {keys[0]})" if keys else ", which are not mappings")
                + ". Name one, or give a function of the batch that returns the mask."
            )
    else:
        positions = mask(batch)
    positions = as_tensors(positions)
    if (
        not isinstance(positions, Tensor)
        or positions.is_complex()
        or positions.ndim == 0
        or len(positions) != len(outputs)
    ):
        shape = list(positions.shape) if isinstance(positions, Tensor) else type(positions).__name__
        raise DataError(
            f"{where}: the mask is {shape}, and there are {len(outputs)} examples; it must be a tensor [N, P] with one "
            "number for each position: true where the position counts."
        )
    other = positions[(positions != 0) & (positions != 1)] if positions.dtype != torch.bool else positions[:0]
    if other.numel():
        raise DataError(
            f"{where}: the mask contains {float(other[0])}, and it must be true (or 1) where a position counts and "
            "false (or 0) elsewhere. For weights use kf.Weighted."
        )
    return (positions != 0).unsqueeze(-1).flatten(1).to(outputs.device)


def checksum(batch: Any) -> Tensor:
    """A number for each tensor or array of a batch, computed from its bits in order, and one for texts in it.

    Later passes compare them.
    """
    sums = []
    for tensor in tensors_in(as_tensors(batch)):
        flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        bits = flat.detach().contiguous().flatten().view(_BITS[flat.element_size()]).long()
        order = torch.arange(1, len(bits) + 1, device=bits.device)
        sums.append((bits * (2 * order + 1)).sum().cpu())  # odd factors, modulo 2^64
    if words := list(_words_in(batch)):  # texts that a forward of the user's reads
        number = int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "little", signed=True)
        sums.append(torch.tensor(number, dtype=torch.long, device="cpu"))
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.long, device="cpu")


def _words_in(batch: Any) -> Iterator[Any]:
    """Texts and numbers in nested containers that are no tensors."""
    batch = as_mapping(batch)
    if isinstance(batch, str | bytes | int | float):
        yield batch
    elif isinstance(batch, np.ndarray) and batch.dtype.kind in "US":
        yield batch.tolist()
    elif isinstance(batch, Mapping | list | tuple):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _words_in(item)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
