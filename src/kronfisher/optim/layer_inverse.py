"""The damped inverse of the curvature of one layer."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kronfisher.errors import NumericalError, NumericalWarning, UnsupportedError, together
from kronfisher.fisher.blocks import Block
from kronfisher.fisher.damping import Damping
from kronfisher.fisher.layout import gather, scatter
from kronfisher.operators import Kronecker, Operator
from kronfisher.operators.spectral import Spectral
from kronfisher.optim.layer_statistics import LayerStatistics

__all__ = ["LayerInverse"]

WIDE = 4  # times as wide as the other factor of a weight
RAISES = 6  # times that λ is raised tenfold for a layer that cannot be factorised, before its last inverse is kept


@dataclass(frozen=True)
class Elsewhere:
    """What the schedule of all ranks needs to know of an inverse that another rank keeps.

    Attributes:
        halves: as of `LayerInverse`.
        has_diagonal: likewise.
        spectral: whether its owner keeps the operator, too.
    """

    halves: bool
    has_diagonal: bool
    spectral: bool


@dataclass
class LayerInverse:
    """An inverse made from the statistics of one layer.

    Attributes:
        layer: its statistics.
        other: those of the same weight as it is used transposed, if it is: the curvature is the sum of both.
        due: the step at which the inverse is to be made again.
        operator: the curvature that the inverse was made of, kept where another λ costs next to nothing.
        inverse: the damped inverse; None before the first statistics.
        solves: whether `inverse` is the damped matrix itself, which has no inverse that could be kept.
        value: λ in it.
        mean: the mean eigenvalue of the undamped curvature.
        made: the step at which it was made.
        trouble: what went wrong with the last inverse, empty if nothing.
        begun: whether the output factor's inverse was made without the input factor's, which is to follow.
        inputs_due: the step before which the inverse of an input factor of data is kept.
        elsewhere: of an inverse that another rank made and keeps.
    """

    layer: LayerStatistics
    due: int = 0
    other: LayerStatistics | None = field(default=None, kw_only=True)
    operator: Operator | None = None
    inverse: Operator | None = None
    solves: bool = False
    value: float = 0.0
    mean: float = 0.0
    made: int = -1
    trouble: str = ""
    begun: bool = False
    inputs_due: int = 0
    elsewhere: Elsewhere | None = None

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.layer.blocks

    @property
    def dim(self) -> int:
        return self.layer.dim

    @property
    def separable(self) -> bool:
        """Whether the inverse is one Kronecker product, of a dense input factor and any output factor."""
        factors = None if self.inverse is None or self.solves or len(self.blocks) > 1 else self.inverse.product
        return factors is not None and all(factor.groups == 1 for factor in factors) and not factors[0].is_diagonal

    @property
    def has_diagonal(self) -> bool:
        """Whether the output factor of a separable inverse is a diagonal."""
        if self.elsewhere is not None:
            return self.elsewhere.has_diagonal
        return self.inverse is not None and self.inverse.product is not None and self.inverse.product[1].is_diagonal

    @property
    def halves(self) -> bool:
        """Whether the inverses of its two factors can be made one by one."""
        if self.elsewhere is not None:
            return self.elsewhere.halves
        return self.separable and isinstance(self.inverse, Kronecker)

    @property
    def spectral(self) -> bool:
        """Whether the operator is kept, of which an inverse with another λ costs next to nothing."""
        return self.operator is not None or (self.elsewhere is not None and self.elsewhere.spectral)

    @property
    def ready(self) -> bool:
        """Whether there are statistics."""
        return self.layer.average is not None and (self.other is None or self.other.average is not None)

    def read(self) -> None:
        """Read the operator from the statistics.

        Raises:
            NumericalError: an average is not finite.
        """
        self.operator = self.layer.operator()
        if self.other is not None:
            _, *sizes = self.blocks[0].shape
            self.operator = _sum(self.operator, self.other.operator().transposed(*sizes))

    def measure(self) -> None:
        """Read the operator and its mean eigenvalue from the statistics; raises as `read`."""
        self.read()
        assert self.operator is not None
        self.mean = float(self.operator.trace()) / self.operator.dim

    def make(self, damping: Damping, value: float, step: int, *, outputs: bool | None = None) -> None:
        """Make the inverse of the operator with λ = `value`; λ is raised where that is too small for this layer.

        Args:
            damping: how λ enters.
            value: λ.
            step: number of the step.
            outputs: of a separable inverse, make that of the output factor alone, or, if False, of the input factor.
        """
        assert self.operator is not None
        tried = value
        for _ in range(RAISES):
            try:
                with warnings.catch_warnings(record=True) as caught, together():
                    warnings.simplefilter("always", NumericalWarning)
                    damped = damping.at(tried)(self.operator)
                    try:
                        inverse, solves = self._inverse_of(damped, outputs), False
                    except UnsupportedError:
                        inverse, solves = damped, True
                self.inverse, self.solves = inverse, solves
                self.trouble = str(caught[0].message) if caught else ""
                if tried != value:
                    self.trouble = f"singular with λ = {value:.1e}; raised to {tried:.1e}"
                self.value, self.made = value, step
                break
            except NumericalError as error:
                tried, self.trouble = 10 * tried, str(error)
        else:
            if self.inverse is None:
                raise NumericalError(
                    f"{self.name}: no inverse even with λ = {tried:.1e}. Check this layer's inputs and gradients, or "
                    "give it a diagonal fit."
                )
        if not isinstance(self.operator, Spectral):
            self.operator = None

    def take(self, inverse: Operator, step: int) -> None:
        """Take over an inverse that was made of the operator elsewhere, with λ = 1, in place of `make`."""
        self.inverse, self.solves, self.operator = inverse, False, None
        self.value, self.made, self.trouble = 1.0, step, ""

    def leave(self, value: float, step: int) -> None:
        """Leave the inverse to another rank, in place of `make`, which makes it of the operator that was read."""
        if self.operator is not None or self.inverse is not None:
            kept = self.operator if self.inverse is None else self.inverse  # the structure of both is the same
            like = replace(self, inverse=kept, elsewhere=None)
            self.elsewhere = Elsewhere(like.halves, like.has_diagonal, isinstance(self.operator, Spectral))
        self.operator = self.inverse = None
        self.value, self.made, self.trouble = value, step, ""

    def forget(self) -> None:
        """Be as if no inverse had been made."""
        self.operator = self.inverse = self.elsewhere = None
        self.value, self.made, self.begun = 0.0, -1, False

    def _inverse_of(self, damped: Operator, outputs: bool | None) -> Operator:
        if outputs is None:
            return damped.inverse()
        assert isinstance(damped, Kronecker) and isinstance(self.inverse, Kronecker)
        return damped.half_inverse(self.inverse, outputs=outputs)

    def apply(self, rows: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> None:
        """Write the inverse times a vector ``{name: [1, *shape]}`` into `out`."""
        assert self.inverse is not None
        given = {name: rows.get(name) for block in self.blocks for name in block.parameters}
        if all(tensor is None for tensor in given.values()):
            return
        vectors = {name: _zeros(self.blocks, name, rows) if t is None else t for name, t in given.items()}
        vector = gather(self.blocks, vectors).to(self.inverse.dtype)
        answer = self.inverse.solves(vector) if self.solves else self.inverse.matvecs(vector)
        scatter(self.blocks, answer, {name: out.get(name, vectors[name]) for name in given})

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors, numbers and strings."""
        return {
            "operator": _written(self.operator),
            "inverse": _written(self.inverse),
            **{key: getattr(self, key) for key in _NUMBERS},
        }

    def load_state_dict(self, state: Mapping[str, Any], device: Any) -> None:
        """Take over what `state_dict` gave."""
        self.operator, self.inverse = (_read(state[key], device) for key in ("operator", "inverse"))
        for key in _NUMBERS:
            setattr(self, key, state.get(key, getattr(self, key)))


