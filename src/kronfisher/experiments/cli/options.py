"""Options: their meaning, and one line of error where they make no sense."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

__all__ = [
    "byte_size",
    "example",
    "names",
    "option",
    "refuse_bad_options",
    "refuse_other_options",
    "require_writable",
    "settings",
    "stop",
    "whole",
]

FOLDER = "folder with the files of the data sets (default: $KRONFISHER_DATA)"
SEED = "of data, initial weights, training and label draws"


def option(text: str, *names: str) -> Any:
    """An option of a command with its help, and its names where they are not the argument's own."""
    import typer

    return typer.Option(*names, help=text)


def example(line: str) -> str:
    """The last line of a command's help."""
    return f"Example: {line}"


def names(text: str) -> tuple[str, ...]:
    """``a, b`` → ``("a", "b")``."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def whole(text: str) -> int:
    """A whole number, or ValueError."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


def settings(text: str) -> Any:
    """An object from JSON, or from the file that `text` names."""
    import json

    try:
        read = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"options are not valid JSON: {error}") from None
    if not isinstance(read, dict) or not all(isinstance(each, dict) for each in read.values()):
        raise ValueError("options must be one JSON object of objects, name → settings")
    return read


def refuse_other_options(context: Any, names: set[str], why: str = "a study has its own settings") -> None:
    """ValueError if the command line sets an option that is not among `names`."""
    given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}
    if odd := sorted(given - names):
        flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
        listed = ", ".join(flags[name] for name in odd)
        raise ValueError(f"{why}: leave out {listed}")


def byte_size(text: str | None) -> int | None:
    """``500MB`` → 500,000,000; ValueError if it is not a size."""
    if text is None:
        return None
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    units |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    stripped = text.strip().lower()
    unit = stripped.lstrip("0123456789.")
    try:
        return int(float(stripped.removesuffix(unit)) * units[unit.strip()])
    except (ValueError, KeyError):
        raise ValueError(f"memory-budget {text!r} is not a size; write it as 500MB, 2GB or a number of bytes") from None


def require_writable(path: Path | None, *, folder: bool) -> None:
    """Raise ValueError if nothing can be written there; called before hours of work."""
    if path is None:
        return
    if path.exists() and path.is_dir() != folder:
        raise ValueError(f"{path} is {'a file, not a folder' if folder else 'a folder, not a file'}")
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not folder and path.exists():
        parent = path
    if not os.access(parent, os.W_OK) or (parent.is_file() and parent != path):
        raise ValueError(f"{path} cannot be written: {parent} is {'a file' if parent.is_file() else 'read-only'}")


@contextmanager
def refuse_bad_options() -> Iterator[None]:
    """An error in here is one of the options: one line, exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        stop(str(error), 2)


def stop(message: str, code: int) -> NoReturn:
    """One line on standard error, and the end."""
    print(f"kronfisher: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
