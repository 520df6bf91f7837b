"""What likelihoods have in common: refusals, precision, sums."""

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from kronfisher.errors import DataError, NumericalError


def require_exponentials(exponents: Tensor, name: str, what: str, where: str) -> None:
    """Refuses exponents that overflow in the precision of the outputs: vectors would not be finite.

    Raises:
        NumericalError: One is too large.
    """
    limit = math.log(torch.finfo(exponents.dtype).max)
    if exponents.numel() and not bool((largest := exponents.max()) < limit):
        raise NumericalError(
            f"{where}: {name} needs {what} below {limit:.0f}, or their exponentials overflow in {exponents.dtype}, "
            f"found {float(largest):.3g}; look for divergence, or bound the outputs"
        )


def sum_per_datum(tensor: Tensor) -> Tensor:
    """Sum of `[N, ...]` over everything but the data: `[N]`."""
    return tensor.unsqueeze(-1).flatten(1).sum(1)


def require_shape(targets: Tensor | None, shape: Sequence[int], name: str, where: str = "targets") -> Tensor:
    """The targets, once they are known to have this very shape: broadcasting would be silently wrong.

    Args:
        targets: What was given.
        shape: What is needed.
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


def fail(where: str, what: str, remedy: str) -> NoReturn:
    """Raises a `DataError` that says where, what and what to do."""
    raise DataError(f"{where}: {what}; {remedy}")
