"""The largest factors that training keeps as matrices: those whose inverses cost a bounded number of passes."""

import math
from dataclasses import dataclass, replace
from typing import Any

from kronfisher.capture.capture import Capture
from kronfisher.fisher.blocks import Block
from kronfisher.fits import Fit
from kronfisher.fits.shapes import MAX_DIM
from kronfisher.optim.batch_figures import multiplications, sizes_of_weights

__all__ = ["CHOLESKY", "EIGENVECTORS", "Largest", "bounded", "kept_as_diagonals", "largest_factor"]

PASSES = 32  # forward and backward passes over a batch that one inverse may cost
ALWAYS = 1024  # a factor of this size is inverted within milliseconds
PASSES_OF_OUTPUTS, ALWAYS_OF_OUTPUTS = 0.25, 512  # the same of outputs: where rows are few, their diagonal is better
CHOLESKY = 1.5  # products as dear as inverting n × n, over n³, from measured speeds
EIGENVECTORS = 20.0  # the same of the eigenvectors of n × n


@dataclass(frozen=True)
class Largest:
    """The sizes beyond which factors are kept as their diagonals; `MAX_DIM` where no factor is that large.

    Attributes:
        factor: of any.
        outputs: of those of outputs.
    """

    factor: int = MAX_DIM
    outputs: int = MAX_DIM

    @classmethod
    def of(cls, saved: Any) -> "Largest":
        """From `state_dict`, or from the number that earlier versions saved; None: no batch told."""
        return cls(*saved) if isinstance(saved, list | tuple) else cls(saved or MAX_DIM)

    def state_dict(self) -> list[int]:
        """What `of` reads."""
        return [self.factor, self.outputs]


def largest_factor(capture: Capture) -> Largest:
    """The sizes beyond which factors cost more than `PASSES`, powers of two.

    Args:
        capture: of a forward pass over a batch, or over a part of it.
    """
    sizes = list(sizes_of_weights(capture))
    cost = sum(multiplications(rows, outputs, inputs) for rows, outputs, inputs, _ in sizes)
    inputs = [inputs for _, _, inputs, table in sizes if not table]  # a table's are no matrix
    outputs = [outputs for _, outputs, _, _ in sizes]
    most, most_outputs = _affordable(PASSES * cost, ALWAYS), _affordable(PASSES_OF_OUTPUTS * cost, ALWAYS_OF_OUTPUTS)
    largest, largest_outputs = (
        max((n for n in some if n <= MAX_DIM), default=0) for some in (inputs + outputs, outputs)
    )
    return Largest(most if largest > most else MAX_DIM, most_outputs if largest_outputs > most_outputs else MAX_DIM)


def _affordable(cost: float, always: int) -> int:
    """The largest size whose inverse takes so many multiplications, a power of two."""
    return max(always, 2 ** int(math.log2(max(cost / CHOLESKY, 1)) / 3))


def bounded(fit: Fit, largest: Largest) -> Fit:
    """The fit with larger factors kept as their diagonals, unless it has a bound of its own."""
    if not _has_none(fit):
        return fit
    if largest.factor < MAX_DIM:
        fit = replace(fit, max_dim=largest.factor)  # pyright: ignore[reportCallIssue]
    if largest.outputs < MAX_DIM and hasattr(fit, "max_outputs"):
        fit = replace(fit, max_outputs=largest.outputs)  # pyright: ignore[reportCallIssue]
    return fit


def kept_as_diagonals(block: Block, fit: Fit, largest: Largest) -> list[str]:
    """What to tell of factors beyond the largest of a block with this fit, as it was given."""
    if not _has_none(fit):
        return []
    most = min(largest.outputs, largest.factor) if hasattr(fit, "max_outputs") else largest.factor
    return [
        f"{block.name}: the {side} factor of size {size} is kept as its diagonal, because an inverse would cost more "
        f"than {PASSES if size > largest.factor else PASSES_OF_OUTPUTS} forward and backward passes over a batch; "
        f"fit=kf.{type(fit).__name__}(max_dim={size}) keeps it whole"
        for side, size, bound in zip(("output", "input"), block.shape[1:], (most, largest.factor), strict=True)
        if bound < size <= MAX_DIM and not (block.onehot and side == "input")
    ]


def _has_none(fit: Fit) -> bool:
    """Whether a fit could have a bound and was given none."""
    return getattr(fit, "max_dim", None) == MAX_DIM and getattr(fit, "max_outputs", None) is None
