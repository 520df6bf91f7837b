"""KL: the Kronecker product that is nearest in Kullback-Leibler divergence, by alternating half steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kronfisher.errors import SingularError
from kronfisher.fisher.blocks import Block
from kronfisher.fits.fit import (
    MAX_DIM,
    Fit,
    Plan,
    State,
    checked_max_dim,
    elements,
    reciprocal,
    register,
    side_shapes,
    sizes,
)
from kronfisher.fits.rearrangement import norm, over, times
from kronfisher.layers.samples import Samples
from kronfisher.operators import Kronecker
from kronfisher.operators.algebra import nonnegative
from kronfisher.operators.factors import Factor

__all__ = ["KL"]


@dataclass(frozen=True)
class KL(Fit):
    """The minimum of ``KL(N(0, F + λ·1) ‖ N(0, X))`` over ``X = B ⊗ A``: matrix-normal maximum likelihood.

    Alternates between the two sides (the flip-flop algorithm; Lin et al. 2025 use one step of it per batch)::

        B ← (Σ_k G_k A⁻¹ G_kᵀ / N + λ tr(A⁻¹)·1) / I        A ← (Σ_k G_kᵀ B⁻¹ G_k / N + λ tr(B⁻¹)·1) / O

    from A = 1. The problem is geodesically convex: there is one minimum. X stands for F + λ·1, so that it needs no more
    damping to be inverted; its Frobenius distance from F is not what is small. The undamped fit is equivariant to
    affine reparametrisations of a layer.

    Every half step reads the data once, in the same order and with the same label draws: ``2 · iterations`` passes at
    most, and no memory beyond that of the sides. The report says how many there were and how much A still changed.

    Args:
        damping: λ, in the units of the eigenvalues of F as a mean over data (with ``reduction="sum"``, X is N times as
            large, and so is λ in it). At zero the minimum exists only with enough data in general position (T = 1: at
            least max(I, O) samples, I + 1 if I = O), never with dead inputs or softmax outputs.
        iterations: double steps at most.
        tolerance: a group is done when its A, at norm one, changes by no more than this in a double step.
        max_dim: sides beyond this size are kept as their diagonals, as those of lookups in a table are: then X is the
            minimum under that constraint.

    Raises:
        ValueError: a number makes no sense.
        SingularError: when it is fitted, the minimum does not exist to working precision; raise `damping`.

    Example:
        >>> import torch, kronfisher as kf
        >>> layer = torch.nn.Linear(2, 3)
        >>> fisher = kf.estimate(layer, torch.randn(50, 2), kf.Gaussian(), fit=kf.KL(damping=1e-4), labels="exact")
        >>> fisher.info.blocks["weight"].notes.split(" (")[0]
        'KL: converged after 2 double steps'
    """

    damping: float = 1e-3
    iterations: int = 20
    tolerance: float = 1e-3
    max_dim: int = MAX_DIM

    def __post_init__(self) -> None:
        checked_max_dim(self)
        nonnegative(self.damping, "KL: the damping λ")
        nonnegative(self.tolerance, "KL: the tolerance")
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"KL(iterations={self.iterations!r}): an integer of at least 1.")

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        numbers = sum(elements(*side) for side in side_shapes(group, self.max_dim))
        return Plan(4 * element * numbers, passes=2 * self.iterations)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> State:
        inputs, outputs = side_shapes(group, self.max_dim)
        identity = Factor.type_of(inputs).identity(inputs, like)
        sums = {"outputs": like.new_zeros(outputs)}
        going = torch.ones(inputs[0], dtype=torch.bool, device=like.device)
        return State(group, plan, sums, {"A": identity, "root": identity, "going": going})

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        (use,) = samples
        if use.first:
            state.rows = state.rows + use.rows
        root = state.fixed["root"]
        if "outputs" in state.sums:
            for part in use.rotated(root if state.phase else None, None):
                part.add_output_products_(state.sums["outputs"])
        else:
            for part in use.rotated(None, root):
                part.add_input_products_(state.sums["inputs"])
        return state

    def next_pass(self, state: State) -> State | None:
        A, B = self._sides(state)
        inputs, outputs = side_shapes(state.blocks, self.max_dim)
        going = state.fixed["going"]
        if "inputs" in state.sums:
            going = going & (_change(A, state.fixed["A"]) > self.tolerance)
            if state.phase + 1 >= 2 * self.iterations or not bool(going.any()):
                return None
            sums, side = {"outputs": A.new_zeros(outputs)}, A
        else:
            sums, side = {"inputs": A.new_zeros(inputs)}, B
        fixed = {"A": A, "B": B, "root": self._root(side, state.name), "going": going}
        return State(state.blocks, state.plan, sums, fixed, phase=state.phase + 1)

    def finish(self, state: State) -> Kronecker:
        A, B = self._sides(state)
        even = (
            Factor.of(B).diagonal().mean(1) / Factor.of(A).diagonal().mean(1)
        ).sqrt()  # so that damping both sides alike makes sense
        return Kronecker(times(A, even), times(B, 1 / even), name=state.name, definite=self.damping > 0)

    def notes(self, state: State) -> str:
        steps = (state.phase + 1) // 2
        if "inputs" not in state.sums:
            return "KL: half a step only"
        change = float(_change(self._sides(state)[0], state.fixed["A"]).max())
        done = "converged" if change <= self.tolerance else "NOT converged"
        plural = "" if steps == 1 else "s"
        return f"KL: {done} after {steps} double step{plural} (last change {change:.0e}), fits F + {self.damping:g}"

    def _sides(self, state: State) -> tuple[Tensor, Tensor]:
        """A and B after the pass: the side that was summed is new, where a group has not come to rest."""
        state.checked()
        _, outputs, inputs = sizes(state.blocks)
        root, scale = state.fixed["root"], reciprocal(state.count)
        shift = self.damping * root.square().flatten(1).sum(1)  # λ tr of the other side's inverse
        going = state.fixed["going"]
        if "outputs" in state.sums:
            B = Factor.of(state.sums["outputs"]).mirror(scale).shift(shift).tensor / inputs
            return state.fixed["A"], _chosen(going, B, state.fixed.get("B", B))
        A = Factor.of(state.sums["inputs"]).mirror(scale).shift(shift).tensor / outputs
        return _chosen(going, A, state.fixed["A"]), state.fixed["B"]

    def _root(self, side: Tensor, name: str) -> Tensor:
        """R ``[H, n, n]`` with ``R Rᵀ = side⁻¹``, or its diagonal."""
        try:
            return Factor.of(side).inverse_root(name).tensor
        except SingularError as error:
            raise SingularError(
                f"{name}: KL(damping={self.damping:g}) has no minimum to {side.dtype} precision, because a side of the "
                "product is singular (dead inputs, softmax outputs or too few data). Use a larger damping, or float64."
            ) from error


def _chosen(which: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Group by group the new side or the old one."""
    return torch.where(which.view(-1, *[1] * (new.dim() - 1)), new, old)


def _change(new: Tensor, old: Tensor) -> Tensor:
    """``‖A / ‖A‖ − A' / ‖A'‖‖`` of each group, ``[H]``: the scale may move between A and B."""
    return norm(over(new, norm(new)) - over(old, norm(old)))


register("kl", KL)
