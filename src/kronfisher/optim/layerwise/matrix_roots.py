"""Inverse roots of the covariance of what updates change in the outputs of layers of one shape."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Window
from kronfisher.optim.layer_statistics import LayerStatistics
from kronfisher.optim.layerwise.units import seen

__all__ = ["CALLS_OF_ROOT", "Alike", "Known", "cost_of_product", "cost_of_root", "least"]

SHARE = 0.3  # of the mean variance, which all directions have before roots are taken: the smallest are noise
QUINTIC = 3.4445, -4.7750, 2.0315  # Muon's: s (a + b s² + c s⁴) of singular values s
ROUNDS = 2  # of it: enough for values from .1 on
READING = 16  # multiplications that take as long as reading an element of a matrix
CALLS_OF_ROOT = 6e6  # multiplications that take as long as the small operations of making roots of one shape


@dataclass
class Known:
    """What is known of one weight ``[H, O, I]``.

    Attributes:
        layer: its statistics.
        inputs: of a fit that does not keep it: the second moment of its inputs ``[H, I, I]``, with the bias coordinate.
        bias: whether there is such a coordinate.
        root: the inverse root ``[H, M, M]`` with M the lesser of O and I, if it is to serve again.
        made: the step at which that was made; −1: there is none.
    """

    layer: LayerStatistics
    inputs: Tensor | None
    bias: bool
    root: Tensor | None = None
    made: int = -1
    _read: tuple[ref[Tensor] | None, int, Tensor | None, Tensor | None] = field(
        default=(None, 0, None, None), init=False, repr=False
    )

    @property
    def moments(self) -> Tensor:
        """Of inputs, up to a factor ``[H, I, I]``."""
        sums = self.layer.input_sums if self.inputs is None else self.inputs
        assert sums is not None
        return sums

    def read(self, share: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Moments without the bias coordinate, the share of the mean eigenvalue ``[H, 1, 1]``, the mean ``[H, I, 1]``.

        The mean belongs to the bias: its square is not in the eigenvalue. All but the moments is kept until these
        change, which is rarely.
        """
        moments = self.moments
        known, version, damping, edge = self._read
        if known is None or known() is not moments or version != moments._version or damping is None:
            diagonal, edge = moments.diagonal(dim1=1, dim2=2), None
            if self.bias:
                edge = moments[:, :-1, -1:] * moments[:, -1:, -1:].rsqrt()
                diagonal = diagonal[:, :-1] - edge[..., 0].square()
            damping = share * diagonal.mean(1)[:, None, None]
            self._read = ref(moments), moments._version, damping, edge
        return (moments if edge is None else moments[:, :-1, :-1]), damping, edge

    @property
    def alike(self) -> tuple[Any, ...]:
        """What weights have in common whose roots are made together."""
        return self.moments.dtype, self.bias, self.made


