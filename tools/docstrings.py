"""What the site's reader of docstrings has to be told: our ``Example:`` is what it knows as ``Examples:``."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Names the section of examples as the reader expects it, so that they are shown as code."""

    def on_object(self, *, obj: griffe.Object, **options: Any) -> None:
        """Called with every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
