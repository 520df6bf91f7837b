"""``kronfisher race``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kronfisher.experiments.cli.options import (
    FOLDER,
    checking,
    interruptible,
    names,
    option,
    settings,
    stop,
    whole,
    writable,
)
from kronfisher.experiments.cli.showing import show as shown

if TYPE_CHECKING:
    from kronfisher.experiments.race.race import Race

__all__ = ["add"]


def add(app: Any) -> None:
    """Add the command."""
    import typer

    from kronfisher.experiments.race import COMPETITORS, PROBLEMS

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
        data_dir: Annotated[Path | None, option(FOLDER)] = None,
    ) -> int:
        """Train with optimisers side by side, from the same weights and in the same order of the data.

        What is in the folder already is not done again, and an interrupted race goes on where it was. Two processes may
        share a folder if they have different optimizers, or different seeds once the searches are done.
        """
        from kronfisher.experiments.race.entry import enter

        with checking():
            entered = enter(
                problem,
                optimizers=names(optimizers),
                options=settings(options),
                study=study,
                full=full,
                seconds=budget,
                steps=steps,
                seeds=tuple(whole(seed) for seed in names(seeds)) or None,
                search=search,
                folder=output,
                train_size=train_size,
                evaluations=evaluations,
                threads=threads,
                device=device,
            )
            writable(entered.folder, folder=True)
        return _race(entered, data_dir, target, run=not show)


def _race(race: "Race", data_dir: Path | None, target: float | None, *, run: bool) -> int:
    """Run with progress, print the tables, write the files; the exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from kronfisher.experiments.race.pictures import draw
    from kronfisher.experiments.race.result import write

    console, code = Console(stderr=True, highlight=False, soft_wrap=True), 0
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    if run:
        with interruptible(), checking():
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
        stop(str(error), 1)
    shown(standings)
    path = race.folder / "race.json"
    write(path, standings.to_json())
    print("written:", path, *draw(standings, race.folder, race.clocks), sep="\n  ", end="\n\n")
    return code
