"""Run a model on a batch and obtain its outputs and the batch's targets."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from kronfisher.capture.batches import LABELS, as_keyed, split
from kronfisher.capture.containers import as_tensors, tensors_in, without_inference_tensors
from kronfisher.capture.language_models import shift_labels, with_decoder_inputs
from kronfisher.errors import DataError, NumericalError, UnsupportedError

__all__ = ["Forward", "find_outputs", "not_finite_error", "run"]

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]


def run(
    model: nn.Module,
    batch: Any,
    forward: Forward | None,
    device: torch.device,
    where: str,
    within: AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, Any]:
    """The model's outputs on a batch, and the batch's targets; only the model itself runs within the context, if any.

    A tensor is passed as ``model(x)``, as is a ``PackedSequence``, a tuple as ``model(*x)``, a mapping or a data class
    as ``model(**x)`` without its ``"labels"``. NumPy arrays become tensors on the model's device, floating-point arrays
    in its dtype. If the model does not return a tensor, the tensor ``logits`` of its answer is used. For a causal
    language model the labels in a mapping are those of the same tokens, as is customary; they are shifted here as the
    model's own loss would do. The decoder of an encoder-decoder model reads its labels shifted, as there, unless its
    inputs are given.

    Raises:
        DataError: the batch is on another device, or the outputs are not a single floating-point tensor.
    """
    batch, within = without_inference_tensors(batch), nullcontext() if within is None else within
    try:
        if forward is not None:
            with within:
                answer = forward(model, batch)
            if not isinstance(answer, tuple) or len(answer) != 2:
                raise DataError(f"{where}: forward must return (outputs, targets), not {type(answer).__name__}.")
            outputs, targets = answer
        else:
            like = next(model.parameters())
            inputs, targets = (as_tensors(part, like) for part in split(batch, where))
            for tensor in tensors_in(inputs, lengths=False):
                if tensor.device != device:
                    raise DataError(
                        f"{where} is on {tensor.device}, the model on {device}. Move one: batch.to({str(device)!r})."
                    )
            if isinstance(inputs, Mapping) and not inputs:
                raise DataError(
                    f"{where} has labels and no inputs. Put the inputs of the model, such as 'input_ids', into it."
                )
            with within:
                if isinstance(inputs, Mapping):
                    outputs = model(**with_decoder_inputs(inputs, targets, model, where))
                elif isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence):
                    outputs = model(*inputs)
                else:
                    outputs = model(inputs)
            outputs = _logits_of(outputs, where)
            if isinstance(targets, Tensor) and not (isinstance(as_keyed(batch), tuple | list) and len(batch) == 2):
                targets = shift_labels(targets, outputs, model)
    except (DataError, NumericalError, UnsupportedError):
        raise
    except Exception as error:
        kinds = ", ".join(f"{t.dtype} {list(t.shape)}" for t in tensors_in(batch))
        parameter = next(model.parameters())
        error.add_note(f"in {where} ({kinds}); the model's parameters are {parameter.dtype} on {parameter.device}.")
        if forward is None and isinstance(inputs := _inputs_of(batch), Mapping):
            error.add_note(
                f"The model was called with the keyword arguments {list(inputs)}. Targets belong under the key "
                f"{LABELS!r}; for batches of any other form give forward(model, batch) -> (outputs, targets)."
            )
        raise
    if not isinstance(outputs, Tensor):
        raise DataError(f"{where}: forward returned {type(outputs).__name__} as outputs, not a tensor.")
    if outputs.dim() == 0 or not outputs.is_floating_point():
        raise DataError(
            f"{where}: the model returned {outputs.dtype} {list(outputs.shape)}; expected floating-point outputs with "
            "one row per example (not a loss)."
        )
    if len(outputs) == 0:
        raise DataError(f"{where} is empty: the outputs have shape {list(outputs.shape)}. Drop empty batches.")
    return outputs, targets


def _inputs_of(batch: Any) -> Any:
    """The inputs of a batch; None if it has no known form."""
    try:
        return split(batch, "")[0]
    except DataError:
        return None


def find_outputs(answer: Any) -> Tensor | None:
    """The tensor that a model returned, either directly or as ``logits``; None if there is none."""
    logits = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", answer)
    return logits if isinstance(logits, Tensor) else None


def _logits_of(answer: Any, where: str) -> Tensor:
    """The same, required.

    Raises:
        DataError: there is none.
    """
    logits = find_outputs(answer)
    if logits is not None:
        return logits
    keys = f" with keys {list(answer)}" if isinstance(answer, Mapping) else ""
    raise DataError(
        f"{where}: the model returned {type(answer).__name__}{keys}, not a tensor. "
        "Give forward=lambda model, batch: (outputs, targets)."
    )


def not_finite_error(batch: Any, where: str) -> NumericalError:
    """The error for outputs that contain NaN or Inf; it says whether the batch contained them already."""
    for tensor in tensors_in(as_tensors(batch)):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            return NumericalError(
                f"{where}: the batch contains {bad} values that are NaN or Inf (in a tensor of shape "
                f"{list(tensor.shape)}). Clean or drop them; nothing was changed."
            )
    return NumericalError(
        f"{where}: the model's outputs contain NaN or Inf although the batch is finite. Look for overflow in the "
        "weights; nothing was changed."
    )
