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
    stop,
    whole,
)
from kronfisher.experiments.cli.output import progress_bar
from kronfisher.experiments.cli.output import show as print_tables

__all__ = ["add"]


def add(app: Any) -> None:
    """Add the command."""
    from rich.progress import TextColumn

    from kronfisher.experiments import commands
    from kronfisher.experiments.race.result import write
    from kronfisher.experiments.race.suite import HALVES, PROBLEMS
    from kronfisher.experiments.race.suite import half as half_of
    from kronfisher.experiments.race.suite.contestants import BASELINES
    from kronfisher.experiments.race.suite.suite import Suite

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
            known = {"natural": {}, **settings(options)}
            wanted = names(optimizers) or (*BASELINES, *(settings(options) or ("natural",)))
            if odd := [name for name in wanted if name not in known and name not in BASELINES]:
                raise ValueError(f"there is no optimizer {odd[0]!r}; there are {', '.join([*BASELINES, *known])}")
            chosen = {
                "problems": names(problems) or half_of(half),
                "folder": output,
                "seconds": seconds,
                "tuning": tuning_seconds,
                "seeds": tuple(map(whole, names(seeds))),
                "ours": {name: known[name] for name in wanted if name in known},
                "factor": batch,
                "baselines": tuple(name for name in wanted if name in BASELINES),
                "horizon": horizon,
                "again": again,
                "data_dir": data_dir,
            }
            Suite(**chosen).check()
            require_writable(output, folder=True)
        if show:
            with refuse_bad_options():
                results = commands.suite(show=True, **chosen)
        else:
            with progress_bar("suite", TextColumn("")) as reports:
                try:
                    results = commands.suite(say=reports.say, **chosen)
                except KeyboardInterrupt:
                    stop("interrupted; the same command continues from here", 130)
        print_tables(results)
        path = output / "suite.json"
        write(path, results.to_json())
        print("written:", path, sep="\n  ")
        return 0
