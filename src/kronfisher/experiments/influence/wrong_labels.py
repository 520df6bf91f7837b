"""Wrong labels in Fashion-MNIST: the share found when the data are inspected in the order of their self-scores."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from kronfisher.experiments import data
from kronfisher.experiments.data import Dataset
from kronfisher.experiments.data.dataset import generator
from kronfisher.experiments.influence.findings import record
from kronfisher.experiments.influence.fits import FITS, IDENTITY, WHOLE, make
from kronfisher.experiments.influence.study import InfluenceStudy
from kronfisher.experiments.networks.feedforward import mlp
from kronfisher.experiments.progress import Say, Step
from kronfisher.experiments.studies.findings import Record
from kronfisher.experiments.training import evaluate, train
from kronfisher.influence import attribution
from kronfisher.likelihoods import Categorical

__all__ = ["WrongLabelsStudy", "with_wrong_labels"]


def with_wrong_labels(dataset: Dataset, share: float, seed: int = 0) -> tuple[Dataset, Tensor]:
    """The data set with another class for a random share of the training examples, and which they are ``[N]``."""
    random, labels = generator(seed, 7), dataset.train_targets.clone()
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[torch.randperm(len(labels), generator=random)[: round(share * len(labels))]] = True
    shift = torch.randint(1, dataset.outputs, labels.shape, generator=random)
    labels[wrong] = (labels + shift)[wrong] % dataset.outputs
    return replace(dataset, train_targets=labels), wrong


@dataclass(frozen=True)
class WrongLabelsStudy(InfluenceStudy):
    """The settings of the study.

    Attributes:
        dataset: name of the data set.
        train_size: examples to train on.
        share: of wrong labels.
        hidden: units of the hidden layer.
        epochs: of training.
        shares: of the data that are inspected.
        fits: names in `FITS`; beside them the loss, and the norm of the gradient.
        folder: nothing is written to it: nothing is trained again.
        data_dir: folder of the data sets' files; None takes KRONFISHER_DATA.
    """

    study: ClassVar[str] = "wrong-labels"
    dataset: str = "fashion-mnist"
    train_size: int = 10000
    share: float = 0.1
    hidden: int = 128
    epochs: int = 10
    shares: Sequence[float] = (0.1, 0.2)
    fits: Sequence[str] = ("diagonal", "K-FAC", "EKFAC", "K-FOC", "EKFAC on K-FOC")
    folder: Path = Path("results/influence-wrong-labels")
    data_dir: Path | None = None

    @classmethod
    def quick(cls, data_dir: Path | None = None) -> Self:
        """A few seconds of it, on digits."""
        return cls("digits", 500, hidden=32, epochs=20, fits=("K-FAC",), data_dir=data_dir)

    @classmethod
    def full(cls, data_dir: Path | None = None) -> Self:
        """All 60,000 images, and all fits but the whole matrix; the identity is the norm of the gradient."""
        return cls(
            train_size=60000, fits=tuple(name for name in FITS if name not in (IDENTITY, WHOLE)), data_dir=data_dir
        )

    def check(self) -> None:
        data.load(self.dataset, data_dir=self.data_dir)

    @property
    def trained(self) -> tuple[str, ...]:
        return "dataset", "train_size", "share", "hidden", "epochs"

    def measure(self, networks: list[Record], rows: list[Record], say: Say, step: Step) -> None:
        dataset = data.load(self.dataset, data_dir=self.data_dir, train_size=self.train_size)
        dataset, wrong = with_wrong_labels(dataset, self.share)
        flat = dataset.flat()
        model = mlp(flat.train_inputs.shape[1], (self.hidden,), dataset.outputs, seed=0)
        started = time.perf_counter()
        train(model, flat, epochs=self.epochs, on_step=lambda done, total, _: step("training", done, total))
        accuracy = evaluate(model, flat)["accuracy"]
        what = f"{len(wrong):,} examples, {int(wrong.sum()):,} labels wrong, test accuracy {accuracy:.1%}"
        self.note(networks, say, what, started, accuracy=accuracy)
        batches = flat.batches(500)
        with torch.no_grad():
            losses = torch.cat([-Categorical().log_prob(model(x), y) for x, y in batches])
        self._add(rows, "loss", losses, wrong, 0.0, say)
        for name in ("gradient norm", *self.fits):
            began = time.perf_counter()
            fit = IDENTITY if name == "gradient norm" else name
            scores = make(fit, model, batches, Categorical(), labels="sampled").self_scores(batches)
            self._add(rows, name, scores, wrong, time.perf_counter() - began, say)
            step(name, len(rows), 2 * len(self.fits) + 4)

    def _add(self, rows: list[Record], name: str, scores: Tensor, wrong: Tensor, seconds: float, say: Say) -> None:
        curve = attribution.mislabelled(scores, wrong, shares=self.shares)
        for share, interval in zip(curve.at, curve.intervals, strict=True):
            rows.append(record(self.dataset, name, f"found in the first {share:.0%}", interval, seconds))
        say(
            f"{name}: "
            + ", ".join(f"{i} in the first {at:.0%}" for at, i in zip(curve.at, curve.intervals, strict=True))
        )
