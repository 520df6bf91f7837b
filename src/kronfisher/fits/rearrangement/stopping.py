"""Iterations that end at a tolerance, with the same answer on every device.

The host sees that an iteration is done where its numbers lie in its own memory. It would wait for any other device, so
there the remaining steps are made and discarded: what was done stays as it was.
"""

import torch
from torch import Tensor

__all__ = ["ended", "kept"]


def ended(done: Tensor) -> bool:
    """Whether the host sees that an iteration is done; never on a device that it would have to wait for."""
    return done.device.type == "cpu" and bool(done)


def kept(done: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """`old` where the iteration was done before this step, else `new`, without waiting.

    Args:
        done: whether it was, as `ended` was asked after the step before; on the CPU there is no step after that.
        old: from the step before.
        new: from this step.
    """
    return new if done.device.type == "cpu" else torch.where(done, old, new)
