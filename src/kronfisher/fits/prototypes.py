"""Prototypes: gradients parted into the nearest of a few Kronecker-structured directions, and what is left of them."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from kronfisher.fisher.blocks import Block
from kronfisher.fits.fit import Fit
from kronfisher.fits.plan import Plan
from kronfisher.fits.registry import register
from kronfisher.fits.shapes import elements, sizes
from kronfisher.fits.state import FactorSums, Fixed, State, Total, WaitingState, reciprocal
from kronfisher.layers.activations import Dense
from kronfisher.layers.samples import Samples
from kronfisher.linalg import chunks, eigh, mirror
from kronfisher.operators import Eigen, KroneckerBasis, Prototyped

__all__ = ["Prototypes"]

_ROOM = 2**27  # bytes of samples kept for a layer
_PLASTIC = 1.32471795724474602596  # its powers spread numbers evenly in two dimensions (data and columns)


@dataclass(kw_only=True)
class Kept(WaitingState):
    """Samples of the first pass, chosen by their number alone.

    Attributes:
        nothing: a tensor without elements, of the dtype and device of the sums to come.
        data: how many examples there were.
        column: of the output Hessian's root, or label draw, that came last.
        share: samples are kept whose own number in [0, 1) is below it.
        numbers: those of the samples that wait.
        longest: T of the longest sample so far.
    """

    nothing: Tensor
    data: int = 0
    column: int = 0
    share: float = 1.0
    numbers: list[Tensor] = field(default_factory=list)
    longest: int = 1

    @property
    def like(self) -> Tensor:
        return self.nothing


@dataclass(kw_only=True)
class Parts(State):
    """The second pass: both parts of every gradient, around fixed prototypes ``z_c = b_c ⊗ a_c``.

    Attributes:
        eigenvalues: ``Σ_k (U_Bᵀ Δ_k U_A)∘²`` ``[H, O, I]``.
        weights: ``Σ ⟨G_k, z_c⟩²`` over the samples nearest to c, ``[H, m]``.
        inputs: U_A ``[H, I, I]``.
        outputs: U_B ``[H, O, O]``.
        A: a_c ``[H, m, I]``.
        B: b_c ``[H, m, O]``.
        kept: how many samples the prototypes were found from.
    """

    eigenvalues: Total
    weights: Total
    inputs: Fixed
    outputs: Fixed
    A: Fixed
    B: Fixed
    kept: int = 0


@dataclass(frozen=True)
class Prototypes(Fit):
    """``F ≈ Σ_c w_c z_c z_cᵀ + U diag(s) Uᵀ`` with prototypes ``z_c = b_c ⊗ a_c``, O + I numbers each.

    Every sample's gradient is parted into its component along the prototype nearest to it and the rest,
    ``G_k = ⟨G_k, z⟩ z + Δ_k``. The components give ``w_c = Σ ⟨G_k, z_c⟩²`` over the samples nearest to c, the rest its
    diagonal in a Kronecker basis, ``s = Σ_k (U_Bᵀ Δ_k U_A)∘²``, as in EKFAC. What is dropped are the products between
    the two parts and the rest's off-diagonal. So the matrix is positive semidefinite and has the true trace. It is the
    exact block where no more samples than prototypes have a gradient (T = 1), and where O or I is one.

    Unlike one Kronecker product, or any diagonal in a fixed basis, it can have few directions with curvature, so that
    its determinant, and the marginal likelihood, are not far from those of the exact block.

    The first pass keeps at most `samples` samples of a layer, spread evenly over data and columns whatever the batches,
    and finds prototypes and U from these alone: greedy seeds, then alternating assignment and best rank-one
    directions. The second pass sums w and s over all samples, exactly.

    Args:
        ratio: memory of the prototypes relative to that of K-FAC's two factors: ``ratio (O² + I²) / (O + I)`` of them.
        samples: of one layer, kept in the first pass.
        iterations: of assignment and update.

    Raises:
        ValueError: an option makes no sense.

    Example:
        >>> import torch, kronfisher as kf
        >>> layer = torch.nn.Linear(2, 3)
        >>> fisher = kf.estimate(layer, torch.randn(50, 2), kf.Gaussian(), fit=kf.Prototypes(), labels="exact")
        >>> fisher["weight"].structure
        '9 prototypes + eigenvalue-corrected 3x3'
    """

    ratio: float = 3.0
    samples: int = 2048
    iterations: int = 10

    trains: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.ratio > 0 or self.samples < 1 or self.iterations < 0:
            raise ValueError(f"{self!r}: a ratio above 0, at least one sample, and no fewer than 0 iterations.")

    @property
    def linear(self) -> bool:
        return False

    def number(self, group: tuple[Block, ...]) -> int:
        """How many prototypes a group gets; none where one Kronecker product is exact."""
        _, outputs, inputs = sizes(group)
        if min(outputs, inputs) == 1:
            return 0
        wanted = int(self.ratio * (outputs**2 + inputs**2) / (outputs + inputs))
        return max(1, min(wanted, self.samples))

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        groups, outputs, inputs = sizes(group)
        own = outputs**2 + inputs**2 + outputs * inputs + self.number(group) * (outputs + inputs + 1)
        kept = min(_ROOM, element * self.samples * groups * (outputs + inputs)) if self.number(group) else 0
        return Plan(2 * element * elements(groups, own) + kept, passes=2)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> Kept | FactorSums:
        if self.number(group):
            return Kept(group, plan, nothing=like.new_empty(0))
        groups, outputs, inputs = sizes(group)
        A, B = like.new_zeros(groups, inputs, inputs), like.new_zeros(groups, outputs, outputs)
        return FactorSums(group, plan, inputs=A, outputs=B)

    def update(self, state: Any, samples: tuple[Samples, ...]) -> State:
        (use,) = samples
        if use.first:
            state.rows = state.rows + use.rows
        if isinstance(state, Parts):
            _add_parts_(state, use)
        elif isinstance(state, FactorSums):
            use.add_output_products_(state.outputs)
            use.add_input_products_(state.inputs)
        else:
            self._keep(state, use)
        return state

    def _keep(self, state: Kept, use: Samples) -> None:
        state.column = 0 if use.first else state.column + 1
        begin = state.data if use.first else max(0, state.data - len(use))
        if use.first:
            state.data += len(use)
        place = torch.arange(begin, begin + len(use), dtype=torch.float64) + 1
        number = (place / _PLASTIC + state.column / _PLASTIC**2) % 1
        chosen = (number < state.share).nonzero()[:, 0]
        if len(chosen):
            state.numbers.append(number[chosen])
            part = use if len(chosen) == len(use) else use.select(chosen.to(use.gradients.device))
            state.waiting.append(replace(part, first=True, mask=None).copy())
        state.longest = max(state.longest, use.positions)
        groups, outputs, inputs = use.shape
        each = groups * state.longest * (outputs + inputs) * use.gradients.element_size()
        most = max(1, min(self.samples, _ROOM // each))
        while sum(map(len, state.numbers)) > most:
            state.share /= 2
            kept = [(n < state.share).nonzero()[:, 0] for n in state.numbers]
            state.waiting = [
                w.select(k.to(w.gradients.device)) for w, k in zip(state.waiting, kept, strict=True) if len(k)
            ]
            state.numbers = [n[k] for n, k in zip(state.numbers, kept, strict=True) if len(k)]

    def combine(self, x: State, y: State, wx: float = 1.0, wy: float = 1.0) -> State:
        """States of parts of the data, around the same prototypes.

        Raises:
            ValueError: they are of the first pass, or of other prototypes.
        """
        if not (isinstance(x, Parts) and isinstance(y, Parts)):
            raise ValueError(
                f"{x.name}: states of {self!r} combine only after the prototypes were chosen, and for the same ones."
            )
        return super().combine(x, y, wx, wy)

    def next_pass(self, state: Kept | FactorSums | Parts) -> Parts | None:
        if isinstance(state, Parts):
            return None
        state.check()
        groups, outputs, inputs = sizes(state.blocks)
        like, kept = state.like, 0
        if isinstance(state, FactorSums):
            A, B = (like.new_zeros(groups, 0, size) for size in (inputs, outputs))
            moments = [mirror(state.inputs), mirror(state.outputs)]
        elif not state.waiting:  # nothing ever came: all is zero
            A, B = (like.new_zeros(groups, self.number(state.blocks), size) for size in (inputs, outputs))
            moments = [torch.eye(size).to(like).expand(groups, -1, -1) for size in (inputs, outputs)]
        else:
            kept = sum(map(len, state.waiting))
            chosen = _joined(state)
            A, B = _prototypes(chosen, min(self.number(state.blocks), len(chosen)), self.iterations)
            rest, moments = _parted(chosen, A, B)[0], [like.new_zeros(groups, size, size) for size in (inputs, outputs)]
            rest.add_input_products_(moments[0])
            rest.add_output_products_(moments[1])
            moments = [mirror(moment) for moment in moments]
        inputs_basis, outputs_basis = (eigh(moment, f"{state.name} (basis)")[1] for moment in moments)
        return Parts(
            state.blocks,
            state.plan,
            phase=state.phase + 1,
            eigenvalues=like.new_zeros(sizes(state.blocks)),
            weights=like.new_zeros(A.shape[:2]),
            inputs=inputs_basis,
            outputs=outputs_basis,
            A=A,
            B=B,
            kept=kept,
        )

    def finish(self, state: Parts) -> Prototyped | Eigen:
        state.check()
        scale = reciprocal(state.count)
        U = KroneckerBasis(state.inputs, state.outputs)
        values = (state.eigenvalues * scale).clamp_min(0).flatten()  # a difference of sums: zero to rounding
        rest = Eigen(U, values, name=state.name)
        if not state.A.shape[1]:
            return rest
        return Prototyped(rest, state.A @ U.A, state.B @ U.B, state.weights * scale)

    def notes(self, state: Parts) -> str:
        if not state.kept:
            return "" if self.number(state.blocks) else "O or I is one: its eigenvectors are exact"
        own, rest = state.weights.sum(), state.eigenvalues.sum()
        share = (own / (own + rest).clamp_min(torch.finfo(own.dtype).tiny)).item()
        return f"prototypes from {state.kept} samples hold {share:.1%} of the trace"


def _along(a: Tensor, g: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``⟨G_k, z_c⟩`` ``[H, n, m]``."""
    return ((a.flatten(1, 2) @ A.mT) * (g.flatten(1, 2) @ B.mT)).unflatten(1, a.shape[1:3]).sum(2)


