"""Which training data are behind some predictions: of a built-in problem, or of a script of the user's."""

import runpy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kronfisher.capture.batches import Batches, split
from kronfisher.errors import DataError
from kronfisher.estimation.documents import document
from kronfisher.estimation.estimate import estimate
from kronfisher.experiments.influence.page import Named, Shown, page
from kronfisher.experiments.progress import Say, Step
from kronfisher.experiments.study import Study
from kronfisher.experiments.training import evaluate, train
from kronfisher.fits import FITS
from kronfisher.influence import Influence, Scores
from kronfisher.likelihoods import Likelihood
from kronfisher.tables import Table

__all__ = ["Subject", "Traces", "built_in", "from_script", "trace"]


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained network with its data and some queries.

    Attributes:
        name: in the heading.
        model: trained, in the mode that is meant.
        train: batches.
        queries: batches.
        likelihood: of the targets.
        characters: of a text, by their numbers; None: no text.
        facts: lines for the report.
    """

    name: str
    model: nn.Module
    train: Any
    queries: Any
    likelihood: Likelihood
    characters: Sequence[str] | None = None
    facts: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Traces:
    """Scores of some queries, and the page that shows them.

    Attributes:
        settings: what they depend on.
        rows: one record for every query and named example.
        html: the page.
        remarks: about the network and what fell back.
        finished: always.
    """

    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    html: str
    remarks: Sequence[str] = ()
    finished: bool = True

    def tables(self) -> list[Table]:
        """The named examples of every query, and their scores."""
        table = Table("Training examples behind each query", ("query", "direction", "examples (score)"), 3)
        for query in dict.fromkeys(row["query"] for row in self.rows):
            for direction in dict.fromkeys(row["direction"] for row in self.rows):
                own = [row for row in self.rows if row["query"] == query and row["direction"] == direction]
                table.add(str(query), direction, ", ".join(f"{row['example']} ({row['score']:+.2g})" for row in own))
        return [table]

    def notes(self) -> list[str]:
        """The remarks."""
        return list(self.remarks)

    def to_json(self) -> str:
        """Everything but the page, as JSON."""
        return document(self.settings, self.finished, rows=list(self.rows))

    def __str__(self) -> str:
        return "\n\n".join(map(str, [*self.tables(), *self.notes()]))


def built_in(study: Study, queries: int, say: Say, step: Step) -> Subject:
    """A network trained on a data set that is known by name; the first test examples are the queries.

    Raises:
        ValueError: the network cannot take such data.
        FileNotFoundError: a file of the data set is missing.
    """
    dataset, model = study.load()
    learned = dataset.head(study.train_size)
    what = f"training {study.network}"
    train(
        model,
        learned,
        epochs=study.epochs,
        batch_size=study.batch_size,
        lr=study.lr,
        seed=study.seed,
        on_step=lambda done, total, loss: step(f"{what}, loss {loss:.3g}", done, total),
    )
    quality = ", ".join(f"test {name} {value:.3g}" for name, value in evaluate(model.eval(), dataset).items())
    fact = f"{study.network} on {len(learned.train_inputs):,} examples of {study.data}: {quality}"
    say(fact)
    characters = None
    if dataset.text:
        from kronfisher.experiments.data.files import locate, read

        characters = sorted(set(read(locate(study.data_dir, "shakespeare/input.txt", "")).decode()))
    return Subject(
        f"{study.network} on {study.data}",
        model,
        learned.batches(study.batch_size),
        dataset.head(test_size=queries).batches(study.batch_size, test=True),
        dataset.likelihood,
        characters,
        (fact,),
    )


def from_script(path: Path, names: Mapping[str, str]) -> Subject:
    """What a script of the user's defines.

    Args:
        path: of the script; it is run.
        names: "model", "train", "queries" and "likelihood" → the script's names for them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not define a name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    found = runpy.run_path(str(path))
    if missing := [name for name in names.values() if name not in found]:
        raise ValueError(f"{path} does not define {', '.join(missing)}; say its names with --model, --train, ...")
    model, train, queries, likelihood = (found[names[key]] for key in ("model", "train", "queries", "likelihood"))
    if not isinstance(model, nn.Module) or not isinstance(likelihood, Likelihood):
        raise ValueError(f"{path}: {names['model']} must be a torch module, {names['likelihood']} a likelihood of kf.")
    return Subject(path.stem, model, train, queries, likelihood)


