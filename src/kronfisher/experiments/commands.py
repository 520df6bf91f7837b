"""The commands of ``kronfisher`` as functions: settings go in and a result comes out, which can be printed and drawn.

Nothing is printed, and nothing is written but the folder of a race. Settings that cannot be are refused, and missing
files are found, before the first report of progress.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kronfisher.estimation.comparison import Comparison
from kronfisher.estimation.coverage import Coverage
from kronfisher.estimation.coverage import coverage as coverage_of
from kronfisher.experiments.doctor import Health, examine
from kronfisher.experiments.influence import STUDIES as ATTRIBUTION
from kronfisher.experiments.influence.subject import NAMES, built_in, from_script, running
from kronfisher.experiments.influence.tracing import Traces, trace
from kronfisher.experiments.progress import Say, Step, ignore
from kronfisher.experiments.race.entry import enter
from kronfisher.experiments.race.result import Progress
from kronfisher.experiments.race.standings import Standings
from kronfisher.experiments.race.suite.rates import Pairs, Rates
from kronfisher.experiments.race.suite.stability import Stability, Starts
from kronfisher.experiments.race.suite.suite import Suite
from kronfisher.experiments.race.suite.table import Results
from kronfisher.experiments.schemas import schema
from kronfisher.experiments.studies import STUDIES, Findings
from kronfisher.experiments.study import Study
from kronfisher.experiments.uncertainty import STUDIES as POSTERIORS
from kronfisher.experiments.uncertainty import UCIStudy
from kronfisher.fisher import load

__all__ = [
    "DEMO",
    "compare",
    "coverage",
    "demo",
    "doctor",
    "influence",
    "influence_study",
    "race",
    "rates",
    "report",
    "schema",
    "stability",
    "study",
    "suite",
    "uncertainty",
]

DEMO = {
    network: Study(
        network=network,
        fits=("diagonal", "kfac", "kfac-reduce", "tkfac", "kfoc", "ekfac", "ekfac-kfoc", "kronecker-sum", "full"),
        labels="exact",
        epochs=15,
    )
    for network in ("convnet", "mlp")
}
"""Network → its comparison in the demonstration."""


def demo(network: str, *, say: Say = ignore, step: Step = ignore) -> Comparison:
    """Train a small network on handwritten digits and compare every fit of its Fisher matrix.

    Args:
        network: one of `DEMO`; the command shows them all.
        say: called with a line of text whenever a part is done.
        step: called with what is being done, how many parts of it are done, and of how many.

    Returns:
        One row for each fit.
    """
    with _one_thread():  # these problems are tiny: threads that wait for each other take longer than the work
        return _compare(DEMO[network], say, step)


def compare(*, say: Say = ignore, step: Step = ignore, **settings: Any) -> Comparison:
    """Train a network, estimate its Fisher matrix with each fit, and say how good each is and what it cost.

    Args:
        say: called with a line of text whenever a part is done.
        step: called with what is being done, how many parts of it are done, and of how many.
        settings: those of `Study`.

    Returns:
        One row for each fit; ``kronfisher.experiments.figures.draw`` makes pictures of it.

    Raises:
        ValueError: a setting is not possible.
        FileNotFoundError: a file of the data set is missing.

    Example:
        >>> result = compare(network="mlp", fits=("kfac", "diagonal"), train_size=100, limit=40, epochs=1)
        >>> [row.fit for row in result.rows], result.rows[0].error < result.rows[1].error
        (['kfac', 'diagonal'], True)
    """
    return _compare(Study(**settings), say, step)


def study(
    name: str, *, quick: bool = False, data_dir: Path | None = None, say: Say = ignore, step: Step = ignore
) -> Findings:
    """Repeat the study of a paper.

    Args:
        name: one of `STUDIES`.
        quick: a few seconds of it, on data that need no files.
        data_dir: folder of the data sets' files; None takes KRONFISHER_DATA.
        say: called with a line of text whenever a part is done.
        step: called with what is being done, how many parts of it are done, and of how many.

    Returns:
        Tables (``str``), pictures (``draw``) and numbers (``rows``, ``to_json``).

    Raises:
        ValueError: there is no such study.
        FileNotFoundError: a file of a data set is missing.
    """
    if name not in STUDIES:
        raise ValueError(f"there is no study {name!r}; there are {', '.join(STUDIES)}")
    chosen = STUDIES[name].quick(data_dir) if quick else STUDIES[name](data_dir=data_dir)
    chosen.check()
    with _one_thread():  # seconds of one thread are what the tables say
        return chosen.run(say, step)


def coverage(
    data: str = Study.data, network: str = Study.network, *, seed: int = Study.seed, data_dir: Path | None = None
) -> Coverage:
    """Say how each parameter of a network would be treated, before any work.

    Args:
        data: name of the data set.
        network: name of the network.
        seed: of data and initial weights.
        data_dir: folder of the data sets' files; None takes KRONFISHER_DATA.

    Returns:
        One line for each parameter (``str``), see `Coverage`.

    Raises:
        ValueError: a name is not known, or the network cannot take such data.
        FileNotFoundError: a file of the data set is missing.

    Example:
        >>> coverage(network="mlp").share
        1.0
    """
    dataset, model = Study(data=data, network=network, seed=seed, data_dir=data_dir).load()
    return coverage_of(model.eval(), dataset.batches(2)[0])


def doctor() -> Health:
    """Look at versions, devices, threads and arithmetic, and at what is missing for which extra.

    Returns:
        Tables (``str``) and everything for programs (``to_json``); `problems` says what is wrong.
    """
    return examine()


def report(file: Path, output: Path | None = None, *, title: str = "") -> Path:
    """Write one HTML page about a Fisher matrix, or about a comparison of fits, from its file.

    Args:
        file: what `kronfisher.Fisher.save` or ``kronfisher compare --json`` wrote.
        output: the page (default: beside the file, with its name).
        title: its heading (default: the name of the file, or what was compared).

    Returns:
        The path of the page.

    Raises:
        DataError: the file is neither.
        FileNotFoundError: there is no such file.
        ImportError: a package is missing; the message says which.
    """
    output = output or file.with_suffix(".html")
    if output == file:
        raise ValueError(f"the page would replace {file}; name another with --output")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.suffix == ".json":
        return Comparison.from_json(file.read_text()).save_report(output, title)
    return load(file).save_report(output, title or file.stem)


def race(
    problem: str,
    *,
    show: bool = False,
    target: float | None = None,
    data_dir: Path | None = None,
    say: Say = ignore,
    progress: Progress | None = None,
    **settings: Any,
) -> Standings:
    """Train with optimisers side by side, from the same weights and in the same order of the data.

    What is in the folder already is not done again, and an interrupted race continues where it was.

    Args:
        problem: one of `kronfisher.experiments.race.PROBLEMS`.
        show: only collect what the folder holds.
        target: training loss to which times are measured (default: the best baseline's).
        data_dir: folder of the data sets' files; None takes KRONFISHER_DATA.
        say: called with a line of text for every run.
        progress: called about twice a second, see `Progress`.
        settings: those of `enter`.

    Returns:
        Tables (``str``) and numbers (``to_json``) of everything that the folder holds.

    Raises:
        ValueError: a setting is not possible, or there is no result to show.
        FileNotFoundError: a file of the data set is missing.
    """
    chosen = enter(problem, **settings)
    if not show:
        chosen.go(chosen.problem.load(data_dir, chosen.device), say, progress)
    return chosen.standings(target)


def suite(*, show: bool = False, say: Say = ignore, **settings: Any) -> Results:
    """Train on many problems of many kinds, seconds each, ours against tuned baselines.

    What is in the folder already is not done again, and an interrupted suite continues where it was.

    Args:
        show: only collect what the folder holds.
        say: called with a line of text for every run.
        settings: those of `Suite`.

    Returns:
        Tables (``str``) and numbers (``to_json``) of everything that the folder holds of these problems.

    Raises:
        ValueError: a setting is not possible, or there is no result to show.
        FileNotFoundError: a file of a data set is missing.
    """
    chosen = Suite(**settings)
    chosen.check()
    return chosen.results() if show else chosen.go(say)


def stability(*, say: Say = ignore, **settings: Any) -> Starts:
    """Train shortly on the suite's problems at every batch size, and compare the losses before and after.

    What is in the folder already is not done again.

    Args:
        say: called with a line of text for every run.
        settings: those of `Stability`.

    Returns:
        A table (``str``) and numbers (``to_json``).

    Raises:
        ValueError: a setting is not possible.
        FileNotFoundError: a file of a data set is missing.
    """
    chosen = Stability(**settings)
    chosen.check()
    return chosen.go(say)


def rates(*, say: Say = ignore, **settings: Any) -> Pairs:
    """Train shortly on the suite's problems by SGD at several rates, alone and after the preconditioner.

    What is in the folder already is not done again.

    Args:
        say: called with a line of text for every run.
        settings: those of `Rates`.

    Returns:
        A table (``str``) and numbers (``to_json``).

    Raises:
        ValueError: a setting is not possible.
        FileNotFoundError: a file of a data set is missing.
    """
    chosen = Rates(**settings)
    chosen.check()
    return chosen.go(say)


def uncertainty(
    name: str,
    *,
    quick: bool = False,
    splits: int | None = None,
    sets: Sequence[str] | None = None,
    data_dir: Path | None = None,
    say: Say = ignore,
    step: Step = ignore,
) -> Findings:
    """Measure what each fit is worth as a Laplace posterior: UCI regression, data from elsewhere, or a picture.

    Args:
        name: "uci", "ood" or "picture".
        quick: the same in seconds.
        splits: of each UCI set, for the study "uci" (default: all).
        sets: UCI sets, for the study "uci" (default: all).
        data_dir: folder of the data sets' files; None takes KRONFISHER_DATA.
        say: called with a line of text whenever a part is done.
        step: called with what is being done, how many parts of it are done, and of how many.

    Returns:
        Tables (``str``), pictures (``draw``) and numbers (``rows``, ``to_json``).

    Raises:
        ValueError: a setting is not possible.
        FileNotFoundError: a file of a data set is missing.
    """
    if name not in POSTERIORS:
        raise ValueError(f"there is no study {name!r}; there are {', '.join(POSTERIORS)}")
    chosen = POSTERIORS[name].quick(data_dir) if quick else POSTERIORS[name](data_dir=data_dir)
    if splits is not None or sets:
        if not isinstance(chosen, UCIStudy):
            raise ValueError("splits and sets are settings of the study uci")
        if splits is not None and splits < 1:
            raise ValueError(f"splits is {splits} and must be at least 1")
        chosen = replace(chosen, splits=splits or chosen.splits, sets=tuple(sets or chosen.sets))
    chosen.check()
    with _one_thread():  # seconds of one thread are what the tables say
        return chosen.run(say, step)


def influence(
    *,
    script: Path | None = None,
    names: Mapping[str, str] | None = None,
    queries: int = 8,
    top: int = 5,
    measurement: str = "loss",
    fit: str = "ekfac",
    say: Say = ignore,
    step: Step = ignore,
    **settings: Any,
) -> Traces:
    """Show which training data are behind the predictions of a network.

    Args:
        script: a Python file that defines a trained model, batches of training data and of queries, and a likelihood;
            and, if need be, ``show(input, target)`` of one example, which gives text or a picture.
        names: "model", "train", "queries", "likelihood" and "show" → the script's names for them (default: these).
        queries: test examples that are traced back, of a built-in problem.
        top: examples of each kind that are shown.
        measurement: of a query: "loss", "margin" or "logit".
        fit: of the Fisher matrix, by name.
        say: called with a line of text whenever a part is done.
        step: called with what is being done, how many parts of it are done, and of how many.
        settings: of a built-in problem, those of `Study`.

    Returns:
        A table (``str``), numbers (``rows``, ``to_json``) and a page (``html``).

    Raises:
        ValueError: a setting is not possible.
        FileNotFoundError: a file is missing.

    Example:
        >>> traces = influence(network="mlp", train_size=100, epochs=1, queries=2, top=3)
        >>> len(traces.rows), traces.html.count("<h2>")
        (12, 2)
    """
    if queries < 1 or top < 1:
        raise ValueError(f"queries is {queries} and top is {top}; both must be at least 1")
    if measurement not in ("loss", "margin", "logit"):
        raise ValueError(f"measurement is {measurement!r}; there are loss, margin, logit")
    chosen = Study(**{"network": "mlp", "epochs": 10, **settings, "fits": (fit,)})
    with _one_thread():
        known = {key: key for key in NAMES} | dict(names or {})
        with nullcontext() if script is None else running(script):
            subject = built_in(chosen, queries, say, step) if script is None else from_script(script, known)
            return trace(subject, fit, top, measurement, chosen.labels, chosen.samples, say)


def influence_study(
    name: str,
    *,
    quick: bool = False,
    full: bool = False,
    data_dir: Path | None = None,
    folder: Path = Path("results"),
    say: Say = ignore,
    step: Step = ignore,
) -> Findings:
    """Measure how good scores of training data are: against training again, and at finding wrong labels.

    Args:
        name: "logistic", "perceptron", "concrete", "wrong-labels" or "language".
        quick: the same in seconds.
        full: the whole of the published protocol, in hours.
        data_dir: folder of the data sets' files; None takes KRONFISHER_DATA.
        folder: of the trainings' results, from which an interrupted study goes on.
        say: called with a line of text whenever a part is done.
        step: called with what is being done, how many parts of it are done, and of how many.

    Returns:
        Tables (``str``), pictures (``draw``) and numbers (``rows``, ``to_json``).

    Raises:
        ValueError: there is no such study, or it is to be quick and full.
        FileNotFoundError: a file of a data set is missing.
    """
    if quick and full:
        raise ValueError("a study is quick or full, not both")
    if name not in ATTRIBUTION:
        raise ValueError(f"there is no study {name!r}; there are {', '.join(ATTRIBUTION)}")
    kind, size = ATTRIBUTION[name], "-quick" if quick else "-full" if full else ""
    chosen = kind.quick(data_dir) if quick else kind.full(data_dir) if full else kind(data_dir=data_dir)
    chosen = replace(chosen, folder=folder / f"influence-{name}{size}")
    chosen.check()
    with _one_thread():  # seconds of one thread are what the tables say
        return chosen.run(say, step)


def _compare(chosen: Study, say: Say, step: Step) -> Comparison:
    dataset, model = chosen.load()
    return chosen.run(dataset, model, say, step)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch works with one thread in here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
