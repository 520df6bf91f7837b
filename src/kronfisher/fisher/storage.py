"""A Fisher matrix in a file: safetensors, with everything but the numbers as JSON in its header."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fisher.info import Info
from kronfisher.fisher.layout import Blocks, require_cover
from kronfisher.fisher.parameters import unwrapped
from kronfisher.fisher.vectors import Shapes
from kronfisher.operators.operator import Operator
from kronfisher.operators.owned import Owned

__all__ = ["FORMAT", "Contents", "block_of", "read", "write"]

FORMAT = 1
_KEY = "kronfisher"
_CONVENTIONS = {
    "vec": "row-major of W [H, O, I]; I ends with the bias column where there is a bias",
    "kronecker": "B [H, O, O] (x) A [H, I, I]",
    "scale": "sum of outer products of per-example negative log-likelihood gradients; a mean divides by count",
    "checksum": "SHA-256 of the rest of this header and of all tensors",
}


@dataclass(frozen=True)
class Contents:
    """A Fisher matrix as a file holds it.

    Attributes:
        entries: pairs of blocks and the operator that treats them together.
        shapes: name to shape of every covered parameter.
        info: how the matrix was made.
    """

    entries: tuple[tuple[Blocks, Operator], ...]
    shapes: Shapes
    info: Info


def write(
    contents: Contents,
    path: str | Path,
    more: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a matrix to `path`, all or nothing: an interrupted run leaves what was there before.

    Of several ranks whose blocks stay with their owners all make the call, and rank 0 writes.

    Args:
        contents: the matrix.
        path: the file.
        more: further tensors, for those who keep a Fisher among other things.
        notes: further entries of the header.

    Raises:
        ImportError: safetensors is missing; ``pip install "kronfisher[io]"``.
        RankError: writing failed; on the other ranks.
    """
    owned = next((operator for _, operator in contents.entries if isinstance(operator, Owned)), None)
    if owned is None:
        _write(contents, path, more, notes)
        return
    entries = [(b, x.at(0) if isinstance(x, Owned) else x) for b, x in contents.entries]

    def write_there() -> None:
        whole = tuple((blocks, operator) for blocks, operator in entries if operator is not None)
        _write(replace(contents, entries=whole), path, more, notes)

    owned.ranks.of(0, write_there, torch.device("cpu"))


