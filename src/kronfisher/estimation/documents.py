"""JSON documents of results, with everything that the numbers depend on."""

import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

__all__ = ["document", "replace_nonfinite"]


def document(settings: Mapping[str, Any], finished: bool, **parts: Any) -> str:
    """Settings, versions and the `parts` as JSON; a number that is not finite is null.

    Example:
        >>> import json
        >>> json.loads(document({"seed": 0}, True, rows=[{"error": float("nan")}]))["rows"]
        [{'error': None}]
    """
    versions = {"kronfisher": version("kronfisher"), "torch": torch.__version__, "threads": torch.get_num_threads()}
    whole = {"finished": finished, "settings": dict(settings), "versions": versions, **parts}
    return json.dumps(replace_nonfinite(whole), indent=2, ensure_ascii=False) + "\n"


def replace_nonfinite(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {key: replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
