"""Half steps for one position per sample: by weights of the samples, or in their span by Gram matrices."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kronfisher.fits.rearrangement.pairs import (
    packed,
    packs,
    square,
    squares_of_columns,
    sum_over_pairs,
    sum_products,
)
from kronfisher.fits.rearrangement.rearranged import Rearranged, mixture
from kronfisher.fits.rearrangement.scales import over, power_of_two, reciprocal, times
from kronfisher.fits.rearrangement.source import Pair
from kronfisher.fits.rearrangement.stopping import ended, expected, kept
from kronfisher.layers.activations import Activations, Dense
from kronfisher.layers.samples import Samples
from kronfisher.linalg import add_symmetric_product_, complete_, eigh, mirror

__all__ = ["PAIR", "Gram", "Weights"]

_STEPS = 2  # double steps from noise to other terms
PAIR = 5  # half steps that the leading pair takes, about: its certificate may take as long
_NARROW = 96  # numbers a row up to which the sums of several terms are one product


class Weights(Rearranged):
    """T = 1, by the weights ``a_kᵀ A a_k`` and ``g_kᵀ B g_k`` of the samples.

    Args:
        samples: with one position each, or columns of the same examples (`kronfisher.fits.columns`).

    Attributes:
        activations: a ``[H, n, 1, I]``.
        columns: C, the number of output gradients for each input.
        g: ``[H, n·C, O]``, those of one input after the other; zero where an input has fewer.
    """

    def __init__(self, samples: Sequence[Samples]) -> None:
        self.activations = Activations.append([use.activations for use in samples])
        self.columns = max(use.columns for use in samples)
        self.g = torch.cat([_rows(use.gradients, self.columns) for use in samples], dim=1)
        self.shape = samples[0].shape

    @cached_property
    def a(self) -> Tensor:
        """Inputs ``[H, n, I]``, written out once for all half steps."""
        return self.activations.dense()[:, :, 0]

    def like(self) -> Tensor:
        return self.g

    def leading(self, start: Tensor | None = None, tolerance: float = 1e-3, iterations: int = 50) -> Pair:
        ordinary, scale = self._ordinary()
        pair = super(Weights, ordinary).leading(start, tolerance, iterations)
        return replace(pair, sigma=pair.sigma * scale.square())

    def leading_terms(
        self, rank: int, before: Tensor | None = None, tolerance: float = 1e-3, iterations: int = 50
    ) -> tuple[Pair, Tensor, Tensor]:
        ordinary, scale = self._ordinary()
        pair, A, B = super(Weights, ordinary).leading_terms(rank, before, tolerance, iterations)
        pair, each = replace(pair, sigma=pair.sigma * scale.square()), scale[:, None, None]
        return pair, A * each, B * each

    def _ordinary(self) -> "tuple[Weights, Tensor]":
        """The same with small inputs and gradients brought to about one, and what the ``G_k [H]`` are divided by.

        Squares of small ones would vanish before factors do.
        """
        one, sizes = copy(self), [power_of_two(rows.abs().amax((1, 2))).clamp(max=1) for rows in (self.a, self.g)]
        one.a, one.g = (over(rows, size) for rows, size in zip((self.a, self.g), sizes, strict=True))
        return one, sizes[0] * sizes[1]

    def outputs(self, A: Tensor, odd: bool = False) -> Tensor:
        return _weighted_sum(self.g, self._spread(torch.linalg.vecdot(torch.bmm(self.a, A), self.a)))

    def outputs_of_identity(self) -> Tensor:
        return _weighted_sum(self.g, self._spread(torch.linalg.vecdot(self.a, self.a)))

    def inputs(self, B: Tensor, odd: bool = False) -> Tensor:
        weights = torch.linalg.vecdot(torch.bmm(self.g, B), self.g)
        return _weighted_sum(self.a, weights if self.columns == 1 else weights.unflatten(1, (-1, self.columns)).sum(2))

    def _spread(self, weights: Tensor) -> Tensor:
        """``[H, n]`` for every column: ``[H, n·C]``."""
        return weights if self.columns == 1 else weights.repeat_interleave(self.columns, dim=1)

    def squared_norm(self, samples: Sequence[Samples], limit: int) -> Tensor | None:
        groups, outputs, width = self.shape
        pairs = outputs if self.columns == 1 else min(outputs * (outputs + 1) // 2, self.columns**2 * outputs)
        n = self.g.shape[1] // self.columns
        half_steps = PAIR * n * groups * (width**2 + self.columns * outputs**2)
        if n**2 * groups * (pairs + width) > max(limit, 2 * half_steps):  # from the diagonal on: half of them are made
            return None
        same, pairs = self.squared_products()
        return same + pairs

    def squared_products(self) -> tuple[Tensor, Tensor]:
        """``Σ_k ‖G_k‖⁴`` and ``Σ_{k≠l} ⟨G_k, G_l⟩²`` (over all groups together), in float64.

        Where columns share inputs the first takes in the products of the columns of one input with each other.
        """
        triangles = self.columns > 1 and packs(self.g, self.columns)
        if self.columns > 1 and not triangles:  # of one group
            return sum_products(square(self.activations.products()), squares_of_columns(self.g, self.columns))
        both = self.a, self.g
        lengths = [power_of_two(torch.linalg.vector_norm(rows, dim=-1).amax()) for rows in both]
        a, g = (rows / length for rows, length in zip(both, lengths, strict=True))  # no square vanishes
        same, every = sum_over_pairs(a, *(packed(g, self.columns) if triangles else (g, None)))
        scale = (lengths[0].double() * lengths[1].double()).square().square()
        return same * scale, (every - same) * scale


def _weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """``Σ_k w_k x_k x_kᵀ [H, D, D]`` for rows ``[H, n, D]`` and weights ``[H, n]`` of any sign."""
    total = rows.new_zeros(len(rows), rows.shape[-1], rows.shape[-1])
    return complete_(add_symmetric_product_(total, rows, rows * weights[..., None]))


def _weighted_sums(rows: Tensor, weights: Tensor) -> Tensor:
    """The same for R weights of each ``[H, n, R]``: ``[R, H, D, D]``."""
    if rows.shape[-1] > _NARROW:
        totals = rows.new_zeros(weights.shape[-1], len(rows), *2 * rows.shape[2:])
        for total, each in zip(totals, weights.unbind(-1), strict=True):
            complete_(add_symmetric_product_(total, rows, rows * each[..., None]))
        return totals
    side_by_side = (rows.unsqueeze(2) * weights.unsqueeze(3)).flatten(2)  # one product for all
    return (rows.mT @ side_by_side).unflatten(2, (-1, rows.shape[-1])).permute(2, 0, 1, 3).contiguous()


class Gram(Weights):
    """T = 1, with n no larger than a few times the layer: the pair is found in the span of the samples.

    ``A = aᵀ diag(w) a`` and ``B = gᵀ diag(u) g`` with ``u = K_a w``, ``w = K_g u``, where ``K_a = (a aᵀ)∘²`` and
    ``K_g = (g gᵀ)∘²``: n² a half step, and one product for each factor at the end.

    Attributes:
        inputs_gram: K_a ``[H, n, n]``, the largest entry about one.
        outputs_gram: K_g ``[H, n, n]``, likewise.
    """

    starts = False
    orthogonal = True

    def __init__(self, samples: Sequence[Samples]) -> None:
        super().__init__(samples)
        self.inputs_gram, self._a_scale = square(self.activations.products())
        self.outputs_gram, self._g_scale = (
            square(Dense(self.g.unsqueeze(2)).products())
            if self.columns == 1
            else squares_of_columns(self.g, self.columns)
        )

    def weights(self, tolerance: float = 1e-3, iterations: int = 50) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The pair as weights of the samples: w and u ``[H, n]`` with A and B of norm one, σ, steps and change."""
        Ka, Kg = self.inputs_gram, self.outputs_gram
        w = old = mapped = torch.zeros_like(Ka[:, 0])
        v = Ka.diagonal(dim1=-2, dim2=-1).sqrt()  # ‖a_k‖²: A is the identity
        u, sigma = w, w.new_zeros(len(w))
        steps, change = w.new_zeros((), dtype=torch.int64), w.new_full((), torch.inf)
        last, done = change, change <= tolerance
        for _ in range(max(iterations, 1)):
            new = _multiply(Kg, v)
            inverse = reciprocal(torch.linalg.vecdot(v, new).sqrt())[:, None]
            u, w = kept(done, u, v * inverse), new * inverse
            v = _multiply(Ka, w)
            size = torch.linalg.vecdot(w, v).sqrt()
            inverse = reciprocal(size)[:, None]
            w, v = kept(done, old, w * inverse), kept(done, mapped, v * inverse)
            steps, sigma = steps + ~done, kept(done, sigma, size)
            before, last = last, torch.linalg.vecdot(w - old, v - mapped).clamp_min(0).sqrt().max()
            change = kept(done, change, expected(before, last))
            old, mapped, done = w, v, change <= tolerance
            if ended(done):
                break
        scale = self._a_scale * self._g_scale
        return over(w, self._a_scale), over(u, self._g_scale), sigma * scale, steps, change

    def squared_products(self) -> tuple[Tensor, Tensor]:
        if len(self.g) > 1:
            return super().squared_products()
        return sum_products((self.inputs_gram, self._a_scale), (self.outputs_gram, self._g_scale))

    def squared_norm(self, samples: Sequence[Samples], limit: int) -> Tensor | None:
        same, pairs = self.squared_products()
        return same + pairs

    def leading(self, start: Tensor | None = None, tolerance: float = 1e-3, iterations: int = 50) -> Pair:
        w, u, sigma, steps, change = self.weights(tolerance, iterations)
        groups, outputs, width = self.shape
        A, B = self.g.new_zeros(groups, width, width), self.g.new_zeros(groups, outputs, outputs)
        self.add_inputs_(A, w)
        self.add_outputs_(B, u)
        return Pair(mirror(A), mirror(B), sigma, steps, change)

    def add_leading_(
        self,
        inputs: Tensor,
        outputs: Tensor,
        weight: float | None = None,
        start: Tensor | None = None,
        tolerance: float = 1e-3,
        iterations: int = 50,
    ) -> tuple[Tensor, Tensor, Tensor]:
        w, u, sigma, steps, change = self.weights(tolerance, iterations)
        # Straight into the sums: A and B are not formed.
        self.add_inputs_(inputs, times(w, sigma) if weight is None else w * weight)
        self.add_outputs_(outputs, times(u, sigma))
        return sigma, steps, change

    def leading_terms(
        self, rank: int, before: Tensor | None = None, tolerance: float = 1e-3, iterations: int = 50
    ) -> tuple[Pair, Tensor, Tensor]:
        """The same in the span of the samples, n² numbers a step and a term: orthogonal, largest first."""
        w, _, sigma, steps, change = self.weights(tolerance, iterations)
        Ka, Kg = self.inputs_gram, self.outputs_gram
        noise = _noise(*w.shape, rank - 1, w.dtype, w.device)
        W = torch.cat([times(w, self._a_scale)[..., None], noise], dim=2)  # as the Gram matrix is: of size one
        U = W
        for _ in range(_STEPS):
            _, U = _orthonormalise(Ka, W)
            U, W = _orthonormalise(Kg, U)  # the scales of both Gram matrices cancel
        W, U = self._orthogonalise(W, U)
        A, B = _weighted_sums(self.a, W), _weighted_sums(self.g, self._spread(U))
        return Pair(A[0], B[0], sigma, steps, change), A, B

    def _orthogonalise(self, W: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the same sum with orthogonal A as well, both factors of a term of one norm, for orthonormal B."""
        gram = (W.mT @ _mapped(self.inputs_gram, W)).double()
        values, turn = (each.flip(-1) for each in eigh((gram + gram.mT) / 2, "products of terms"))
        root = (values.clamp_min(0).sqrt() * over(self._a_scale, self._g_scale).double()[:, None]).sqrt().to(W)
        W, U = W @ turn.to(W), U @ turn.to(U)
        traces = (self.inputs_gram.diagonal(dim1=-2, dim2=-1).sqrt()[..., None] * W).sum(1)
        root = torch.where(traces < 0, -root, root)[:, None]
        return W * torch.where(root != 0, 1 / root, 0), U * root

    def add_inputs_(self, total: Tensor, w: Tensor) -> None:
        """``total += Σ_k w_k a_k a_kᵀ``, the upper triangle, for weights of at least zero."""
        self.activations.add_weighted_(total, w)

    def add_outputs_(self, total: Tensor, u: Tensor) -> None:
        """``total += Σ_k u_k g_k g_kᵀ``, the upper triangle, for weights of at least zero."""
        add_symmetric_product_(total, self.g * self._spread(u).sqrt()[..., None])


def _orthonormalise(gram: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``[H, n, R]`` of matrices that are orthonormal, by their Gram matrix, and this times them."""
    mapped = _mapped(gram, weights)
    mix = mixture((weights.mT @ mapped).double()).to(weights)
    return weights @ mix, mapped @ mix


def _mapped(gram: Tensor, weights: Tensor) -> Tensor:
    """A symmetric ``[H, n, n]`` times ``[H, n, R]``: with few rows on the left it takes a third of the time."""
    return (weights.mT @ gram).mT


@lru_cache(maxsize=64)
def _noise(groups: int, n: int, number: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random weights ``[H, n, R]``, the same at every call."""
    noise = torch.randn((groups, n, number), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise.to(device, dtype, non_blocking=True)


def _multiply(gram: Tensor, weights: Tensor) -> Tensor:
    return torch.bmm(gram, weights.unsqueeze(-1)).squeeze(-1)  # `matmul` calls four operators more


def _rows(gradients: Tensor, columns: int) -> Tensor:
    """``[H, n, c, O]`` with zeros for so many columns, as rows ``[H, n·C, O]``."""
    missing = columns - gradients.shape[2]
    return (F.pad(gradients, (0, 0, 0, missing)) if missing else gradients).flatten(1, 2)
