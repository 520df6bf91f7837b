"""Which layers go on a chain with which, from batch to batch, and where a chain is cut."""

from collections.abc import Container, Iterable, Mapping

from kronfisher.capture.capture import Capture
from kronfisher.capture.chain import chains
from kronfisher.capture.graph import Proof
from kronfisher.capture.parts import Part
from kronfisher.capture.refusals import refuse
from kronfisher.estimation.assignment import Treatment
from kronfisher.fisher.blocks import Block, Key
from kronfisher.layers import RowOrder

__all__ = ["Following"]


class Following:
    """What follows what; chains that were begun to be counted have to hold.

    Args:
        treatment: which fit treats which block.

    Attributes:
        after: key of a block → key of the one after it, where a fit treats them together.
        cuts: key of a block → why it is not treated together with what comes before, where its fit might do so.
    """

    def __init__(self, treatment: Treatment) -> None:
        self.treatment = treatment
        self.after: dict[Key, Key] = {}
        self.cuts: dict[Key, str] = {}
        self._looked: set[int] = set()  # graphs in which it is known what follows what

    def follow(
        self,
        capture: Capture,
        proof: Proof,
        parts: Mapping[int, list[Part]],
        owners: Mapping[tuple[int, int], RowOrder],
        begun: Container[Key],
        where: str,
    ) -> None:
        """Find the chains of layers that fits treat together.

        Args:
            capture: of the forward pass; its graph is still there.
            proof: what the walk over the graph found.
            parts: index of a call → its blocks.
            owners: (index of a call, number of the part) → how rows are sorted.
            begun: keys of blocks that earlier batches were counted for.
            where: the batch's name in messages.

        Raises:
            UnsupportedError: layers that earlier batches were counted for as neighbours are none here.
        """
        blocks = {part.block.key: part.block for several in parts.values() for part in several}
        if proof.graph in self._looked or not any(self.treatment.fit_of(block).chained for block in blocks.values()):
            return
        found = chains(capture, proof, parts, owners, self._apart)
        broken = [
            (key, later)
            for key, later in self.after.items()
            if blocks.keys() & {key, later} and found.after.get(key) != later
        ]
        refuse(
            {
                names: f"{names}: in earlier batches these layers followed each other and were counted so, here they "
                f"do not ({found.cuts.get(later) or other}). Choose a fit that treats layers apart, such as 'kfac'."
                for key, later in broken
                for names in [", ".join(view.label for part in (key, later) for view in part[:1] if view)]
                for other in ["another comes between" if {key, later} <= blocks.keys() else "one of them is not used"]
            },
            where,
        )
        for key, later in found.after.items():
            if key not in begun and later not in begun:
                self.after[key] = later
        self.cuts = found.cuts | self.cuts
        if not proof.gathers:  # else the rows of the next batch may come in another order
            self._looked.add(proof.graph)

    def _apart(self, earlier: Block, later: Block) -> str:
        """Why no fit takes two blocks together."""
        first, second = self.treatment.fit_of(earlier), self.treatment.fit_of(later)
        if first != second:
            return f"{earlier.name} has another fit"
        if not first.chained:
            return "their fit treats layers apart"
        dtypes = [self.treatment.parameters[block.parameters[0]].dtype for block in (earlier, later)]
        if dtypes[0] != dtypes[1]:
            return f"{earlier.name} is {dtypes[0]}, {later.name} {dtypes[1]}"
        return first.alone(earlier) or first.alone(later)

    def notes(self, blocks: Iterable[Block]) -> list[str]:
        """Where a chain of layers is cut before one of these blocks, and why."""
        return [
            f"cut before {block.name}: {self.cuts[block.key]}"
            for block in blocks
            if block.key in self.cuts and self.treatment.fit_of(block).chained
        ]
