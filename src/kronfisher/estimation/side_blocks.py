"""Blocks beside the layers, and tables: no dense factor of theirs may cost more than the network."""

from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from math import prod

from torch import nn

from kronfisher.capture.observation import Observation
from kronfisher.capture.parts import Part
from kronfisher.estimation.groups import Fits
from kronfisher.fisher.blocks import Block, Key

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
    block, and tables whose rows are summed in bags, whose inputs have a dense factor. What a renewal of it takes
    (products of all samples and one factorisation) is compared with a pass over the data, its memory with that of all
    parameters. Prices are counted, never measured.

    Args:
        observation: of a batch.
        parts: index of a call → its blocks.
        new: keys of the blocks that no batch before it used.
        fits: which fit treats which block, and which parameters were given theirs by name.
        batches: in a pass over the data; in training one, because each renewal has one.
    """
    wide = [(part, rows) for part, rows in _side_parts(observation, parts, fits) if part.block.key in new]
    if not wide:
        return {}
    passed = batches * _forward_backward(observation, parts)
    numbers = _numbers(observation.model)
    share, whole = (1.0, "of the batch") if fits.training else (_SHARE, "over the data")
    found = {}
    for part, rows in wide:
        table = part.block.weight is not None
        name, width = part.block.parameters[0], part.block.shape[2 if table else 1]
        if width <= _SMALL or name in fits.asked or fits.of(part.block).exact:
            continue
        work = batches * rows * width**2 + _FACTORISING * width**3
        if work > share * passed:
            price = f"takes {work:.1e} operations, and a forward and backward pass {whole} {passed:.1e}"
        elif width**2 > numbers:
            price = f"holds {width**2:,} numbers, and all parameters together {numbers:,}"
        else:
            continue
        form = "entries of a bag count one by one" if table else "diagonal"
        found[name] = (
            f"{name}: {form}, because a dense factor of {width:,} rows {price}; "
            f"fit={{{name!r}: 'kfac', '*': ...}} keeps it in full"
        )
    return found


def _side_parts(observation: Observation, parts: Mapping[int, list[Part]], fits: Fits) -> Iterator[tuple[Part, int]]:
    """Parts whose dense factor is in question, with the vectors in a batch that enter it."""
    for index, own in parts.items():
        for part in own:
            if part.block.weight is None and part.use.summing:
                yield part, len(observation)
            elif not part.block.onehot and part.use.entries_apart() is not None and _saves(fits, part.block):
                yield part, prod(observation.calls[index].shape) // part.block.shape[1]


def _saves(fits: Fits, block: Block) -> bool:
    """Whether the fit's matrices are smaller where the inputs have a diagonal factor."""
    fit = fits.of(block)
    return not fit.exact and fit.plan((replace(block, onehot=True),), 1).bytes < fit.plan((block,), 1).bytes


def _forward_backward(observation: Observation, parts: Mapping[int, list[Part]]) -> float:
    """Multiplications and additions of the captured products, forward and twice as many backward."""
    products = sum(
        prod(observation.calls[index].shape) * (1 if part.use.looked_up else part.block.shape[2])
        for index, own in parts.items()
        for part in own
    )
    return 6.0 * products


def _numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
