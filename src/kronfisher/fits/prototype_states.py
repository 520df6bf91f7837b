"""The states of `Prototypes`: samples kept in the first pass, and sums around fixed prototypes in the second."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from kronfisher.fits.nearest_prototype import split
from kronfisher.fits.prototype_search import find_prototypes
from kronfisher.fits.scaling import moderate
from kronfisher.fits.shapes import Shapes, sizes
from kronfisher.fits.state import FactorSums, Fixed, State, Total, WaitingState
from kronfisher.layers.activations import Dense
from kronfisher.layers.samples import Samples
from kronfisher.linalg import chunks
from kronfisher.operators.factors import Factor

__all__ = ["ROOM", "Kept", "Moments", "Parts"]

ROOM = 2**27  # bytes of samples kept for a layer
_PLASTIC = 1.32471795724474602596  # its powers spread numbers evenly in two dimensions (examples and columns)


@dataclass(frozen=True, eq=False)
class PrototypeSet:
    """Prototypes and the moments of what they leave of the samples that they come from.

    Attributes:
        A: a_c ``[H, m, I]``.
        B: b_c ``[H, m, O]``.
        inputs: ``Σ_k Δ_kᵀ Δ_k`` ``[H, I, I]``, or its diagonal.
        outputs: ``Σ_k Δ_k Δ_kᵀ`` ``[H, O, O]``, or its diagonal.
        kept: how many samples these were.
    """

    A: Tensor
    B: Tensor
    inputs: Tensor
    outputs: Tensor
    kept: int = 0


@dataclass(kw_only=True)
class Kept(WaitingState):
    """Samples of the first pass, chosen by their number alone.

    Attributes:
        nothing: a tensor without elements, of the dtype and device of the sums to come.
        most: how many samples are kept at most.
        examples: how many there were.
        column: of the output Hessian's root, or label draw, that came last.
        share: samples are kept whose own number in [0, 1) is below it.
        numbers: those of the samples that wait.
        longest: T of the longest sample so far.
    """

    nothing: Tensor
    most: int
    examples: int = 0
    column: int = 0
    share: float = 1.0
    numbers: list[Tensor] = field(default_factory=list)
    longest: int = 1

    @property
    def like(self) -> Tensor:
        return self.nothing

    def add_(self, use: Samples) -> None:
        """Keep those samples of a backward pass whose own number is small enough."""
        self.column = 0 if use.first else self.column + 1
        begin = self.examples if use.first else max(0, self.examples - len(use))
        if use.first:
            self.examples += len(use)
        place = torch.arange(begin, begin + len(use), dtype=torch.float64) + 1
        number = (place / _PLASTIC + self.column / _PLASTIC**2) % 1
        chosen = (number < self.share).nonzero()[:, 0]
        if len(chosen):
            self.numbers.append(number[chosen])
            part = use if len(chosen) == len(use) else use.select(chosen.to(use.gradients.device))
            self.waiting.append(replace(part, first=True, mask=None).copy())
        self.longest = max(self.longest, use.positions)
        self._thin(use)

    def joined(self, other: "Kept") -> "Kept":
        """The samples that are kept of both, as evenly spread as those of the one of which fewer are."""
        both = replace(
            self,
            waiting=[*self.waiting, *other.waiting],
            numbers=[*self.numbers, *other.numbers],
            count=self.count + other.count,
            rows=self.rows + other.rows,
            examples=self.examples + other.examples,
            share=min(self.share, other.share),
            longest=max(self.longest, other.longest),
        )
        if both.waiting:
            both._select()
            both._thin((self.waiting or other.waiting)[0])
        return both

    def order_batches(self) -> None:
        """Samples together with their own numbers."""
        pairs = sorted(zip(self.waiting, self.numbers, strict=True), key=lambda pair: pair[0].batch)
        self.waiting, self.numbers = [use for use, _ in pairs], [number for _, number in pairs]

    def _thin(self, use: Samples) -> None:
        """Keep fewer samples, half as many each time, until they are not too many; `use` is like all of them."""
        groups, outputs, inputs = use.shape
        each = groups * self.longest * (outputs + inputs) * use.gradients.element_size()
        most = max(1, min(self.most, ROOM // each))
        while sum(map(len, self.numbers)) > most:
            self.share /= 2
            self._select()

    def _select(self) -> None:
        """Drop the samples whose own number is not below the share."""
        if all(bool((n < self.share).all()) for n in self.numbers):
            return
        kept = [(n < self.share).nonzero()[:, 0] for n in self.numbers]
        self.waiting = [w.select(k.to(w.gradients.device)) for w, k in zip(self.waiting, kept, strict=True) if len(k)]
        self.numbers = [n[k] for n, k in zip(self.numbers, kept, strict=True) if len(k)]

    def prototypes(self, number: int, iterations: int, sides: Shapes) -> PrototypeSet:
        """At most so many prototypes for the samples kept, by so many iterations, and moments of what these leave."""
        groups, outputs, inputs = sizes(self.blocks)
        like = self.nothing
        if not self.waiting:  # nothing ever came: all is zero
            A, B = (like.new_zeros(groups, number, size) for size in (inputs, outputs))
            inputs_moment, outputs_moment = (Factor.type_of(shape).identity(shape, like) for shape in sides)
            return PrototypeSet(A, B, inputs_moment, outputs_moment)
        (samples,) = moderate([self.join()])  # only directions are asked for
        A, B = find_prototypes(samples, min(number, len(samples)), iterations)
        rest = split(samples, A, B)[0]
        moments = [like.new_zeros(shape) for shape in sides]
        rest.add_input_products_(moments[0])
        rest.add_output_products_(moments[1])
        inputs_moment, outputs_moment = (Factor.of(moment).mirror().tensor for moment in moments)
        return PrototypeSet(A, B, inputs_moment, outputs_moment, len(samples))

    def join(self) -> Samples:
        """All that was kept, in the order of the samples' own numbers; shorter ones get positions of zeros."""
        parts = [(use.activations.dense(), use.gradients) for use in self.waiting]
        longest = max(g.shape[2] for _, g in parts)
        a, g = (
            torch.cat([pad(rows, (0, 0, 0, longest - rows.shape[2])) for rows in stack], 1)
            for stack in zip(*parts, strict=True)
        )
        order = torch.cat(self.numbers).argsort(stable=True).to(g.device)
        return replace(self.waiting[0], activations=Dense(a[:, order]), gradients=g[:, order])


