"""Iterations that end at a tolerance, with the same answer on every device.

A double step shrinks what is wrong of A by (σ₂/σ₁)² in the end. Where that is little, the step that would only show
that nothing changes any more is half of the work, so that those before it tell.

The host sees that an iteration is done where its numbers lie in its own memory. It would wait for any other device, so
there the remaining steps are made and discarded: what was done stays as it was.
"""

import torch
from torch import Tensor

__all__ = ["ended", "expected", "kept"]

_LEAST = 0.1  # (σ₂/σ₁)² of a factor in trained networks, about; the first steps from a poor start shrink more


def expected(before: Tensor, change: Tensor) -> Tensor:
    """About how much another step will change, as the last two tell; the last change where there was only one.

    The share is the root of what the last step shrank by, because the first steps shrink the most.

    Args:
        before: what the step before the last one changed; infinite where there was none.
        change: what the last one changed.

    Example:
        >>> expected(torch.tensor(1.0), torch.tensor(0.04))
        tensor(0.0080)
        >>> expected(torch.tensor(torch.inf), torch.tensor(0.04))
        tensor(0.0400)
    """
    share = (change / before.clamp_min(torch.finfo(change.dtype).tiny)).sqrt().clamp(_LEAST, 1.0)
    return change * torch.where(torch.isfinite(before), share, 1)


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
