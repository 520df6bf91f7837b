"""What a batch is, how it goes into the model, and what can be wrong with it."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from kronfisher.errors import DataError, NumericalError, UnsupportedError

__all__ = ["Batches", "Forward", "Mask", "checksum", "passes_over", "positions_of", "run", "tensors_in"]

Forward = Callable[[nn.Module, Any], tuple[Tensor, Any]]
Mask = Callable[[Any], Tensor] | str

_LABELS = "labels"  # the key of a batch that holds its targets
_IGNORED = -100
# Their outputs at a token belong to the label of the next one, and the labels come unshifted.
_SHIFTED = re.compile(r"(ForCausalLM|(?<!XLNet)(?<!With)LMHeadModel)$")


def passes_over(data: Any) -> tuple[Iterable[Any], bool]:
    """The batches, and whether they can be read more than once.

    A tensor, an array, a mapping, a tuple or a data class is one batch; a list, a ``DataLoader`` or any other iterable
    holds batches.

    Raises:
        DataError: the data are none of these.
    """
    if isinstance(data, Tensor | np.ndarray | Mapping | tuple) or _record(data):
        return [data], True
    name = type(data).__name__
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise DataError(
            f"data is {name}, which holds single data; pass torch.utils.data.DataLoader(data, batch_size=N)."
        )
    if not isinstance(data, Iterable) or isinstance(data, str | bytes | nn.Module):
        raise DataError(f"data is {name}; pass a loader of (inputs, targets) batches, one such tuple, or a tensor.")
    return data, not isinstance(data, Iterator)


class Batches:
    """The batches of some data, with names for messages; in a later pass they are recognised.

    Args:
        data: one batch, or an iterable of batches.

    Attributes:
        index: how many batches the pass has read so far.

    Raises:
        DataError: the data are neither.
    """

    def __init__(self, data: Any) -> None:
        self._batches, self._again = passes_over(data)
        self._checksums: dict[int, Tensor] = {}
        self._number = self._first = self.index = 0

    def read(self, number: int) -> Iterator[tuple[str, Any]]:
        """Name and batch, one after the other, in the pass of this number."""
        self._number, self.index = number, 0
        try:
            for batch in self._batches:
                self.index += 1
                yield f"batch {self.index - 1}" + (f" of pass {number + 1}" if number else ""), batch
        except Exception as error:
            error.add_note(f"while the loader was read in pass {number + 1}")
            raise

    def recognise(self, batch: Any) -> None:
        """Remember the batch just read in the first pass; in a later one it has to be the same.

        Raises:
            DataError: it is another one, or the data cannot be read again.
        """
        if not self._again:
            raise DataError(
                "This fit reads the data more than once, and a generator can be read only once. "
                "Pass a list or a DataLoader."
            )
        bits, place = checksum(batch), self.index - 1
        if self._number == 0:
            self._checksums[place] = bits
        elif place in self._checksums and not torch.equal(bits, self._checksums[place]):
            raise DataError(f"batch {place} of pass {self._number + 1} is not the one of the first pass. {_SAME}")

    def require_same_number(self) -> None:
        """DataError if the pass just read had no batch, or not as many as the first one."""
        if self._number and self.index != self._first:
            raise DataError(f"Pass {self._number + 1} read {self.index} batches, the first one {self._first}. {_SAME}")
        if not self.index:
            raise DataError(
                "The data hold no batch. Pass a loader with at least one batch; a generator can be read only once."
            )
        self._first = self.index


_SAME = (
    "A fit that reads the data several times needs the same batches in the same order (a loader that shuffles with "
    "the global generators has it, one with a generator of its own has not): fix the loader's order, or pass a list."
)


def split(batch: Any, where: str) -> tuple[Any, Any]:
    """Inputs and targets of a batch; targets are None where there are none.

    A mapping, a data class or a named tuple may hold targets as ``"labels"``; what else it holds are inputs.
    """
    batch = _keyed(batch)
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != _LABELS}, batch.get(_LABELS)
    if isinstance(batch, Tensor | np.ndarray):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return split(batch[0], where) if isinstance(_keyed(batch[0]), Mapping) else (batch[0], None)
    raise DataError(
        f"{where} is a {type(batch).__name__}"
        + (f" of {len(batch)} entries" if isinstance(batch, tuple | list) else "")
        + "; pass (inputs, targets) or give forward(model, batch) -> (outputs, targets)."
    )


def run(model: nn.Module, batch: Any, forward: Forward | None, device: torch.device, where: str) -> tuple[Tensor, Any]:
    """The model's outputs on a batch, and its targets.

    A tensor is passed as ``model(x)``, a tuple as ``model(*x)``, a mapping or a data class as ``model(**x)`` without
    its ``"labels"``. NumPy arrays become tensors on the model's device, those of floating point in its dtype. Of what
    a model returns, its tensor ``logits`` is taken. To a causal language model the labels of a mapping are those of the
    same tokens, as everywhere in such data: they are shifted here as its own loss would.

    Raises:
        DataError: the batch lies on another device, or the outputs are not one floating-point tensor.
    """
    batch = ordinary(batch)
    try:
        if forward is not None:
            answer = forward(model, batch)
            if not isinstance(answer, tuple) or len(answer) != 2:
                raise DataError(f"{where}: forward must return (outputs, targets), not {type(answer).__name__}.")
            outputs, targets = answer
        else:
            like = next(model.parameters())
            inputs, targets = (as_tensors(part, like) for part in split(batch, where))
            for tensor in tensors_in(inputs):
                if tensor.device != device:
                    raise DataError(
                        f"{where} lies on {tensor.device}, the model on {device}. Move one: batch.to({str(device)!r})."
                    )
            if isinstance(inputs, Mapping):
                outputs = model(**inputs)
            elif isinstance(inputs, tuple | list):
                outputs = model(*inputs)
            else:
                outputs = model(inputs)
            outputs = logits_of(outputs, where)
            if isinstance(targets, Tensor) and not (isinstance(_keyed(batch), tuple | list) and len(batch) == 2):
                targets = shifted(targets, outputs, model)
    except (DataError, NumericalError, UnsupportedError):
        raise
    except Exception as error:
        kinds = ", ".join(f"{t.dtype} {list(t.shape)}" for t in tensors_in(batch))
        parameter = next(model.parameters())
        error.add_note(f"in {where} ({kinds}); the model's parameters are {parameter.dtype} on {parameter.device}.")
        if forward is None and isinstance(inputs := _keywords(batch), Mapping):
            error.add_note(
                f"The model was called with the keyword arguments {list(inputs)}. Targets belong under the key "
                f"{_LABELS!r}; for batches of any other form give forward(model, batch) -> (outputs, targets)."
            )
        raise
    if not isinstance(outputs, Tensor):
        raise DataError(f"{where}: forward returned {type(outputs).__name__} for the outputs, not a tensor.")
    if outputs.dim() == 0 or not outputs.is_floating_point():
        raise DataError(
            f"{where}: the model returned {outputs.dtype} {list(outputs.shape)}; expected floating-point outputs with "
            "one row per datum (not a loss)."
        )
    if len(outputs) == 0:
        raise DataError(f"{where} is empty: the outputs have shape {list(outputs.shape)}. Drop empty batches.")
    return outputs, targets


def logits_of(answer: Any, where: str) -> Tensor:
    """The tensor that a model returned, by itself or as ``logits``.

    Raises:
        DataError: there is none.
    """
    found = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", answer)
    if isinstance(found, Tensor):
        return found
    keys = f" with keys {list(answer)}" if isinstance(answer, Mapping) else ""
    raise DataError(
        f"{where}: the model returned {type(answer).__name__}{keys}, not a tensor. "
        "Give forward=lambda model, batch: (outputs, targets)."
    )


def shifted(labels: Tensor, outputs: Tensor, model: nn.Module) -> Tensor:
    """Labels of a causal language model, each moved to the token before; all others as they are."""
    if outputs.ndim != 3 or labels.shape != outputs.shape[:2]:
        return labels
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return labels  # its decoder reads them shifted
    if not any(_SHIFTED.search(type(module).__name__) for module in model.modules()):
        return labels
    return F.pad(labels[:, 1:], (0, 1), value=_IGNORED)


def positions_of(batch: Any, mask: Mask, outputs: Tensor, where: str) -> Tensor:
    """Which positions of a batch count, bool ``[N, P]`` on the device of the outputs.

    Args:
        batch: as the loader gave it.
        mask: a function of the batch, or the key of the batch or of its inputs that holds it.
        outputs: ``[N, ...]``.
        where: the name of the batch in messages.

    Raises:
        DataError: there is none, or it is not a number of zeros and ones for each datum.
    """
    if isinstance(mask, str):
        parts = [_keyed(part) for part in ([batch, batch[0]] if isinstance(batch, tuple | list) and batch else [batch])]
        found = next((part[mask] for part in parts if isinstance(part, Mapping) and mask in part), None)
        if found is None:
            keys = [list(part) for part in parts if isinstance(part, Mapping)]
            raise DataError(
                f"{where}: mask={mask!r} is no key of the batch or its inputs"
                + (f" (keys {keys[0]})" if keys else ", which are no mappings")
                + ". Name one, or give a function of the batch that returns the mask."
            )
    else:
        found = mask(batch)
    found = as_tensors(found)
    if not isinstance(found, Tensor) or found.is_complex() or found.ndim == 0 or len(found) != len(outputs):
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise DataError(
            f"{where}: the mask is {shape}, and there are {len(outputs)} data; it must be a tensor [N, P] with one "
            "number for each position: true where it counts."
        )
    other = found[(found != 0) & (found != 1)] if found.dtype != torch.bool else found[:0]
    if other.numel():
        raise DataError(
            f"{where}: the mask holds {float(other[0])}, and it must be true (or 1) where a position counts and false "
            "(or 0) elsewhere. For weights use kf.Weighted."
        )
    return (found != 0).unsqueeze(-1).flatten(1).to(outputs.device)


def not_finite(batch: Any, where: str) -> NumericalError:
    """The error for outputs with NaN or Inf, which says whether the data brought them."""
    for tensor in tensors_in(as_tensors(batch)):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            return NumericalError(
                f"{where}: the batch holds {bad} values that are NaN or Inf (a tensor of shape {list(tensor.shape)}). "
                "Clean or drop them; nothing was changed."
            )
    return NumericalError(
        f"{where}: the model's outputs hold NaN or Inf although the batch is finite. Look for overflow in the weights; "
        "nothing was changed."
    )


def checksum(batch: Any) -> Tensor:
    """A number for each tensor or array of a batch, of its bits in their order: the next pass recognises the batch."""
    sums = []
    for tensor in tensors_in(as_tensors(batch)):
        flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        bits = flat.detach().contiguous().flatten().view(_BITS[flat.element_size()]).long()
        order = torch.arange(1, len(bits) + 1, device=bits.device)
        sums.append((bits * (2 * order + 1)).sum().cpu())  # odd factors, modulo 2^64
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.long, device="cpu")


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def ordinary(value: Any) -> Any:
    """The same with copies of tensors that were made under ``torch.inference_mode``, which no graph may hold."""
    return _mapped(value, Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def as_tensors(value: Any, like: Tensor | None = None) -> Any:
    """The same with tensors for NumPy arrays: on the device of `like`, in its dtype where they are floating."""

    def convert(array: np.ndarray) -> Any:
        if array.dtype.kind not in "biufc":
            return array
        tensor = torch.from_numpy(np.array(array))  # a copy, as arrays may be read-only
        if like is None:
            return tensor
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)

    return _mapped(value, np.ndarray, convert)


def _mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Nested containers with every leaf of a kind replaced; what holds nothing new is returned itself."""
    if isinstance(value, kind):
        return function(value)
    record = _record(value)
    if not record and not isinstance(value, Mapping | tuple | list):
        return value
    old = _keyed(value) if record else value
    items = dict(old) if isinstance(old, Mapping) else dict(enumerate(old))
    new = {key: _mapped(item, kind, function) for key, item in items.items()}
    if all(new[key] is item for key, item in items.items()):
        return value
    if isinstance(value, Mapping):
        return new
    if record:
        other = copy(value)
        for name, item in new.items():
            object.__setattr__(other, str(name), item)
        return other
    return type(value)(*new.values()) if hasattr(value, "_fields") else type(value)(new.values())


def _record(value: Any) -> bool:
    """Whether it is an instance of a data class that is nothing else besides."""
    return is_dataclass(value) and not isinstance(value, type | nn.Module | Dataset | Mapping)


def _keyed(value: Any) -> Any:
    """Data classes, and named tuples with a field for labels, as mappings; anything else as it is."""
    if _record(value):
        return {entry.name: getattr(value, entry.name) for entry in fields(value)}
    if isinstance(value, tuple) and _LABELS in getattr(value, "_fields", ()):
        return dict(zip(value._fields, value, strict=True))  # pyright: ignore[reportAttributeAccessIssue]
    return value


def _keywords(batch: Any) -> Any:
    """Inputs that are keyword arguments of the model, or whatever else."""
    try:
        return split(batch, "")[0]
    except DataError:
        return None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and data classes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from tensors_in(getattr(value, entry.name))
