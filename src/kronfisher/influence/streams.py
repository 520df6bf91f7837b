"""Where scores go as they come: into memory, or into a memory-mapped file."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronfisher.capture.batches import Batches
from kronfisher.errors import DataError, MemoryBudgetError
from kronfisher.estimation.progress import Progress
from kronfisher.influence.files import RowFile
from kronfisher.influence.scores import Scores
from kronfisher.influence.scoring import Part, Scorer
from kronfisher.operators.memory import available_memory

__all__ = ["collect", "join", "load", "write"]


def collect(
    scorer: Scorer,
    batches: Batches,
    number: int,
    residuals: Tensor | None = None,
    progress: Progress = False,
    again: bool = False,
) -> Scores:
    """All scores in memory.

    Args:
        scorer: with its queries.
        batches: the training data.
        number: of their reading.
        residuals: of refined queries.
        progress: as for `kronfisher.estimate`.
        again: whether the data may be read once more.

    Raises:
        MemoryBudgetError: they do not fit.
    """
    parts: list[Part] = []
    limit, taken = available_memory(scorer.own.device), 0
    for part in scorer.read(batches, number, progress, again=again):
        parts.append(part)
        taken += sum(2 * t.numel() * t.element_size() for t in (part.values, part.bounds) if t is not None)
        if taken > limit:
            raise MemoryBudgetError(
                f"{part.where}: the scores of {batches.index} batches take {taken:,} bytes, more than the free memory "
                f"of {limit:,}. Give path=, ask for fewer queries, or, if the loader never ends, one that does."
            )
    values = [part.values for part in parts]
    if scorer.per == "position":  # where a batch has fewer positions, the rest is zero
        longest = max(part.shape[2] for part in values)
        values = [torch.nn.functional.pad(part, (0, longest - part.shape[2])) for part in values]
    bounds = [part.bounds for part in parts if part.bounds is not None]
    return Scores(
        torch.cat(values).transpose(0, 1),
        scorer.per,
        parts[0].names,
        torch.cat(bounds).mT if bounds else None,
        parts[-1].fallback,
        residuals,
    )


def join(slices: Sequence[Scores]) -> Scores:
    """The scores of all queries, one slice after the other."""
    if len(slices) == 1:
        return slices[0]
    bounds = [part.bounds for part in slices if part.bounds is not None]
    residuals = [part.residuals for part in slices if part.residuals is not None]
    return replace(
        slices[0],
        values=torch.cat([part.values for part in slices]),
        bounds=torch.cat(bounds) if bounds else None,
        residuals=torch.cat(residuals) if residuals else None,
    )


def write(
    scorer: Scorer, batches: Batches, number: int, residuals: Tensor | None, file: RowFile, progress: Progress = False
) -> Scores:
    """All scores in a file, which may have some of them already; see `collect`.

    Raises:
        DataError: the batches are not those that the file was written from.
    """
    more = None if residuals is None else residuals.tolist()
    for part in scorer.read(batches, number, progress, skip=file.skip):
        parts = {"scores": part.values} | ({} if part.bounds is None else {"bounds": part.bounds})
        notes: dict[str, Any] = {"per": scorer.per, "names": list(part.names), "fallback": dict(part.fallback)}
        if file.record.rows and file.record.notes["names"] != notes["names"]:
            raise DataError(f"{part.where}: other blocks than in {file.path}; it is left as it is.")
        file.add(parts, notes | {"residuals": more})
    file.finish()
    return _scores_in(file)


def load(paths: Sequence[str | Path]) -> Scores:
    """The scores of some files, one after the other.

    Raises:
        DataError: a file is missing, damaged, not finished or no file of scores, or the files are of other models,
            queries or settings.
    """
    if not paths:
        raise DataError("scores are loaded from one file at least.")
    files = [RowFile(path, None) for path in paths]
    for file in files:
        if file.record.width and "scores" not in file.record.width:
            raise DataError(
                f"{file.path} holds no scores but {' and '.join(file.record.width)}: an index, which "
                "influence.index(train, path) opens."
            )
        if not file.record.finished:
            raise DataError(f"{file.path}: its scores were interrupted; ask for them again with the same path first.")
        first, own = ({**each.record.settings, "names": each.record.notes["names"]} for each in (files[0], file))
        if odd := [name for name in first if first[name] != own.get(name)]:
            raise DataError(f"{file.path} was written with other settings than {files[0].path} ({', '.join(odd)}).")
    found = [_scores_in(file) for file in files]
    if len(found) == 1:
        return found[0]
    bounds = [part.bounds for part in found if part.bounds is not None]
    return replace(
        found[0],
        values=torch.cat([part.values for part in found], dim=1),
        bounds=torch.cat(bounds, dim=1) if bounds else None,
        fallback={name: reason for part in found for name, reason in part.fallback.items()},
    )


def _scores_in(file: RowFile) -> Scores:
    kept, notes = file.open(), file.record.notes
    bounds, residuals = kept.get("bounds"), notes["residuals"]
    return Scores(
        kept["scores"].transpose(0, 1),
        notes["per"],
        tuple(notes["names"]),
        None if bounds is None else bounds.mT,
        notes["fallback"],
        None if residuals is None else torch.tensor(residuals, dtype=kept["scores"].dtype),
    )
