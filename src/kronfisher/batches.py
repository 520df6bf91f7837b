"""What a batch is, how it goes into the model, and what can be wrong with it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.errors import DataError, NumericalError
from kronfisher.isolation import tensors_in

__all__ = ["Forward", "Mask", "checksum", "passes_over", "positions_of", "run"]

Forward = Callable[[nn.Module, Any], tuple[Tensor, Any]]
Mask = Callable[[Any], Tensor] | str


def passes_over(data: Any) -> tuple[Iterable[Any], bool]:
    """The batches, and whether they can be read more than once.

    A tensor, a mapping or a tuple is one batch; a list, a ``DataLoader`` or any other iterable holds batches.

    Raises:
        DataError: the data are none of these.
    """
    if isinstance(data, Tensor | Mapping | tuple):
        return [data], True
    if not isinstance(data, Iterable):
        raise DataError(
            f"data is {type(data).__name__}; pass a loader of (inputs, targets) batches, one such tuple, or a tensor."
        )
    return data, not isinstance(data, Iterator)


def split(batch: Any, where: str) -> tuple[Any, Any]:
    """Inputs and targets of a batch; targets are None where there are none."""
    if isinstance(batch, Tensor | Mapping):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0], None
    raise DataError(
        f"{where} is a {type(batch).__name__}"
        + (f" of {len(batch)} entries" if isinstance(batch, tuple | list) else "")
        + "; pass (inputs, targets) or give forward(model, batch) -> (outputs, targets)."
    )


def run(model: nn.Module, batch: Any, forward: Forward | None, device: torch.device, where: str) -> tuple[Tensor, Any]:
    """The model's outputs on a batch, and its targets.

    A tensor is passed as ``model(x)``, a tuple as ``model(*x)``, a mapping as ``model(**x)``.

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
            inputs, targets = split(batch, where)
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
    except (RuntimeError, TypeError, IndexError) as error:
        kinds = ", ".join(f"{t.dtype} {list(t.shape)}" for t in tensors_in(batch))
        parameter = next(model.parameters())
        error.add_note(f"in {where} ({kinds}); the model's parameters are {parameter.dtype} on {parameter.device}.")
        raise
    if not isinstance(outputs, Tensor):
        raise DataError(
            f"{where}: the model returned {type(outputs).__name__}, not a tensor. "
            "Give forward=lambda model, batch: (outputs, targets)."
        )
    if outputs.dim() == 0 or not outputs.is_floating_point():
        raise DataError(
            f"{where}: the model returned {outputs.dtype} {list(outputs.shape)}; expected floating-point outputs with "
            "one row per datum (not a loss)."
        )
    if len(outputs) == 0:
        raise DataError(f"{where} is empty: the outputs have shape {list(outputs.shape)}. Drop empty batches.")
    return outputs, targets


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
        parts = [batch, batch[0]] if isinstance(batch, tuple | list) and batch else [batch]
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
    for tensor in tensors_in(batch):
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
    """A number for each tensor of a batch, made of its bits in their order: the next pass recognises the batch."""
    sums = []
    for tensor in tensors_in(batch):
        flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        bits = flat.detach().contiguous().flatten().view(_BITS[flat.element_size()]).long()
        order = torch.arange(1, len(bits) + 1, device=bits.device)
        sums.append((bits * (2 * order + 1)).sum().cpu())  # odd factors, modulo 2^64
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.long, device="cpu")


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def ordinary(value: Any) -> Any:
    """The same with copies of tensors that were made under ``torch.inference_mode``, which no graph may hold."""
    if not any(tensor.is_inference() for tensor in tensors_in(value)):
        return value
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: ordinary(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(ordinary, value))
    return type(value)(map(ordinary, value)) if isinstance(value, tuple | list) else value
