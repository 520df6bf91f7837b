"""EKFAC: the eigenbasis of a Kronecker product, with eigenvalues measured in it."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Block
from kronfisher.fits.fit import Fit, Plan, State, elements, named, reciprocal, register, sizes
from kronfisher.fits.kfac import KFAC
from kronfisher.fits.kfoc import KFOC
from kronfisher.layers.samples import Samples
from kronfisher.operators import Eigen, Kronecker, KroneckerBasis
from kronfisher.operators.factors import Factor, sandwich

__all__ = ["EKFAC"]


@dataclass(frozen=True)
class EKFAC(Fit):
    """Eigenvectors of a rank-one fit, eigenvalues ``S = Σ_k (U_Bᵀ G_k U_A)∘²`` (George et al. 2018).

    Never worse in Frobenius norm than the product whose basis it uses. It reads the data once more than `basis` does,
    in the same order and with the same label draws.

    Args:
        basis: the fit whose Kronecker product gives the eigenvectors, or its name.

    Example:
        >>> import torch, kronfisher as kf
        >>> layer = torch.nn.Linear(2, 3)
        >>> fisher = kf.estimate(layer, torch.randn(50, 2), kf.Gaussian(), fit=kf.EKFAC(), labels="exact")
        >>> fisher["weight"].structure
        'eigenvalue-corrected 3x3'
    """

    basis: Fit = field(default_factory=KFAC)

    def __post_init__(self) -> None:
        object.__setattr__(self, "basis", named(self.basis))

    @property
    def linear(self) -> bool:
        return self.basis.linear

    @property
    def by_batch(self) -> bool:
        return self.basis.by_batch

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        first = self.basis.plan(group, element)
        extra = first.bytes // 2 + element * elements(*sizes(group))  # the eigenvectors are as large as the factors
        return replace(first, bytes=first.bytes + extra, passes=first.passes + 1, by_example=True)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> State:
        return self.basis.init(group, plan, like)

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        if "eigenvalues" not in state.sums:
            return self.basis.update(state, samples)
        (use,) = samples
        if use.first:
            state.rows = state.rows + use.rows
        for part in use.rotated(state.fixed["inputs"], state.fixed["outputs"]):
            state.sums["eigenvalues"] += part.squares()
        return state

    def combine(self, x: State, y: State, wx: float = 1.0, wy: float = 1.0) -> State:
        first = "eigenvalues" not in x.sums and "eigenvalues" not in y.sums
        return self.basis.combine(x, y, wx, wy) if first else super().combine(x, y, wx, wy)

    def next_pass(self, state: State) -> State | None:
        if "eigenvalues" in state.sums:
            return None
        again = self.basis.next_pass(state)
        if again is not None:
            return again
        product = self.basis.finish(state)
        if not isinstance(product, Kronecker):
            raise ValueError(f"EKFAC(basis={self.basis}): the basis must be a fit of one Kronecker product.")
        fixed = {}
        for side, factor in (("inputs", product.input_factor), ("outputs", product.output_factor)):
            values, vectors = factor.eigh(f"{state.name} ({side[:-1]} side)")
            fixed |= {side: vectors.tensor, f"{side}.values": values}
        sums = {"eigenvalues": product.A.new_zeros(sizes(state.blocks))}
        return State(state.blocks, state.plan, sums, fixed, phase=state.phase + 1)

    def carried(self, before: State, after: State) -> State:
        """The eigenvalues so far, taken over into the new eigenvectors.

        That is the diagonal there of the matrix that they make in the old eigenvectors. A large eigenvalue would leak
        into small ones beside it, by far more than these are, with every small turn; so each side's are scaled by what
        the same way there and back would make of the new product's: what belongs to the new product arrives unchanged.
        """
        sides = {}
        for side in ("inputs", "outputs"):
            new, values = Factor.of(after.fixed[side]), after.fixed[f"{side}.values"]
            turn = (new.mT @ Factor.of(before.fixed[side])).square()
            column = values.clamp_min(values.amax(-1, keepdim=True) * torch.finfo(values.dtype).eps)[..., None]
            back = turn.left(turn.mT.left(column))
            sides[side] = turn, torch.where(back > 0, column / back, 1.0)
        values = before.sums["eigenvalues"]
        rows = sandwich(sides["outputs"][0], values.reshape(1, -1), sides["inputs"][0]).reshape(values.shape)
        rows = rows * sides["outputs"][1] * sides["inputs"][1].mT
        return replace(after, sums={"eigenvalues": rows}, count=before.count, rows=before.rows)

    def finish(self, state: State) -> Eigen:
        state.checked()
        basis = KroneckerBasis(state.fixed["inputs"], state.fixed["outputs"])
        return Eigen(basis, (state.sums["eigenvalues"] * reciprocal(state.count)).flatten(), name=state.name)


register("ekfac", EKFAC)
register("ekfac-kfoc", lambda: EKFAC(KFOC()))
