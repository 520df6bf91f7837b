"""The largest factor that training keeps as a matrix: one whose inverse costs a bounded number of passes."""

import math
from collections.abc import Iterable
from dataclasses import replace

from kronfisher.capture.capture import Capture
from kronfisher.fisher.blocks import Block
from kronfisher.fits import Fit
from kronfisher.fits.shapes import MAX_DIM
from kronfisher.optim.batch_figures import multiplications, sizes_of_weights

__all__ = ["CHOLESKY", "bounded", "kept_as_diagonals", "largest_factor"]

PASSES = 32  # forward and backward passes over a batch that one inverse may cost
ALWAYS = 1024  # a factor of this size is inverted within milliseconds
CHOLESKY = 1.5  # products as dear as inverting n × n, over n³, from measured speeds


def largest_factor(capture: Capture) -> int:
    """The size beyond which a factor costs more than `PASSES`, a power of two; `MAX_DIM` if none of them does.

    Args:
        capture: of a forward pass over a batch, or over a part of it.
    """
    sizes = list(sizes_of_weights(capture))
    cost = sum(multiplications(rows, outputs, inputs) for rows, outputs, inputs, _ in sizes)
    most = max(ALWAYS, 2 ** int(math.log2(max(PASSES * cost / CHOLESKY, 1)) / 3))
    sides = [(outputs,) if table else (outputs, inputs) for _, outputs, inputs, table in sizes]  # a table's has none
    there = [size for both in sides for size in both if size <= MAX_DIM]
    return most if max(there, default=0) > most else MAX_DIM


def bounded(fit: Fit, largest: int) -> Fit:
    """The fit with larger factors kept as their diagonals, unless it has a bound of its own."""
    if largest < MAX_DIM == getattr(fit, "max_dim", None):
        return replace(fit, max_dim=largest)  # pyright: ignore[reportCallIssue]
    return fit


def kept_as_diagonals(blocks: Iterable[Block], fit: str, largest: int) -> list[str]:
    """What to tell of factors beyond the largest."""
    return [
        f"{block.name}: the factor of size {size} is kept as its diagonal, because an inverse would cost more than "
        f"{PASSES} forward and backward passes over a batch; fit=kf.{fit}(max_dim={size}) keeps it whole"
        for block in blocks
        for size in block.shape[1:]
        if largest < size <= MAX_DIM and not block.onehot
    ]
