"""One HTML page with every query beside the training examples that its scores name."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kronfisher.pages import render

__all__ = ["Named", "Shown", "page"]


@dataclass(frozen=True)
class Shown:
    """An example as people see it.

    Attributes:
        value: an image ``[C, H, W]`` or ``[H, W]`` in any range, or text.
        label: a line below it.
    """

    value: Tensor | str
    label: str = ""


@dataclass(frozen=True)
class Named:
    """A query and who is behind it.

    Attributes:
        query: itself.
        rows: title, whether these are good for the query, and the examples with their index and score.
    """

    query: Shown
    rows: Sequence[tuple[str, bool, Sequence[tuple[int, float, Shown]]]]


def page(title: str, facts: Sequence[str], named: Sequence[Named]) -> str:
    """The text of the page; it needs no other file.

    Args:
        title: the heading.
        facts: lines below it.
        named: the queries.

    Raises:
        ImportError: jinja2 is missing; ``pip install "kronfisher[report]"``.
    """
    return render("queries.html", Path(__file__).parent, title=title, facts=facts, named=named, picture=_picture)


def _picture(shown: Shown) -> str | None:
    """The image as a part of the page; None for text."""
    if isinstance(shown.value, str):
        return None
    return f"data:image/png;base64,{base64.b64encode(_png(shown.value)).decode()}"


def _png(image: Tensor) -> bytes:
    from matplotlib.image import imsave

    image = image.detach().float().cpu()
    image = image.movedim(0, -1).squeeze(-1) if image.dim() == 3 else image
    low, high = image.min(), image.max()
    scaled = (image - low) / (high - low).clamp_min(1e-12)
    file = io.BytesIO()
    imsave(file, scaled.numpy(), format="png", cmap="gray_r" if image.dim() == 2 else None)
    return file.getvalue()
