"""Numbers per example or per position, laid along the outputs: masks and weights."""

from itertools import pairwise
from math import prod

from torch import Tensor

from kronfisher.likelihoods.checks import fail

__all__ = ["along_outputs", "masked_positions", "spread"]


def spread(values: Tensor, outputs: Tensor, joint: int | None) -> Tensor:
    """Values for leading dimensions of the positions, in a shape that multiplies the outputs.

    Args:
        values: `[N, ...]`, leading dimensions of the outputs without their joint one.
        outputs: `[N, ...]`.
        joint: The dimension whose entries belong together (`Likelihood.joint_dim`), or None.

    Example:
        >>> import torch
        >>> spread(torch.ones(2, 5), torch.ones(2, 3, 5), joint=1).shape
        torch.Size([2, 1, 5])
    """
    missing = outputs.ndim - (joint is not None) - values.ndim
    values = values.reshape(*values.shape, *[1] * missing)
    return values if joint is None else values.unsqueeze(joint)


def along_outputs(mask: Tensor, outputs: Tensor, joint: int | None, where: str) -> Tensor:
    """A mask of positions in a shape that multiplies the outputs.

    Where the likelihood does not say which dimension is not one of positions, it is the last one or the first after the
    examples, whichever leaves as many positions as the mask has. Outputs with one row per example count if any position
    does: then the positions are inside the model only.

    Args:
        mask: `[N, P]`.
        outputs: `[N, ...]`.
        joint: The dimension whose entries belong together (`Likelihood.joint_dim`), or None.
        where: Name of the batch, for the message.

    Raises:
        DataError: The outputs have another number of positions, or it cannot be said which dimensions they are.
    """
    count, dims = mask.shape[1], list(range(1, outputs.ndim))
    whole = mask.any(1).reshape(len(mask), *[1] * len(dims))
    if count == 1:
        return whole
    choices = [dims[:-1], dims[1:], dims] if joint is None else [[d for d in dims if d != joint]]
    # Dimensions of one entry make no difference.
    distinct = {tuple(d for d in choice if outputs.shape[d] > 1) for choice in choices}
    fits = [choice for choice in distinct if prod(outputs.shape[d] for d in choice) == count]
    if not fits and () in distinct:
        return whole
    problem = f"the mask has {count} positions for each example, and outputs {list(outputs.shape)} "
    if not fits:
        fail(
            where,
            problem + "have another number of them",
            "mask positions of the outputs by ignored targets instead (ignore_index), and leave out mask=",
        )
    if len(fits) > 1 or (joint is None and len(dims) == 1):
        fail(
            where,
            problem + "do not show which of their dimensions are positions, if any",
            "return [N, P, 1] for one number per position; else pad the batch to another number of positions",
        )
    return mask.reshape(len(mask), *[outputs.shape[d] if d in fits[0] else 1 for d in dims])


def masked_positions(mask: Tensor, positions: Tensor | None, where: str) -> Tensor:
    """The positions that both a mask `[N, P]` and the targets `[N, Q]` count, bool `[N, max(P, Q)]`.

    Raises:
        DataError: Both have positions, but not the same number of them.
    """
    if positions is None:
        return mask
    counts = sorted({mask.shape[1], positions.shape[1]})
    if any(low > 1 for low, _ in pairwise(counts)):
        fail(
            where,
            f"the mask has {mask.shape[1]} positions for each example, the targets {positions.shape[1]}",
            "give one mask for both, or mark the positions by ignored targets alone (ignore_index)",
        )
    return mask & positions
