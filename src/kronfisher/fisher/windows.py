"""Windows on one parameter: elements that they leave over, share, or show twice."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from kronfisher.fisher.blocks import Block, Window

__all__ = ["Claims", "left_over", "settle", "swapped"]


@dataclass
class Claims:
    """Parameters that blocks share or show only in part.

    Attributes:
        apart: names of parameters with several partners (other biases, or none), which must be treated without them.
        problems: name → reason of those that no blocks can stand for.
    """

    apart: set[str] = field(default_factory=set)
    problems: dict[str, str] = field(default_factory=dict)


def settle(blocks: Iterable[Block], whole: Container[str] = ()) -> Claims:
    """Find parameters that blocks share, or show only in part, and say what is to be done.

    Args:
        blocks: all of a model.
        whole: names of parameters of which every element must have one place only: they may not have two roles.
    """
    windows: dict[str, list[tuple[Window, Block]]] = {}
    for block in blocks:
        for view in block.views:
            windows.setdefault(view.parameter, []).append((view, block))
    found = Claims()
    for name, several in windows.items():
        alone = all(len(block.views) == 1 for _, block in several)
        if len(several) == 1 and several[0][0].complete:
            continue
        matrices = all(block.weight is not None for _, block in several)
        roles = alone and matrices and swapped([view for view, _ in several])
        if roles and name not in whole:
            continue
        counts = _counts([view for view, _ in several])
        operators = ", ".join(sorted({block.operator for _, block in several}))
        if not bool((counts > 1).any()):
            if len(boxes := _boxes(counts == 0)) > _PIECES:
                found.problems[name] = (
                    f"{name}: only {int((counts > 0).sum())} of its {counts.numel()} elements are used (by "
                    f"{operators}), and what is left over has {len(boxes)} pieces"
                )
        elif not alone:
            found.apart.add(name)
        else:
            ways = "two roles, as a matrix and as its transpose" if roles else f"{len(several)} different ways"
            found.problems[name] = f"{name}: used in {ways} (by {operators})"
    return found


_PIECES = 64  # left over by windows on a parameter


def left_over(views: Sequence[Window]) -> list[Window]:
    """Windows on what some windows on one parameter do not show."""
    if any(view.complete for view in views):
        return []
    left, view = [], views[0]
    for box in _boxes(_counts(views) == 0):
        size = tuple(high - low for low, high in box)
        offset = sum(low * step for (low, _), step in zip(box, view.layout, strict=True))
        left.append(Window(view.parameter, view.shape, view.layout, size, view.layout, offset).reshaped(1, *size))
    return left


def _counts(views: Sequence[Window]) -> Tensor:
    counts = views[0].counter()
    for view in views:
        view.mark(counts)
    return counts


def _boxes(mask: Tensor) -> list[tuple[tuple[int, int], ...]]:
    """Ranges along the axes of boxes that together are what the mask marks."""
    if mask.dim() == 0:
        return [()] if bool(mask) else []
    if mask.dim() > 1 and bool(mask.all()):
        return [tuple((0, n) for n in mask.shape)]
    rows = mask.reshape(len(mask), -1)
    starts = [0, *((rows[1:] != rows[:-1]).any(dim=1).nonzero().flatten() + 1).tolist(), len(rows)]
    return [((low, high), *box) for low, high in pairwise(starts) if low < high for box in _boxes(mask[low])]


def swapped(views: Sequence[Window]) -> bool:
    """Whether they are a whole matrix and its transpose, as a table of embeddings tied to the last layer is."""
    if (
        len(views) != 2
        or len({view.parameter for view in views}) > 1
        or not any(view.whole for view in views)
        or any(len(v.size) != 3 for v in views)
    ):
        return False
    (_, o, i), (_, p, q) = views[0].stride, views[1].stride
    same = views[0].size == (1, *views[1].size[:0:-1]) and views[0].offset == views[1].offset
    return same and (o, i) == (q, p)
