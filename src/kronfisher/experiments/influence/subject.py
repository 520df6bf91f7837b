"""Trained networks whose predictions are traced back: a built-in problem, or what a script of the user's defines."""

import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from typing import Any

from torch import Tensor, nn

from kronfisher.capture.batches import as_batches
from kronfisher.experiments.progress import Say, Step
from kronfisher.experiments.study import Study
from kronfisher.experiments.training import evaluate, train
from kronfisher.influence.queries import require_order
from kronfisher.likelihoods import Likelihood

__all__ = ["NAMES", "Subject", "built_in", "from_script", "running"]

NAMES = ("model", "train", "queries", "likelihood", "show")
"""Of a script; the last one is not needed."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained network with its data and some queries.

    Attributes:
        name: in the heading.
        model: trained, in the mode that is meant.
        train: batches.
        queries: batches.
        likelihood: of the targets.
        show: ``show(input, target)`` of one example → text or a picture ``[C, H, W]`` or ``[H, W]``; None: by shape.
        facts: lines for the report.
    """

    name: str
    model: nn.Module
    train: Any
    queries: Any
    likelihood: Likelihood
    show: Callable[[Any, Any], Tensor | str] | None = None
    facts: tuple[str, ...] = ()


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
    show = None
    if dataset.text:
        from kronfisher.experiments.data.files import locate, read

        show = _as_text(sorted(set(read(locate(study.data_dir, "shakespeare/input.txt", "")).decode())))
    return Subject(
        f"{study.network} on {study.data}",
        model,
        learned.batches(study.batch_size),
        dataset.head(test_size=queries).batches(study.batch_size, test=True),
        dataset.likelihood,
        show,
        (fact,),
    )


def _as_text(characters: Sequence[str]) -> Callable[[Any, Any], str]:
    return lambda tokens, _: "".join(characters[int(token)] for token in tokens)


@contextmanager
def running(script: Path) -> Iterator[None]:
    """In here a script finds the modules beside it and no arguments, as where Python runs it."""
    path, arguments = list(sys.path), list(sys.argv)
    sys.path.insert(0, str(script.resolve().parent))
    sys.argv[:] = [str(script)]
    try:
        yield
    finally:
        sys.path[:], sys.argv[:] = path, arguments


def from_script(path: Path, names: Mapping[str, str]) -> Subject:
    """What a script of the user's defines; it is run, and so are the modules that it imports, within `running`.

    Args:
        path: of the script.
        names: of `NAMES` → the script's names for them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it fails, or does not define a name, or what it defines is something else.
        DataError: its data are shuffled, or can be read only once.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        found = runpy.run_path(str(path))
    except Exception as error:
        lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f"line {lines[-1]} of {path}" if lines else path
        raise ValueError(f"{place} fails: {type(error).__name__}: {error}") from error
    if missing := [names[key] for key in NAMES[:-1] if names[key] not in found]:
        raise ValueError(
            f"{path} does not define {', '.join(missing)} (what stands below if __name__ == '__main__' is not run); "
            "say its own names with --model, --train, --queries-name, --likelihood"
        )
    model, train, queries, likelihood = (found[names[key]] for key in NAMES[:-1])
    if not isinstance(model, nn.Module) or not isinstance(likelihood, Likelihood):
        raise ValueError(
            f"{path}: {names['model']} must be a torch module, {names['likelihood']} an instance of a likelihood of "
            f"kf; they are {type(model).__name__} and {getattr(likelihood, '__name__', type(likelihood).__name__)}"
        )
    show = found.get(names["show"])
    if names["show"] != "show" and show is None:
        raise ValueError(f"{path} does not define {names['show']}")
    for what, data in ((names["train"], train), (names["queries"], queries)):
        require_order(data, what)
        if not as_batches(data)[1]:
            raise ValueError(f"{path}: {what} is read several times, and a generator once; make it a list or a loader")
    return Subject(path.stem, model, train, queries, likelihood, show)
