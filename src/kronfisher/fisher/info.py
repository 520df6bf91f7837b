"""The origin of a Fisher matrix, as far as its numbers do not tell."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

from kronfisher.errors import DataError

__all__ = ["BlockInfo", "Info"]


@dataclass(frozen=True)
class BlockInfo:
    """The origin of one block.

    Attributes:
        method: the fit, in words, such as ``KFAC(mode='expand')``.
        rows: unmasked positions over all data that used the block's weight.
        seconds: time spent on this block alone.
        error: relative Frobenius error ``‖F − X‖ / ‖F‖``, if the fit knows it.
        notes: what else the fit has to say, such as iterations and convergence.
    """

    method: str = ""
    rows: float = 0.0
    seconds: float = 0.0
    error: float | None = None
    notes: str = ""


@dataclass(frozen=True)
class Info:
    """The origin of a Fisher matrix.

    Attributes:
        count: N, the number of examples.
        reduction: ``"mean"`` (the sum over data divided by N) or ``"sum"``.
        labels: ``"exact"``, ``"sampled"`` or ``"observed"``.
        samples: label draws per example, where labels were sampled.
        seed: of the draws.
        likelihood: in words.
        seconds: wall time of the whole estimate, passes over the model included.
        trainable: how many trainable parameters (numbers) the model has; None if unknown.
        blocks: block name to what concerns it alone.
        targets: what was taken for the targets of a batch, in words; empty if unknown.
        log_likelihood: of the observed targets, summed over data; None if there were none.
        outputs: how many numbers the model gave for the counted data, in all.
        parameters: fingerprint of the parameters at which it was estimated; empty if unknown.
        ranks: how many processes read the data.
        sent: bytes that all of them gave to each other; names, shapes and other small values apart.
        planned: those of sums, which were known from shapes before any were sent; the rest is what owners made of them.
        collectives: how many calls that took.
        changes: what was done to the matrix since, in order, such as ``"+ 0.001"`` or ``"inverse"``.
    """

    count: float
    reduction: Literal["mean", "sum"] = "mean"
    labels: str = "sampled"
    samples: int = 1
    seed: int = 0
    likelihood: str = ""
    seconds: float = 0.0
    trainable: int | None = None
    blocks: Mapping[str, BlockInfo] = field(default_factory=dict)
    log_likelihood: float | None = None
    outputs: float = 0.0
    parameters: str = ""
    targets: str = ""
    ranks: int = 1
    sent: int = 0
    planned: int = 0
    collectives: int = 0
    changes: tuple[str, ...] = ()

    def changed(self, change: str) -> "Info":
        """The same with one more change; errors were those of the matrix before it."""
        blocks = {name: replace(block, error=None) for name, block in self.blocks.items()}
        return replace(self, changes=(*self.changes, change), blocks=blocks)

    def joined(self, other: "Info") -> "Info":
        """Of the sum of two matrices: sums are one over all data, means over N examples each are still over N.

        Raises:
            DataError: one is a mean and the other a sum over data, or they are means over different numbers of data.
        """
        if self.reduction != other.reduction:
            raise DataError(
                f"one Fisher is a {self.reduction} over its data, the other a {other.reduction}; "
                f'bring both to one: fisher.reduced("sum").'
            )
        if self.reduction == "mean" and self.count != other.count:
            raise DataError(
                f"means over {self.count:g} and {other.count:g} data do not add up to a mean over any number of data. "
                'Add sums, fisher.reduced("sum") + other.reduced("sum"); .reduced("mean") makes that a mean over all.'
            )
        more = 0 if self.reduction == "mean" else 1
        blocks = {
            name: replace(mine, rows=mine.rows + more * theirs.rows, seconds=mine.seconds + theirs.seconds, error=None)
            for name, mine in self.blocks.items()
            if (theirs := other.blocks.get(name)) is not None
        }
        changes = self.changes if self.changes == other.changes else (*self.changes, "sum", *other.changes)
        count = self.count + more * other.count
        labels = self.labels if self.labels == other.labels else f"{self.labels} + {other.labels}"
        seconds = self.seconds + other.seconds
        known = more and self.log_likelihood is not None and other.log_likelihood is not None
        log_likelihood = (self.log_likelihood or 0.0) + (other.log_likelihood or 0.0) if known else None
        return replace(
            self,
            count=count,
            labels=labels,
            seconds=seconds,
            blocks=blocks,
            log_likelihood=log_likelihood,
            outputs=self.outputs + more * other.outputs,
            parameters=self.parameters if self.parameters == other.parameters else "",
            ranks=max(self.ranks, other.ranks),
            sent=self.sent + other.sent,
            planned=self.planned + other.planned,
            collectives=self.collectives + other.collectives,
            changes=changes,
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From ``dataclasses.asdict`` of it, tuples become lists; unknown keys are left out."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        blocks = {name: BlockInfo(**block) for name, block in known.get("blocks", {}).items()}
        return cls(**{**known, "blocks": blocks, "changes": tuple(known.get("changes", ()))})
