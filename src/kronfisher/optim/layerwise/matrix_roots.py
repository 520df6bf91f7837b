"""Inverse roots of the covariance of what updates change in the outputs of layers of one shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Window
from kronfisher.optim.layerwise.units import seen

__all__ = ["Alike", "Known", "cost_of_product", "cost_of_root", "covariance", "identity", "least"]

SHARE = 0.3  # of the mean variance, which all directions have before roots are taken: the smallest are noise
QUINTIC = 3.4445, -4.7750, 2.0315  # Muon's: s (a + b s² + c s⁴) of singular values s
ROUNDS = 2  # of it: enough for values from .1 on


@dataclass
class Known:
    """What is known of one weight ``[H, O, I]``.

    Attributes:
        inputs: the damped covariance A of its inputs ``[H, I, I]``.
        root: the inverse root ``[H, M, M]`` with M the lesser of O and I.
        made: the step at which that was made; −1: it is the identity yet.
    """

    inputs: Tensor
    root: Tensor
    made: int = -1


class Alike:
    """Weights of one shape, whose roots are made and applied together.

    Args:
        known: of each weight, of the same age; their tensors become views of those here.

    Attributes:
        made: the step at which the roots were made.
        cost: multiplications of making them.
    """

    def __init__(self, known: Mapping[Window, Known]) -> None:
        self._known = dict(known)
        first, entry = next(iter(known.items()))
        self._size, self.made = first.size, entry.made
        self.cost = len(known) * cost_of_root(first)
        self._inputs = torch.cat([one.inputs for one in known.values()])
        self._roots = torch.cat([one.root for one in known.values()])
        groups = self._size[0]
        for one, inputs, root in zip(
            known.values(), self._inputs.split(groups), self._roots.split(groups), strict=True
        ):
            one.inputs, one.root = inputs, root

    def even(self, updates: Mapping[str, Tensor], step: int, *, renew: bool) -> None:
        """Multiply the updates by the roots in place, after making these anew at this step, if so asked."""
        shown = [seen(w, updates[w.parameter]) if w.parameter in updates else None for w in self._known]
        if all(one is None for one in shown):
            return
        groups, outputs, *inputs = self._size
        none = self._roots.new_zeros(()).expand(groups, outputs, prod(inputs))
        update = torch.cat([none if one is None else one.reshape(none.shape).to(none.dtype) for one in shown])
        if renew:
            self._roots.copy_(_roots(update, self._inputs, self._roots))
            self.made = step
            for one in self._known.values():
                one.made = step
        changed = self._roots @ update if outputs <= update.shape[2] else update @ self._roots
        before, after = (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) for x in (update, changed))
        changed.mul_(before.div_(after.clamp_min_(torch.finfo(after.dtype).tiny)))
        for window, one, new in zip(self._known, shown, changed.split(groups), strict=True):
            if one is not None:
                one.copy_(new.view(one.shape))
                if not window.row_major:
                    window.scatter(one[None], updates[window.parameter][None])


def least(window: Window) -> int:
    """The lesser of O and I."""
    groups, outputs, *inputs = window.size
    return min(outputs, prod(inputs)) if groups else 0


def cost_of_product(window: Window) -> float:
    """Multiplications of a root with an update."""
    return float(window.numel * least(window))


def cost_of_root(window: Window) -> float:
    """Multiplications of making a root."""
    groups, outputs, *rest = window.size
    inputs, small = prod(rest), least(window)
    return float(groups * (outputs * inputs**2 + small**2 * max(outputs, inputs) + (4 * ROUNDS - 3) * small**3))


def identity(window: Window, like: Tensor) -> Tensor:
    """The root that changes nothing, ``[H, M, M]``."""
    return torch.eye(least(window), dtype=like.dtype, device=like.device).expand(window.size[0], -1, -1)


def covariance(factor: Tensor, share: float, *, bias: bool) -> Tensor:
    """A ``[H, I, I]`` without its part for the bias, which takes the mean, damped by a share of its mean eigenvalue."""
    if bias:
        edge = factor[:, :-1, -1:]
        factor = factor[:, :-1, :-1] - edge @ edge.mT / factor[:, -1:, -1:]
    damped = factor.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal.add_(share * diagonal.mean(1, keepdim=True))
    return damped


def _roots(update: Tensor, inputs: Tensor, before: Tensor) -> Tensor:
    """``(C + .3 c)^(−1/2)`` up to a factor, ``[H, M, M]``; where one is not finite, that of before.

    For O > I it is the same function of ``A UᵀU``, which has the eigenvalues of C and applies from the right.
    """
    wide = update.shape[1] <= update.shape[2]
    product = update @ inputs @ update.mT if wide else inputs @ (update.mT @ update)
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
    return torch.where(torch.isfinite(root).all(-1, keepdim=True).all(-2, keepdim=True), root, before)
