"""What cannot be treated, found before any work and said by name."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from kronfisher.blocks import Block, View
from kronfisher.errors import UnsupportedError

__all__ = ["Claims", "detached", "hidden", "left_over", "refuse", "settle", "swapped", "unclaimed", "unknown"]


def hidden(name: str, functions: Iterable[str]) -> str:
    """What to say of a parameter used inside autograd functions that it was not given to."""
    hint = (
        " Reentrant checkpointing hides its layers: call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        if "CheckpointFunction" in functions
        else " Pass the parameter to the function, or freeze it with requires_grad_(False)."
    )
    return f"{name}: used by {', '.join(sorted(functions))} inside, where no graph shows its gradient.{hint}"


def unclaimed(name: str, operators: Iterable[str]) -> str:
    """What to say of a parameter used by operators that are not understood."""
    return f"{name}: used by {', '.join(sorted(operators))}"


def unknown(problems: Mapping[str, str], where: str) -> UnsupportedError:
    """The error for parameters that only the fallback could treat, where it is not wanted."""
    lines = "\n  ".join(problems.values())
    return UnsupportedError(
        f"{where}: strict=True, and these trainable parameters are used in ways that are not understood:\n  {lines}\n"
        "Without strict=True their diagonal is taken from the gradients of single data; freeze them with "
        "requires_grad_(False) to leave them out of the Fisher matrix."
    )


def detached(where: str) -> UnsupportedError:
    """The error for outputs that no trainable parameter has a part in."""
    return UnsupportedError(
        f"{where}: the outputs depend on no trainable parameter, or were detached from them (torch.no_grad, .detach()) "
        "inside the model."
    )


@dataclass
class Claims:
    """What several blocks make of parameters that they share or show only in part.

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
    windows: dict[str, list[tuple[View, Block]]] = {}
    for block in blocks:
        for view in block.views:
            windows.setdefault(view.parameter, []).append((view, block))
    found = Claims()
    for name, several in windows.items():
        alone = all(len(block.views) == 1 for _, block in several)
        if len(several) == 1 and several[0][0].complete:
            continue
        if alone and name not in whole and swapped([view for view, _ in several]):
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
            found.problems[name] = (
                f"{name} is used in {len(several)} different ways (by {operators}), for example as a matrix and as its "
                "transpose, or whole and in part"
            )
    return found


_PIECES = 64  # left over by windows on a parameter


def left_over(views: Sequence[View]) -> list[View]:
    """Windows on what some windows on one parameter do not show."""
    if any(view.complete for view in views):
        return []
    left, view = [], views[0]
    for box in _boxes(_counts(views) == 0):
        size = tuple(high - low for low, high in box)
        offset = sum(low * step for (low, _), step in zip(box, view.layout, strict=True))
        left.append(View(view.parameter, view.shape, view.layout, size, view.layout, offset).reshaped(1, *size))
    return left


def _counts(views: Sequence[View]) -> Tensor:
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


def swapped(views: Sequence[View]) -> bool:
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


def refuse(problems: Mapping[str, str], where: str) -> None:
    """Raise an UnsupportedError that lists what is wrong with which parameter, if anything is."""
    if problems:
        raise UnsupportedError(f"{where}: " + "\n".join(problems.values()))
