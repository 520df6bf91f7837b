"""Inverses of narrow layers of one shape, made together: one by one, calls cost more than their arithmetic."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kronfisher.errors import NumericalError, NumericalWarning, together
from kronfisher.operators import Kronecker
from kronfisher.optim.layer_inverse import LayerInverse

__all__ = ["Turn", "gather_alike", "make_alike"]

NARROW = 256  # outputs or inputs
MOST = 2**21  # numbers in the factors of layers that are made together, which are copied for it


class Turn(NamedTuple):
    """An inverse that is to be made: of the output factor alone, of the input factor alone (False), or of both."""

    one: LayerInverse
    outputs: bool | None


def gather_alike(chosen: Iterable[Turn]) -> Iterator[list[Turn]]:
    """Layers that are one narrow matrix each, by shape, and all others alone."""
    groups: dict[object, list[Turn]] = {}
    for turn in chosen:
        one, shape = turn.one, turn.one.blocks[0].shape
        plain = len(one.blocks) == 1 and one.other is None and one.layer.passes == 1 and turn.outputs is None
        narrow = plain and shape[0] == 1 and max(shape) <= NARROW
        groups.setdefault((shape, one.layer.reads_data) if narrow else id(one), []).append(turn)
    for group in groups.values():
        most = max(MOST // sum(size**2 for size in group[0].one.blocks[0].shape[1:]), 1)
        for low in range(0, len(group), most):
            yield group[low : low + most]


def make_alike(group: Sequence[LayerInverse], shares: tuple[float | Tensor, float | Tensor], step: int) -> bool:
    """Make the inverses of layers whose operators were read, all with the same damping.

    Args:
        group: layers of one shape.
        shares: of the mean eigenvalues of A and of B, by which these are damped.
        step: number of the step.

    Returns:
        Whether they were made; otherwise nothing was changed, and one by one they say what is wrong.
    """
    products = [one.operator for one in group if isinstance(one.operator, Kronecker) and not one.operator.has_diagonal]
    kinds = {
        (each.A.shape, each.B.shape, each.dtype, each.A.device) for each in products
    }  # parts of a model may differ
    if len(products) < len(group) or len(kinds) > 1:
        return False
    A, B = (torch.cat([getattr(each, side) for each in products]) for side in ("A", "B"))
    try:
        with warnings.catch_warnings(), together():
            warnings.simplefilter("error", NumericalWarning)
            made = Kronecker(A, B).normalized(*shares, apart=True).inverse()
    except (NumericalError, NumericalWarning):
        return False
    for one, inputs, outputs in zip(group, _apart(made.A), _apart(made.B), strict=True):
        one.take(Kronecker(inputs, outputs, one.name, definite=True), step)
    return True


def _apart(stacked: Tensor) -> list[Tensor]:
    """One matrix each, in memory of its own, so that none holds on to the others'."""
    return [one.clone() for one in stacked.split(1)]
