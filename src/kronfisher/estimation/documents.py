"""What an experiment writes beside its pictures: JSON with everything that the numbers depend on."""

import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

__all__ = ["document", "finite"]


def document(settings: Mapping[str, Any], finished: bool, **parts: Any) -> str:
    """Settings, versions and the `parts` as JSON; a number that is not finite is null.

    Example:
        >>> import json
        >>> json.loads(document({"seed": 0}, True, rows=[{"error": float("nan")}]))["rows"]
        [{'error': None}]
    """
    versions = {"kronfisher": version("kronfisher"), "torch": torch.__version__, "threads": torch.get_num_threads()}
    whole = {"finished": finished, "settings": dict(settings), "versions": versions, **parts}
    return json.dumps(finite(whole), indent=2, ensure_ascii=False) + "\n"


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
