"""Which training data are behind some predictions, as a table and as a page."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kronfisher.estimation.documents import document
from kronfisher.estimation.estimate import estimate
from kronfisher.experiments.influence.examples import shown
from kronfisher.experiments.influence.page import Named, Shown, page
from kronfisher.experiments.influence.subject import Subject
from kronfisher.experiments.progress import Say
from kronfisher.fits import FITS
from kronfisher.influence import Influence, Scores
from kronfisher.tables import Table

__all__ = ["Traces", "trace"]


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
    queries = shown(subject, subject.queries, predicted=True)  # what cannot be shown is known before any work
    shown(subject, subject.train, {0})
    start = time.perf_counter()
    fisher = estimate(subject.model, subject.train, subject.likelihood, fit=fit, labels=labels, samples=samples)
    influence = Influence(subject.model, fisher, subject.likelihood)
    scores = influence.scores(subject.train, subject.queries, measurement=measurement)
    count, size = scores.values.shape
    done = f"{size:,} examples scored for {count} queries with {fit} in {time.perf_counter() - start:.1f} s"
    say(done)
    remarks = [done, *(f"{name}: {reason}; per-example gradients" for name, reason in scores.fallback.items())]
    words = {True: "helpful", False: "harmful"} if measurement == "loss" else {False: "supporting", True: "opposing"}
    rows, named = _named(subject, scores, queries, min(top, size), words)
    explained = (
        f"Scores say how the {measurement} of a query changes, to first order, if a training example is left out: "
        f"without the {words[True]} ones it rises, without the {words[False]} ones it falls."
    )
    settings = {"subject": subject.name, "fit": fit, "measurement": measurement, "labels": labels, "samples": samples}
    text = page(f"Influence: {subject.name}", [*subject.facts, *remarks, explained], named)
    return Traces(settings, rows, text, [*subject.facts, *remarks])


def _named(
    subject: Subject, scores: Scores, queries: Mapping[int, Shown], top: int, words: Mapping[bool, str]
) -> tuple[list[dict[str, Any]], list[Named]]:
    tops = {raises: scores.top(top, lowest=not raises) for raises in (True, False)}
    wanted = {int(index) for each in tops.values() for index in each.indices.flatten()}
    examples = shown(subject, subject.train, wanted)
    rows, named = [], []
    for q in range(len(scores)):
        lines = []
        for raises, word in words.items():
            both = zip(tops[raises].indices[q].tolist(), tops[raises].values[q].tolist(), strict=True)
            pairs = [(index, score) for index, score in both if (score > 0) == raises and score]
            own = [(index, score, examples[index]) for index, score in pairs]
            lines.append((word, word in ("helpful", "supporting"), own))
            rows += [{"query": q, "direction": word, "example": k, "score": score} for k, score in pairs]
        named.append(Named(queries[q], lines))
    return rows, named
