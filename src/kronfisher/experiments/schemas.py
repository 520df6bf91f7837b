"""JSON schemas of the files that commands write, for programs that read them."""

from typing import Any

from kronfisher.experiments.equations.problems import EQUATIONS

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
_SECONDS: dict[str, Any] = {"type": "number", "description": "CPU time of a run"}
_POINT = {"type": "array", "prefixItems": [_NUMBER, _COUNT, _NUMBER, _NUMBER], "minItems": 4, "maxItems": 4}
_CURVE = _object(
    "one training",
    optimizer=_TEXT,
    seed=_COUNT,
    points=_list(_POINT) | {"description": "seconds of CPU time, steps, relative error, loss"},
    setting=_TEXT,
)
_INTERVAL = _object(
    "the equation's constants, from one draw of the observations",
    seed=_COUNT,
    mean=_list(_NUMBER),
    deviation=_list(_NUMBER),
    steps=_COUNT,
    loss=_NUMBER,
    starts=_COUNT,
)
_EQUATION = _object(equation=_TEXT, seconds=_SECONDS, runs=_list(_CURVE))
_EQUATION["properties"]["intervals"] = _list(_INTERVAL) | {"description": "only where constants are unknown"}

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
    **{f"race {name}": _EQUATION for name in EQUATIONS},
    "race uci": _object(
        seconds=_SECONDS,
        runs=_list(
            _object(
                "one training",
                problem=_TEXT,
                optimizer=_TEXT,
                seed=_COUNT,
                seconds=_list(_NUMBER) | {"description": "CPU time at which each of the losses was known"},
                losses=_list(_NUMBER) | {"description": "of the training data, at most some 200"},
                test=_NUMBER | {"description": "root mean square error on the test data"},
                setting=_TEXT,
                last=_NUMBER | {"description": "training loss at the end"},
                steps=_COUNT,
            )
        ),
    ),
    "race suite": _object(
        seconds=_SECONDS,
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
