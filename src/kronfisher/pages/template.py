"""Filling in a template; every page of the library extends ``page.html``."""

from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "render"]

FOLDER = Path(__file__).parent


def render(name: str, *folders: Path, **values: Any) -> str:
    """The text of a page; what is filled in is escaped.

    Args:
        name: of the template.
        folders: where to look for it before this folder.
        values: what the template asks for.

    Raises:
        ImportError: jinja2 is missing; ``pip install "kronfisher[report]"``.

    Example:
        >>> "<title>A &lt; B</title>" in render("page.html", title="A < B")
        True
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError('pages are written by jinja2: pip install "kronfisher[report]"') from error
    places = jinja2.FileSystemLoader([*folders, FOLDER])
    settings: Any = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(loader=places, autoescape=True, undefined=jinja2.StrictUndefined, **settings)
    return environment.get_template(name).render(**values)
