"""Half steps through a few directions, for many samples of wide weights.

With ``A ≈ L Lᵀ``, L ``[I, ρ]``, a half step is ``Σ_k (G_k L)(G_k L)ᵀ``: ρ rows a sample instead of T, and for T = 1 the
weights ``‖Lᵀ a_k‖²``. The step is an exact one from a nearby matrix, and the distance of that matrix from the leading
one shrinks by σ₂/σ₁ in it. So a part of the samples tells the directions, and one half step on each side takes in all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from kronfisher.linalg import add_symmetric_product_, eigh, mirror_
from kronfisher.rearrangement.sides import norm, over
from kronfisher.rearrangement.weights import Gram
from kronfisher.samples import Samples, applied, chunks

__all__ = ["DIRECTIONS", "PART", "Projected"]

DIRECTIONS = 16
PART, WIDER = 256, 2**18  # samples that tell the directions where T = 1, half as many for more weights than so
_SHARE = 4  # one of so many tells them where positions share the weight
_LARGE = 4  # so many times fewer are there besides, for their size
_STEPS = 2  # double steps over that part, each from nearby matrices
_ITERATIONS = 10  # double steps at most to find them from a Gram matrix


class Projected:
    """The leading pair of ℛ(F) through the leading `DIRECTIONS` of A and B.

    Args:
        samples: some; their positions may differ.

    Attributes:
        change: of A in the last step over the part of the samples.
        steps: double steps over that part.
    """

    def __init__(self, samples: Sequence[Samples], tolerance: float = 1e-3, iterations: int = 50) -> None:
        self.samples = samples
        self.shape = samples[0].shape
        self.single = all(several.positions == 1 for several in samples)
        found = self._from_gram(tolerance, iterations) if self.single else self._from_part()
        self.right, self.left, self.steps, self.change = found

    def add_(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Add a half step on each side to sums ``[H, I, I]`` and ``[H, O, O]``, upper triangles.

        Returns:
            The weight ``⟨B, ℛ(F) A⟩ [H]`` of what was added: the pair is ``B ⊗ A`` divided by it.
        """
        weight = self.right.new_zeros(len(self.right))
        for several in self.samples:
            if self.single:
                right = several.activations.times(self.right)[:, :, 0].square().sum(-1)
                left = (several.gradients[:, :, 0] @ self.left).square().sum(-1)
                several.activations.add_weighted_(inputs, left)
                add_symmetric_product_(outputs, several.gradients[:, :, 0] * right.sqrt()[..., None])
                weight += torch.linalg.vecdot(left, right)
                continue
            for rows in _rows(several, self.right):
                add_symmetric_product_(outputs, rows)
                weight += (rows @ self.left).square().sum((1, 2))
            for rows in _rows(several, self.left, transposed=True):
                add_symmetric_product_(inputs, rows)
        return weight

    def _from_gram(self, tolerance: float, iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pair of a part of the samples, exactly, then its directions."""
        _, outputs, width = self.shape
        gram = Gram(_some(self.samples, PART if outputs * width <= WIDER else PART // 2))
        w, u, _, steps, change = gram.weights(tolerance, min(iterations, _ITERATIONS))
        self.gram = gram
        a, g = gram.activations.dense()[:, :, 0] * w.sqrt()[..., None], gram.g * u.sqrt()[..., None]
        right = _directions(lambda v: a.mT @ (a @ v), _random(a, a.shape[-1]))
        left = _directions(lambda v: g.mT @ (g @ v), _random(g, g.shape[-1]))
        return right, left, steps, change

    def _from_part(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Double steps over a part of the samples."""
        _, outputs, width = self.shape
        like = self.samples[0].gradients
        part = _some(self.samples, max(1, sum(map(len, self.samples)) // _SHARE))
        right, left = _random(like, width), _random(like, outputs)
        change = like.new_full((), torch.inf)
        for step in range(_STEPS):
            B = _total(outputs, right, part, transposed=False)
            left = _directions(lambda v, B=B: B @ v, _random(like, outputs))
            A, old = _total(width, left, part, transposed=True), right
            right = _directions(lambda v, A=A: A @ v, _random(like, width))
            if step:  # by the directions: they tell nearly all of A, and another A would take as much room as factors
                change = (2 - 2 * norm(old.mT @ right).square()).clamp_min(0).sqrt().max()
            del A, B
        return right, left, like.new_full((), _STEPS, dtype=torch.int64), change


def _total(width: int, directions: Tensor, samples: Sequence[Samples], transposed: bool) -> Tensor:
    """A half step over some samples, up to a scale."""
    total = directions.new_zeros(len(directions), width, width)
    for several in samples:
        for rows in _rows(several, directions, transposed):
            add_symmetric_product_(total, rows)
    return mirror_(total)


def _some(samples: Sequence[Samples], number: int) -> list[Samples]:
    """The largest of the samples, and about so many of the others, evenly spread over sizes and standing for them all.

    Of heavy-tailed gradients a few decide on the leading pair, and directions that miss these miss it.
    """
    step = max(1, sum(map(len, samples)) // number)
    if step == 1:
        return list(samples)
    found = []
    for several in samples:
        order = _sizes(several).argsort(descending=True, stable=True)
        large, rest = order.tensor_split([-(-len(order) // (step * _LARGE))])
        spread = rest[::step]
        part = several.taken(torch.cat([large, spread]))
        weights = part.gradients.new_ones(len(part), 1, 1)
        weights[len(large) :] = (len(rest) / max(len(spread), 1)) ** 0.5
        found.append(replace(part, gradients=part.gradients * weights))
    return found


def _sizes(samples: Samples) -> Tensor:
    """About ``‖g_k‖² ‖a_k‖² [n]``, over all groups; where positions are many, the inputs in a random direction tell."""
    a, g = samples.activations, samples.gradients
    rows = a.dense() if samples.positions == 1 else a.times(_random(g, a.shape[-1])[..., :1].contiguous())
    sizes = [torch.linalg.vector_norm(side, dim=(2, 3)) for side in (rows, g)]
    return torch.linalg.vector_norm(sizes[0] * sizes[1], dim=0)


def _rows(samples: Samples, L: Tensor, transposed: bool = False) -> Iterator[Tensor]:
    """``(G_k L)ᵀ``, or ``(G_kᵀ L)ᵀ`` where transposed: ``[H, n'·ρ, D]``, some samples at a time."""
    heads, _, width = samples.shape
    size = samples.gradients.element_size() * heads * samples.positions * (width + L.shape[-1]) * 2
    for low, high in chunks(len(samples), size, samples.workspace // 8):
        g = samples.gradients[:, low:high]
        if transposed:
            yield (applied(g, L).mT @ samples.activations.dense(low, high)).flatten(1, 2)
        else:
            yield (samples.activations.times(L, low, high).mT @ g).flatten(1, 2)


def _random(like: Tensor, width: int) -> Tensor:
    """Directions ``[H, D, ρ]``, the same at every call."""
    return _drawn(len(like), width, like.dtype, like.device)


@lru_cache(maxsize=64)
def _drawn(heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    shape = (heads, width, min(DIRECTIONS, width))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device, dtype)


def _directions(times: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """L ``[H, D, ρ]`` with ``L Lᵀ`` of norm one and close to the leading part of a positive semidefinite matrix.

    Nyström's approximation ``X (YᵀX)⁺ Xᵀ``, X = M Y, from Y that M was applied to once (Halko et al. 2011).
    """
    Y = times(start)
    Y = over(Y, norm(Y))
    X = times(Y)
    X = over(X, norm(X))
    core = Y.mT @ X
    values, vectors = eigh(core, "the leading directions of K-FOC")
    kept = values > values[:, -1:] * core.shape[-1] * torch.finfo(core.dtype).eps * 10
    L = X @ (vectors * torch.where(kept, values.clamp_min(torch.finfo(core.dtype).tiny).rsqrt(), 0).unsqueeze(1))
    return over(L, norm(L.mT @ L).sqrt())
