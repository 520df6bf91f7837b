"""One HTML page with every query beside the training examples that its scores name."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Named", "Shown", "page"]

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .4rem 0 1.8rem }
td, th { padding: .3rem .6rem; text-align: center; vertical-align: top; border-top: 1px solid #e2e2e2 }
th { text-align: left; font-weight: 600; white-space: nowrap }
img { width: 84px; image-rendering: pixelated; display: block; margin: 0 auto .2rem }
pre { margin: 0 0 .2rem; white-space: pre-wrap; max-width: 15rem; text-align: left }
small { color: #666; display: block }
.raises { color: #00664a } .lowers { color: #a33c00 }
"""


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
        rows: title, whether leaving these out raises the measurement, and the examples with their index and score.
    """

    query: Shown
    rows: Sequence[tuple[str, bool, Sequence[tuple[int, float, Shown]]]]


def page(title: str, facts: Sequence[str], named: Sequence[Named]) -> str:
    """The text of the page; it needs no other file.

    Args:
        title: the heading.
        facts: lines below it.
        named: the queries.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(fact)}</p>" for fact in facts)]
    for number, each in enumerate(named):
        parts.append(f"<h2>Query {number}</h2><table><tr><th>query</th><td>{_cell(each.query)}</td></tr>")
        for name, raises, examples in each.rows:
            kind = "raises" if raises else "lowers"
            cells = "".join(
                f'<td>{_cell(shown)}<small>no. {index}</small><span class="{kind}">{score:+.3g}</span></td>'
                for index, score, shown in examples
            )
            parts.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
        parts.append("</table>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _cell(shown: Shown) -> str:
    if isinstance(shown.value, str):
        picture = f"<pre>{html.escape(shown.value)}</pre>"
    else:
        picture = f'<img alt="" src="data:image/png;base64,{base64.b64encode(_png(shown.value)).decode()}">'
    return picture + f"<small>{html.escape(shown.label)}</small>"


def _png(image: Tensor) -> bytes:
    from matplotlib.image import imsave

    image = image.detach().float().cpu()
    image = image.movedim(0, -1).squeeze(-1) if image.dim() == 3 else image
    low, high = image.min(), image.max()
    scaled = (image - low) / (high - low).clamp_min(1e-12)
    file = io.BytesIO()
    imsave(file, scaled.numpy(), format="png", cmap="gray_r" if image.dim() == 2 else None)
    return file.getvalue()
