"""Refusals that likelihoods share, and sums over the positions of an example."""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from kronfisher.errors import DataError, NumericalError, require
from kronfisher.linalg import all_finite, promote


def require_exponentials(exponents: Tensor, name: str, what: str, where: str) -> None:
    """Refuses exponents that overflow in the precision of the outputs: vectors would not be finite.

    Raises:
        NumericalError: One is too large.
    """
    limit = math.log(torch.finfo(exponents.dtype).max)
    if exponents.numel():
        largest = exponents.max()
        require(
            largest < limit,
            lambda: NumericalError(
                f"{where}: {name} needs {what} below {limit:.0f}, or their exponentials overflow in {exponents.dtype}, "
                f"found {float(largest):.3g}; look for divergence, or bound the outputs"
            ),
        )


def sum_per_example(tensor: Tensor) -> Tensor:
    """Sum of `[N, ...]` over everything but the examples: `[N]`."""
    return tensor if tensor.dim() == 1 else tensor.flatten(1).sum(1)


def require_shape(targets: Tensor | None, shape: Sequence[int], name: str, where: str = "targets") -> Tensor:
    """The targets, once they are known to have this very shape: broadcasting would be silently wrong.

    Args:
        targets: Those given.
        shape: The one needed.
        name: Who needs it, for the message.
        where: Name of the batch, for the message.

    Returns:
        The targets.

    Raises:
        DataError: There are none, or their shape differs.
    """
    if targets is None:
        fail(where, f"{name} needs targets of shape {list(shape)}, found none", "give (inputs, targets) batches")
    if tuple(targets.shape) != tuple(shape):
        fail(
            where,
            f"{name} needs targets of shape {list(shape)}, found {list(targets.shape)}",
            "reshape the targets or the outputs; nothing is broadcast",
        )
    return targets


def refuse_booleans(targets: Tensor, name: str, where: str) -> None:
    """Refuses boolean targets of a likelihood of numbers: they are likely a mask.

    Raises:
        DataError: They are boolean.
    """
    if targets.dtype == torch.bool:
        fail(
            where,
            f"{name} needs targets that are numbers, found {targets.dtype}",
            "if they are what the outputs should be, convert them with targets.float(); if a mask, give it by mask=",
        )


def fail(where: str, what: str, remedy: str) -> NoReturn:
    """Raises a `DataError` that says where, the problem and the remedy."""
    raise refusal(where, what, remedy)


def refusal(where: str, what: str, remedy: str) -> DataError:
    """The `DataError` that says where, the problem and the remedy."""
    return DataError(f"{where}: {what}; {remedy}")


def require_finite(targets: Tensor, name: str, where: str) -> None:
    """Refuses targets that are complex, or not finite.

    Raises:
        DataError: They are.
    """

    def error() -> DataError:
        what = f"{name} needs real, finite targets, found NaN, infinite or complex ones"
        return refusal(where, what, "remove or impute them")

    if targets.is_complex():
        raise error()
    require(torch.isfinite(targets).all(), error)


def check_outputs(outputs: Any, name: str, where: str) -> None:
    """Refuses outputs that are no finite floating-point tensor `[N, ...]`.

    Args:
        outputs: Anything that a model returned.
        name: Of the likelihood, for the message.
        where: Name of the batch, for the message.

    Raises:
        DataError: Wrong type, dtype or shape.
        NumericalError: They are not finite.
    """
    if not isinstance(outputs, Tensor):
        fail(
            where,
            f"{name} needs the outputs to be one tensor, found {type(outputs).__name__}",
            "choose the tensor in forward(model, batch) -> (outputs, targets)",
        )
    if not outputs.is_floating_point():
        fail(where, f"{name} needs floating-point outputs, found {outputs.dtype}", "return logits or means")
    if outputs.ndim == 0:
        fail(
            where,
            f"{name} needs outputs [N, ...], one row per example, found a scalar",
            "return the outputs of every example, not their loss",
        )

    def error() -> NumericalError | None:
        if not (number := int((~torch.isfinite(outputs)).sum())):
            return None
        return NumericalError(
            f"{where}: {number} of {outputs.numel()} outputs are NaN or infinite; look for NaN in the inputs and in "
            "the parameters (in place of -inf use a finite value such as -1e4)"
        )

    require(all_finite(promote(outputs)), error)  # a sum that merely overflows is checked entry by entry


def check_targets(targets: Any, outputs: Tensor, name: str, where: str, labels: str) -> None:
    """Refuses targets that are missing but needed, no tensor, on another device, or of other examples.

    Args:
        targets: Anything that the data gave, None if nothing.
        outputs: `[N, ...]`.
        name: Of the likelihood, for the message.
        where: Name of the batch, for the message.
        labels: "observed" if the targets are needed.

    Raises:
        DataError: As said.
    """
    if targets is None:
        if labels == "observed":
            fail(
                where,
                "observed labels, and so the loss of an example, need targets, found none",
                'give (inputs, targets) batches (an estimate can do without: labels="sampled"; so can queries of '
                "influence: measurement=('logit', 0), or a function of outputs)",
            )
        return
    if not isinstance(targets, Tensor):
        fail(
            where,
            f"{name} needs the targets to be a tensor, found {type(targets).__name__}",
            "convert them with torch.as_tensor (pairs (targets, weight) are for Weighted)",
        )
    if targets.device != outputs.device:
        fail(
            where,
            f"targets are on {targets.device}, outputs on {outputs.device}",
            f'move them with targets.to("{outputs.device}")',
        )
    if targets.shape[:1] != outputs.shape[:1]:
        fail(
            where,
            f"targets {list(targets.shape)} and outputs {list(outputs.shape)} differ in the number of examples",
            "the first dimension of both counts the examples",
        )
