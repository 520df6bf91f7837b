"""What was taken for the targets of a batch: named in reports, and doubted where it looks like a mask."""

import warnings
from typing import Any

from torch import Tensor

from kronfisher.capture.observation import Observation
from kronfisher.likelihoods import Categorical, Likelihood

__all__ = ["name_targets"]


CHANCE = 8  # fewer labels may all be ones by chance


def name_targets(observation: Observation, likelihood: Likelihood, *, needed: bool) -> str:
    """The targets of a batch in words, empty if there are none; warn where they are not needed and look like a mask."""
    targets = observation.targets
    if not needed and (doubt := _doubt(targets, likelihood)):
        warnings.warn(f"{observation.where}: {doubt}", stacklevel=7)
    if targets is None or not isinstance(targets, Tensor):
        return "" if targets is None else type(targets).__name__
    return f"{str(targets.dtype).removeprefix('torch.')} {list(targets.shape)} a batch"


def _doubt(targets: Any, likelihood: Likelihood) -> str:
    """Why targets are more likely a mask, where an estimate needs no targets; empty if they are not.

    Booleans are refused by every likelihood but that of binary targets.

    Args:
        targets: of a batch.
        likelihood: only class indices are doubted.
    """
    if not isinstance(likelihood, Categorical) or not isinstance(targets, Tensor) or targets.dim() < 2:
        return ""
    if targets.is_floating_point() or targets.numel() < CHANCE or not bool((targets == 1).all()):
        return ""
    return (
        "the second entry of the batch, all ones, is taken for its targets, which this estimate does not need. If it "
        "is a mask, pass batches ((inputs, mask),) if the model takes both, and mask=lambda batch: batch[0][1] to "
        "leave positions out."
    )
