"""EKFAC: the eigenbasis of a Kronecker product, with eigenvalues measured in it."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Block
from kronfisher.fits.fit import Fit
from kronfisher.fits.kfac import KFAC
from kronfisher.fits.kfoc import KFOC
from kronfisher.fits.plan import Plan
from kronfisher.fits.registry import register, resolve
from kronfisher.fits.shapes import elements, sizes
from kronfisher.fits.state import Fixed, State, Total, reciprocal
from kronfisher.layers.activations import Activations
from kronfisher.layers.samples import Samples
from kronfisher.operators import Eigen, KroneckerBasis
from kronfisher.operators.factors import Factor, sandwich

__all__ = ["EKFAC"]

_SHARED = 2**18  # numbers of inputs whose squares may stay until further columns come


@dataclass(kw_only=True)
class Eigenvalues(State):
    """The last pass: ``Σ_k (U_Bᵀ G_k U_A)∘²`` ``[H, O, I]`` in fixed eigenvectors.

    Attributes:
        eigenvalues: that sum.
        inputs: U_A ``[H, I, I]``, or ones for a diagonal.
        outputs: U_B, likewise.
        input_values: eigenvalues of A ``[H, I]``.
        output_values: eigenvalues of B ``[H, O]``.
    """

    eigenvalues: Total
    inputs: Fixed
    outputs: Fixed
    input_values: Fixed
    output_values: Fixed

    _inputs: ClassVar[tuple[ref[Activations], Tensor] | None] = None  # those of the column before, squares in U_A

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory of the last inputs: in another process they are others."""
        return {name: value for name, value in vars(self).items() if name != "_inputs"}

    def add_column_(self, use: Samples) -> bool:
        """Add samples with few inputs, which further columns of the same examples share; whether it did.

        With one position ``(U_Bᵀ g)∘² ((U_Aᵀ a)∘²)ᵀ`` is the square, and the inputs' half is the same for all columns.
        """
        A, B = Factor.of(self.inputs), Factor.of(self.outputs)
        small = use.activations.shape[1] * use.activations.shape[3] <= _SHARED
        if use.positions > 1 or A.is_diagonal or use.activations.onehot or not small:
            return False
        known = self._inputs
        if known is None or known[0]() is not use.activations:
            squares = A.rotate(use.activations.dense())[:, :, 0].square()
            known = ref(use.activations), squares
            self._inputs = known  # pyright: ignore[reportAttributeAccessIssue]
        self.eigenvalues += B.rotate(use.gradients).square().sum(2).mT @ known[1]
        return True


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
    renews: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "basis", resolve(self.basis))

    @property
    def linear(self) -> bool:
        return self.basis.linear

    @property
    def of_gradients(self) -> bool:
        return self.basis.of_gradients

    @property
    def by_batch(self) -> bool:
        return self.basis.by_batch

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        first = self.basis.plan(group, element)
        extra = first.bytes // 2 + element * elements(*sizes(group))  # the eigenvectors are as large as the factors
        return replace(first, bytes=first.bytes + extra, passes=first.passes + 1, by_example=True)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> State:
        return self.basis.init(group, plan, like)

    def takes_columns(self, block: Block) -> bool:
        return self.basis.takes_columns(block)

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        if not isinstance(state, Eigenvalues):
            return self.basis.update(state, samples)
        (use,) = samples
        if use.first:
            state.rows = state.rows + use.rows
        if not state.add_column_(use):
            state.eigenvalues += use.rotated_squares(state.inputs, state.outputs)
        return state

    def combine(self, x: State, y: State, wx: float = 1.0, wy: float = 1.0) -> State:
        last = isinstance(x, Eigenvalues) or isinstance(y, Eigenvalues)
        return super().combine(x, y, wx, wy) if last else self.basis.combine(x, y, wx, wy)

    def next_pass(self, state: State) -> State | None:
        if isinstance(state, Eigenvalues):
            return None
        again = self.basis.next_pass(state)
        if again is not None:
            return again
        factors = self.basis.finish(state).product
        if factors is None:
            raise ValueError(f"EKFAC(basis={self.basis}): the basis must be a fit of one Kronecker product.")
        A, B = factors
        input_values, inputs = A.eigh(f"{state.name} (input factor)")
        output_values, outputs = B.eigh(f"{state.name} (output factor)")
        return Eigenvalues(
            state.blocks,
            state.plan,
            phase=state.phase + 1,
            eigenvalues=A.tensor.new_zeros(sizes(state.blocks)),
            inputs=inputs.tensor,
            outputs=outputs.tensor,
            input_values=input_values,
            output_values=output_values,
        )

    def carried(self, before: Eigenvalues, after: Eigenvalues) -> Eigenvalues:
        """The eigenvalues so far, taken over into the new eigenvectors.

        That is the diagonal there of the matrix that they make in the old eigenvectors. A large eigenvalue would leak
        into small ones beside it, by far more than these are, with every small turn; so each factor's are scaled by
        what the same way there and back would make of the new product's: what belongs to the new product arrives
        unchanged.
        """
        inputs, to_inputs = _turn(before.inputs, after.inputs, after.input_values)
        outputs, to_outputs = _turn(before.outputs, after.outputs, after.output_values)
        values = before.eigenvalues
        rows = sandwich(outputs, values.reshape(1, -1), inputs).reshape(values.shape)
        rows = rows * to_outputs * to_inputs.mT
        return replace(after, eigenvalues=rows, count=before.count, rows=before.rows)

    def finish(self, state: Eigenvalues) -> Eigen:
        state.check()
        basis = KroneckerBasis(state.inputs, state.outputs)
        return Eigen(basis, (state.eigenvalues * reciprocal(state.count)).flatten(), name=state.name)


def _turn(before: Tensor, after: Tensor, values: Tensor) -> tuple[Factor, Tensor]:
    """Squares of the products of new and old eigenvectors, and the scale ``[H, D, 1]`` that leaves `values` as is."""
    turn = (Factor.of(after).mT @ Factor.of(before)).square()
    column = values.clamp_min(values.amax(-1, keepdim=True) * torch.finfo(values.dtype).eps)[..., None]
    back = turn.left(turn.mT.left(column))
    return turn, torch.where(back > 0, column / back, 1.0)


register("ekfac", EKFAC, "K-FAC's eigenvectors, measured eigenvalues", "EKFAC")
register("ekfac-kfoc", lambda: EKFAC(KFOC()), "K-FOC's eigenvectors, measured eigenvalues", "EKFAC on K-FOC")
