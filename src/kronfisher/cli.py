"""The command line: ``kronfisher demo``, ``compare``, ``coverage``, ``race`` and ``uncertainty``."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kronfisher.errors import DataError, NumericalError, UnsupportedError

if TYPE_CHECKING:
    from kronfisher.experiments.comparison import Comparison
    from kronfisher.experiments.race.race import Race
    from kronfisher.experiments.race.standings import Standings
    from kronfisher.experiments.studies import Findings
    from kronfisher.experiments.study import Study

__all__ = ["main"]

DEMO = ("diagonal", "kfac", "kfac-reduce", "tkfac", "kfoc", "ekfac", "ekfac-kfoc", "kronecker-sum", "full")

READING = """\
relative error  ‖F̂ − F‖ / ‖F‖ against the exact blocks of the same data and labels: 0 is exact, 1 no better than zero
trace ratio     tr F̂ / tr F: 1 if the overall size of the curvature is right
time            of the estimate; memory: of the matrix kept"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit.

    The exit code is 0 when done, 1 if the task is impossible, 2 for bad options (nothing is written then), and 130 when
    interrupted (what was finished is written).

    Args:
        arguments: default: those of the process.
    """
    try:
        app = _app()
    except ImportError as error:
        sys.exit(f'kronfisher: the command line needs more packages ({error}): pip install "kronfisher[cli]"')
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        sys.exit(app(arguments or ["--help"], standalone_mode=False, prog_name="kronfisher") or 0)
    except (DataError, UnsupportedError, NumericalError, MemoryError, ImportError, OSError) as error:
        _stop(str(error), 1)
    except Exception as error:
        # The exceptions of typer moved between its versions; they all know their message.
        if not hasattr(error, "format_message"):
            raise
        _stop(error.format_message(), 2)  # pyright: ignore[reportAttributeAccessIssue]


def _app() -> Any:
    """The commands; made here so that importing this module needs no extra."""
    import matplotlib  # noqa: F401
    import rich  # noqa: F401
    import torch
    import typer

    from kronfisher.experiments import data, networks
    from kronfisher.experiments.race import COMPETITORS, PROBLEMS
    from kronfisher.experiments.studies import STUDIES
    from kronfisher.experiments.study import Study
    from kronfisher.experiments.uncertainty import STUDIES as UNCERTAINTY
    from kronfisher.experiments.uncertainty import UCIStudy
    from kronfisher.fits import FITS

    app = typer.Typer(
        help="Kronecker-factored Fisher matrices: estimate them, and see how good each approximation is.",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    default = Study()

    def option(text: str, *names: str) -> Any:
        return typer.Option(*names, help=text)

    data_help, network_help = f"one of {', '.join(data.NAMES)}", f"one of {', '.join(networks.NAMES)}"
    folder_help = "folder with the files of the data sets (default: $KRONFISHER_DATA)"
    seed_help = "of data, initial weights, training and label draws"

    @app.command()
    def demo(output: Annotated[Path, option("folder for figures and JSON")] = Path("results/demo")) -> int:
        """Train two small networks on handwritten digits and compare every fit of their Fisher matrices."""
        with _options():
            _writable(output, folder=True)
        torch.set_num_threads(1)  # these problems are tiny: threads that wait for each other take longer than the work
        for network in ("convnet", "mlp"):
            study = Study(network=network, fits=DEMO, labels="exact", epochs=15)
            code = _run(study, output / f"{network}.json", output)
            if code:
                return code
        print(READING)
        return 0

    study_help = f"a paper's study instead: {' or '.join(STUDIES)}; of the options below only those of files apply"

    @app.command()
    def compare(
        context: typer.Context,
        study: Annotated[str | None, option(study_help)] = None,
        quick: Annotated[bool, option("the study in seconds, on data that need no files", "--quick")] = False,
        data_name: Annotated[str, option(data_help, "--data")] = default.data,
        network: Annotated[str, option(network_help)] = default.network,
        fits: Annotated[str, option(f"comma-separated, of {', '.join(sorted(FITS))}")] = ",".join(default.fits),
        labels: Annotated[str, option("sampled, exact or observed")] = default.labels,
        samples: Annotated[int, option("label draws a datum, for sampled labels")] = default.samples,
        limit: Annotated[int, option("data that the Fisher is estimated from")] = default.limit,
        train_size: Annotated[int | None, option("data that the network is trained on (default: all)")] = None,
        batch_size: Annotated[int, option("of training and estimating")] = default.batch_size,
        epochs: Annotated[int, option("of training; 0 compares at the initial weights")] = default.epochs,
        lr: Annotated[float, option("Adam's learning rate")] = default.lr,
        seed: Annotated[int, option(seed_help)] = default.seed,
        split: Annotated[int, option("published split of a UCI set")] = default.split,
        data_dir: Annotated[Path | None, option(folder_help)] = None,
        json: Annotated[Path | None, option("write settings and results to this file")] = None,
        figures: Annotated[Path | None, option("draw PNG figures into this folder")] = None,
        memory_budget: Annotated[str | None, option("most memory that an estimate may take, such as 500MB")] = None,
    ) -> int:
        """Train a network, estimate its Fisher matrix with each fit, and say how good each is and what it cost."""
        if study is not None or quick:
            with _options():
                _only(context, {"study", "quick", "data_dir", "json", "figures"})
                if study not in STUDIES:
                    raise ValueError(f"--study (which --quick needs) is one of {', '.join(STUDIES)}; it is {study}")
                chosen = STUDIES[study].quick(data_dir) if quick else STUDIES[study](data_dir=data_dir)
                chosen.check()
                json, figures = json or Path(f"results/{study}.json"), figures or Path("results")
                _writable(json, folder=False)
                _writable(figures, folder=True)
            torch.set_num_threads(1)  # seconds of one thread are what the tables say
            found = _watch(study, chosen.run)
            useful = any("failure" not in row for row in found.rows)
            return _finish(found, json, figures, found.draw, useful, f"after {len(found.rows)} estimates")
        with _options():
            comparison = Study(
                data=data_name,
                network=network,
                fits=_names(fits),
                labels=labels,
                samples=samples,
                limit=limit,
                train_size=train_size,
                batch_size=batch_size,
                epochs=epochs,
                lr=lr,
                seed=seed,
                split=split,
                data_dir=data_dir,
                memory_budget=_bytes(memory_budget),
            )
            _writable(json, folder=False)
            _writable(figures, folder=True)
        return _run(comparison, json, figures)

    @app.command()
    def coverage(
        data_name: Annotated[str, option(data_help, "--data")] = default.data,
        network: Annotated[str, option(network_help)] = default.network,
        seed: Annotated[int, option(seed_help)] = default.seed,
        data_dir: Annotated[Path | None, option(folder_help)] = None,
    ) -> None:
        """Show how each parameter of a network would be treated, before any work."""
        from kronfisher.coverage import coverage as covered

        with _options():
            dataset, model = Study(data=data_name, network=network, seed=seed, data_dir=data_dir).load()
        print(covered(model.eval(), dataset.batches(2)[0]))

    @app.command()
    def uncertainty(
        study: Annotated[str, typer.Argument(help=f"one of {', '.join(UNCERTAINTY)}")],
        quick: Annotated[bool, option("the same in seconds", "--quick")] = False,
        splits: Annotated[int | None, option("of each UCI set, for the study uci (default: all)")] = None,
        sets: Annotated[list[str] | None, option("a UCI set, for the study uci; repeatable (default: all)")] = None,
        data_dir: Annotated[Path | None, option(folder_help)] = None,
        json: Annotated[Path | None, option("settings and results (default: results/uncertainty-STUDY.json)")] = None,
        figures: Annotated[Path, option("folder of the figures")] = Path("results"),
    ) -> int:
        """What each fit is worth as a Laplace posterior: UCI regression, data from elsewhere, or a picture."""
        with _options():
            if study not in UNCERTAINTY:
                raise ValueError(f"there is no study {study!r}; there are {', '.join(UNCERTAINTY)}")
            chosen = UNCERTAINTY[study].quick(data_dir) if quick else UNCERTAINTY[study](data_dir=data_dir)
            if splits is not None:
                if splits < 1 or not isinstance(chosen, UCIStudy):
                    raise ValueError("--splits is a number of at least 1, for the study uci")
                chosen = replace(chosen, splits=splits)
            if sets:
                if not isinstance(chosen, UCIStudy):
                    raise ValueError("--sets is for the study uci")
                chosen = replace(chosen, sets=tuple(sets))
            chosen.check()
            json = json or Path(f"results/uncertainty-{study}.json")
            _writable(json, folder=False)
            _writable(figures, folder=True)
        torch.set_num_threads(1)  # seconds of one thread are what the tables say
        found = _watch(f"uncertainty {study}", chosen.run)
        useful = any("failure" not in row for row in found.rows)
        return _finish(found, json, figures, found.draw, useful, f"after {len(found.rows)} posteriors")

    @app.command()
    def race(
        problem: Annotated[str, typer.Argument(help=f"one of {', '.join(PROBLEMS)}")],
        optimizers: Annotated[str, option(f"comma-separated, of {', '.join(COMPETITORS)}")] = "",
        budget: Annotated[float | None, option("training time of a run in seconds (default: the problem's)")] = None,
        steps: Annotated[int | None, option("at most so many steps a run")] = None,
        seeds: Annotated[str, option("comma-separated; the searches have the first")] = "",
        search: Annotated[str, option("settings searched with a quarter of the budget: all, rates or none")] = "all",
        options: Annotated[str, option('other settings, as JSON or a file: {"x": {"base": "sgd", "lr": 1}}')] = "{}",
        target: Annotated[float | None, option("training loss to reach (default: the best baseline's)")] = None,
        study: Annotated[str, option("kpsvd: the protocol of Koroko et al. (2022) on an auto-encoder")] = "",
        full: Annotated[bool, option("the study's published length, hours a run")] = False,
        output: Annotated[Path | None, option("folder of all results (default: results/race/PROBLEM)")] = None,
        show: Annotated[bool, option("only show what the folder holds")] = False,
        train_size: Annotated[int | None, option("at most so many training data")] = None,
        evaluations: Annotated[int | None, option("how often a run is evaluated")] = None,
        threads: Annotated[int, option("of torch")] = 1,
        device: Annotated[str, option("of torch, such as cuda")] = "cpu",
        data_dir: Annotated[Path | None, option(folder_help)] = None,
    ) -> int:
        """Train with optimisers side by side, from the same weights and in the same order of the data.

        What is in the folder already is not done again, and an interrupted race goes on where it was. Two processes may
        share a folder if they have different optimizers, or different seeds once the searches are done.
        """
        from kronfisher.experiments.race.entry import enter

        with _options():
            entered = enter(
                problem,
                optimizers=_names(optimizers),
                options=_json(options),
                study=study,
                full=full,
                seconds=budget,
                steps=steps,
                seeds=tuple(_whole(seed) for seed in _names(seeds)) or None,
                search=search,
                folder=output,
                train_size=train_size,
                evaluations=evaluations,
                threads=threads,
                device=device,
            )
            _writable(entered.folder, folder=True)
        return _race(entered, data_dir, target, run=not show)

    return app


def _race(race: "Race", data_dir: Path | None, target: float | None, *, run: bool) -> int:
    """Run with progress, print the tables, write the files; the exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from kronfisher.experiments.race.pictures import draw
    from kronfisher.experiments.race.result import write

    console, code = Console(stderr=True, highlight=False, soft_wrap=True), 0
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    if run:
        with _interruptible(), _options():
            task = race.problem.load(data_dir, race.device)
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal, refresh_per_second=2
        ) as progress:
            bar = progress.add_task(race.problem.name, total=1.0)

            def moved(plan: Any, share: float, loss: float) -> None:
                what = f"{plan.competitor}, seed {plan.seed}: step loss {loss:.4g}"
                progress.update(bar, description=what, completed=share)

            try:
                race.go(task, say=lambda text: progress.console.print(text, markup=False), progress=moved)
            except KeyboardInterrupt:
                print("kronfisher: interrupted; the same command goes on from here", file=sys.stderr)
                code = 130
    try:
        standings = race.standings(target)
    except ValueError as error:
        if code:
            return code
        _stop(str(error), 1)
    _show(standings)
    path = race.folder / "race.json"
    write(path, standings.to_json())
    print("written:", path, *draw(standings, race.folder, race.clocks), sep="\n  ", end="\n\n")
    return code


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is no whole number") from None