def _coefficients(a: Tensor, g: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """``⟨G_k, z⟩`` with the prototype nearest to each sample, and which one that is; ``[H, n]`` both."""
    along = _along(a, g, A, B)
    nearest = along.abs().argmax(-1)
    return along.gather(-1, nearest[..., None])[..., 0], nearest


def _taken(rows: Tensor, index: Tensor) -> Tensor:
    """Rows ``[H, m, n]`` of an index ``[H, k]``: ``[H, k, n]``."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


def _parted(samples: Samples, A: Tensor, B: Tensor) -> tuple[Samples, Tensor, Tensor]:
    """Samples of ``Δ_k``, the prototype's part as one more position; and what `_coefficients` gives."""
    a, g = samples.activations.dense(), samples.gradients
    along, nearest = _coefficients(a, g, A, B)
    a = torch.cat([a, _taken(A, nearest)[:, :, None]], dim=2)
    g = torch.cat([g, -(along[..., None] * _taken(B, nearest))[:, :, None]], dim=2)
    return replace(samples, activations=Dense(a), gradients=g, mask=None), along, nearest


def _add_parts_(state: Parts, use: Samples) -> None:
    """Add the two parts of every sample to the sums of the second pass."""
    A, B = state.A, state.B
    groups, outputs, inputs = use.shape
    if not A.shape[1]:
        for piece in use.rotate(state.inputs, state.outputs):
            state.eigenvalues += piece.squares()
        return
    size = 3 * groups * (use.positions + 1) * (outputs + inputs + A.shape[1]) * use.gradients.element_size()
    for low, high in chunks(len(use), size, use.workspace):
        rest, along, nearest = _parted(use.part(low, high), A, B)
        state.weights.scatter_add_(1, nearest, along.square().to(state.weights))
        for piece in rest.rotate(state.inputs, state.outputs):
            state.eigenvalues += _squares(piece)


def _squares(samples: Samples) -> Tensor:
    """``Σ_k G_k∘²``; of two positions by the binomial formula, which needs no gradient written out."""
    if samples.positions != 2:
        return samples.squares()
    a, g = samples.activations.dense().unbind(2), samples.gradients.unbind(2)
    mixed = (g[0] * g[1]).mT @ (a[0] * a[1])
    return g[0].square().mT @ a[0].square() + g[1].square().mT @ a[1].square() + 2 * mixed


def _joined(state: Kept) -> Samples:
    """All that was kept, in the order of the samples' own numbers; shorter ones get positions of zeros."""
    parts = [(use.activations.dense(), use.gradients) for use in state.waiting]
    longest = max(g.shape[2] for _, g in parts)
    a, g = (
        torch.cat([pad(side, (0, 0, 0, longest - side.shape[2])) for side in s], 1) for s in zip(*parts, strict=True)
    )
    order = torch.cat(state.numbers).argsort(stable=True).to(g.device)
    return replace(state.waiting[0], activations=Dense(a[:, order]), gradients=g[:, order])


def _prototypes(samples: Samples, number: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Unit vectors A ``[H, m, I]`` and B ``[H, m, O]`` whose products are near to the gradients of samples."""
    a, g = samples.activations.dense(), samples.gradients
    A, B = _seeds(samples, number)
    for _ in range(iterations):
        along, nearest = _coefficients(a, g, A, B)
        mine = along[..., None, None] * (a @ _taken(A, nearest)[..., None]) * g  # c (a·a_c) g, summed over positions
        B = _renewed(B, nearest, mine.sum(2))
        mine = along[..., None, None] * (g @ _taken(B, nearest)[..., None]) * a
        A = _renewed(A, nearest, mine.sum(2))
    return A, B


def _renewed(old: Tensor, nearest: Tensor, rows: Tensor) -> Tensor:
    """Directions of the sums of rows by prototype; the old one where no sample is near."""
    sums = torch.zeros_like(old).scatter_add_(1, nearest[..., None].expand_as(rows), rows)
    return torch.where(sums.norm(dim=2, keepdim=True) > 0, normalize(sums, dim=2, eps=0), old)


def _seeds(samples: Samples, number: int) -> tuple[Tensor, Tensor]:
    """Gradients of samples as products of unit vectors, each the one that takes most from what is left of all."""
    a, g = samples.activations.dense(), samples.gradients
    norms = torch.cat([G.square().sum(dim=(2, 3)) for G in samples.per_sample()], dim=1)
    strength = (a.square().sum(-1) * g.square().sum(-1)).argmax(2)[..., None, None]  # the position to begin with
    inputs = a.gather(2, strength.expand(-1, -1, 1, a.shape[3]))
    for _ in range(1 if a.shape[2] == 1 else 5):  # powers of G_k: its best rank one
        outputs = normalize((a @ inputs.mT * g).sum(2, keepdim=True), dim=3)
        inputs = normalize((g @ outputs.mT * a).sum(2, keepdim=True), dim=3)
    inputs, outputs = inputs[:, :, 0], outputs[:, :, 0]
    size = 3 * len(a) * a.shape[1] * a.shape[2] * a.element_size()
    ranges = list(chunks(a.shape[1], size, samples.workspace))
    explained = torch.cat([_along(a[:, i:j], g[:, i:j], inputs, outputs).square() for i, j in ranges], dim=1)
    index = torch.stack([_greedy(*each, number) for each in zip(norms, explained, strict=True)])
    return _taken(inputs, index), _taken(outputs, index)


def _greedy(norms: Tensor, explained: Tensor, number: int) -> Tensor:
    """Which of n candidates ``[number]``: the next is the one that lowers ``Σ_k min_c (‖G_k‖² − ⟨G_k, z_c⟩²)`` most.

    Args:
        norms: ``‖G_k‖²`` ``[n]``.
        explained: ``⟨G_k, z_c⟩²`` ``[n, n]``.
        number: how many.
    """
    left, chosen = norms.clone(), []
    gain = explained.sum(0)
    for _ in range(number):
        chosen.append(gain.argmax())
        now = torch.minimum(left, norms - explained[:, chosen[-1]])
        lower = (now < left).nonzero()[:, 0]
        rest = explained[lower] - norms[lower, None]
        gain -= ((left[lower, None] + rest).clamp_min(0) - (now[lower, None] + rest).clamp_min(0)).sum(0)
        gain[chosen[-1]] = -torch.inf  # each is taken once
        left = now
    return torch.stack(chosen)


register("prototypes", Prototypes, "multiples of a few products, and EKFAC of the rest", "prototypes")
