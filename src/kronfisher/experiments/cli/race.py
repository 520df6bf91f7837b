"""``kronfisher race``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kronfisher.experiments.cli.options import (
    FOLDER,
    example,
    names,
    option,
    refuse_bad_options,
    require_writable,
    settings,
    stop,
    whole,
)
from kronfisher.experiments.cli.output import progress_bar
from kronfisher.experiments.cli.output import show as print_tables

if TYPE_CHECKING:
    from kronfisher.experiments.race.result import Plan

__all__ = ["add"]


def add(app: Any) -> None:
    """Add the command."""
    import typer

    from kronfisher.experiments import commands
    from kronfisher.experiments.equations import EQUATIONS
    from kronfisher.experiments.equations.race import OPTIMIZERS
    from kronfisher.experiments.race import COMPETITORS, PROBLEMS
    from kronfisher.experiments.race.entry import enter
    from kronfisher.experiments.race.pictures import draw
    from kronfisher.experiments.race.result import write

    @app.command(epilog=example("kronfisher race curves --optimizers adamw,layerwise --budget 60"))
    def race(
        problem: Annotated[str, typer.Argument(help=f"one of {', '.join((*PROBLEMS, *EQUATIONS, 'uci'))}")],
        optimizers: Annotated[
            str, option(f"comma-separated, of {', '.join(COMPETITORS)}; on equations of {', '.join(OPTIMIZERS)}")
        ] = "",
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
        train_size: Annotated[int | None, option("at most so many training examples")] = None,
        evaluations: Annotated[int | None, option("how often a run is evaluated")] = None,
        threads: Annotated[int, option("of torch")] = 1,
        device: Annotated[str, option("of torch, such as cuda")] = "cpu",
        data_dir: Annotated[Path | None, option(FOLDER)] = None,
    ) -> int:
        """Train with optimisers side by side, from the same weights and in the same order of the data.

        What is in the folder already is not done again, and an interrupted race continues where it was. Two processes
        may share a folder if they have different optimizers, or different seeds once the searches are done.
        """
        if problem in EQUATIONS or problem == "uci":
            with refuse_bad_options():
                drawn: dict[str, Any] = {"optimizers": names(optimizers), "seconds": budget}
                drawn |= {"seeds": tuple(map(whole, names(seeds)))} if seeds else {}
                drawn |= {"data_dir": data_dir} if problem == "uci" else {"equation": EQUATIONS[problem]}
                return _side_by_side(output or Path("results/race") / problem, drawn)
        with refuse_bad_options():
            chosen = {
                "optimizers": names(optimizers),
                "options": settings(options),
                "study": study,
                "full": full,
                "seconds": budget,
                "steps": steps,
                "seeds": tuple(whole(seed) for seed in names(seeds)) or None,
                "search": search,
                "folder": output,
                "train_size": train_size,
                "evaluations": evaluations,
                "threads": threads,
                "device": device,
            }
            entered = enter(problem, **chosen)
            require_writable(entered.folder, folder=True)
        finished = show or _watch(problem, data_dir=data_dir, target=target, **chosen)
        try:
            standings = commands.race(problem, show=True, target=target, **chosen)
        except ValueError as error:
            if not finished:
                return 130
            stop(str(error), 1)
        print_tables(standings)
        path = entered.folder / "race.json"
        write(path, standings.to_json())
        print("written:", path, *draw(standings, entered.folder, entered.clocks), sep="\n  ", end="\n\n")
        return 0 if finished else 130


def _side_by_side(folder: Path, options: dict[str, Any]) -> int:
    """A race on the residuals of an equation, or on small tables, whose files are JSON and figures."""
    from kronfisher.experiments.equations import race as race_equation
    from kronfisher.experiments.race.small_data import contest

    require_writable(folder, folder=True)
    race = race_equation if "equation" in options else contest
    curves = race(**options, say=lambda line: print(line, file=sys.stderr))
    print_tables(curves)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "race.json"
    path.write_text(curves.to_json())
    print("written:", path, *curves.draw(folder), sep="\n  ", end="\n\n")
    return 0


def _watch(problem: str, **options: Any) -> bool:
    """Race with a progress bar; whether it came to its end."""
    from rich.progress import TaskProgressColumn

    from kronfisher.experiments import commands

    with progress_bar(problem, TaskProgressColumn(), refresh_per_second=2) as reports:

        def move(plan: "Plan", share: float, loss: float) -> None:
            reports.step(f"{plan.competitor}, seed {plan.seed}: step loss {loss:.4g}", share, 1.0)

        try:
            commands.race(problem, **options, say=reports.say, progress=move)
        except KeyboardInterrupt:
            if not reports.begun:
                stop("interrupted before anything was finished; nothing was written", 130)
            print("kronfisher: interrupted; the same command continues from here", file=sys.stderr)
            return False
    return True
