"""The memory and passes that a fit needs for a group of blocks, by static cost."""

from dataclasses import dataclass

from kronfisher.linalg import WORKSPACE

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """Memory and passes for a group of blocks, known before any data are read.

    Attributes:
        bytes: size of the state and of the operator made from it.
        passes: times the data are read, at most.
        by_example: whether rows must be sorted by sample.
        workspace: bytes that temporaries may take.
        temporary: bytes of matrices that come and go while samples are taken in, beside those of `bytes`.
        waits: samples that may wait for more.
        waiting: bytes that they may take, at most.
        sample: bytes of the inputs and gradients of one example, about; known once there are data.
        budget: bytes that all matrices may take together; None: what is free.
    """

    bytes: int
    passes: int = 1
    by_example: bool = True
    workspace: int = WORKSPACE
    temporary: int = 0
    waits: int = 0
    waiting: int = 0
    sample: int = 0
    budget: int | None = None

    @property
    def standing(self) -> int:
        """Bytes that are taken from the first example to the last."""
        return self.bytes + min(self.waiting, self.waits * self.sample)

    @property
    def least(self) -> int:
        """Bytes that come and go with one example: itself, written out, and what is made of it.

        A fit that plans no bytes keeps an account of its own.
        """
        return self.temporary + 3 * self.sample if self.bytes else 0
