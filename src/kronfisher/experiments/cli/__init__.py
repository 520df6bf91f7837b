"""The command line: ``kronfisher demo``, ``compare``, ``coverage``, ``report``, ``race`` and others."""

import sys
from typing import Any

from kronfisher.errors import DataError, NumericalError, UnsupportedError
from kronfisher.experiments.cli.options import example, stop

__all__ = ["main"]


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
        stop(str(error), 1)
    except Exception as error:
        # The exceptions of typer moved between its versions; they all know their message.
        if not hasattr(error, "format_message"):
            raise
        stop(error.format_message(), 2)  # pyright: ignore[reportAttributeAccessIssue]


def _app() -> Any:
    """The commands; made here so that importing this module needs no extra."""
    import matplotlib  # noqa: F401
    import rich  # noqa: F401
    import typer
    from typer.core import TyperGroup

    from kronfisher.experiments.cli import comparison, doctor, influence, race, report, suite, uncertainty

    class Commands(TyperGroup):
        """Commands of one word, or of two."""

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            two = " ".join(args[:2])
            return super().resolve_command(ctx, [two, *args[2:]] if two in self.commands else args)

    app = typer.Typer(
        cls=Commands,
        help="Kronecker-factored Fisher matrices: estimate them, and see how good each approximation is.",
        epilog=example("kronfisher demo"),
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    for commands in (comparison, report, uncertainty, influence, race, suite, doctor):
        commands.add(app)
    return app
