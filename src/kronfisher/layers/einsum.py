"""``einsum``, products of batches of matrices and ``tensordot``, of data with one weight or several."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Window
from kronfisher.layers.contraction import Labels, contraction
from kronfisher.layers.elementwise import ElementwiseUse, broadcast
from kronfisher.layers.paths import paths
from kronfisher.layers.use import Use, Windows, handles

__all__ = ["products"]


_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MORE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _parsed(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str] | None:
    """A letter for every axis of every operand and of the output; None where one occurs twice in a place."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    free = [c for c in _MORE + _LETTERS if c not in equation]
    if len(names) != len(operands):
        return None
    hidden = [
        t.dim() - len(name.replace("...", "")) if "..." in name else 0 for name, t in zip(names, operands, strict=True)
    ]
    dots = "".join(free[: max(hidden)])
    names = [name.replace("...", dots[len(dots) - n :]) for name, n in zip(names, hidden, strict=True)]
    if not arrow:
        joined = "".join(inputs.replace("...", "").replace(",", ""))
        output = dots + "".join(sorted(c for c in set(joined) if joined.count(c) == 1))
    output = output.replace("...", dots)
    places = [*names, output]
    if any(len(name) != t.dim() for name, t in zip(names, operands, strict=True)):
        return None
    return (names, output) if all(len(set(place)) == len(place) for place in places) else None


def _contract(view: Windows, equation: str, operands: Sequence[Tensor]) -> Iterator[Use]:
    """The uses of the operands that are weights."""
    windows = [view(operand) for operand in operands]
    places = [k for k, window in enumerate(windows) if window is not None]
    if not 0 < len(places) < len(operands) or (parsed := _parsed(equation, operands)) is None:
        return
    names, output = parsed
    sizes: dict[str, int] = {}
    for name, operand in zip(names, operands, strict=True):
        for c, n in zip(name, operand.shape, strict=True):
            if 0 in (n, sizes.get(c, n)) and n != sizes.get(c, n):
                return  # one beside none: nothing of the weight is seen
            sizes[c] = max(sizes.get(c, 1), n) if n else 0
    weights: dict[int, tuple[Window, str]] = {}
    for place in places:
        others = "".join(name for k, name in enumerate(names) if k != place)
        if any(c not in others + output for c in names[place]):
            return  # summed over the weight alone
        weights[place] = _once(windows[place], names[place], sizes)  # pyright: ignore[reportArgumentType]
    if len(places) > 1:
        data = [k for k in range(len(operands)) if k not in places and not view.constant(operands[k])]
        yield from paths(weights, data, operands, names, output, sizes)
        return
    ((window, weight),) = weights.values()
    others = [k for k in range(len(operands)) if k not in places]
    data, own = operands[others[0]], names[others[0]]
    if len(others) > 1:
        own = "".join(dict.fromkeys(c for k in others for c in names[k] if c in weight + output))
        data = torch.einsum(",".join(names[k] for k in others) + "->" + own, *(operands[k].detach() for k in others))
    for use in contraction(window, data, Labels(own, weight, output), sizes):
        use.reads_data = all(operands[k].grad_fn is None for k in others)
        yield use


def _once(window: Window, name: str, sizes: dict[str, int]) -> tuple[Window, str]:
    """A window on a weight and its letters, without the axes along which it is repeated: they say nothing."""
    kept = [k for k, c in enumerate(name) if not (sizes[c] > 1 and (window.size[k] == 1 or window.stride[k] == 0))]
    return (window if len(kept) == len(name) else window.permuted(*kept)), "".join(name[k] for k in kept)


@handles(torch.einsum)
def einsum(view: Windows, *args: object) -> Iterator[Use]:
    """``einsum("...", x, W)`` with any number of weights and of other operands."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if isinstance(equation, str) and all(isinstance(each, Tensor) for each in operands):
        yield from _contract(view, equation, operands)  # type: ignore[arg-type]


@handles(torch.bmm, Tensor.bmm)
def bmm(view: Windows, input: Tensor, mat2: Tensor) -> Iterator[Use]:
    """``x [B, n, I] @ W [B, I, O]``, or the other way round."""
    yield from _contract(view, "bij,bjk->bik", (input, mat2))


@handles(torch.baddbmm, Tensor.baddbmm)
def baddbmm(
    view: Windows, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Iterator[Use]:
    """``b + x [B, n, I] @ W [B, I, O]``."""
    if beta != 1 or alpha != 1:
        return
    if view(batch1) or view(batch2):
        uses = list(_contract(view, "bij,bjk->bik", (batch1, batch2)))
        if not uses:
            return
        yield from uses
    if shift := view(input):
        shared = broadcast(shift)
        yield ElementwiseUse(None, shared, None, shared.size[1:])


def products(view: Windows, input: Tensor, other: Tensor) -> Iterator[Use]:
    """``x @ W`` and ``W @ x`` with batches of matrices on either side."""
    if min(input.dim(), other.dim()) < 2:
        return
    count = max(input.dim(), other.dim()) - 2
    left, right = (_MORE[count - tensor.dim() + 2 : count] for tensor in (input, other))
    yield from _contract(view, f"{left}ij,{right}jk->{_MORE[:count]}ik", (input, other))


@handles(torch.tensordot)
def tensordot(view: Windows, a: Tensor, b: Tensor, dims: object = 2, out: None = None) -> Iterator[Use]:
    """Contracted over pairs of axes."""
    if isinstance(dims, int):
        pairs = [(a.dim() - dims + k, k) for k in range(dims)]
    elif isinstance(dims, list | tuple) and all(isinstance(each, list | tuple) for each in dims):
        pairs = [(i % a.dim(), j % b.dim()) for i, j in zip(*dims, strict=True)]
    else:
        return
    left, right = list(_LETTERS[: a.dim()]), list(_MORE[: b.dim()])
    for i, j in pairs:
        right[j] = left[i]
    output = [c for c in left if c not in right] + [c for c in right if c not in left]
    yield from _contract(view, f"{''.join(left)},{''.join(right)}->{''.join(output)}", (a, b))
