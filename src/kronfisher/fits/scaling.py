"""Samples of an ordinary scale, for what does not depend on it and would leave the range of numbers."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from math import frexp

import torch
from torch import Tensor

from kronfisher.errors import NumericalWarning
from kronfisher.fits.columns import spread
from kronfisher.layers.samples import Samples

__all__ = ["level", "moderate", "tell_vanished"]


def moderate(samples: Sequence[Samples]) -> list[Samples]:
    """The same samples times a power of two, the same for all, so that largest inputs and gradients are about one.

    Powers of squares, as in norms of blocks, leave the range of numbers long before the samples do. A power of two
    changes no digit. Zeros stay.
    """
    left, right = (2.0**-size for size in _exponents(samples))
    return _scale(samples, left, right)


def level(samples: Sequence[Samples]) -> list[Samples]:
    """The same gradients of samples from inputs and output gradients of one size: ``g aᵀ = (s g)(a/s)ᵀ``.

    Where inputs are as small as output gradients are large, or the other way round, squares of either leave the range
    of numbers though their products are ordinary.
    """
    gradients, inputs = _exponents(samples)
    shift = (inputs - gradients) // 2
    return _scale(samples, 2.0**shift, 2.0**-shift)


def tell_vanished(samples: Sequence[Samples], name: str) -> None:
    """For samples whose matrix came out as zero: a NumericalWarning, unless all of their gradients are zero, too.

    Squares of gradients and inputs leave the range of numbers before these do. A warning and no error, as the matrix
    plus any λ of an ordinary size is right, and one saturated layer is to stop neither an estimate nor training.
    """
    largest = [(_by_sample(use.gradients), _by_sample(use.activations.dense())) for use in spread(list(samples))]
    some = [(g[both].max(), a[both].max()) for g, a in largest if bool((both := (g > 0) & (a > 0)).any())]
    if some:
        gradients, inputs = (max(map(float, sizes)) for sizes in zip(*some, strict=True))
        warnings.warn(
            f"{name}: its gradients are {gradients:.0e} at most and its inputs {inputs:.0e}, so that squares of their "
            f"products vanish in {samples[0].gradients.dtype}: they count as zero. Scale inputs or the loss up, or use "
            "float64.",
            NumericalWarning,
            stacklevel=2,
        )


def _by_sample(numbers: Tensor) -> Tensor:
    """The largest number of every sample, ``[n]`` of ``[H, n, T, D]``."""
    return numbers.abs().amax((0, 2, 3)) if numbers.numel() else numbers.new_zeros(numbers.shape[1])


def _scale(samples: Sequence[Samples], left: float, right: float) -> list[Samples]:
    """Output gradients times one number, inputs times another."""
    return [
        replace(
            use,
            gradients=use.gradients * left,
            activations=use.activations if right == 1 else use.activations.scale(_line(use, right)),
        )
        for use in samples
    ]


def _line(use: Samples, value: float) -> Tensor:
    """``[H, I]``."""
    return use.gradients.new_full((use.shape[0], use.shape[2]), value)


def _largest(numbers: Tensor) -> float:
    return float(torch.stack(numbers.aminmax()).abs().max())


def _exponents(samples: Sequence[Samples]) -> tuple[int, int]:
    """Of the powers of two that the largest output gradients and inputs are; zero where there are none."""
    some = [use for use in samples if use.gradients.numel()]
    gradients = max((_largest(use.gradients) for use in some), default=0.0)
    inputs = max((_largest(use.activations.dense()) for use in some if not use.activations.onehot), default=0.0)
    return frexp(gradients)[1], frexp(inputs)[1]
