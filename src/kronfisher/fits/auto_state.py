"""The state of `Auto`: samples that are kept until a fit is chosen, then the state of that fit."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from kronfisher.fits.state import State, WaitingState
from kronfisher.fits.trial import Trial
from kronfisher.layers.samples import Samples

__all__ = ["Chosen"]

_GOLDEN = 0.6180339887498949


@dataclass(kw_only=True)
class Chosen(WaitingState):
    """Samples kept while there is no choice yet, then the state of the fit that was chosen.

    Attributes:
        nothing: a tensor without elements, of the dtype and device of the sums.
        inner: the state of the fit that was chosen.
        choice: its place in `Auto.candidates`.
        trials: of all candidates that were tried, in their order.
        kept: how many samples they were tried on.
        uses: how many backward passes brought samples.
        seen: how many samples there were.
        stride: of how many samples one is kept.
    """

    nothing: Tensor
    inner: State | None = None
    choice: int | None = None
    trials: tuple[Trial, ...] = ()
    kept: int = 0
    uses: int = 0
    seen: int = 0
    stride: int = 1

    @property
    def sums(self) -> dict[str, Tensor]:
        """Those of the fit that was chosen."""
        return {} if self.inner is None else self.inner.sums

    def check(self) -> Self:
        """Itself, if every sum of the fit that was chosen is finite; NumericalError otherwise."""
        if self.inner is not None:
            self.inner.check()
        return self

    def order_batches(self) -> None:
        """Those of the fit that was chosen, too."""
        super().order_batches()
        if isinstance(self.inner, WaitingState):
            self.inner.order_batches()

    def release(self) -> None:
        """Let go of the samples and of the sums of the fit that was chosen."""
        super().release()
        if self.inner is not None:
            self.inner.release()

    @property
    def chosen(self) -> State:
        """The state of the fit that was chosen, which knows the number of examples that this one was told."""
        assert self.inner is not None
        self.inner.count = self.count
        return self.inner

    def keep(self, use: Samples, most: int) -> None:
        """Keep some of the samples of a backward pass, so that no more than so many are kept, evenly spread."""
        self.uses += 1
        self.seen += len(use)
        begin = int(self.uses * _GOLDEN % 1 * self.stride)  # no period of the batches meets that of the stride
        if begin < len(use):
            part = use if self.stride == 1 else _every(use, begin, self.stride)
            self.waiting.append(replace(part, first=True).copy())
        self.thin(most)

    def joined(self, other: "Chosen") -> "Chosen":
        """The samples that are kept of both, of as many one; those of `other` after those of this one."""
        stride = max(self.stride, other.stride)
        waiting = [
            use if state.stride == stride else _every(use, 0, stride // state.stride)
            for state in (self, other)
            for use in state.waiting
        ]
        return replace(
            self,
            waiting=waiting,
            count=self.count + other.count,
            rows=self.rows + other.rows,
            uses=self.uses + other.uses,
            seen=self.seen + other.seen,
            stride=stride,
        )

    def thin(self, most: int) -> None:
        """Keep fewer samples, half as many each time, until they are no more than so many."""
        while sum(map(len, self.waiting)) > most:
            self.stride *= 2
            begins = [int(place * _GOLDEN % 1 * 2) for place in range(len(self.waiting))]
            pairs = zip(self.waiting, begins, strict=True)
            self.waiting = [_every(part, begin, 2) for part, begin in pairs if begin < len(part)]


def _every(samples: Samples, begin: int, stride: int) -> Samples:
    return samples.select(torch.arange(begin, len(samples), stride, device=samples.gradients.device))
