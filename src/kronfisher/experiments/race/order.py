"""The order of the training data: decided by a seed, the same for every optimiser."""

import torch
from torch import Tensor

from kronfisher.experiments.data.dataset import generator

__all__ = ["Order"]


class Order:
    """Passes over `number` data, each in another order, cut into batches of any sizes.

    The rest of a pass that is too small for a batch is left out. Where the order is, is two numbers, so that a race can
    be resumed.

    Attributes:
        epoch: the number of the pass, from 0.
        start: data of this pass already taken.

    Example:
        >>> order = Order(10, seed=0)
        >>> sorted(torch.cat([order.take(5), order.take(5)]).tolist()) == list(range(10)), order.passes
        (True, 1.0)
    """

    def __init__(self, number: int, seed: int) -> None:
        self.number, self.seed, self.epoch, self.start = number, seed, 0, 0
        self._made, self._permutation = -1, torch.empty(0, dtype=torch.long)

    @property
    def passes(self) -> float:
        """Passes made so far."""
        return self.epoch + self.start / self.number

    def take(self, size: int) -> Tensor:
        """The indices of the next batch."""
        if self.start + size > self.number and self.start > 0:
            self.epoch, self.start = self.epoch + 1, 0
        if self._made != self.epoch:
            self._permutation = torch.randperm(self.number, generator=generator(self.seed, 100 + self.epoch))
            self._made = self.epoch
        indices = self._permutation[self.start : self.start + size]
        self.start += len(indices)
        return indices
