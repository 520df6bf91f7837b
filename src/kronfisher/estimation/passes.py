"""Reading the data as often as a fit needs, and remembering how an estimate was asked for."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kronfisher.capture.batches import checksum, passes_over
from kronfisher.capture.isolation import isolated
from kronfisher.errors import DataError
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.linalg import plain_arithmetic

__all__ = [
    "Progress",
    "accumulate",
]

Progress = bool | Callable[[str], None]


def accumulate(run: Accumulator, data: Any, progress: Progress = False) -> None:
    """Read the data as often as the fits need and fill their states.

    Raises:
        DataError: there are no data, they cannot be read again, or they came in another order.
    """
    batches, again = passes_over(data)
    tell = run.tell = _teller(progress)
    sums: dict[int, Tensor] = {}
    number = index = count = 0
    try:
        while True:
            run.start_pass()
            with isolated(run.model, run.seed):
                index = 0
                for index, batch in enumerate(_read(batches, number), 1):
                    where = f"batch {index - 1}" + (f" of pass {number + 1}" if number else "")
                    run.add(batch, where)
                    if run.passes > 1:
                        _compare(sums, index - 1, batch, number, again)
                    tell(f"pass {number + 1}/{run.passes}, {index} batches, {run.backward_passes} backward passes")
            if number and index != count:
                raise DataError(f"Pass {number + 1} read {index} batches, the first one {count}. {_SAME}")
            if not index:
                raise DataError(
                    "The data hold no batch. Pass a loader with at least one batch; a generator can be read only once."
                )
            if not float(run.count):
                raise DataError("No datum counts: all positions are masked, or have the target that is ignored.")
            with plain_arithmetic(run.device):
                more = run.next_pass()
            if not more:
                break
            count, number = index, number + 1
    except BaseException as error:
        if not isinstance(error, Exception):  # interrupted from outside
            error.add_note(
                f"kronfisher stopped after {index} batches of pass {number + 1}; no estimate was made. The model, its "
                "gradients and buffers and the random state are as before. Estimate on fewer data, or with a cheaper "
                "fit."
            )
        raise
    finally:
        tell("")


_SAME = (
    "A fit that reads the data several times needs the same batches in the same order (a loader that shuffles with "
    "the global generators has it, one with a generator of its own has not): fix the loader's order, or pass a list."
)


def _read(batches: Iterable[Any], number: int) -> Iterator[Any]:
    try:
        yield from batches
    except Exception as error:
        error.add_note(f"while the loader was read in pass {number + 1}")
        raise


def _compare(sums: dict[int, Tensor], index: int, batch: Any, number: int, again: bool) -> None:
    """Remember a batch in the first pass, recognise it later."""
    if not again:
        raise DataError(
            "This fit reads the data more than once, and a generator can be read only once. "
            "Pass a list or a DataLoader."
        )
    found = checksum(batch)
    if number == 0:
        sums[index] = found
    elif index in sums and not torch.equal(found, sums[index]):
        raise DataError(f"batch {index} of pass {number + 1} is not the one of the first pass. {_SAME}")


def _teller(progress: Progress) -> Callable[[str], None]:
    if callable(progress):
        return progress
    if not progress:
        return lambda text: None
    return lambda text: print(f"\r{text:<78}" if text else "", end="" if text else "\n", file=sys.stderr, flush=True)
