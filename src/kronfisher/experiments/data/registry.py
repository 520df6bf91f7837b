"""Data sets by name: a function that loads one is registered, and everything else finds it there."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kronfisher.experiments.data.dataset import Dataset

__all__ = ["load", "names", "register"]

Loader = TypeVar("Loader", bound=Callable[..., Dataset])
LOADERS: dict[str, Callable[..., Dataset]] = {}
OPTIONS = ("name", "data_dir", "seed", "split", "train_size", "test_size")


def register(*names: str) -> Callable[[Loader], Loader]:
    """Make a function known that loads a data set, under its `names`; they are then known to the command line too.

    The function returns a `Dataset` and takes those of the following that it needs, by keyword: `data_dir` (the folder
    with all files, or None), `seed` (of what is shuffled or generated), `split` (a number), `train_size` and
    `test_size` (left out where nothing is asked for, so they need defaults), and `name` where one function loads
    several data sets.

    Raises:
        ValueError: the function has a parameter of another name, or a name belongs to another data set.

    Example:
        >>> import torch
        >>> from kronfisher.experiments import data
        >>> @data.register("parity")
        ... def parity(seed=0, train_size=100, test_size=20):
        ...     random = torch.Generator().manual_seed(seed)
        ...     bits = torch.randint(2, (train_size + test_size, 8), generator=random)
        ...     inputs, targets = bits.float(), bits.sum(1) % 2
        ...     parts = inputs[:train_size], targets[:train_size], inputs[train_size:], targets[train_size:]
        ...     return data.Dataset("parity", *parts, task="classes", outputs=2)
        >>> data.load("parity", train_size=50)
        Dataset('parity', train [50, 8], test [20, 8], classes)
        >>> del data.registry.LOADERS["parity"]
    """

    def add(loader: Loader) -> Loader:
        if odd := [name for name in inspect.signature(loader).parameters if name not in OPTIONS]:
            raise ValueError(f"a data set is loaded with {', '.join(OPTIONS)}; {names[0]!r} asks for {', '.join(odd)}")
        for name in names:
            if name in LOADERS:
                raise ValueError(f"there is already a data set {name!r}")
            LOADERS[name] = loader
        return loader

    return add


def names() -> tuple[str, ...]:
    """The names of all data sets, in the order in which they were registered."""
    return tuple(LOADERS)


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
        name: one of `names`. "digits" and "curves" need no files.
        data_dir: the folder with the files of the others; None takes the environment variable KRONFISHER_DATA.
        train_size: at most so many training examples (default: all that were published).
        test_size: at most so many test examples.
        seed: of the order of the digits and of what is generated (curves, faces).
        split: which published split of a UCI set.

    Raises:
        ValueError: there is no data set of that name, or no such split.
        FileNotFoundError: a file is missing; the message says which one, where to get it and how to point to it.
        DataError: a file is damaged.

    Example:
        >>> load("curves", train_size=100, test_size=10)
        Dataset('curves', train [100, 784], test [10, 784], probabilities)
    """
    if name not in LOADERS:
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(LOADERS)}")
    loader = LOADERS[name]
    sizes = {key: size for key, size in (("train_size", train_size), ("test_size", test_size)) if size is not None}
    options: dict[str, Any] = {"name": name, "data_dir": data_dir, "seed": seed, "split": split, **sizes}
    wanted = inspect.signature(loader).parameters
    dataset = loader(**{key: value for key, value in options.items() if key in wanted})
    return dataset.head(train_size, test_size)