def _json(text: str) -> Any:
    """An object from JSON, or from the file that `text` names."""
    import json

    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"options are no JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise ValueError("options must be one JSON object of objects, name → settings")
    return found


def _run(study: "Study", json: Path | None, figures: Path | None) -> int:
    """One comparison; the exit code."""
    from kronfisher.experiments.figures import draw

    with _interruptible(), _options():
        dataset, model = study.load()
    comparison = _watch(f"training {study.network}", lambda say, step: study.run(dataset, model, say, step))
    useful = any(not row.failure for row in comparison.rows)
    done = f"after {len(comparison.rows)} of {len(study.fits)} fits"
    return _finish(comparison, json, figures, lambda folder: draw(comparison, folder, study.network), useful, done)


def _watch(what: str, run: Callable[[Callable, Callable], Any]) -> Any:
    """Run with progress on a terminal; an interrupt before anything was finished ends the process."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    quiet = not console.is_terminal  # the lines that are said remain
    with _interruptible(), Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task(what, total=None)
        found = run(
            lambda text: progress.console.print(text, markup=False),
            lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
        )
        if not found.rows:
            raise KeyboardInterrupt
    return found


def _finish(
    found: "Findings | Comparison",
    json: Path | None,
    figures: Path | None,
    draw: Callable[[Path], list[Path]],
    useful: bool,
    done: str,
) -> int:
    """Print the tables and write the files; the exit code, 0 if there are `useful` numbers."""
    _show(found)
    paths = []
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(found.to_json())
        paths.append(json)
    if figures is not None:
        paths += draw(figures)
    if paths:
        print("written:", *paths, sep="\n  ", end="\n\n")
    if not found.finished:
        print(f"kronfisher: interrupted {done}", file=sys.stderr)
        return 130
    return 0 if useful else 1


def _only(context: Any, names: set[str]) -> None:
    """ValueError if the command line sets an option that is not among `names`."""
    given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}
    if odd := sorted(given - names):
        listed = ", ".join(f"--{name.removesuffix('_name').replace('_', '-')}" for name in odd)
        raise ValueError(f"a study has its own settings: leave out {listed}")


def _show(comparison: "Findings | Comparison | Standings") -> None:
    """The tables: drawn for a terminal, plain text for a file or a pipe."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        print(f"\n{comparison}\n")
        return
    for table in comparison.tables():
        drawn = Table(title=table.title, title_justify="left", title_style="bold")
        for k, name in enumerate(table.header):
            drawn.add_column(name, justify="left" if k < table.text else "right", style="cyan" if k == 0 else None)
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
    for note in comparison.notes():
        console.print(note, markup=False, style="yellow")


