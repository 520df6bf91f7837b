"""Half steps through a few directions, for many samples of wide weights.

With ``A ≈ L Lᵀ``, L ``[I, ρ]``, a half step is ``Σ_k (G_k L)(G_k L)ᵀ``: ρ rows a sample instead of T, and for T = 1 the
weights ``‖Lᵀ a_k‖²``. The step is an exact one from a nearby matrix, and the distance of that matrix from the leading
one shrinks by σ₂/σ₁ in it. So the directions are found from a part of the samples, and one half step on each factor
takes in all. Where positions share the weight, later samples start from the directions of the sums so far: their half
steps add up to half steps of all samples.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kronfisher.fits.rearrangement.parts import noise, subset
from kronfisher.fits.rearrangement.scales import norm, over, times
from kronfisher.fits.rearrangement.source import Pair, Source
from kronfisher.fits.rearrangement.stopping import ended, kept
from kronfisher.fits.rearrangement.weights import Gram
from kronfisher.layers.activations import Activations, Dense
from kronfisher.layers.samples import Samples
from kronfisher.linalg import (
    add_symmetric_product_,
    chunks,
    eigh,
    mirror,
    mirror_,
    multiply_rows,
    multiply_symmetric,
)

__all__ = ["PART", "Projected"]

PART, WIDER = 256, 2**18  # samples that tell the directions where T = 1, half as many for more weights than so
_SHARED = 64  # samples at least that tell them where positions share the weight, each of which brings many directions
_PROBED, _FEWER = 16, 4  # and of those that are asked first, where there are so many times more
_CLEAR, _FEW = 0.05, 8  # change of A in their second step up to which they are enough, and as many directions
_STEPS = 8  # double steps at most over the part where positions share the weight
_SETTLED = 0.3  # change of A after which half steps over everything come closer than more of them in few directions
_FORMED = 192  # columns up to which a matrix that is met twice by a few directions is formed
_ITERATIONS = 10  # double steps at most to find them from a Gram matrix


class Projected(Source):
    """The leading pair of ℛ(F) through the leading `DIRECTIONS` of A and B.

    Args:
        samples: some; their positions may differ.
        tolerance: of the pair of a part of them, where T = 1.
        iterations: double steps at most, for that pair.
        start: directions ``[H, I, ρ]`` of A and ``[H, O, ρ]`` of B for other samples of the block, to go on from.
        running: the sums that `add_` is given hold what these other samples brought: where positions share the weight,
            directions are those of the sums, and half steps over one piece after the other are half steps over all.

    Attributes:
        right: directions of A.
        left: directions of B.
        change: of A in the last step over the part of the samples.
        steps: double steps over that part.
    """

    starts = False  # `start` does, when it is made

    def __init__(
        self,
        samples: Sequence[Samples],
        tolerance: float = 1e-3,
        iterations: int = 50,
        start: tuple[Tensor, Tensor] | None = None,
        running: bool = False,
    ) -> None:
        self.samples = samples
        self.shape = samples[0].shape
        self.single = all(use.positions == 1 for use in samples)
        self._weights: list[Tensor] = []  # [H, n] of the samples in A, where a step over all of them left these
        if self.single:
            directions = self._from_gram(tolerance, iterations) if start is None else self._from_all(start)
        elif start is not None and running:
            directions = (*start, start[0].new_zeros((), dtype=torch.int64), start[0].new_zeros(()))
        else:
            directions = self._from_part()
        self.running = running and not self.single
        self.right, self.left, self.steps, self.change = directions

    @property
    def directions(self) -> tuple[Tensor, Tensor]:
        return self.right, self.left

    def leading(self, start: Tensor | None = None, tolerance: float = 1e-3, iterations: int = 50) -> Pair:
        """A half step on each factor, to the tolerance that it was made with."""
        groups, outputs, width = self.shape
        A, B = self.right.new_zeros(groups, width, width), self.right.new_zeros(groups, outputs, outputs)
        weight = self.add_(A, B)
        A, B = mirror(A), mirror(B)
        sizes = norm(A), norm(B)
        return Pair(over(A, sizes[0]), over(B, sizes[1]), over(sizes[0] * sizes[1], weight), self.steps, self.change)

    def leading_terms(
        self, rank: int, before: Tensor | None = None, tolerance: float = 1e-3, iterations: int = 50
    ) -> tuple[Pair, Tensor, Tensor]:
        """The pair alone, as one term."""
        pair = self.leading()
        root = pair.sigma.sqrt()
        return pair, times(pair.A, root)[None], times(pair.B, root)[None]

    def add_leading_(
        self,
        inputs: Tensor,
        outputs: Tensor,
        weight: float | None = None,
        start: Tensor | None = None,
        tolerance: float = 1e-3,
        iterations: int = 50,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if weight is not None:
            return super().add_leading_(inputs, outputs, weight)
        sigma = self.add_(inputs, outputs)  # half steps straight into the sums, which are in the scale of σ
        return sigma, self.steps, self.change

    def add_(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Add a half step on each factor to sums ``[H, I, I]`` and ``[H, O, O]``, upper triangles.

        Returns:
            The weight ``⟨B, ℛ(F) A⟩ [H]`` of what was added: the pair is ``B ⊗ A`` divided by it.
        """
        weight = self.right.new_zeros(len(self.right))
        for place, use in enumerate(self.samples):
            if self.single:
                right = _squares(use.activations, self.right).squeeze(-1)
                left = self._weights[place] if self._weights else _squares(Dense(use.gradients), self.left).squeeze(-1)
                use.activations.add_weighted_(inputs, left)
                add_symmetric_product_(outputs, use.gradients[:, :, 0] * right.sqrt()[..., None])
                weight += torch.linalg.vecdot(left, right)
                continue
            for rows in _rows(use, self.right):
                add_symmetric_product_(outputs, rows)
        if self.single:
            return weight
        if self.running:
            self.left = _directions_of_sum(outputs, self.left)
        for use in self.samples:
            for rows in _rows(use, self.left, transposed=True):
                add_symmetric_product_(inputs, rows)
                weight += (rows @ self.right).square().sum((1, 2))
        if self.running:
            old, self.right = self.right, _directions_of_sum(inputs, self.right)
            self.steps, self.change = self.steps + 1, _change(old, self.right)
        return weight

    def _from_gram(self, tolerance: float, iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pair of a part of the samples, exactly, then its directions."""
        _, outputs, width = self.shape
        gram = Gram(subset(self.samples, PART if outputs * width <= WIDER else PART // 2))
        w, u, _, steps, change = gram.weights(tolerance, min(iterations, _ITERATIONS))
        a, g = gram.activations, Dense(gram.g.unsqueeze(2))
        right = _directions(lambda v: _multiply_weighted([(a, w[..., None])], v), noise(gram.g, width))
        left = _directions(lambda v: _multiply_weighted([(g, u[..., None])], v), noise(gram.g, outputs))
        return right, left, steps, change

    def _from_all(self, start: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One double step over all samples, each factor through its directions."""
        right, left = map(_perturb, start)
        pairs = [(use.activations, Dense(use.gradients)) for use in self.samples]
        rows = [(g, _squares(a, right)) for a, g in pairs]
        left = _nystrom(lambda v: _multiply_weighted(rows, v), left)
        columns = [(a, _squares(g, left)) for a, g in pairs]
        self._weights = [w.squeeze(-1) for _, w in columns]
        right = _nystrom(lambda v: _multiply_weighted(columns, v), right)
        return right, left, left.new_ones((), dtype=torch.int64), _change(start[0], right)

    def _from_part(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Double steps over all samples, or over a part of many: one over everything follows.

        Where a second step over very few changes next to nothing, the pair stands out (as it does where inputs have a
        mean, behind activations): then they are enough, and half of the directions, too.
        """
        _, outputs, width = self.shape
        like = self.samples[0].gradients
        longest = max(use.positions for use in self.samples)
        few, many = (max(number, PART // longest) for number in (_PROBED, _SHARED))
        right, left = noise(like, width), noise(like, outputs)
        if _FEWER * few > min(many, sum(map(len, self.samples))):  # to ask fewer would save nothing
            return _double_steps(subset(self.samples, many), right, left, _STEPS, False)
        first = _double_steps(subset(self.samples, few), right, left, 2, False)
        clear = first[3] <= _CLEAR
        if not ended(clear):
            more = _double_steps(subset(self.samples, many), *first[:2], _STEPS, True)
            first = tuple(kept(clear, old, new) for old, new in zip(first, more, strict=True))
        right, left, steps, change = first
        return _fewer(right, clear), _fewer(left, clear), steps, change


def _double_steps(
    samples: Sequence[Samples], right: Tensor, left: Tensor, most: int, near: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Directions after double steps over some samples, with their number and the change of A in the last.

    Args:
        samples: they are over.
        right: directions of A to start from.
        left: directions of B.
        most: double steps.
        near: the directions given are not random, so that one step may be enough.
    """
    (_, outputs, width), steps = samples[0].shape, right.new_zeros((), dtype=torch.int64)
    change = right.new_full((), torch.inf)
    done = change <= _SETTLED
    for step in range(most):
        old, find = right, _follow if near or step else _directions
        left = kept(done, left, find(_half_step(outputs, right, samples, False), left))
        right = kept(done, old, find(_half_step(width, left, samples, True), right))
        steps = steps + ~done
        change = kept(done, change, _change(old, right)) if near or step else change
        done = change <= _SETTLED
        if ended(done):
            break
    return right, left, steps, change


def _fewer(directions: Tensor, clear: Tensor) -> Tensor:
    """The `_FEW` largest where a pair was clear: each is a row of every sample in the products that follow.

    A host that would wait to know takes zeros in place of the others, with the same answer.
    """
    turn = eigh(directions.mT @ directions, "directions")[1].flip(-1)
    largest = directions @ turn
    if clear.device.type == "cpu":
        return largest[..., :_FEW].contiguous() if bool(clear) else directions
    others = torch.arange(largest.shape[-1], device=largest.device) >= _FEW
    return torch.where(clear, largest.masked_fill(others, 0), directions)


def _perturb(directions: Tensor) -> Tensor:
    """With a little of a random one: a component that the start lacks would never appear."""
    other = noise(directions, directions.shape[1])[..., :1]
    return torch.cat([directions[..., :1] + 0.1 * over(other, norm(other)), directions[..., 1:]], dim=-1)


def _directions_of_sum(upper: Tensor, start: Tensor) -> Tensor:
    """Directions of a sum ``[H, D, D]`` of which the upper triangle is known."""
    return _follow(lambda v: multiply_symmetric(upper, v), start)


def _change(old: Tensor, new: Tensor) -> Tensor:
    """Of A, by its directions: they tell nearly all of it, and another A would take as much room as the factors."""
    return (2 - 2 * norm(old.mT @ new).square()).clamp_min(0).sqrt().max()


def _squares(rows: Activations, directions: Tensor) -> Tensor:
    """``‖Lᵀ x_k‖² [H, n, 1]`` for T = 1."""
    return rows.times(directions)[:, :, 0].square().sum(-1, keepdim=True)


def _multiply_weighted(rows: Sequence[tuple[Activations, Tensor]], v: Tensor) -> Tensor:
    """``Σ_k w_k x_k x_kᵀ v`` for x with T = 1 and weights ``[H, n, 1]``."""
    products = [x.sum_with(x.times(v)[:, :, 0] * w) for x, w in rows]
    return products[0] if len(products) == 1 else torch.stack(products).sum(0)


def _half_step(
    width: int, directions: Tensor, samples: Sequence[Samples], transposed: bool
) -> Callable[[Tensor], Tensor]:
    """The product with the matrix that a half step over some samples gives, which is formed for narrow weights alone.

    A few products with the rows that it is the sum of take less where it is wide, and little room beside the samples.
    """
    pieces = (rows for use in samples for rows in _rows(use, directions, transposed))
    number = sum(map(len, samples)) * directions.shape[-1]
    room = min(use.workspace for use in samples) // 4
    if number <= width or (width > _FORMED and number * width * len(directions) * directions.element_size() <= room):
        kept = list(pieces)
        # With few rows on the left the second product takes two thirds of the time.
        return lambda v: torch.stack([((rows @ v).mT @ rows).mT for rows in kept]).sum(0)
    total = directions.new_zeros(len(directions), width, width)
    for rows in pieces:
        add_symmetric_product_(total, rows)
    total = mirror_(total)
    return lambda v: total @ v


def _rows(samples: Samples, L: Tensor, transposed: bool = False) -> Iterator[Tensor]:
    """``(G_k L)ᵀ``, or ``(G_kᵀ L)ᵀ`` where transposed: ``[H, n'·ρ, D]``, some samples at a time."""
    groups, _, width = samples.shape
    size = samples.gradients.element_size() * groups * samples.positions * (width + L.shape[-1]) * 2
    for low, high in chunks(len(samples), size, samples.workspace // 8):
        g = samples.gradients[:, low:high]
        if transposed:
            yield samples.activations.weighted_sums(multiply_rows(g, L), low, high).flatten(1, 2)
        else:
            yield (samples.activations.times(L, low, high).mT @ g).flatten(1, 2)


def _directions(times: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """L ``[H, D, ρ]`` with ``L Lᵀ`` of norm one and close to the leading part of a positive semidefinite matrix.

    From the product Y of M with the start (Halko et al. 2011).
    """
    return _nystrom(times, times(start))


def _follow(times: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The same from the directions of a matrix nearby."""
    return _nystrom(times, _perturb(start))


def _nystrom(times: Callable[[Tensor], Tensor], Y: Tensor) -> Tensor:
    """The same from Y near the leading part: Nyström's approximation ``X (YᵀX)⁺ Xᵀ``, X = M Y."""
    Y = over(Y, norm(Y))
    # Column by column: from piece to piece the weaker ones would fade to numbers that processors are slow with.
    Y = Y / torch.linalg.vector_norm(Y, dim=-2, keepdim=True).clamp_min(torch.finfo(Y.dtype).tiny)
    X = times(Y)
    X = over(X, norm(X))
    core = Y.mT @ X
    core = over(core + core.mT, core.diagonal(dim1=-2, dim2=-1).amax(-1))
    # In place of the inverse: what is no more than rounding in the core is that in X too, and stays so.
    core.diagonal(dim1=-2, dim2=-1).add_(core.shape[-1] * torch.finfo(core.dtype).eps * 20)
    root = torch.linalg.cholesky_ex(core).L
    L = torch.linalg.solve_triangular(root.mT, X, upper=True, left=False)
    return over(L, norm(L.mT @ L).sqrt())
