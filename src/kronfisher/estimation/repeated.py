"""Batches that are treated as the one before, without looking at them again."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kronfisher.capture.observation import Observation
from kronfisher.capture.parts import Part
from kronfisher.estimation.assignment import Assignment, Known, find_parts
from kronfisher.estimation.groups import Fits

__all__ = ["Repeated"]


@dataclass(frozen=True)
class Repeated:
    """The assignment of a batch, for later ones with the same graph, number of examples and blocks.

    What it says is then proved for these, too. It holds no inputs: those of its parts are gone.

    Attributes:
        assignment: of that batch, without its parts.
        blocks: index of a call → blocks that its uses contribute to, and how.
        known: by that batch and those before it; where more is known, it does not hold.
        signature: of the graph.
        examples: in the batch.
        masked: whether positions were masked.
    """

    assignment: Assignment
    blocks: Mapping[int, list[tuple[object, ...]]]
    known: Known
    signature: int
    examples: int
    masked: bool

    @classmethod
    def of(
        cls, assignment: Assignment, known: Known, observation: Observation, fits: Fits, *, masked: bool
    ) -> "Repeated | None":
        """What later batches may repeat; None where values may decide, and in training, which learns as it goes.

        Args:
            assignment: of the batch.
            known: by now.
            observation: of the batch.
            fits: the fit of every parameter.
            masked: whether positions are masked.
        """
        if not assignment.proved or known.fallback or known.dear or fits.training or fits.chained:
            return None
        blocks = _blocks(assignment.parts)
        bare = replace(assignment, parts={}, new=(), known=known)
        return cls(bare, blocks, known, observation.graph.signature, len(observation), masked)

    def again(self, observation: Observation, fits: Fits, known: Known, *, masked: bool) -> Assignment | None:
        """The assignment of another batch; None where it may differ."""
        same = known is self.known and masked == self.masked and len(observation) == self.examples
        if not same or observation.graph.signature != self.signature or observation.graph.unclaimed:
            return None
        parts = find_parts(observation, fits, known.fallback, known.apart)
        return replace(self.assignment, parts=parts) if _blocks(parts) == self.blocks else None


def _blocks(parts: Mapping[int, list[Part]]) -> dict[int, list[tuple[object, ...]]]:
    def form(part: Part) -> tuple[object, ...]:
        return part.block, type(part.use), part.weight, part.bias

    return {index: [form(part) for part in own] for index, own in parts.items()}