def _sum(first: Operator, second: Operator) -> Operator:
    """Of two products as one sum, led by the larger, which has an exact inverse at any size and is never formed."""
    if float(first.trace()) < float(second.trace()):
        first, second = second, first
    if isinstance(first, Kronecker) and isinstance(second, Kronecker):
        first, second = _beside_diagonals(first, second), _beside_diagonals(second, first)
    return (first.beside(second) if isinstance(first, Kronecker) else None) or first + second


def _beside_diagonals(own: Kronecker, other: Kronecker) -> Kronecker:
    """With the diagonal alone of a factor that is wide where the other's is a diagonal, as of a table that is read.

    Both together take eigenvectors of that width, which for a vocabulary are far dearer than all else of the layer.
    """
    sides = list(zip(own.product, other.product, strict=True))
    wide = [mine.width > WIDE * sides[1 - k][0].width for k, (mine, _) in enumerate(sides)]
    A, B = (
        mine.diagonal() if far and theirs.is_diagonal else mine.tensor
        for far, (mine, theirs) in zip(wide, sides, strict=True)
    )
    return Kronecker(A, B, own.name, definite=own.definite)


_NUMBERS = ("due", "solves", "value", "mean", "made", "trouble", "begun", "inputs_due")


def _written(operator: Operator | None) -> dict[str, Any] | None:
    if operator is None:
        return None
    return {"tensors": operator.tensors(), "settings": {"kind": operator.kind, **operator.settings()}}


def _read(written: Mapping[str, Any] | None, device: Any) -> Operator | None:
    if written is None:
        return None
    return Operator.restored({key: t.to(device) for key, t in written["tensors"].items()}, written["settings"])


def _zeros(blocks: tuple[Block, ...], name: str, rows: Mapping[str, Tensor]) -> Tensor:
    view = next(view for block in blocks for view in block.views if view.parameter == name)
    return next(iter(rows.values())).new_zeros(1, *view.shape)
