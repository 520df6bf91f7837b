"""JSON schemas of the files that commands write, for programs that read them."""

from typing import Any

__all__ = ["SCHEMAS", "schema"]

_NUMBER: dict[str, Any] = {"type": ["number", "null"], "description": "null: not finite, or not known"}
_TEXT: dict[str, Any] = {"type": "string"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_ANY: dict[str, Any] = {"type": "object"}


def _object(described: str = "", **properties: Any) -> dict[str, Any]:
    """An object that has all of these, and perhaps more in a later version."""
    found = {"type": "object", "properties": properties, "required": list(properties)}
    return found | ({"description": described} if described else {})


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _map(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": of}


def _document(**parts: Any) -> dict[str, Any]:
    versions = _object("of what computed it", kronfisher=_TEXT, torch=_TEXT, threads=_COUNT)
    settings = _ANY | {"description": "everything that the numbers depend on"}
    finished = {"type": "boolean", "description": "whether all that was asked for is there"}
    return _object(finished=finished, settings=settings, versions=versions, **parts)


_FIT = _object(
    "one fit",
    fit=_TEXT,
    count=_COUNT | {"description": "examples"},
    seconds=_NUMBER | {"description": "wall time of the estimate"},
    bytes=_COUNT | {"description": "memory of the matrix"},
    relative_error=_NUMBER | {"description": "in the Frobenius norm, against the exact blocks"},
    trace_ratio=_NUMBER | {"description": "trace over the exact one"},
    blocks=_map(_NUMBER) | {"description": "block → relative error"},
    failure={"type": ["string", "null"], "description": "why there is no number"},
)
_COMPARISON = _document(rows=_list(_FIT))

SCHEMAS: dict[str, dict[str, Any]] = {
    "compare": _COMPARISON,
    "demo": _COMPARISON,
    "uncertainty": _document(networks=_list(_ANY), rows=_list(_ANY)),
    "influence": _document(rows=_list(_ANY)),
    "race": _object(
        problem=_TEXT,
        target=_NUMBER | {"description": "training loss to which times are measured"},
        optimizers=_map(
            _object(settings=_ANY, seeds=_list(_COUNT), baseline={"type": "boolean"}, last=_ANY, best=_ANY)
        ),
        runs=_list(_ANY),
    ),
    "race suite": _object(
        seconds={"type": "number", "description": "CPU time of a run"},
        summary={},
        runs=_list(_object(problem=_TEXT, name=_TEXT, seed=_COUNT, settings=_ANY, steps=_COUNT, failure={})),
    ),
    "doctor": _document(
        facts=_map(_TEXT),
        missing=_map(_list(_TEXT)) | {"description": "extra → requirements that are not met"},
        problems=_list(_TEXT),
    ),
}
"""Command → the schema of what its ``--json`` or its folder holds."""


def schema(command: str) -> dict[str, Any]:
    """The JSON schema of the file that a command writes.

    Args:
        command: one of `SCHEMAS`.

    Returns:
        The schema, plain JSON.

    Raises:
        ValueError: the command writes no JSON.

    Example:
        >>> schema("compare")["required"]
        ['finished', 'settings', 'versions', 'rows']
    """
    if command not in SCHEMAS:
        raise ValueError(f"{command!r} writes no JSON; these do: {', '.join(SCHEMAS)}")
    title = f"kronfisher {command}"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **SCHEMAS[command]}
