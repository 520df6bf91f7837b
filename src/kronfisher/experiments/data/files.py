"""Finding the files of a data set that cannot be generated, and saying where they come from when they are not there."""

import gzip
import os
from pathlib import Path

from kronfisher.errors import DataError

VARIABLE = "KRONFISHER_DATA"


def locate(data_dir: str | Path | None, name: str, origin: str) -> Path:
    """The path of ``data_dir/name``, or of the same with ``.gz``.

    Args:
        data_dir: the folder of all data sets; where None, the environment variable KRONFISHER_DATA names it.
        name: the file, relative to that folder, without ``.gz``.
        origin: what the file is and where to get it, for the error message.

    Raises:
        FileNotFoundError: no folder was given, or the file is not in it.
    """
    root = data_dir if data_dir is not None else os.environ.get(VARIABLE)
    if not root:
        raise FileNotFoundError(
            f"{name}[.gz] is needed and no data folder is known: pass data_dir (--data-dir on the command line) or set "
            f"{VARIABLE} to the folder that holds it. Where to get it: it is {origin}."
        )
    path = Path(root).expanduser() / name
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{path}[.gz] does not exist. Where to get it: it is {origin}. Put it there, or point data_dir "
        f"(--data-dir on the command line) or {VARIABLE} to the folder that holds {name}."
    )


def read(path: Path) -> bytes:
    """The file's bytes, decompressed if its name ends in ``.gz``.

    Raises:
        DataError: the compressed file is damaged.
    """
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be decompressed ({error}): fetch it again") from error