def _bytes(text: str | None) -> int | None:
    """``500MB`` → 500,000,000; ValueError if it is no size."""
    if text is None:
        return None
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    units |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    stripped = text.strip().lower()
    unit = stripped.lstrip("0123456789.")
    try:
        return int(float(stripped.removesuffix(unit)) * units[unit.strip()])
    except (ValueError, KeyError):
        raise ValueError(f"memory-budget {text!r} is no size; write it as 500MB, 2GB or a number of bytes") from None


def _writable(path: Path | None, *, folder: bool) -> None:
    """ValueError if nothing can be written there, found out before hours of work."""
    if path is None:
        return
    if path.exists() and path.is_dir() != folder:
        raise ValueError(f"{path} is {'a file, not a folder' if folder else 'a folder, not a file'}")
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not folder and path.exists():
        parent = path
    if not os.access(parent, os.W_OK) or (parent.is_file() and parent != path):
        raise ValueError(f"{path} cannot be written: {parent} is {'a file' if parent.is_file() else 'read-only'}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """An interrupt in here leaves nothing behind: one line, exit 130."""
    try:
        yield
    except KeyboardInterrupt:
        _stop("interrupted before anything was finished; nothing was written", 130)


@contextmanager
def _options() -> Iterator[None]:
    """What is wrong in here is wrong with the options: one line, exit 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        _stop(str(error), 2)


def _stop(message: str, code: int) -> None:
    print(f"kronfisher: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
