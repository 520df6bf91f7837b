"""``kronfisher uncertainty``."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from kronfisher.experiments.cli.options import FOLDER, checking, option, writable
from kronfisher.experiments.cli.showing import finish, watch

__all__ = ["add"]


def add(app: Any) -> None:
    """Add the command."""
    import torch
    import typer

    from kronfisher.experiments.uncertainty import STUDIES, UCIStudy

    @app.command()
    def uncertainty(
        study: Annotated[str, typer.Argument(help=f"one of {', '.join(STUDIES)}")],
        quick: Annotated[bool, option("the same in seconds", "--quick")] = False,
        splits: Annotated[int | None, option("of each UCI set, for the study uci (default: all)")] = None,
        sets: Annotated[list[str] | None, option("a UCI set, for the study uci; repeatable (default: all)")] = None,
        data_dir: Annotated[Path | None, option(FOLDER)] = None,
        json: Annotated[Path | None, option("settings and results (default: results/uncertainty-STUDY.json)")] = None,
        figures: Annotated[Path, option("folder of the figures")] = Path("results"),
    ) -> int:
        """What each fit is worth as a Laplace posterior: UCI regression, data from elsewhere, or a picture."""
        with checking():
            if study not in STUDIES:
                raise ValueError(f"there is no study {study!r}; there are {', '.join(STUDIES)}")
            chosen = STUDIES[study].quick(data_dir) if quick else STUDIES[study](data_dir=data_dir)
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
            writable(json, folder=False)
            writable(figures, folder=True)
        torch.set_num_threads(1)  # seconds of one thread are what the tables say
        found = watch(f"uncertainty {study}", chosen.run)
        useful = any("failure" not in row for row in found.rows)
        return finish(found, json, figures, found.draw, useful, f"after {len(found.rows)} posteriors")