@dataclass(kw_only=True)
class Moments(FactorSums):
    """The first pass where one product is exact and there are no prototypes: ``Σ G_kᵀ G_k`` and ``Σ G_k G_kᵀ``."""

    def add_(self, use: Samples) -> None:
        """Add the samples of a backward pass."""
        use.add_output_products_(self.outputs)
        use.add_input_products_(self.inputs)

    def prototypes(self, number: int, iterations: int, sides: Shapes) -> PrototypeSet:
        """No prototypes: all is left."""
        groups, outputs, inputs = sizes(self.blocks)
        A, B = (self.inputs.new_zeros(groups, 0, size) for size in (inputs, outputs))
        inputs_moment, outputs_moment = (Factor.of(moment).mirror().tensor for moment in (self.inputs, self.outputs))
        return PrototypeSet(A, B, inputs_moment, outputs_moment)


@dataclass(kw_only=True)
class Parts(State):
    """The second pass: both parts of every gradient, around fixed prototypes ``z_c = b_c ⊗ a_c``.

    Attributes:
        eigenvalues: ``Σ_k (U_Bᵀ Δ_k U_A)∘²`` ``[H, O, I]``.
        weights: ``Σ ⟨G_k, z_c⟩²`` over the samples nearest to c, ``[H, m]``.
        inputs: U_A ``[H, I, I]``, or ``[H, I]`` of ones.
        outputs: U_B ``[H, O, O]``, or ``[H, O]`` of ones.
        A: a_c ``[H, m, I]``.
        B: b_c ``[H, m, O]``.
        kept: how many samples the prototypes come from.
    """

    eigenvalues: Total
    weights: Total
    inputs: Fixed
    outputs: Fixed
    A: Fixed
    B: Fixed
    kept: int = 0

    def add_(self, use: Samples) -> None:
        """Add the two parts of every sample to the sums of the second pass."""
        A, B = self.A, self.B
        groups, outputs, inputs = use.shape
        if not A.shape[1]:
            for piece in use.rotate(self.inputs, self.outputs):
                self.eigenvalues += piece.squares()
            return
        size = 3 * groups * (use.positions + 1) * (outputs + inputs + A.shape[1]) * use.gradients.element_size()
        for low, high in chunks(len(use), size, use.workspace):
            rest, along, nearest = split(use.part(low, high), A, B)
            self.weights.scatter_add_(1, nearest, along.square().to(self.weights))
            for piece in rest.rotate(self.inputs, self.outputs):
                self.eigenvalues += _sum_squares(piece)


def _sum_squares(samples: Samples) -> Tensor:
    """``Σ_k G_k∘²``; of two positions by the binomial formula, which needs no gradient written out."""
    if samples.positions != 2:
        return samples.squares()
    a, g = samples.activations.dense().unbind(2), samples.gradients.unbind(2)
    mixed = (g[0] * g[1]).mT @ (a[0] * a[1])
    return g[0].square().mT @ a[0].square() + g[1].square().mT @ a[1].square() + 2 * mixed
