"""What this machine and its packages are, as far as numbers and speed depend on them, and what is missing for what."""

import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch

from kronfisher.estimation.documents import document
from kronfisher.operators.memory import available_memory
from kronfisher.tables import Table, size

__all__ = ["Health", "examine"]


@dataclass(frozen=True)
class Health:
    """What was found; ``str`` of it is for people, `to_json` for programs.

    Attributes:
        facts: name → value.
        missing: extra → requirements that are not met; empty where all are there.
        problems: what is wrong, with what to do.
    """

    facts: Mapping[str, str]
    missing: Mapping[str, tuple[str, ...]]
    problems: tuple[str, ...] = ()

    def tables(self) -> list[Table]:
        """The facts, and one line for each extra."""
        facts = Table("This machine", ("what", "found"), text=2)
        for name, value in self.facts.items():
            facts.add(name, value)
        extras = Table("Extras", ("extra", "state"), text=2)
        for name, lacking in self.missing.items():
            advice = f'missing {", ".join(lacking)}: pip install "kronfisher[{name}]"'
            extras.add(name, advice if lacking else "all there")
        return [facts, extras]

    def notes(self) -> list[str]:
        """The problems."""
        return list(self.problems)

    def to_json(self) -> str:
        """Everything as JSON."""
        return document({}, True, facts=dict(self.facts), missing=dict(self.missing), problems=list(self.problems))

    def __str__(self) -> str:
        return "\n\n".join(map(str, [*self.tables(), *self.notes()]))


def examine() -> Health:
    """Look at versions, devices, threads and arithmetic, and at the packages of every extra.

    Example:
        >>> health = examine()
        >>> health.facts["torch"] == torch.__version__, "io" in health.missing
        (True, True)
    """
    problems = []
    subnormal = torch.full((64,), 1e-40) * torch.ones(64)
    kept = bool((subnormal > 0).all())
    if not kept:
        problems.append(
            "subnormal numbers are flushed to zero: values below 1e-38 are lost, and tests of tiny numbers fail. "
            "torch.set_flush_denormal(False) keeps them; other libraries may have set it."
        )
    if (precision := torch.get_float32_matmul_precision()) != "highest":
        problems.append(
            f"float32 products have the precision {precision!r}: not those of the library, but of the rest of your "
            'program. torch.set_float32_matmul_precision("highest") changes that.'
        )
    if difference := _arithmetic():
        problems.append(f"eigenvectors of a small matrix are wrong by {difference:.1e}: this build of torch is broken.")
    facts = {
        "kronfisher": version("kronfisher"),
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "devices": ", ".join(_devices()),
        "processors": str(os.cpu_count()),
        "threads of torch": str(torch.get_num_threads()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "linear algebra": _blas(),
        "subnormal numbers": "kept" if kept else "flushed to zero",
        "default dtype": str(torch.get_default_dtype()),
        "memory available": size(available_memory(torch.device("cpu"))),
        "data sets": os.environ.get("KRONFISHER_DATA", "KRONFISHER_DATA is not set: only those that need no files"),
    }
    return Health(facts, missing_packages(), tuple(problems))


def missing_packages() -> dict[str, tuple[str, ...]]:
    """Extra → requirements that are not met, from the metadata of the installed package."""
    asked: dict[str, list[str]] = {}
    for line in requires("kronfisher") or []:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if extra := re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker):
            asked.setdefault(extra[1], []).append(requirement)
    return {extra: tuple(each for each in _whole(extra, asked) if not _met(each)) for extra in asked}


def _whole(extra: str, asked: Mapping[str, list[str]]) -> list[str]:
    """The requirements of an extra, and of those that it is made of."""
    found: list[str] = []
    for requirement in asked[extra]:
        inner = re.match(r"kronfisher\[(.+)\]", requirement)
        found += (
            [each for name in inner[1].split(",") for each in _whole(name.strip(), asked)] if inner else [requirement]
        )
    return list(dict.fromkeys(found))


def _met(requirement: str) -> bool:
    parts = re.match(r"([\w.-]+)(?:\[.*?\])?(?:>=([\d.]+))?", requirement)
    if parts is None:
        return True
    name, least = parts.groups()
    try:
        return _numbers(version(name)) >= _numbers(least or "0")
    except PackageNotFoundError:
        return False


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:4])


def _devices() -> list[str]:
    names = [f"cuda:{k} {torch.cuda.get_device_name(k)}" for k in range(torch.cuda.device_count())]
    return ["cpu", *names, *(["mps"] if torch.backends.mps.is_available() else [])]


def _blas() -> str:
    config = torch.__config__.show()
    library = re.search(r"BLAS_INFO=(\w+)", config)
    lapack = re.search(r"LAPACK_INFO=(\w+)", config)
    parts = [f"BLAS {library[1]}" if library else "", f"LAPACK {lapack[1]}" if lapack else ""]
    return ", ".join(filter(None, [*parts, "oneDNN" if torch.backends.mkldnn.is_available() else ""])) or "unknown"


def _arithmetic() -> float:
    """How far the eigenvectors of a small matrix are from giving it back; 0.0 within rounding."""
    generator = torch.Generator().manual_seed(0)
    root: Any = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    matrix = root @ root.mT
    values, vectors = torch.linalg.eigh(matrix)
    difference = float((vectors * values @ vectors.mT - matrix).norm() / matrix.norm())
    return difference if not difference < 1e-12 else 0.0