def trace(subject: Subject, fit: str, top: int, measurement: str, labels: Any, samples: int, say: Say) -> Traces:
    """Score all training data for all queries, and show the first and the last.

    Args:
        subject: network and data.
        fit: of the Fisher matrix, by name.
        top: examples of each kind.
        measurement: "loss", "margin" or "logit".
        labels: of the estimate.
        samples: of the estimate.
        say: called with a line of text whenever a part is done.

    Raises:
        ValueError: there is no such fit.
    """
    if fit not in FITS:
        raise ValueError(f"there is no fit {fit!r}; there are {', '.join(sorted(FITS))}")
    start = time.perf_counter()
    fisher = estimate(subject.model, subject.train, subject.likelihood, fit=fit, labels=labels, samples=samples)
    influence = Influence(subject.model, fisher, subject.likelihood)
    scores = influence.scores(subject.train, subject.queries, measurement=measurement)
    count, size = scores.values.shape
    done = f"{size:,} examples scored for {count} queries with {fit} in {time.perf_counter() - start:.1f} s"
    say(done)
    remarks = [done, *(f"{name}: {reason}; per-example gradients" for name, reason in scores.fallback.items())]
    directions = {True: "helpful", False: "harmful"} if measurement == "loss" else {True: "raises", False: "lowers"}
    rows, named = _named(subject, scores, min(top, size), directions)
    explained = (
        f"Scores say how the {measurement} of a query changes, to first order, if a training example is left out: "
        f"without the {directions[True]} ones it rises, without the {directions[False]} ones it falls."
    )
    settings = {"subject": subject.name, "fit": fit, "measurement": measurement, "labels": labels, "samples": samples}
    text = page(f"Influence: {subject.name}", [*subject.facts, *remarks, explained], named)
    return Traces(settings, rows, text, [*subject.facts, *remarks])


def _named(
    subject: Subject, scores: Scores, top: int, directions: Mapping[bool, str]
) -> tuple[list[dict[str, Any]], list[Named]]:
    tops = {raises: scores.top(top, lowest=not raises) for raises in (True, False)}
    wanted = {int(index) for each in tops.values() for index in each.indices.flatten()}
    examples = _shown(subject, subject.train, wanted)
    queries = _shown(subject, subject.queries, set(range(len(scores))))
    rows, named = [], []
    for q in range(len(scores)):
        lines = []
        for raises, word in directions.items():
            pairs = list(zip(tops[raises].indices[q].tolist(), tops[raises].values[q].tolist(), strict=True))
            lines.append((word, raises, [(index, score, examples[index]) for index, score in pairs]))
            rows += [{"query": q, "direction": word, "example": k, "score": score} for k, score in pairs]
        named.append(Named(queries[q], lines))
    return rows, named


def _shown(subject: Subject, data: Any, wanted: set[int]) -> dict[int, Shown]:
    """Some examples as people see them."""
    found, low = {}, 0
    for where, batch in Batches(data).read(0):
        inputs, targets = split(batch, where) if isinstance(batch, tuple | list) else (batch, None)
        if not isinstance(inputs, Tensor):
            raise DataError(f"{where}: the page can show batches (inputs, targets) of tensors only.")
        for k in range(len(inputs)):
            if low + k in wanted:
                target = targets[k] if isinstance(targets, Tensor) else None
                found[low + k] = _example(subject, inputs[k], target)
        low += len(inputs)
    return found


def _example(subject: Subject, x: Tensor, y: Tensor | None) -> Shown:
    if subject.characters is not None:
        return Shown("".join(subject.characters[int(k)] for k in x))
    label = "" if y is None or y.numel() > 4 else f"target {', '.join(f'{v:g}' for v in y.flatten().tolist())}"
    if x.dim() == 3 and x.shape[0] in (1, 3):
        return Shown(x, label)
    side = isqrt(x.numel())
    if x.dim() == 1 and side * side == x.numel() and side > 4:
        return Shown(x.view(side, side), label)
    some = ", ".join(f"{v:.3g}" for v in x.flatten()[:12].tolist())
    return Shown(f"{some}, ..." if x.numel() > 12 else some, label)
