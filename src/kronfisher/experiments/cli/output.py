"""Progress while a command works, then its tables and files."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kronfisher.experiments.cli.options import stop

if TYPE_CHECKING:
    from rich.progress import Progress

    from kronfisher.estimation.comparison import Comparison
    from kronfisher.experiments.doctor import Health
    from kronfisher.experiments.equations import Curves
    from kronfisher.experiments.influence.tracing import Traces
    from kronfisher.experiments.race.small_data import Contest
    from kronfisher.experiments.race.standings import Standings
    from kronfisher.experiments.race.suite.rates import Pairs
    from kronfisher.experiments.race.suite.stability import Starts
    from kronfisher.experiments.race.suite.table import Results
    from kronfisher.experiments.studies import Findings

__all__ = ["Reports", "finish", "progress_bar", "show", "watch"]


class Reports:
    """Progress of a command on a terminal; elsewhere only lines of text.

    Attributes:
        begun: whether anything was reported; before, an error is one of the options.
    """

    def __init__(self, progress: "Progress", what: str, total: float | None = None) -> None:
        self.progress, self.begun = progress, False
        self.task = progress.add_task(what, total=total)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.begun = True
        self.progress.console.print(text, markup=False)

    def step(self, what: str, done: float, total: float) -> None:
        """Move the bar."""
        self.begun = True
        self.progress.update(self.task, description=what, completed=done, total=total)


@contextmanager
def progress_bar(what: str, amount: Any, **options: Any) -> Iterator[Reports]:
    """Reports of a command that works in here; an error before the first is one of the options (exit code 2).

    Args:
        what: is done first.
        amount: the column of rich that shows how much is done.
        options: of the bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeElapsedColumn())
    quiet = not console.is_terminal  # the lines of text remain
    reports = None
    try:
        with Progress(*columns, console=console, transient=True, disable=quiet, **options) as progress:
            reports = Reports(progress, what)
            yield reports
    except (ValueError, OSError) as error:
        if reports is None or reports.begun:
            raise
        stop(str(error), 2)


def watch(what: str, command: Callable[..., Any], **options: Any) -> Any:
    """The result of a command; an interrupt before anything was finished ends the process."""
    from rich.progress import MofNCompleteColumn

    with progress_bar(what, MofNCompleteColumn()) as reports:
        try:
            result = command(**options, say=reports.say, step=reports.step)
        except KeyboardInterrupt:
            result = None
    if result is None or not result.rows:
        stop("interrupted before anything was finished; nothing was written", 130)
    return result


def finish(
    result: "Findings | Comparison | Traces",
    json: Path | None,
    figures: Path | None,
    draw: Callable[[Path], list[Path]],
    useful: bool,
    done: str,
) -> int:
    """Print the tables and write the files; the exit code, 0 if there are `useful` numbers."""
    show(result)
    paths = []
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(result.to_json())
        paths.append(json)
    if figures is not None:
        paths += draw(figures)
    if paths:
        print("written:", *paths, sep="\n  ", end="\n\n")
    if not result.finished:
        print(f"kronfisher: interrupted {done}", file=sys.stderr)
        return 130
    return 0 if useful else 1


def show(
    result: "Findings | Comparison | Contest | Curves | Standings | Results | Starts | Pairs | Traces | Health",
) -> None:
    """The tables: drawn for a terminal, plain text for a file or a pipe."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        print(f"\n{result}\n")
        return
    for table in result.tables():
        drawn = Table(title=table.title, title_justify="left", title_style="bold")
        for k, name in enumerate(table.header):
            drawn.add_column(name, justify="left" if k < table.text else "right", style="cyan" if k == 0 else None)
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
    for note in result.notes():
        console.print(note, markup=False, style="yellow")
