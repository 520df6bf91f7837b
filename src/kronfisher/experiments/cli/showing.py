"""Progress while a command works, then its tables and files."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kronfisher.experiments.cli.options import interruptible

if TYPE_CHECKING:
    from kronfisher.estimation.comparison import Comparison
    from kronfisher.experiments.race.standings import Standings
    from kronfisher.experiments.studies import Findings

__all__ = ["finish", "show", "watch"]


def watch(what: str, run: Callable[[Callable, Callable], Any]) -> Any:
    """Run with progress on a terminal; an interrupt before anything was finished ends the process."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    quiet = not console.is_terminal  # the lines that are said remain
    with interruptible(), Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task(what, total=None)
        found = run(
            lambda text: progress.console.print(text, markup=False),
            lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
        )
        if not found.rows:
            raise KeyboardInterrupt
    return found


def finish(
    found: "Findings | Comparison",
    json: Path | None,
    figures: Path | None,
    draw: Callable[[Path], list[Path]],
    useful: bool,
    done: str,
) -> int:
    """Print the tables and write the files; the exit code, 0 if there are `useful` numbers."""
    show(found)
    paths = []
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(found.to_json())
        paths.append(json)
    if figures is not None:
        paths += draw(figures)
    if paths:
        print("written:", *paths, sep="\n  ", end="\n\n")
    if not found.finished:
        print(f"kronfisher: interrupted {done}", file=sys.stderr)
        return 130
    return 0 if useful else 1


def show(comparison: "Findings | Comparison | Standings") -> None:
    """The tables: drawn for a terminal, plain text for a file or a pipe."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        print(f"\n{comparison}\n")
        return
    for table in comparison.tables():
        drawn = Table(title=table.title, title_justify="left", title_style="bold")
        for k, name in enumerate(table.header):
            drawn.add_column(name, justify="left" if k < table.text else "right", style="cyan" if k == 0 else None)
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
    for note in comparison.notes():
        console.print(note, markup=False, style="yellow")
