"""Examples as people see them: pictures, text, or a line of numbers, with their targets and what is predicted."""

from collections.abc import Mapping, Set
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from kronfisher.capture.batches import Batches, split
from kronfisher.capture.containers import as_tensors
from kronfisher.capture.forward import run
from kronfisher.errors import DataError
from kronfisher.experiments.influence.page import Shown
from kronfisher.experiments.influence.subject import Subject
from kronfisher.likelihoods import Categorical

__all__ = ["shown"]

_NUMBERS = 12  # of an example that is no picture
_TARGETS = 4  # numbers of a target that stand below
_COLOURS = 1, 3
_SIDE = 8  # of the smallest picture that comes as a row of numbers


def shown(subject: Subject, data: Any, wanted: Set[int] | None = None, *, predicted: bool = False) -> dict[int, Shown]:
    """Some examples of data, by their places in it.

    Args:
        subject: whose they are.
        data: batches.
        wanted: places; None: all.
        predicted: whether the class that is predicted stands below, where there are classes.
    """
    found, low = {}, 0
    for where, batch in Batches(data).read(0):
        inputs, targets = (as_tensors(part) for part in split(batch, where))
        if isinstance(inputs, PackedSequence):
            inputs, _ = pad_packed_sequence(inputs, batch_first=True)
        size = _size(inputs, where)
        here = [k for k in range(size) if wanted is None or low + k in wanted]
        classes = _classes(subject, batch, where) if predicted and here else None
        for k in here:
            answer = None if classes is None else int(classes[k])
            found[low + k] = _example(subject, _part(inputs, k, size), _part(targets, k, size), answer)
        low += size
        if wanted is not None and len(found) == len(wanted):
            break
    return found


def _size(inputs: Any, where: str) -> int:
    """How many examples there are: the length of the first tensor, array or list of texts in the inputs."""
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    if isinstance(inputs, tuple | list) and inputs and not isinstance(inputs[0], str):
        return _size(inputs[0], where)
    try:
        return len(inputs)
    except TypeError:
        raise DataError(f"{where}: nobody knows how many examples {type(inputs).__name__} are.") from None


def _part(value: Any, place: int, size: int) -> Any:
    """That of one example, in whatever containers it comes."""
    if isinstance(value, Mapping):
        return {key: _part(item, place, size) for key, item in value.items()}
    texts = isinstance(value, tuple | list) and bool(value) and isinstance(value[0], str)
    if (texts or (isinstance(value, Tensor) and value.dim())) and len(value) == size:
        return value[place]
    if isinstance(value, tuple | list) and not texts:
        return tuple(_part(item, place, size) for item in value)
    return value


def _classes(subject: Subject, batch: Any, where: str) -> Tensor | None:
    """The class that is predicted of every example ``[n]``; None where there is not one."""
    if not isinstance(subject.likelihood, Categorical):
        return None
    with torch.no_grad():
        outputs, _ = run(subject.model, batch, None, next(subject.model.parameters()).device, where)
    return outputs.argmax(1) if outputs.dim() == 2 else None


def _example(subject: Subject, x: Any, y: Any, answer: int | None) -> Shown:
    value = _by_shape(x) if subject.show is None else subject.show(x, y)
    if not isinstance(value, str | Tensor) or (isinstance(value, Tensor) and value.dim() not in (2, 3)):
        what = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"show gave {what}; it must give text, or a picture [H, W] or [C, H, W]")
    short = isinstance(y, int | float) or (isinstance(y, Tensor) and y.numel() <= _TARGETS)
    label = [f"target {_numbers(torch.as_tensor(y))}"] if short else []
    return Shown(value, ", ".join([*label, *([] if answer is None else [f"predicted {answer}"])]))


def _by_shape(x: Any) -> Tensor | str:
    """A picture, where the shape is that of one; else text."""
    if isinstance(x, Mapping):
        return "\n".join(f"{key}: {_line(item)}" for key, item in x.items())
    if isinstance(x, tuple | list):
        return "\n".join(map(_line, x))
    if not isinstance(x, Tensor) or x.dtype in (torch.int32, torch.int64):  # tokens are no colours
        return _line(x)
    if x.dim() == 3 and x.shape[0] in _COLOURS:
        return x
    if x.dim() == 3 and x.shape[2] in _COLOURS:
        return x.movedim(2, 0)
    if x.dim() == 2 and min(x.shape) > 1:
        return x
    side = isqrt(x.numel())
    return x.view(side, side) if x.dim() == 1 and side * side == x.numel() and side >= _SIDE else _line(x)


def _line(x: Any) -> str:
    return _numbers(x) if isinstance(x, Tensor) else str(x)


def _numbers(x: Tensor) -> str:
    """The first ones."""
    some = ", ".join(f"{v:.5g}" for v in x.flatten()[:_NUMBERS].tolist())
    return f"{some}, ..." if x.numel() > _NUMBERS else some