def _write(
    contents: Contents, path: str | Path, more: Mapping[str, Tensor] | None, notes: Mapping[str, Any] | None
) -> None:
    safetensors = _safetensors()
    path = Path(path)
    tensors, entries = {}, []
    for k, (blocks, operator) in enumerate(contents.entries):
        tensors |= {f"{k}.{key}": tensor for key, tensor in operator.tensors().items()}
        described = {"kind": operator.kind, **operator.settings()}
        entries.append({"blocks": [asdict(block) for block in blocks], "operator": described})
    header = {
        "format": FORMAT,
        "conventions": _CONVENTIONS,
        "dtype": str(reduce(torch.promote_types, (operator.dtype for _, operator in contents.entries))),
        "shapes": {name: list(shape) for name, shape in contents.shapes.items()},
        "info": asdict(contents.info),
        "entries": entries,
        **(notes or {}),
    }
    owned = _owned({**tensors, **(more or {})})
    header["checksum"] = checksum(header, owned)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        safetensors.torch.save_file(owned, temporary, metadata={_KEY: json.dumps(header)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | Path, model: torch.nn.Module | None) -> tuple[Contents, dict[str, Tensor], dict[str, Any]]:
    """A matrix that `write` wrote, all tensors of the file, and its header.

    Args:
        path: the file.
        model: the model the matrix belongs to; its parameters must have the names and shapes of the file. None: no
            model is asked, and the matrix stays on the CPU.

    Raises:
        DataError: the file is damaged or of another format, or the model does not match; the message says where.
        FileNotFoundError: there is no such file.
        ImportError: safetensors is missing; ``pip install "kronfisher[io]"``.
    """
    safetensors = _safetensors()
    path, model = Path(path), None if model is None else unwrapped(model)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY, "null")
            header = json.loads(text)
            _require_format(path, header)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        device = torch.device("cpu") if model is None else _require_match(path, header["shapes"], model)
        _require_checksum(text, header, tensors)
        tensors = {key: tensor.to(device) for key, tensor in tensors.items()}
        contents = _build(header, tensors)
        require_cover(contents.entries, contents.shapes)
        _require_windows(contents)
        return contents, tensors, header
    except (DataError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a header may be damaged anywhere, so that any line may fail on it
        raise _damaged(path, error) from error


def _build(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Contents:
    entries = []
    for k, entry in enumerate(header["entries"]):
        own = {key.removeprefix(f"{k}."): t for key, t in tensors.items() if key.startswith(f"{k}.")}
        blocks = tuple(block_of(block) for block in entry["blocks"])
        entries.append((blocks, Operator.restored(own, entry["operator"])))
    shapes = {name: torch.Size(shape) for name, shape in header["shapes"].items()}
    return Contents(tuple(entries), shapes, Info.from_json(header["info"]))


def block_of(values: Mapping[str, Any]) -> Block:
    """The block of which ``dataclasses.asdict`` made `values`."""
    return Block(
        values["name"], values["operator"], _view(values["weight"]), _view(values["bias"]), values.get("onehot", False)
    )


def _view(values: Mapping[str, Any] | None) -> Window | None:
    if values is None:
        return None
    shape, layout, size, stride = (tuple(values[key]) for key in ("shape", "layout", "size", "stride"))
    return Window(values["parameter"], shape, layout, size, stride, values["offset"])


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a header without its checksum, as JSON with sorted keys, and of all tensors by name."""
    rest = {key: value for key, value in json.loads(json.dumps(header)).items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))  # one number may have any stride
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _require_checksum(text: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """ValueError if the file is not as it was written; files of earlier versions have no checksum.

    The checksum is of values, and several texts have the same value: numbers of more digits than a float has, an
    exponent's E, an escaped letter. Only one of them is the text that `write` writes.
    """
    if "checksum" not in header and "checksum" not in header["conventions"]:
        return
    if text != json.dumps(header) or header.get("checksum") != checksum(header, tensors):
        raise ValueError("its checksum is another one: bytes of it were changed")


def _require_windows(contents: Contents) -> None:
    """ValueError unless windows stay within their parameters, and together show every element once."""
    counts: dict[str, Tensor] = {}
    for view in (view for blocks, _ in contents.entries for block in blocks for view in block.views):
        numbers = (*view.shape, *view.layout, *view.size, *view.stride, view.offset)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"a window on {view.parameter} has numbers that are no sizes")
        if len(view.shape) != len(view.layout) or len(view.size) != len(view.stride):
            raise ValueError(f"a window on {view.parameter} has not one stride for each axis")
        # The memory of a vector has one place for each element of the parameter.
        if max(_last(view.shape, view.layout), view.offset + _last(view.size, view.stride)) >= prod(view.shape):
            raise ValueError(f"a window on {view.parameter} reaches beyond its {prod(view.shape)} elements")
        if view.parameter not in counts:
            counts[view.parameter] = torch.zeros(prod(view.shape), dtype=torch.int32)
            places = torch.zeros_like(counts[view.parameter])
            places.as_strided(view.shape, view.layout).add_(1)
            if not bool((places == 1).all()):
                raise ValueError(f"{view.parameter} has a layout in which elements share their place")
        counts[view.parameter].as_strided(view.size, view.stride, view.offset).add_(1)
    for name, count in counts.items():
        if not bool((count == 1).all()):
            raise ValueError(f"the windows on {name} do not show each element exactly once")


def _last(size: Sequence[int], stride: Sequence[int]) -> int:
    """The place of the last element."""
    return sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: damaged, or not a kronfisher file ({error}); estimate and save it again")


def _require_format(path: Path, header: Any) -> None:
    if not isinstance(header, dict) or "format" not in header:
        raise DataError(f"{path}: a safetensors file, but not one of kronfisher")
    if header["format"] != FORMAT:
        raise DataError(
            f"{path}: format {header['format']}, but this version reads format {FORMAT}; use the version that wrote it"
        )


def _require_match(path: Path, shapes: Mapping[str, list[int]], model: torch.nn.Module) -> torch.device:
    parameters = dict(model.named_parameters())
    missing = [name for name in shapes if name not in parameters]
    extra = [name for name, p in parameters.items() if p.requires_grad and name not in shapes]
    differ = [
        f"{name} (file {list(shape)}, model {list(parameters[name].shape)})"
        for name, shape in shapes.items()
        if name in parameters and list(parameters[name].shape) != list(shape)
    ]
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("not in the model", missing),
            ("of another shape", differ),
            ("trainable in the model but not in the file (freeze them if they were frozen then)", extra),
        )
        if names
    ]
    if problems:
        raise DataError(f"{path}: the model is not the one it was saved for; {'; '.join(problems)}")
    return next(parameters[name].device for name in shapes)


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors wants every tensor contiguous and alone in its memory; copy only those that are not.
    result, seen = {}, set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        result[key] = tensor
    return result


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError('safetensors is missing; pip install "kronfisher[io]"') from error
    return safetensors
