"""``kronfisher report``."""

from pathlib import Path
from typing import Annotated, Any

from kronfisher.experiments.cli.options import example, option, refuse_bad_options, require_writable

__all__ = ["add"]


def add(app: Any) -> None:
    """Add the command."""
    import typer

    from kronfisher.experiments import commands

    file_help = "a Fisher matrix that fisher.save wrote, or the JSON of kronfisher compare"

    @app.command(epilog=example("kronfisher report fisher.safetensors --output fisher.html"))
    def report(
        file: Annotated[Path, typer.Argument(help=file_help)],
        output: Annotated[Path | None, option("the page (default: beside the file, with its name)")] = None,
        title: Annotated[str, option("its heading (default: from the file)")] = "",
    ) -> None:
        """Write one HTML page, with pictures and no need of a network, about a Fisher matrix or a comparison."""
        with refuse_bad_options():
            require_writable(output, folder=False)
        print("written:", commands.report(file, output, title=title), sep="\n  ")
