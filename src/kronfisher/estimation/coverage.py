"""The parameters that an estimate would cover, before any work."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from kronfisher.capture.batches import Batches
from kronfisher.capture.forward import Forward
from kronfisher.capture.isolation import isolate
from kronfisher.capture.per_sample import per_sample_block
from kronfisher.distributed import ProcessGroup, ranks_of, whole
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.estimation.first_batches import examine
from kronfisher.estimation.recipe import Recipe
from kronfisher.fisher.parameters import unwrapped
from kronfisher.fisher.report import BY_LAYERS, treatment
from kronfisher.fits import Choice
from kronfisher.likelihoods import Categorical
from kronfisher.tables import Table, shares, together

__all__ = ["Coverage", "CoverageRow", "coverage"]


@dataclass(frozen=True)
class CoverageRow:
    """One trainable parameter: how the model uses it and how it would be treated.

    Attributes:
        parameter: its name.
        shape: its shape.
        numel: how many numbers it holds.
        operators: the operators of torch that use it.
        treatment: the fit, ``"unused"``, or ``"fallback: "`` and the fit of the per-example gradients.
        reason: why only the fallback can treat it; empty otherwise.
    """

    parameter: str
    shape: tuple[int, ...]
    numel: int
    operators: tuple[str, ...]
    treatment: str
    reason: str = ""

    @property
    def structure(self) -> str:
        """In a word or two: by layers, diagonal, from per-example gradients, unused."""
        return treatment(self.treatment, diagonal="Diagonal()" in self.treatment)


@dataclass(frozen=True)
class Coverage:
    """Which parameters an estimate covers; printing it gives a table.

    Attributes:
        rows: one per trainable parameter, in the model's order.
        frozen: how many numbers do not require a gradient and are left out.
        cuts: where a chain of layers is cut and why, for fits that treat neighbours together; and for which
            parameters a dense factor would be too dear.

    Example:
        >>> import torch, kronfisher as kf
        >>> found = kf.coverage(torch.nn.Linear(3, 2), torch.randn(5, 3))
        >>> found.share, found.complete, found.rows[0].operators
        (1.0, True, ('linear',))
    """

    rows: tuple[CoverageRow, ...]
    frozen: int
    cuts: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The share of the trainable elements that `estimate` treats with the requested fit."""
        total = sum(row.numel for row in self.rows)
        return sum(row.numel for row in self.rows if not row.reason) / total

    @property
    def complete(self) -> bool:
        """Whether no parameter needs the fallback; otherwise ``estimate(..., strict=True)`` raises."""
        return not any(row.reason for row in self.rows)

    def __str__(self) -> str:
        total = sum(row.numel for row in self.rows)
        table = Table("", ("parameter", "shape", "share", "used by", "treated by"), text=5)
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            share = f"{100 * row.numel / total:.1f} %"
            table.add(row.parameter, shape, share, ", ".join(row.operators) or "-", row.treatment)
        by_layers = sorted(self.rows, key=lambda row: row.structure != BY_LAYERS)
        size = f"{total:,} trainable numbers" + (f"; {self.frozen:,} frozen" if self.frozen else "")
        facts = f"{shares((row.structure, row.numel) for row in by_layers)} ({size})"
        return "\n".join([facts, str(table), *together({row.parameter: row.reason for row in self.rows}), *self.cuts])


def coverage(
    model: nn.Module,
    batch: Any,
    *,
    fit: Choice = "kfac",
    forward: Forward | None = None,
    group: ProcessGroup = None,
) -> Coverage:
    """List how `estimate` would treat each parameter, with the reason for those that only the fallback can treat.

    It takes one forward pass, and a few backward passes if it is not known which example each row belongs to.

    Args:
        model: as for `estimate`.
        batch: one batch (or a loader, whose first batch is used); targets are not needed.
        fit: as for `estimate`.
        forward: as for `estimate`.
        group: the processes that read a part of the data each, as for `estimate`; all of them call this, and each gets
            what the batches of all show.

    Raises:
        UnsupportedError: the model cannot be treated at all (coupled examples, as by BatchNorm in train mode; scripted
            parts or reentrant checkpoints, which hide operators; outputs that depend on no trainable parameter).
        DataError: there is no batch, or it does not fit the model.
        RankError: it failed on another rank of the group, or ranks have different models.

    Example:
        >>> import torch, kronfisher as kf
        >>> print(kf.coverage(torch.nn.Linear(3, 2), torch.randn(5, 3)))
        100.0 % by layers (8 trainable numbers)
        parameter  shape  share   used by  treated by
        ──────────────────────────────────────────────────────
        weight     2x3    75.0 %  linear   KFAC(mode='expand')
        bias       2      25.0 %  linear   KFAC(mode='expand')
    """
    model, ranks = unwrapped(model), ranks_of(group)
    with whole(model):
        recipe = Recipe(model, Categorical(), forward=forward, ranks=ranks)  # any likelihood: no label is drawn
        run, batches = Accumulator(recipe, fit), Batches(batch)
        run.batches = batches.number
        with isolate(model, 0):
            seen, known = examine(run, batches)
    rows = []
    for name, parameter in run.parameters.items():
        treatment = repr(run.fits.given[name]) if any(name in one.reached for one in seen) else "unused"
        used = {operator for one in seen for operator in one.operators.get(name, ())}
        if name in known.dear and not any(name in one.looked_up for one in seen):
            treatment = repr(run.fits.fallback)
        if name in known.fallback:
            treatment = f"fallback: {run.fits.of(per_sample_block(name, parameter))!r}"
            used |= {operator for one in seen for operator in one.beside.get(name, ())}
        shape, reason = tuple(parameter.shape), known.fallback.get(name, "")
        rows.append(CoverageRow(name, shape, parameter.numel(), tuple(sorted(used)), treatment, reason))
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    notes = dict.fromkeys((*(note for one in seen for note in one.notes), *known.dear.values()))
    return Coverage(tuple(rows), frozen, tuple(notes))
