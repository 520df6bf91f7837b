"""Blocks beside the layers: no vector of parameters that are added or multiplied may cost more than the network."""

from collections.abc import Container, Iterable, Mapping
from math import prod

from torch import nn

from kronfisher.capture.observation import Observation
from kronfisher.capture.parts import Part
from kronfisher.estimation.groups import Fits
from kronfisher.fisher.blocks import Key

__all__ = ["dear_blocks"]

_SMALL = 64  # numbers whose dense factor costs no more than calling a few operators does
_SHARE = 0.25  # of a forward and backward pass over the data, for what an estimate makes of them once
_FACTORISING = 4  # multiplications and additions for each cube of a dense factor's width


def dear_blocks(
    observation: Observation,
    parts: Mapping[int, list[Part]],
    new: Container[Key],
    fits: Fits,
    batches: int,
) -> dict[str, str]:
    """Parameter that is to have a diagonal only → why, with the price of its dense factor.

    These are vectors and tables that are multiplied or added elementwise, so that the dense factor is all of their
    block. What a renewal of it takes (products of all samples and one factorisation) is compared with a pass over the
    data, its memory with that of all parameters. Prices are counted, never measured.

    Args:
        observation: of a batch.
        parts: index of a call → its blocks.
        new: keys of the blocks that no batch before it used.
        fits: which fit treats which block, and which parameters were given theirs by name.
        batches: in a pass over the data; in training one, because each renewal has one.
    """
    wide = [part for part in _side_parts(parts) if part.block.shape[1] > _SMALL and part.block.key in new]
    if not wide:
        return {}
    passed = batches * _forward_backward(observation, parts)
    numbers = _numbers(observation.model)
    share, whole = (1.0, "of the batch") if fits.training else (_SHARE, "over the data")
    found = {}
    for part in wide:
        name, width = part.block.parameters[0], part.block.shape[1]
        if name in fits.asked or fits.of(part.block).exact:
            continue
        work = batches * len(observation) * width**2 + _FACTORISING * width**3
        if work > share * passed:
            price = f"takes {work:.1e} operations, and a forward and backward pass {whole} {passed:.1e}"
        elif width**2 > numbers:
            price = f"holds {width**2:,} numbers, and all parameters together {numbers:,}"
        else:
            continue
        found[name] = (
            f"{name}: diagonal, because a dense factor of {width:,} rows {price}; "
            f"fit={{{name!r}: 'kfac', '*': ...}} keeps it in full"
        )
    return found


def _side_parts(parts: Mapping[int, list[Part]]) -> Iterable[Part]:
    return (part for own in parts.values() for part in own if part.use.summing and part.block.weight is None)


def _forward_backward(observation: Observation, parts: Mapping[int, list[Part]]) -> float:
    """Multiplications and additions of the captured products, forward and twice as many backward."""
    products = sum(
        prod(observation.calls[index].shape) * (1 if part.use.onehot else part.block.shape[2])
        for index, own in parts.items()
        for part in own
    )
    return 6.0 * products


def _numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
