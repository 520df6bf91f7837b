"""Half steps for one position per sample: by weights of the samples, or in their span by Gram matrices."""

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from kronfisher.fits.rearrangement.rearranged import Rearranged, mixture
from kronfisher.fits.rearrangement.scales import over, power_of_two, reciprocal, times
from kronfisher.fits.rearrangement.source import Pair
from kronfisher.fits.rearrangement.stopping import ended, kept
from kronfisher.layers.activations import Activations, Dense
from kronfisher.layers.samples import Samples
from kronfisher.linalg import add_symmetric_product_, complete_, eigh, mirror, mirror_

__all__ = ["Gram", "Weights"]

_STEPS = 2  # double steps from noise to other terms
_PANEL = 128  # samples whose products with all others are in hand at a time


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

    def outputs(self, A: Tensor, odd: bool = False) -> Tensor:
        return _weighted_sum(self.g, self._spread(torch.linalg.vecdot(self.a @ A, self.a)))

    def inputs(self, B: Tensor, odd: bool = False) -> Tensor:
        weights = torch.linalg.vecdot(self.g @ B, self.g)
        return _weighted_sum(self.a, weights if self.columns == 1 else weights.unflatten(1, (-1, self.columns)).sum(2))

    def _spread(self, weights: Tensor) -> Tensor:
        """``[H, n]`` for every column: ``[H, n·C]``."""
        return weights if self.columns == 1 else weights.repeat_interleave(self.columns, dim=1)

    def squared_norm(self, samples: Sequence[Samples], limit: int) -> Tensor | None:
        groups, outputs, width = self.shape
        pairs = outputs if self.columns == 1 else min(outputs * (outputs + 1) // 2, self.columns**2 * outputs)
        if (self.g.shape[1] // self.columns) ** 2 * groups * (pairs + width) > limit:
            return None
        same, pairs = self.squared_products()
        return same + pairs

    def squared_products(self) -> tuple[Tensor, Tensor]:
        """``Σ_k ‖G_k‖⁴`` and ``Σ_{k≠l} ⟨G_k, G_l⟩²`` (over all groups together), in float64.

        Where columns share inputs the first takes in the products of the columns of one input with each other.
        """
        packs = self.columns > 1 and _packs(self.g, self.columns)
        if self.columns > 1 and not packs:  # of one group
            return _sum_products(_square(self.activations.products()), _squares_of_columns(self.g, self.columns))
        both = self.a, self.g
        lengths = [power_of_two(torch.linalg.vector_norm(rows, dim=-1).amax()) for rows in both]
        a, g = (rows / length for rows, length in zip(both, lengths, strict=True))  # no square vanishes
        same, every = _sum_over_pairs(a, *(_packed(g, self.columns) if packs else (g, None)))
        scale = (lengths[0].double() * lengths[1].double()).square().square()
        return same * scale, (every - same) * scale


def _weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """``Σ_k w_k x_k x_kᵀ [H, D, D]`` for rows ``[H, n, D]`` and weights ``[H, n]`` of any sign."""
    return _add_weighted_sum_(rows.new_zeros(len(rows), rows.shape[-1], rows.shape[-1]), rows, weights)


def _add_weighted_sum_(total: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    return complete_(add_symmetric_product_(total, rows, rows * weights[..., None]))


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
        self.inputs_gram, self._a_scale = _square(self.activations.products())
        self.outputs_gram, self._g_scale = (
            _square(Dense(self.g.unsqueeze(2)).products())
            if self.columns == 1
            else _squares_of_columns(self.g, self.columns)
        )

    def weights(self, tolerance: float = 1e-3, iterations: int = 50) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The pair as weights of the samples: w and u ``[H, n]`` with A and B of norm one, σ, steps and change."""
        Ka, Kg = self.inputs_gram, self.outputs_gram
        w = old = mapped = torch.zeros_like(Ka[:, 0])
        v = Ka.diagonal(dim1=-2, dim2=-1).sqrt()  # ‖a_k‖²: A is the identity
        u, sigma = w, w.new_zeros(len(w))
        steps, change = w.new_zeros((), dtype=torch.int64), w.new_full((), torch.inf)
        done = change <= tolerance
        for _ in range(max(iterations, 1)):
            new = _multiply(Kg, v)
            inverse = reciprocal(torch.linalg.vecdot(v, new).sqrt())[:, None]
            u, w = kept(done, u, v * inverse), new * inverse
            v = _multiply(Ka, w)
            size = torch.linalg.vecdot(w, v).sqrt()
            inverse = reciprocal(size)[:, None]
            w, v = kept(done, old, w * inverse), kept(done, mapped, v * inverse)
            steps, sigma = steps + ~done, kept(done, sigma, size)
            change = kept(done, change, torch.linalg.vecdot(w - old, v - mapped).clamp_min(0).sqrt().max())
            old, mapped, done = w, v, change <= tolerance
            if ended(done):
                break
        scale = self._a_scale * self._g_scale
        return over(w, self._a_scale), over(u, self._g_scale), sigma * scale, steps, change

    def squared_products(self) -> tuple[Tensor, Tensor]:
        if len(self.g) > 1:
            return super().squared_products()
        return _sum_products((self.inputs_gram, self._a_scale), (self.outputs_gram, self._g_scale))

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
        noise = torch.randn((*w.shape, rank - 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        noise = noise.to(w.device, w.dtype, non_blocking=True)
        W = torch.cat([times(w, self._a_scale)[..., None], noise], dim=2)  # as the Gram matrix is: of size one
        U = W
        for _ in range(_STEPS):
            _, U = _orthonormalise(Ka, W)
            U, W = _orthonormalise(Kg, U)  # the scales of both Gram matrices cancel
        W, U = self._orthogonalise(W, U)
        (groups, outputs, width), new = self.shape, w.new_empty
        A, B = new(rank, groups, width, width), new(rank, groups, outputs, outputs)
        for r in range(rank):
            _add_weighted_sum_(A[r].zero_(), self.a, W[..., r])
            _add_weighted_sum_(B[r].zero_(), self.g, self._spread(U[..., r]))
        return Pair(A[0], B[0], sigma, steps, change), A, B

    def _orthogonalise(self, W: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the same sum with orthogonal A as well, both factors of a term of one norm, for orthonormal B."""
        gram = (W.mT @ (self.inputs_gram @ W)).double()
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
    mapped = gram @ weights
    mix = mixture((weights.mT @ mapped).double()).to(weights)
    return weights @ mix, mapped @ mix


def _multiply(gram: Tensor, weights: Tensor) -> Tensor:
    return (gram @ weights.unsqueeze(-1)).squeeze(-1)


def _square(products: Tensor) -> tuple[Tensor, Tensor]:
    """``[H, n, n]`` squared over about the largest entry, and the root of that ``[H]``: nothing underflows."""
    largest = power_of_two(products.diagonal(dim1=-2, dim2=-1).amax(1))
    return products.mul_(reciprocal(largest)[:, None, None]).square_(), largest


def _sum_products(inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``Σ_k`` and ``Σ_{k≠l}`` of ``K_a K_g`` entry by entry, each ``[1, n, n]`` with the root of its scale."""
    products = inputs[0][0] * outputs[0][0]  # ⟨G_k, G_l⟩²
    scale = (inputs[1].double() * outputs[1].double()).square()[0]
    same = products.diagonal().sum(dtype=torch.float64)
    return same * scale, (products.sum(dtype=torch.float64) - same) * scale


def _packs(g: Tensor, columns: int) -> bool:
    """Whether ``Σ_c g_c g_cᵀ`` of each input takes fewer numbers than the products of all columns of two inputs."""
    width = g.shape[-1]
    return width * (width + 1) // 2 <= columns**2 * width


def _packed(g: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Of ``S_k = Σ_c g_kc g_kcᵀ`` for ``[H, n·C, O]`` the upper triangle in a row ``[H, n, O(O+1)/2]``.

    And the weights of their entries with which inner products of rows are those of the S_k, ``Σ_{c,d} ⟨g_kc, g_ld⟩²``:
    two beside the diagonal.
    """
    g = g.unflatten(1, (-1, columns))
    twice = g.new_full(2 * g.shape[-1:], 2.0).fill_diagonal_(1.0)
    return _triangle(g.mT @ g), _triangle(twice)


def _triangle(matrices: Tensor) -> Tensor:
    """The upper triangle of ``[..., D, D]``, row after row."""
    return torch.cat([row[..., k:] for k, row in enumerate(matrices.unbind(-2))], dim=-1)


def _sum_over_pairs(a: Tensor, g: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """``Σ_k`` and ``Σ_{k,l}`` of ``(Σ_h ⟨a_k, a_l⟩ ⟨g_k, g_l⟩)²``; of ``⟨a_k, a_l⟩² ⟨g_k, g_l⟩`` if g are packed.

    A panel at a time, which is no more than a processor's cache holds, and from the diagonal on.
    """
    same, every = [], []
    for low in range(0, a.shape[1], _PANEL):
        left, part = a[:, low : low + _PANEL] @ a[:, low:].mT, g[:, low : low + _PANEL]
        right = (part if weights is None else part * weights) @ g[:, low:].mT
        if weights is None:
            left = right = left.mul_(right)[0] if len(left) == 1 else left.mul_(right).sum(0)
        else:  # of one group
            left, right = left.square_()[0], right[0]
        square = slice(len(left))  # products of the panel's samples with each other, which are there twice
        same.append((left.diagonal() * right.diagonal()).sum(dtype=torch.float64))
        every.append(2 * torch.linalg.vecdot(left, right).sum(dtype=torch.float64))
        every.append(-torch.linalg.vecdot(left[:, square], right[:, square]).sum(dtype=torch.float64))
    return torch.stack(same).sum(), torch.stack(every).sum()


def _rows(gradients: Tensor, columns: int) -> Tensor:
    """``[H, n, c, O]`` with zeros for so many columns, as rows ``[H, n·C, O]``."""
    missing = columns - gradients.shape[2]
    return (F.pad(gradients, (0, 0, 0, missing)) if missing else gradients).flatten(1, 2)


def _squares_of_columns(g: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """``Σ_{c,d} ⟨g_kc, g_ld⟩² [H, n, n]``, divided by about the largest, and the root of that, for ``[H, n·C, O]``."""
    length = power_of_two(torch.linalg.vector_norm(g, dim=-1).amax(1))
    g = over(g, length).unflatten(1, (-1, columns))
    if _packs(g, columns):
        flat, weights = _packed(g.flatten(1, 2), columns)
        gram = flat.new_zeros(len(g), *2 * g.shape[1:2])
        gram = mirror_(add_symmetric_product_(gram, flat.mT, (flat * weights).mT))
    else:
        rows = g.flatten(1, 2).mT
        gram = g.new_zeros(len(g), *2 * g.shape[1:2])
        for c in range(columns):
            gram += (g[:, :, c] @ rows).square_().unflatten(2, (-1, columns)).sum(3)
    root = power_of_two(gram.diagonal(dim1=-2, dim2=-1).amax(1).sqrt())
    return over(gram, root.square()), length.square() * root
