"""A small GPT on Shakespeare: training on halves of the text, and which characters of a piece a score comes from."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kronfisher.estimation.documents import document
from kronfisher.experiments import data
from kronfisher.experiments.figures import write_figures
from kronfisher.experiments.influence.findings import InfluenceFindings
from kronfisher.experiments.influence.fits import FITS, make
from kronfisher.experiments.influence.halves import HalvesStudy
from kronfisher.experiments.influence.retraining import Trainer
from kronfisher.experiments.networks.attention import gpt
from kronfisher.experiments.studies.findings import Record

__all__ = ["LanguageFindings", "LanguageStudy"]

SHOWN, TOP = 4, 2  # queries, and training examples of each


@dataclass(frozen=True, eq=False)
class LanguageFindings(InfluenceFindings):
    """With the scores of single characters.

    Attributes:
        tokens: one record a pair: query and example, their tokens, and the score of each of the example's.
    """

    tokens: list[dict[str, Any]] = field(default_factory=list)
    characters: str = ""

    def to_json(self) -> str:
        """Everything, as JSON."""
        lists = {"networks": list(self.networks), "rows": list(self.rows), "tokens": self.tokens}
        return document(self.settings, self.finished, **lists)

    def draw(self, folder: str | Path) -> list[Path]:
        """The scores of fits, and pieces of text with the score of each character as its colour."""

        def figures() -> Iterator[tuple[str, Any]]:
            from matplotlib.figure import Figure

            figure = Figure(figsize=(11, 0.6 + 0.55 * len(self.tokens)), layout="constrained")
            for axes, row in zip(figure.subplots(len(self.tokens), 1, squeeze=False)[:, 0], self.tokens, strict=True):
                limit = max(map(abs, row["scores"])) or 1.0
                axes.imshow([row["scores"]], cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
                for place, token in enumerate(row["example_tokens"]):
                    colour = "white" if abs(row["scores"][place]) > 0.7 * limit else "black"
                    axes.text(place, 0, self._shown(token), ha="center", va="center", family="monospace", color=colour)
                axes.set(xticks=[], yticks=[])
                axes.grid(visible=False)
                query = "".join(map(self._shown, row["query_tokens"]))
                axes.set_title(f"{query}  ←  no. {row['example']}", fontsize=8, family="monospace", weight="normal")
            yield f"influence-{self.settings['study']}-characters", figure

        return [*super().draw(folder), *(write_figures(folder, figures) if self.tokens else [])]

    def _shown(self, token: int) -> str:
        return {"\n": "↵", " ": "·"}.get(self.characters[token], self.characters[token])


@dataclass(frozen=True)
class LanguageStudy(HalvesStudy):
    """The settings of the study.

    Attributes:
        width: of the network.
        depth: its blocks.
        tokens: is filled with the scores of single characters.
    """

    study: ClassVar[str] = "language"
    dataset: str = "shakespeare"
    train_size: int = 1024
    queries: int = 64
    epochs: int = 20
    subsets: int = 40
    folder: Path = Path("results/influence-language")
    width: int = 32
    depth: int = 2
    tokens: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def quick(cls, data_dir: Path | None = None) -> Self:
        """A few seconds of it."""
        return cls(train_size=48, queries=4, epochs=2, subsets=4, fits=("EKFAC",), width=8, depth=1, data_dir=data_dir)

    @classmethod
    def full(cls, data_dir: Path | None = None) -> Self:
        """A larger network and more text, all fits, and 100 halves with five trainings each."""
        fits = tuple(name for name in FITS if name != "block-tridiagonal")
        return cls(train_size=4096, subsets=100, seeds=5, width=64, depth=4, fits=fits, data_dir=data_dir)

    @property
    def trained(self) -> tuple[str, ...]:
        return *super().trained, "width", "depth"

    def problem(self) -> Trainer:
        dataset = data.load(self.dataset, data_dir=self.data_dir, train_size=self.train_size, test_size=self.queries)

        def make(seed: int) -> nn.Module:
            return gpt(dataset.outputs, dataset.input_shape[0], width=self.width, depth=self.depth, seed=seed)

        return Trainer(dataset, make, self.epochs, 32, 0.003, 0.01, adam=True)

    def show(self, fit: str, model: nn.Module, problem: Trainer, scores: Tensor) -> None:
        """The scores of single characters of the first queries' most helpful examples.

        Scales and shifts of normalisations, a few parameters in a hundred, are left out of these.
        """
        if fit != "EKFAC":
            return
        count, dataset = min(SHOWN, len(scores)), problem.dataset
        model = deepcopy(model)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(False)
        influence = make(fit, model, dataset.batches(250), dataset.likelihood, labels="sampled")
        top = scores[:count].topk(TOP, dim=1).indices
        some = top.flatten().unique()
        train = dataset.train_inputs[some], dataset.train_targets[some]
        queries = dataset.test_inputs[:count], dataset.test_targets[:count]
        parts = influence.scores(train, queries, per="position").values
        for q in range(count):
            for k in top[q].tolist():
                self.tokens.append(
                    {
                        "query": q,
                        "example": k,
                        "query_tokens": queries[0][q].tolist(),
                        "example_tokens": dataset.train_inputs[k].tolist(),
                        "scores": parts[q, int(torch.searchsorted(some, k))].tolist(),
                    }
                )

    def findings(self, networks: list[Record], rows: list[Record], finished: bool) -> LanguageFindings:
        from kronfisher.experiments.data.shakespeare import shakespeare_text

        characters = "".join(sorted(set(shakespeare_text(self.data_dir))))
        return LanguageFindings(self.settings(), networks, rows, finished, self.tokens, characters)
