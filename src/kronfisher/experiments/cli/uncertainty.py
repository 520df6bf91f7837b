"""``kronfisher uncertainty``."""

from pathlib import Path
from typing import Annotated, Any

from kronfisher.experiments.cli.options import FOLDER, example, option, refuse_bad_options, require_writable
from kronfisher.experiments.cli.output import finish, watch

__all__ = ["add"]


def add(app: Any) -> None:
    """Add the command."""
    import typer

    from kronfisher.experiments import commands
    from kronfisher.experiments.uncertainty import STUDIES

    @app.command(epilog=example("kronfisher uncertainty picture --quick"))
    def uncertainty(
        study: Annotated[str, typer.Argument(help=f"one of {', '.join(STUDIES)}")],
        quick: Annotated[bool, option("the same in seconds", "--quick")] = False,
        splits: Annotated[int | None, option("of each UCI set, for the study uci (default: all)")] = None,
        sets: Annotated[list[str] | None, option("a UCI set, for the study uci; repeatable (default: all)")] = None,
        data_dir: Annotated[Path | None, option(FOLDER)] = None,
        json: Annotated[Path | None, option("settings and results (default: results/uncertainty-STUDY.json)")] = None,
        figures: Annotated[Path, option("folder of the figures")] = Path("results"),
    ) -> int:
        """Measure what each fit is worth as a Laplace posterior: UCI regression, data from elsewhere, or a picture."""
        json = json or Path(f"results/uncertainty-{study}.json")
        with refuse_bad_options():
            require_writable(json, folder=False)
            require_writable(figures, folder=True)
        options = {"name": study, "quick": quick, "splits": splits, "sets": sets, "data_dir": data_dir}
        findings = watch(f"uncertainty {study}", commands.uncertainty, **options)
        useful = any("failure" not in row for row in findings.rows)
        return finish(findings, json, figures, findings.draw, useful, f"after {len(findings.rows)} posteriors")