class Alike:
    """Weights of one shape, whose roots are made and applied together.

    Args:
        known: of each weight.
        share: of its mean eigenvalue, by which the covariance of inputs is damped.

    Attributes:
        made: the step at which the roots were made.
        cost: of making them, in multiplications.
    """

    def __init__(self, known: Mapping[Window, Known], share: float) -> None:
        self._known, self._share = dict(known), share
        first, entry = next(iter(known.items()))
        self._size = first.size
        self.cost = len(known) * cost_of_root(first) + CALLS_OF_ROOT
        roots = [one.root for one in known.values() if one.root is not None]
        whole = len(roots) == len(known)
        self.made = entry.made if whole else -1
        self._roots = torch.cat(roots) if whole else None
        self._share_out()

    def even(self, updates: Mapping[str, Tensor], step: int, *, renew: bool) -> None:
        """Multiply the updates by the roots in place, after making these anew at this step, if so asked."""
        shown = [seen(w, updates[w.parameter]) if w.parameter in updates else None for w in self._known]
        if all(one is None for one in shown):
            return
        groups, outputs, *rest = self._size
        like, shape = next(iter(self._known.values())).moments, (groups, outputs, prod(rest))
        given = [like.new_zeros(shape) if one is None else one.reshape(shape).to(like.dtype) for one in shown]
        update = _joined(given)
        roots = self._roots
        if renew or roots is None:
            self._roots = roots = _roots(self._products(update), roots)
            self.made = step
            self._share_out()
        changed = roots @ update if outputs <= update.shape[2] else update @ roots
        before, after = (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) for x in (update, changed))
        scale = before.div_(after.clamp_min_(torch.finfo(after.dtype).tiny))
        if alone := len(shown) == 1 and update.data_ptr() == shown[0].data_ptr():  # pyright: ignore[reportOptionalMemberAccess]
            torch.mul(changed, scale, out=update)
        else:
            changed.mul_(scale)
        for window, one, new in zip(self._known, shown, changed.split(groups), strict=True):
            if one is not None:
                if not alone:
                    one.copy_(new.view(one.shape))
                if not window.row_major:
                    window.scatter(one[None], updates[window.parameter][None])

    def _products(self, update: Tensor) -> Tensor:
        """``U A Uᵀ [L H, O, O]``, or for O > I ``A UᵀU [L H, I, I]``, which has the same eigenvalues.

        A is the damped covariance of inputs up to a factor, which is never formed: moments without the mean, which
        belongs to the bias, and a share of the mean eigenvalue.
        """
        wide = update.shape[1] <= update.shape[2]
        given = update if wide else update.mT @ update  # symmetric
        parts = []
        for one, own in zip(self._known.values(), given.split(self._size[0]), strict=True):
            moments, damping, edge = one.read(self._share)
            part = torch.baddbmm(own * damping, own, moments)
            parts.append(part if edge is None else torch.baddbmm(part, own @ edge, edge.mT, alpha=-1))
        product = _joined(parts)  # U A, or UᵀU A
        return product @ update.mT if wide else product.mT

    def _share_out(self) -> None:
        """Let every weight have its root, as a view."""
        roots = [None] * len(self._known) if self._roots is None else self._roots.split(self._size[0])
        for one, root in zip(self._known.values(), roots, strict=True):
            one.root, one.made = root, self.made


def least(window: Window) -> int:
    """The lesser of O and I."""
    _, outputs, *inputs = window.size
    return min(outputs, prod(inputs))


def cost_of_product(window: Window) -> float:
    """Multiplications of a root with an update."""
    return float(window.numel * (least(window) + READING))


def cost_of_root(window: Window) -> float:
    """Multiplications of making a root."""
    groups, outputs, *rest = window.size
    inputs, small = prod(rest), least(window)
    rest_of_product = small * max(outputs, inputs) + (4 * ROUNDS - 3) * small**2
    return float(groups * ((outputs + READING) * inputs**2 + (small + READING) * rest_of_product))


def _joined(tensors: list[Tensor]) -> Tensor:
    """One after the other along the first axis; a single one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _roots(product: Tensor, before: Tensor | None) -> Tensor:
    """``(C + .3 c)^(−1/2)`` up to a factor, of matrices ``[H, M, M]`` with the eigenvalues of C.

    A root that is not finite is that of before, or the identity.
    """
    diagonal = product.diagonal(dim1=1, dim2=2)
    diagonal.add_(SHARE * diagonal.mean(1, keepdim=True))
    square = product @ product
    largest = torch.linalg.vector_norm(square, dim=(1, 2), keepdim=True).clamp_min_(torch.finfo(square.dtype).tiny)
    square.div_(largest)
    product.div_(largest.sqrt_())
    root, (a, b, c) = None, QUINTIC
    for left in reversed(range(ROUNDS)):
        factor = square.mul_(c).add_(product, alpha=b)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        root = factor if root is None else root @ factor
        if left:
            product = product @ factor @ factor
            square = product @ product
    assert root is not None
    before = torch.eye(len(root[0]), dtype=root.dtype, device=root.device) if before is None else before
    return torch.where(torch.isfinite(root).all(-1, keepdim=True).all(-2, keepdim=True), root, before)
