"""The samples of a first pass, kept where they are few, so that later passes need no model.

A fit of several passes gets the same samples in each of them. Where those of all layers take next to no memory, running
the model again would be most of what a later pass costs: its batches are read and recognised, and what they brought
before is passed on once more. A model that draws random numbers is run again: its loader may draw from the same
generator.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor

from kronfisher.estimation.groups import Group
from kronfisher.layers.activations import Activations
from kronfisher.layers.samples import Samples

__all__ = ["Kept"]

ROOM = 2**22  # bytes of all samples


@dataclass
class _Batch:
    """What one batch brought: its size, and what was passed on in its order; the inputs of all columns are one copy."""

    count: float | Tensor = 0.0
    updates: list[tuple[Group, tuple[Samples, ...]]] = field(default_factory=list)


class Kept:
    """What a pass brought, or nothing once that is more than there is room for.

    Args:
        batches: how many there are, as far as that is known.

    Attributes:
        whole: whether nothing had to be left out.
        score: the log likelihood of all batches, and the number of outputs that it covers.
    """

    score: tuple[Tensor | None, int] = None, 0

    def __init__(self, batches: int) -> None:
        self._number, self._bytes, self.whole = batches, 0, True
        self._batches: list[_Batch] = []
        self._copies: dict[int, tuple[Activations, Activations]] = {}  # id of inputs of this batch → they, their copy

    def begin(self, plain: bool) -> None:
        """A batch begins.

        Args:
            plain: the model drew no random numbers, and left its inputs alone: what a loader brings next does not
                depend on its having run.
        """
        self._copies = {}
        if not plain:
            self._drop()
        if self.whole:
            self._batches.append(_Batch())

    def note(self, group: Group, samples: tuple[Samples, ...]) -> None:
        """Keep a copy of what a group is given."""
        if not self.whole:
            return
        for use in samples:
            again = id(use.activations) in self._copies
            self._bytes += use.gradients.nbytes if again else use.bytes
        if self._bytes * (self._number if len(self._batches) == 1 else 1) > ROOM:
            return self._drop()
        self._batches[-1].updates.append((group, tuple(map(self._copy, samples))))

    def end(self, count: float | Tensor) -> None:
        """The batch with so many examples ends."""
        if self.whole:
            self._batches[-1].count = count

    def pass_on(self) -> Iterator[float | Tensor]:
        """Give what the batches brought to those groups that still read data; the number of examples of each batch."""
        for batch in self._batches:
            for group, samples in batch.updates:
                if not group.done:
                    began = time.perf_counter()
                    group.state = group.fit.update(group.state, samples)
                    group.seconds += time.perf_counter() - began
            yield batch.count

    def _drop(self) -> None:
        self.whole, self._batches, self._copies = False, [], {}

    def _copy(self, samples: Samples) -> Samples:
        """A copy in memory of its own; fits tell by the inputs that columns are of the same examples."""
        copy, key = None, id(samples.activations)
        if key in self._copies:
            copy = self._copies[key][1]
        else:
            copy = samples.activations.copy()
            self._copies[key] = samples.activations, copy
        mask = None if samples.mask is None else samples.mask.clone()
        return replace(samples, activations=copy, gradients=samples.gradients.clone(), mask=mask, shared=None)
