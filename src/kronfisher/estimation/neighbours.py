"""Which blocks follow each other, from batch to batch, for fits that treat neighbours together."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from kronfisher.capture.chain import find_chains
from kronfisher.capture.observation import Observation
from kronfisher.capture.parts import Part
from kronfisher.estimation.groups import Fits
from kronfisher.fisher.blocks import Block, Key
from kronfisher.layers import RowOrder

__all__ = ["Neighbours", "find_neighbours"]


@dataclass(frozen=True)
class Neighbours:
    """Blocks that follow each other; chains of earlier batches have to hold in later ones.

    Attributes:
        after: key of a block → key of the one after it, where a fit treats them together.
        cuts: key of a block → why it is not treated together with the one before, although its fit could do so.
        examined: the last graphs examined; one that selects rows by index is examined in every batch.
    """

    after: Mapping[Key, Key] = field(default_factory=dict)
    cuts: Mapping[Key, str] = field(default_factory=dict)
    examined: tuple[int, ...] = ()

    def notes(self, blocks: Iterable[Block], fits: Fits) -> list[str]:
        """Where a chain of layers is cut before one of these blocks, and why."""
        return [
            f"cut before {block.name}: {self.cuts[block.key]}"
            for block in blocks
            if block.key in self.cuts and fits.of(block).chained
        ]


def find_neighbours(
    observation: Observation,
    parts: Mapping[int, list[Part]],
    orders: Mapping[tuple[int, int], RowOrder],
    fits: Fits,
    known: Neighbours,
    counted: Container[Key],
) -> Neighbours | dict[str, str]:
    """Find the neighbours, including those of this batch.

    Args:
        observation: of the batch's forward pass.
        parts: index of a call → its blocks.
        orders: (index of a call, number of the part) → which example each row belongs to.
        fits: which fit treats which block.
        known: the neighbours of earlier batches.
        counted: keys of blocks that earlier batches contributed to.

    Returns:
        The neighbours, or why the batch is refused: layers that were neighbours in earlier
        batches are not neighbours here.
    """
    graph = observation.graph
    if not fits.chained or graph.signature in known.examined:
        return known
    if not any(fits.of(part.block).chained for own in parts.values() for part in own):
        return known
    blocks = {part.block.key: part.block for own in parts.values() for part in own}
    chain = find_chains(observation, parts, orders, fits.why_apart)
    broken = [
        (key, later)
        for key, later in known.after.items()
        if blocks.keys() & {key, later} and chain.after.get(key) != later
    ]
    if broken:
        return {
            names: f"{names}: in earlier batches these layers followed each other and were counted so, here they "
            f"do not ({chain.cuts.get(later) or other}). Choose a fit that treats layers apart, such as 'kfac'."
            for key, later in broken
            for names in [", ".join(window.label for part in (key, later) for window in part[:1] if window)]
            for other in ["another comes between" if {key, later} <= blocks.keys() else "one of them is not used"]
        }
    new = {key: later for key, later in chain.after.items() if key not in counted and later not in counted}
    examined = known.examined if graph.gathers or graph.combines else (*known.examined[1 - _ROOM :], graph.signature)
    return Neighbours({**known.after, **new}, {**chain.cuts, **known.cuts}, examined)


_ROOM = 256  # every shape of a batch has a graph of its own
