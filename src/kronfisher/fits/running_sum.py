"""Sums of products that are carried from one piece of the samples to the next, and the product made of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from kronfisher.errors import NumericalError
from kronfisher.fits.rearrangement import norm, over, products, times, truncate
from kronfisher.fits.state import State
from kronfisher.layers.samples import Samples
from kronfisher.operators import Factor, Kronecker

__all__ = ["add_terms", "balance", "inner", "leading", "naming_errors", "pieces"]

_DOUBLE_STEPS = 1000  # after which a term smaller than the first by a hundredth has no share left


def leading(A: Tensor, B: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The positive semidefinite pair ``[H, I, I]``, ``[H, O, O]`` that leads a sum of orthogonal terms ``[R, H, ...]``.

    Double steps from the identity multiply the share of a term by its squared singular value. They end in the first
    term; where others are as large, in the one mixture of them that is positive semidefinite, and not in any other.
    """
    sizes = [torch.stack([norm(term) for term in factors]).double() for factors in (A, B)]
    sigma = sizes[0] * sizes[1]  # [R, H]
    traces = over(B.diagonal(dim1=-2, dim2=-1).sum(-1).double().flatten(), sizes[1].flatten()).view_as(sigma)
    share = traces * (sigma / sigma[0].clamp_min(torch.finfo(sigma.dtype).tiny)).clamp_max(1) ** _DOUBLE_STEPS
    share[0] = torch.where(share.abs().sum(0) > 0, share[0], 1)
    root = sigma[0].sqrt()
    pair = []
    for factors, size in zip((A, B), sizes, strict=True):
        weights = over(share.flatten(), size.flatten()).view_as(share)
        mixed = torch.einsum("rh,rhij->hij", weights.to(factors), factors)
        factor = Factor.of(times(over(mixed, norm(mixed)), root.to(factors)))
        pair.append(factor.nearest_semidefinite(name, rounded=True).tensor)
    return pair[0], pair[1]


@contextmanager
def naming_errors(state: State) -> Iterator[None]:
    """Decompositions that fail say of which block they were."""
    try:
        yield
    except (NumericalError, torch.linalg.LinAlgError) as error:  # pyright: ignore[reportPrivateImportUsage]
        state.check()
        raise NumericalError(
            f"{state.name}: products of its inputs and gradients are not finite though they are themselves; "
            "scale the loss down, look at the weights, or use float64."
        ) from error


def inner(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Tensor:
    """``⟨Σ B_r ⊗ A_r, Σ B'_s ⊗ A'_s⟩`` over all groups, in float64."""
    return (products(x[0], y[0]) * products(x[1], y[1])).sum()


def add_terms(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best sum of so many terms for two sums of A and B together, A and B, and the `inner` product of the two."""
    (A, B), (more_A, more_B) = x, y
    across = products(B, more_B), products(A, more_A)
    B, A, _ = truncate(B, A, terms, (more_B, more_A), across)
    return A, B, (across[0] * across[1]).sum()


def pieces(samples: list[Samples], size: int) -> Iterator[list[Samples]]:
    """Samples in their order, in pieces of about `size`."""
    total = sum(map(len, samples))
    number = max(1, round(total / size))
    edges = [round(total * k / number) for k in range(number + 1)]
    for low, high in pairwise(edges):
        piece, offset = [], 0
        for use in samples:
            begin, end = max(low - offset, 0), min(high - offset, len(use))
            if begin < end:
                piece.append(use if end - begin == len(use) else use.part(begin, end))
            offset += len(use)
        yield piece


def balance(A: Tensor, B: Tensor, scale: float | Tensor, name: str) -> Kronecker:
    """``scale · B ⊗ A`` with ``tr A / I = tr B / O``, as every damping rule wants it; reads upper triangles."""

    def mean(factor: Tensor) -> Tensor:
        return Factor.of(factor).diagonal().mean(-1).clamp_min(0)

    left, right = mean(B) * scale, mean(A)
    some = (left > 0) & (right > 0)
    ratio = torch.where(some, left, 1).sqrt() / torch.where(some, right, 1).sqrt()
    inverse = scale / ratio
    return Kronecker(Factor.of(A).mirror(ratio).tensor, Factor.of(B).mirror(inverse).tensor, name=name)
