"""``kronfisher race suite``."""

from pathlib import Path
from typing import Annotated, Any

from kronfisher.experiments.cli.options import (
    FOLDER,
    names,
    option,
    refuse_bad_options,
    require_writable,
    settings,
    whole,
)
from kronfisher.experiments.cli.output import progress_bar
from kronfisher.experiments.cli.output import show as print_tables

__all__ = ["add"]


def add(app: Any) -> None:
    """Add the command."""
    from kronfisher.experiments.race.result import write
    from kronfisher.experiments.race.suite import HALVES, PROBLEMS
    from kronfisher.experiments.race.suite import half as half_of
    from kronfisher.experiments.race.suite.contestants import BASELINES
    from kronfisher.experiments.race.suite.suite import Suite, collect

    @app.command("race suite")
    def suite(
        half: Annotated[str, option(f"one of {', '.join(HALVES)} (default: both)")] = "",
        problems: Annotated[str, option(f"comma-separated, of {', '.join(PROBLEMS)} (default: the half's)")] = "",
        seconds: Annotated[float, option("CPU time of a run")] = Suite.seconds,
        tuning_seconds: Annotated[float, option("CPU time of a run of the baselines' searches")] = Suite.tuning,
        seeds: Annotated[str, option("comma-separated")] = "0,1,2",
        optimizers: Annotated[
            str, option(f"comma-separated, of {', '.join(BASELINES)}, natural, and of --options")
        ] = "",
        options: Annotated[str, option('others of ours, as JSON or a file: {"x": {"lr": 0.5}}')] = "{}",
        batch: Annotated[
            float, option("our batch over the baselines' first, the same for all problems")
        ] = Suite.factor,
        horizon: Annotated[bool, option("ours also with total_steps")] = Suite.horizon,
        again: Annotated[bool, option("make our runs again", "--again")] = False,
        show: Annotated[bool, option("only show what the folder holds", "--show")] = False,
        output: Annotated[Path, option("folder of all results")] = Path("results/race/suite"),
        data_dir: Annotated[Path | None, option(FOLDER)] = None,
    ) -> int:
        """Train on many problems of many kinds, seconds each, against tuned AdamW, Muon and SOAP.

        What is in the folder already is not done again, and an interrupted suite continues where it was.
        """
        with refuse_bad_options():
            chosen = names(problems) or half_of(half)
            known = {"natural": {}, **settings(options)}
            wanted = names(optimizers) or (*BASELINES, *(settings(options) or ("natural",)))
            if odd := [name for name in wanted if name not in known and name not in BASELINES]:
                raise ValueError(f"there is no optimizer {odd[0]!r}; there are {', '.join([*BASELINES, *known])}")
            ours = {name: known[name] for name in wanted if name in known}
            others = tuple(name for name in wanted if name in BASELINES)
            entered = Suite(
                chosen,
                output,
                seconds,
                tuning_seconds,
                tuple(map(whole, names(seeds))),
                ours,
                batch,
                others,
                horizon,
                again,
                data_dir,
            )
            entered.check()
            require_writable(output, folder=True)
        if not show:
            from rich.progress import TextColumn

            with progress_bar("suite", TextColumn("")) as reports:
                entered.go(reports.say)
        with refuse_bad_options():
            results = collect(output, chosen, seconds)
        print_tables(results)
        path = output / "suite.json"
        write(path, results.to_json())
        print("written:", path, sep="\n  ")
        return 0
