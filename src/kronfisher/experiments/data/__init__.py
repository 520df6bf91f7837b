"""The data sets of the experiments, found by name."""

from pathlib import Path

from kronfisher.experiments.data.curves import curves
from kronfisher.experiments.data.dataset import Dataset
from kronfisher.experiments.data.digits import digits
from kronfisher.experiments.data.faces import faces
from kronfisher.experiments.data.mnist import mnist
from kronfisher.experiments.data.shakespeare import shakespeare
from kronfisher.experiments.data.uci import NAMES as UCI
from kronfisher.experiments.data.uci import uci

__all__ = ["NAMES", "Dataset", "curves", "digits", "faces", "load", "mnist", "shakespeare", "uci"]

NAMES = ("digits", "curves", "mnist", "fashion-mnist", "faces", "shakespeare", *UCI)


def load(
    name: str,
    *,
    data_dir: str | Path | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    split: int = 0,
) -> Dataset:
    """The data set called `name`.

    Args:
        name: one of `NAMES`. "digits" and "curves" need no files.
        data_dir: the folder with the files of the others; None takes the environment variable KRONFISHER_DATA.
        train_size: at most so many training data (default: all that were published).
        test_size: at most so many test data.
        seed: of the order of the digits and of what is generated (curves, faces).
        split: which published split of a UCI set.

    Raises:
        ValueError: there is no data set of that name, or no such split.
        FileNotFoundError: a file is missing; the message says which, and where it comes from.
        DataError: a file is damaged.

    Example:
        >>> load("curves", train_size=100, test_size=10)
        Dataset('curves', train [100, 784], test [10, 784], probabilities)
    """
    generated = {k: v for k, v in (("train_size", train_size), ("test_size", test_size)) if v is not None}
    if name == "digits":
        found = digits(seed)
    elif name == "curves":
        found = curves(seed, **generated)
    elif name == "faces":
        found = faces(data_dir, seed, **generated)
    elif name in ("mnist", "fashion-mnist"):
        found = mnist(name, data_dir)
    elif name == "shakespeare":
        found = shakespeare(data_dir)
    elif name in UCI:
        found = uci(name, data_dir, split)
    else:
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(NAMES)}")
    return found.head(train_size, test_size)
