"""``kronfisher race suite``."""

from pathlib import Path
from typing import Annotated, Any

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

__all__ = ["add"]


def add(app: Any) -> None:
    """Add the command."""
    from rich.progress import TextColumn

    from kronfisher.experiments import commands
    from kronfisher.experiments.race.result import write
    from kronfisher.experiments.race.suite import HALVES, PROBLEMS
    from kronfisher.experiments.race.suite import half as half_of
    from kronfisher.experiments.race.suite.contestants import BASELINES
    from kronfisher.experiments.race.suite.fits import FITS, named
    from kronfisher.experiments.race.suite.pictures import draw
    from kronfisher.experiments.race.suite.suite import Suite
    from kronfisher.experiments.race.suite.table import Results

    @app.command(
        "race suite", epilog=example("kronfisher race suite --half development --seconds 3 --optimizers natural")
    )
    def suite(
        half: Annotated[str, option(f"one of {', '.join(HALVES)} (default: both)")] = "",
        problems: Annotated[str, option(f"comma-separated, of {', '.join(PROBLEMS)} (default: the half's)")] = "",
        seconds: Annotated[float | None, option("CPU time of a run (default: 10, and 3 without a table)")] = None,
        tuning_seconds: Annotated[float, option("CPU time of a run of the baselines' searches")] = Suite.tuning,
        search: Annotated[bool, option("search the baselines' settings anew", "--search")] = Suite.search,
        seeds: Annotated[str, option("comma-separated")] = "0,1,2",
        optimizers: Annotated[str, option(f"comma-separated, of {', '.join(BASELINES)}, natural and --options")] = "",
        options: Annotated[str, option('others of ours, as JSON or a file: {"x": {"lr": 0.5}}')] = "{}",
        batch: Annotated[float | None, option("our batch over the baselines' first (default: a rule)")] = None,
        horizon: Annotated[bool, option("ours also with total_steps")] = Suite.horizon,
        fits: Annotated[str, option(f"ours with these fits only: all, or of {', '.join(FITS)}")] = "",
        stability: Annotated[bool, option("ours at every batch size, start and end", "--stability")] = False,
        preconditioner: Annotated[bool, option("SGD at several rates, alone and after it", "--preconditioner")] = False,
        again: Annotated[bool, option("make the runs of --optimizers again, but no search", "--again")] = False,
        show: Annotated[bool, option("only show what the folder holds", "--show")] = False,
        output: Annotated[Path, option("folder of all results")] = Path("results/race/suite"),
        data_dir: Annotated[Path | None, option(FOLDER)] = None,
    ) -> int:
        """Train on many problems of many kinds, seconds each, against tuned AdamW, Muon and SOAP.

        What is in the folder already is not done again, and an interrupted suite continues where it was.
        """
        with refuse_bad_options():
            if (bool(fits) + stability + preconditioner) > 1 or (optimizers and (fits or preconditioner)):
                raise ValueError("--fits, --stability and --preconditioner have their own runs: take one of them alone")
            if show and (stability or preconditioner):
                raise ValueError("--show is of training for the table: leave out --stability and --preconditioner")
            compared = named(tuple(FITS) if fits == "all" else names(fits)) if fits else {}
            known = {"natural": {}, **settings(options), **compared}
            wanted = names(optimizers) or tuple(compared) or (*BASELINES, *(settings(options) or ("natural",)))
            if odd := [name for name in wanted if name not in known and name not in BASELINES]:
                raise ValueError(f"there is no optimizer {odd[0]!r}; there are {', '.join([*BASELINES, *known])}")
            ours = {name: known[name] for name in wanted if name in known}
            common = {
                "problems": names(problems) or half_of(half),
                "folder": output,
                "seeds": tuple(map(whole, names(seeds))),
                "again": again,
                "data_dir": data_dir,
            } | ({} if seconds is None else {"seconds": seconds})
            require_writable(output, folder=True)
        with progress_bar("suite", TextColumn("")) as reports:
            try:
                if stability:
                    found: dict[str, Any] = {
                        f"stability-{name}": commands.stability(name=name, settings=given, say=reports.say, **common)
                        for name, given in ours.items()
                    }
                elif preconditioner:
                    found = {"rates": commands.rates(say=reports.say, **common)}
                else:
                    told = {
                        "horizon": horizon and not fits,
                        "tuning": tuning_seconds,
                        "search": search,
                        "factor": batch,
                        "only": bool(optimizers or fits),
                    }
                    told |= {"ours": ours, "baselines": tuple(name for name in wanted if name in BASELINES)}
                    found = {"suite": commands.suite(show=show, say=reports.say, **told, **common)}
            except KeyboardInterrupt:
                stop("interrupted; the same command continues from here", 130)
        paths = []
        for name, results in found.items():
            print_tables(results)
            paths.append(output / f"{name}.json")
            write(paths[-1], results.to_json())
            if isinstance(results, Results):
                paths += draw(results, output)
        print("written:", *paths, sep="\n  ")
        return 0
