"""Rows of numbers in a memory-mapped file that grows batch by batch and survives being killed at any time.

A row is a training example. What counts as written stands in a record beside the file, which is replaced in one piece
after the rows are on the disk: a run that is killed leaves rows that the record does not count, and the next run writes
them again. The record names the settings by a hash, and the batches that were read by a checksum of all of them.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from glob import escape
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronfisher.capture.batches import checksum
from kronfisher.errors import DataError

__all__ = ["Record", "RowFile", "digest", "require_folder"]

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Record:
    """What a file of rows holds.

    Attributes:
        settings: name → hash or text of everything that the numbers depend on besides the batches.
        width: numbers of a row, in parts: name → shape.
        dtype: "float32" or "float64".
        rows: that were written.
        batches: that were read.
        chain: checksum of all batches so far, in their order.
        notes: anything else, plain JSON.
        finished: whether there were no more batches.
        run: that wrote last, a random name.
    """

    settings: Mapping[str, str]
    width: Mapping[str, list[int]] = field(default_factory=dict)
    dtype: str = "float32"
    rows: int = 0
    batches: int = 0
    chain: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    finished: bool = False
    run: str = ""

    @property
    def numbers(self) -> int:
        """In a row."""
        return sum(prod(shape) for shape in self.width.values())

    @property
    def row_bytes(self) -> int:
        """Of a row."""
        return self.numbers * _DTYPES[self.dtype].itemsize


class RowFile:
    """A file of rows and its record; see above.

    Args:
        path: of the file; its record is at the same path with ``.json`` appended.
        settings: name → hash or text of everything that the numbers depend on besides the batches; None: to be read
            from a file that is there.

    Raises:
        DataError: the file is there and was written with other settings, or is damaged, and is left as it is; or the
            folder does not exist.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, str] | None) -> None:
        self.path = Path(path)
        self.record = Record(dict(settings or {}))
        self._seen, self._chain, self._run = 0, "", secrets.token_hex(8)
        require_folder(self.path)
        if settings is None and not self._record_path.exists():
            raise DataError(f"{self.path}: there is no such file with a record beside it.")
        if self._record_path.exists():
            self.record = self._read()
            settings = self.record.settings if settings is None else settings
            if odd := [
                k for k in {**settings, **self.record.settings} if self.record.settings.get(k) != settings.get(k)
            ]:
                raise DataError(
                    f"{self.path} was written with other settings ({', '.join(sorted(odd))}); it is left as it is. "
                    "Give another path, or remove it and its record."
                )
            size = self.path.stat().st_size if self.path.exists() else 0
            if size < self.record.rows * self.record.row_bytes:
                raise DataError(
                    f"{self.path} holds {size:,} bytes, and its record counts {self.record.rows:,} rows of "
                    f"{self.record.row_bytes:,}: it is damaged. Remove it and its record."
                )
        elif self.path.exists():
            raise DataError(f"{self.path} exists and has no record beside it; it is left as it is. Give another path.")

    @property
    def _record_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def _read(self) -> Record:
        try:
            return Record(**json.loads(self._record_path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{self._record_path} is damaged ({error}); remove it and {self.path}.") from error

    def skip(self, number: int, batch: Any) -> bool:
        """Whether a batch was written by an earlier run.

        Raises:
            DataError: the batches are not those of the earlier run.
        """
        self._chain, self._seen = digest(self._chain, checksum(batch)), number + 1
        if self._seen == self.record.batches and self._chain != self.record.chain:
            raise DataError(
                f"the first {self._seen} batches are not those that {self.path} was written from; it is left as it is. "
                "Fix the order and the size of the batches, or give another path."
            )
        return self._seen <= self.record.batches

    def add(self, parts: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write the rows of the batch that `skip` saw last, and then count them.

        Args:
            parts: name → ``[n, ...]``, of the same shapes in all batches.
            notes: kept in the record.

        Raises:
            DataError: the shapes are others than before, or another run writes to the file, too.
        """
        self._require_alone()
        width = {name: [*part.shape[1:]] for name, part in parts.items()}
        record = self.record
        if not record.width:
            dtype = str(next(iter(parts.values())).dtype).removeprefix("torch.")
            record = replace(record, width=width, dtype=dtype)
        if record.width != width:
            raise DataError(f"{self.path} has rows of {dict(record.width)}, and this batch gives {width}.")
        rows = torch.cat([part.flatten(1) for part in parts.values()], dim=1).to("cpu", _DTYPES[record.dtype])
        if not self.path.exists():  # a run that is killed between the two would leave a file of nobody knows what
            self._count(record)
            record = self.record
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.truncate(record.rows * record.row_bytes)  # rows that were written and not counted
            file.seek(0, os.SEEK_END)
            file.write(rows.contiguous().numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._count(
            replace(
                record,
                rows=record.rows + len(rows),
                batches=self._seen,
                chain=self._chain,
                notes=dict(notes),
                finished=False,
            )
        )

    def _require_alone(self) -> None:
        """DataError if the record is not what this run read or wrote last."""
        found = self._read() if self._record_path.exists() else Record({})
        if (found.run, found.batches) != (self.record.run, self.record.batches):
            raise DataError(
                f"{self.path}: another run has written to it since this one began, and goes on. Wait until it has "
                "ended, and ask again; or give this one a path of its own."
            )

    def _count(self, record: Record) -> None:
        record = replace(record, run=self._run)
        temporary = self._record_path.with_name(f".{self._record_path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w") as file:
                json.dump(asdict(record), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._record_path)
        finally:
            temporary.unlink(missing_ok=True)
        self.record = record

    def finish(self) -> None:
        """DataError if fewer batches were read than the file was written from."""
        if self._seen < self.record.batches:
            raise DataError(
                f"{self.path} was written from {self.record.batches} batches, and there are {self._seen}; it is left "
                "as it is."
            )
        if not self.record.finished:
            self._require_alone()
            self._count(replace(self.record, finished=True))
        for left in self.path.parent.glob(f".{escape(self._record_path.name)}.*.tmp"):  # of runs that were killed
            left.unlink(missing_ok=True)

    def open(self) -> dict[str, Tensor]:
        """Name → ``[rows, ...]``, memory-mapped; what is written into them does not reach the file."""
        record = self.record
        size = record.rows * record.numbers
        flat = torch.from_file(str(self.path), shared=False, size=size, dtype=_DTYPES[record.dtype])
        rows = flat.view(record.rows, record.numbers)
        sizes = [prod(shape) for shape in record.width.values()]
        parts = zip(record.width.items(), rows.split(sizes, dim=1), strict=True)
        return {name: part.unflatten(1, shape) if len(shape) != 1 else part for (name, shape), part in parts}


def require_folder(path: Path) -> None:
    """DataError unless the folder of a file exists: that is known before the first number is computed."""
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.parent}. Make it, or give another path.")


def digest(*parts: Any) -> str:
    """A hash of texts, numbers and tensors."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(part.detach().cpu().contiguous().numpy().tobytes())
        else:
            found.update(repr(part).encode())
        found.update(b"\x00")
    return found.hexdigest()
