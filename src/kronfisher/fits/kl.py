"""KL: the Kronecker product that is nearest in Kullback-Leibler divergence, by alternating half steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kronfisher.errors import SingularError, keep_integer
from kronfisher.fisher.blocks import Block
from kronfisher.fits.fit import Fit
from kronfisher.fits.plan import Plan
from kronfisher.fits.rearrangement import norm, over, times
from kronfisher.fits.registry import register
from kronfisher.fits.shapes import MAX_DIM, check_max_dim, elements, factor_shapes, sizes
from kronfisher.fits.state import Fixed, State, Upper, reciprocal
from kronfisher.layers.samples import Samples
from kronfisher.operators import Kronecker
from kronfisher.operators.algebra import nonnegative
from kronfisher.operators.factors import Factor

__all__ = ["KL"]


@dataclass(kw_only=True)
class FlipStep(State):
    """Half a step of the flip-flop: one factor is summed around the other, which is fixed.

    Attributes:
        A: the input factor.
        root: R with ``R Rᵀ`` the inverse of the fixed one.
        going: groups that have not come to rest, ``[H]``.
    """

    A: Fixed
    root: Fixed
    going: Fixed

    def add_(self, use: Samples) -> None:
        """Add the half step over some samples."""
        raise NotImplementedError

    def factors(self, damping: float) -> tuple[Tensor, Tensor]:
        """A and B after the pass: the factor that was summed is new, where a group has not come to rest."""
        raise NotImplementedError

    def _damp(self, total: Tensor, damping: float, width: int) -> Tensor:
        """The mean of a sum with λ tr of the other factor's inverse on its diagonal, over the other factor's width."""
        shift = damping * self.root.square().flatten(1).sum(1)
        return Factor.of(total).mirror(reciprocal(self.count)).shift(shift).tensor / width


@dataclass(kw_only=True)
class FlipOutputs(FlipStep):
    """Half a step for B around a fixed A.

    Attributes:
        B: of the double step before; None in the first one.
        outputs: ``Σ_k G_k A⁻¹ G_kᵀ``, the upper triangle ``[H, O, O]``, or diagonal.
    """

    B: Fixed | None = None
    outputs: Upper

    def add_(self, use: Samples) -> None:
        for part in use.rotate(self.root if self.phase else None, None):
            part.add_output_products_(self.outputs)

    def factors(self, damping: float) -> tuple[Tensor, Tensor]:
        B = self._damp(self.outputs, damping, sizes(self.blocks)[2])
        return self.A, _select(self.going, B, B if self.B is None else self.B)


@dataclass(kw_only=True)
class FlipInputs(FlipStep):
    """Half a step for A, which is that of the double step before, around a fixed B.

    Attributes:
        B: the output factor.
        inputs: ``Σ_k G_kᵀ B⁻¹ G_k``, the upper triangle ``[H, I, I]``, or diagonal.
    """

    B: Fixed
    inputs: Upper

    def add_(self, use: Samples) -> None:
        for part in use.rotate(None, self.root):
            part.add_input_products_(self.inputs)

    def factors(self, damping: float) -> tuple[Tensor, Tensor]:
        A = self._damp(self.inputs, damping, sizes(self.blocks)[1])
        return _select(self.going, A, self.A), self.B


@dataclass(frozen=True)
class KL(Fit):
    """The minimum of ``KL(N(0, F + λ·1) ‖ N(0, X))`` over ``X = B ⊗ A``: matrix-normal maximum likelihood.

    Alternates between the two factors (the flip-flop algorithm; Lin et al. 2025 use one step of it per batch)::

        B ← (Σ_k G_k A⁻¹ G_kᵀ / N + λ tr(A⁻¹)·1) / I        A ← (Σ_k G_kᵀ B⁻¹ G_k / N + λ tr(B⁻¹)·1) / O

    from A = 1. The problem is geodesically convex: there is one minimum. X stands for F + λ·1, so that it needs no more
    damping to be inverted; its Frobenius distance from F is not what is small. The undamped fit is equivariant to
    affine reparametrisations of a layer.

    Every half step reads the data once, in the same order and with the same label draws: ``2 · iterations`` passes at
    most, and no memory beyond that of the factors. The report says how many there were and how much A still changed.

    Args:
        damping: λ, in the units of the eigenvalues of F as a mean over data (with ``reduction="sum"``, X is N times as
            large, and so is λ in it). At zero the minimum exists only with enough data in general position (T = 1: at
            least max(I, O) samples, I + 1 if I = O), never with dead inputs or softmax outputs.
        iterations: double steps at most.
        tolerance: a group is done when its A, at norm one, changes by no more than this in a double step.
        max_dim: factors beyond this size are kept as their diagonals, as those of lookups in a table are: then X is the
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
        check_max_dim(self)
        nonnegative(self.damping, "KL: the damping λ")
        nonnegative(self.tolerance, "KL: the tolerance")
        keep_integer(self, "iterations", 1)

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        numbers = sum(elements(*shape) for shape in factor_shapes(group, self.max_dim))
        return Plan(4 * element * numbers, passes=2 * self.iterations)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> FlipOutputs:
        inputs, outputs = factor_shapes(group, self.max_dim)
        identity = Factor.type_of(inputs).identity(inputs, like)
        going = torch.ones(inputs[0], dtype=torch.bool, device=like.device)
        return FlipOutputs(group, plan, outputs=like.new_zeros(outputs), A=identity, root=identity, going=going)

    def update(self, state: FlipStep, samples: tuple[Samples, ...]) -> FlipStep:
        (use,) = samples
        if use.first:
            state.rows = state.rows + use.rows
        state.add_(use)
        return state

    def next_pass(self, state: FlipStep) -> FlipStep | None:
        A, B = state.check().factors(self.damping)
        inputs, outputs = factor_shapes(state.blocks, self.max_dim)
        blocks, plan, phase, going = state.blocks, state.plan, state.phase + 1, state.going
        if isinstance(state, FlipOutputs):
            root = self._root(B, state.name)
            return FlipInputs(blocks, plan, phase=phase, inputs=B.new_zeros(inputs), A=A, B=B, root=root, going=going)
        going = going & (_change(A, state.A) > self.tolerance)
        if state.phase + 1 >= 2 * self.iterations or not bool(going.any()):
            return None
        root = self._root(A, state.name)
        return FlipOutputs(blocks, plan, phase=phase, outputs=A.new_zeros(outputs), A=A, B=B, root=root, going=going)

    def finish(self, state: FlipStep) -> Kronecker:
        A, B = state.check().factors(self.damping)
        # Damping both factors alike makes sense only where their traces are alike.
        even = (Factor.of(B).diagonal().mean(1) / Factor.of(A).diagonal().mean(1)).sqrt()
        return Kronecker(times(A, even), times(B, 1 / even), name=state.name, definite=self.damping > 0)

    def notes(self, state: FlipStep) -> str:
        steps = (state.phase + 1) // 2
        if isinstance(state, FlipOutputs):
            return "KL: half a step only"
        change = float(_change(state.check().factors(self.damping)[0], state.A).max())
        done = "converged" if change <= self.tolerance else "NOT converged"
        plural = "" if steps == 1 else "s"
        return f"KL: {done} after {steps} double step{plural} (last change {change:.0e}), fits F + {self.damping:g}"

    def _root(self, factor: Tensor, name: str) -> Tensor:
        """R ``[H, n, n]`` with ``R Rᵀ = factor⁻¹``, or its diagonal."""
        try:
            return Factor.of(factor).inverse_root(name).tensor
        except SingularError as error:
            raise SingularError(
                f"{name}: KL(damping={self.damping:g}) has no minimum to {factor.dtype} precision: a factor of the "
                "product is singular (dead inputs, softmax outputs, or too few examples). Use a larger damping."
            ) from error


def _select(which: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Group by group the new factor or the old one."""
    return torch.where(which.view(-1, *[1] * (new.dim() - 1)), new, old)


def _change(new: Tensor, old: Tensor) -> Tensor:
    """``‖A / ‖A‖ − A' / ‖A'‖‖`` of each group, ``[H]``: the scale may move between A and B."""
    return norm(over(new, norm(new)) - over(old, norm(old)))


register("kl", KL, "the product nearest in divergence (F + 0.001)", "KL")
