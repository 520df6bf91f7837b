"""``kronfisher doctor`` and ``kronfisher schema``."""

from json import dumps
from pathlib import Path
from typing import Annotated, Any

from kronfisher.experiments.cli.options import example, option, refuse_bad_options, require_writable
from kronfisher.experiments.cli.output import show

__all__ = ["add"]


def add(app: Any) -> None:
    """Add the commands."""
    import typer

    from kronfisher.experiments import commands, schemas

    @app.command(epilog=example("kronfisher doctor --json doctor.json"))
    def doctor(json: Annotated[Path | None, option("write what was found to this file")] = None) -> int:
        """Show versions, devices, threads, arithmetic, and what is missing for which extra; exit code 1: a problem."""
        with refuse_bad_options():
            require_writable(json, folder=False)
        health = commands.doctor()
        show(health)
        if json is not None:
            json.parent.mkdir(parents=True, exist_ok=True)
            json.write_text(health.to_json())
            print("written:", json, sep="\n  ")
        return 1 if health.problems else 0

    known = ", ".join(schemas.SCHEMAS)

    @app.command(epilog=example('kronfisher schema "race suite"'))
    def schema(command: Annotated[str, typer.Argument(help=f"one of {known}")]) -> None:
        """Print the JSON schema of the file that a command writes."""
        with refuse_bad_options():
            found = commands.schema(command)
        print(dumps(found, indent=2, ensure_ascii=False))
