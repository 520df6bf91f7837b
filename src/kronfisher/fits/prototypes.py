"""Prototypes: gradients split into the nearest of a few Kronecker-structured directions and the rest."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kronfisher.errors import keep_integer
from kronfisher.fisher.blocks import Block
from kronfisher.fits.fit import Fit
from kronfisher.fits.plan import Plan
from kronfisher.fits.prototype_states import ROOM, Kept, Moments, Parts
from kronfisher.fits.registry import register
from kronfisher.fits.shapes import MAX_DIM, Shapes, check_max_dim, elements, sizes
from kronfisher.fits.state import State, reciprocal
from kronfisher.layers.samples import Samples
from kronfisher.operators import Eigen, KroneckerBasis, Prototyped
from kronfisher.operators.factors import Factor

__all__ = ["Prototypes"]


@dataclass(frozen=True)
class Prototypes(Fit):
    """``F ≈ Σ_c w_c z_c z_cᵀ + U diag(s) Uᵀ`` with prototypes ``z_c = b_c ⊗ a_c``, O + I numbers each.

    Every sample's gradient is split into its component along the prototype nearest to it and the rest,
    ``G_k = ⟨G_k, z⟩ z + Δ_k``. The components give ``w_c = Σ ⟨G_k, z_c⟩²`` over the samples nearest to c, the rest its
    diagonal in a Kronecker basis, ``s = Σ_k (U_Bᵀ Δ_k U_A)∘²``, as in EKFAC. What is dropped are the products between
    the two parts and the rest's off-diagonal. So the matrix is positive semidefinite and has the true trace. It is the
    exact block where no more samples than prototypes have a gradient (T = 1), and where O or I is one.

    Unlike one Kronecker product, or any diagonal in a fixed basis, it can have few directions with curvature, so that
    its determinant, and the marginal likelihood, are not far from those of the exact block.

    The first pass keeps at most `samples` samples of a layer, spread evenly over examples and columns whatever the
    batches, and finds prototypes and U from these alone: greedy seeds, then alternating assignment and best rank-one
    directions. The second pass sums w and s over all samples, exactly.

    Args:
        ratio: memory of the prototypes relative to that of K-FAC's two factors: ``ratio (O² + I²) / (O + I)`` of them.
        samples: of one layer, kept in the first pass.
        iterations: of assignment and update.
        max_dim: inputs or outputs beyond this size are not turned: U is the identity there, and K-FAC's factor a
            diagonal, so that prototypes are few.

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
    max_dim: int = MAX_DIM

    trains: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_max_dim(self)
        keep_integer(self, "samples", 1)
        keep_integer(self, "iterations", 0)
        if not self.ratio > 0:
            raise ValueError(f"{self!r}: the ratio is above 0.")

    @property
    def linear(self) -> bool:
        return False

    def number(self, group: tuple[Block, ...]) -> int:
        """The number of prototypes of a group; none where one Kronecker product is exact."""
        _, outputs, inputs = sizes(group)
        if min(outputs, inputs) == 1:
            return 0
        factors = sum(elements(*shape[1:]) for shape in self.sides(group))
        return max(1, min(int(self.ratio * factors / (outputs + inputs)), self.samples))

    def sides(self, group: tuple[Block, ...]) -> Shapes:
        """Shapes of U_A and U_B: ``[H, D, D]``, or ``[H, D]`` for the identity."""
        groups, outputs, inputs = sizes(group)
        sides = [(groups, size) if size > self.max_dim else (groups, size, size) for size in (inputs, outputs)]
        return sides[0], sides[1]

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        groups, outputs, inputs = sizes(group)
        factors = sum(elements(*shape[1:]) for shape in self.sides(group))
        own = factors + outputs * inputs + self.number(group) * (outputs + inputs + 1)
        kept = min(ROOM, element * self.samples * groups * (outputs + inputs)) if self.number(group) else 0
        return Plan(2 * element * elements(groups, own) + kept, passes=2)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> Kept | Moments:
        if self.number(group):
            return Kept(group, plan, nothing=like.new_empty(0), most=self.samples)
        A, B = map(like.new_zeros, self.sides(group))
        return Moments(group, plan, inputs=A, outputs=B)

    def update(self, state: Any, samples: tuple[Samples, ...]) -> State:
        (use,) = samples
        if use.first:
            state.rows = state.rows + use.rows
        state.add_(use)
        return state

    def combine(self, x: State, y: State, wx: float = 1.0, wy: float = 1.0) -> State:
        """States of parts of the data: samples that are kept of each, or sums around the same prototypes.

        Raises:
            ValueError: they are around other prototypes, or one is of the first pass; samples kept have no weights.
        """
        if isinstance(x, Kept) and isinstance(y, Kept) and wx == wy == 1:
            return x.joined(y)
        if isinstance(x, Kept) or isinstance(y, Kept):
            raise ValueError(
                f"{x.name}: states of {self!r} combine with weights only after the prototypes were chosen, and for the "
                "same ones."
            )
        return super().combine(x, y, wx, wy)

    def next_pass(self, state: Kept | Moments | Parts) -> Parts | None:
        if isinstance(state, Parts):
            return None
        sides = self.sides(state.blocks)
        chosen = state.check().prototypes(self.number(state.blocks), self.iterations, sides)
        moments = Factor.of(chosen.inputs), Factor.of(chosen.outputs)
        inputs, outputs = (moment.eigh(f"{state.name} (basis)")[1].tensor for moment in moments)
        return Parts(
            state.blocks,
            state.plan,
            phase=state.phase + 1,
            eigenvalues=state.like.new_zeros(sizes(state.blocks)),
            weights=state.like.new_zeros(chosen.A.shape[:2]),
            inputs=inputs,
            outputs=outputs,
            A=chosen.A,
            B=chosen.B,
            kept=chosen.kept,
        )

    def finish(self, state: Parts) -> Prototyped | Eigen:
        state.check()
        scale = reciprocal(state.count)
        U = KroneckerBasis(state.inputs, state.outputs)
        values = (state.eigenvalues * scale).clamp_min(0).flatten()  # a difference of sums: zero to rounding
        rest = Eigen(U, values, name=state.name)
        if not state.A.shape[1]:
            return rest
        A, B = U.input_factor.mT.right(state.A), U.output_factor.mT.right(state.B)  # A U_A, B U_B
        return Prototyped(rest, A, B, state.weights * scale)

    def notes(self, state: Parts) -> str:
        if not state.kept:
            return "" if self.number(state.blocks) else "O or I is one: its eigenvectors are exact"
        own, rest = state.weights.sum(), state.eigenvalues.sum()
        share = (own / (own + rest).clamp_min(torch.finfo(own.dtype).tiny)).item()
        return f"prototypes from {state.kept} samples hold {share:.1%} of the trace"


register("prototypes", Prototypes, "multiples of a few products, and EKFAC of the rest", "prototypes")
