"""Random numbers for Monte-Carlo labels: their own generator, and the same numbers in batches of any size."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Draws:
    """A sequence of random numbers that belongs to one pass over the data.

    Numbers are drawn on the CPU in float64, one after the other, so that an example gets the same ones on every device,
    in every precision and in batches of any size. Nothing of the global generators is read or changed. A second pass
    over the same data starts a new `Draws` with the same `seed` and `stream` and sees the same labels again.

    Args:
        seed: Any integer.
        stream: Number of the Monte-Carlo draw per example, 0 … M-1; the streams of one seed are all different.

    Examples:
        >>> whole = Draws(seed=7).uniform([10, 3])
        >>> parts = Draws(seed=7)
        >>> torch.equal(whole, torch.cat([parts.uniform([4, 3]), parts.uniform([6, 3])]))
        True
    """

    def __init__(self, seed: int, stream: int = 0):
        self.seed, self.stream = seed, stream
        # numpy's generator takes a tenth of the time of torch's on the CPU, and all bits of its seed count.
        key = np.random.SeedSequence(seed % 2**64, spawn_key=(stream,))
        self._generator = np.random.Generator(np.random.PCG64(key))

    def __repr__(self) -> str:
        return f"Draws(seed={self.seed}, stream={self.stream})"

    def uniform(
        self,
        shape: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Uniform numbers strictly between 0 and 1: their logarithm is finite, and so is erfinv of 2u - 1.

        Args:
            shape: `[n, ...]`, examples first.
            device: Where the answer is wanted.
            dtype: Floating type of the answer.

        Returns:
            A tensor of that shape, the next numbers of the sequence.
        """
        numbers = torch.from_numpy(self._generator.random(tuple(shape))).to(dtype)
        eps = torch.finfo(dtype).eps
        return numbers.clamp_(eps / 4, 1 - eps / 2).to(device, non_blocking=True)

    def normal(
        self,
        shape: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Standard normal numbers, one uniform number each (torch's own sampler depends on the size of the request).

        Args:
            shape: `[n, ...]`, examples first.
            device: Where the answer is wanted.
            dtype: Floating type of the answer.

        Returns:
            A tensor of that shape, the next numbers of the sequence.
        """
        numbers = torch.erfinv(2 * self.uniform(shape) - 1) * 2**0.5
        return numbers.to(dtype).to(device, non_blocking=True)
