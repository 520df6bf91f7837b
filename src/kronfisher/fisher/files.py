"""A Fisher matrix from a file, and to a file among other things."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronfisher.fisher import storage
from kronfisher.fisher.fisher import Fisher

__all__ = ["load", "read", "save"]


def load(path: str | Path, model: torch.nn.Module | None = None) -> Fisher:
    """Read a Fisher matrix that `Fisher.save` wrote, onto the device of `model`.

    Args:
        path: the file.
        model: the model the matrix belongs to; its parameters must have the names and shapes of the file. Default: no
            model is asked, and the matrix stays on the CPU.

    Returns:
        The Fisher, with the dtype it was saved in. It knows no data, so that its error cannot be measured.

    Raises:
        DataError: the file is damaged or of another format, or the model does not match; the message says where.
        FileNotFoundError: there is no such file.
        ImportError: safetensors is missing; ``pip install "kronfisher[io]"``.

    Example:
        >>> import tempfile, kronfisher as kf
        >>> model = torch.nn.Linear(3, 2)
        >>> fisher = kf.estimate(model, torch.randn(20, 3), kf.Categorical())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fisher.save(f"{folder}/fisher.safetensors")
        ...     again = kf.load(f"{folder}/fisher.safetensors", model)
        >>> bool((again.to_dense() == fisher.to_dense()).all())
        True
    """
    return read(path, model)[0]


def read(path: str | Path, model: torch.nn.Module | None) -> tuple[Fisher, dict[str, Tensor], dict[str, Any]]:
    """The matrix as `load` reads it, all tensors of the file, and its header."""
    contents, tensors, header = storage.read(path, model)
    return Fisher(contents.entries, contents.shapes, contents.info), tensors, header


def save(fisher: Fisher, path: str | Path, more: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """`Fisher.save` with further tensors, and further entries of the header."""
    storage.write(storage.Contents(fisher.entries, fisher.shapes, fisher.info), path, more, notes)
