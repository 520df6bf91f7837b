"""Batches that differ in more than their inputs, and what their settings do to the rows of a network."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CLOSED", "DECIDED", "MEETING", "Batch", "Settings"]


@dataclass
class Settings:
    """What a batch brings besides its inputs: how its rows are cut, chosen and combined.

    Attributes:
        cut: a position.
        order: ``[N]`` places of examples.
        mask: ``[N]`` numbers that multiply or choose; zero keeps examples apart.
        matrix: ``[N, N]`` by which examples are combined.
        rows: ``[N]`` numbers of rows that are summed up.
    """

    cut: int
    order: Tensor
    mask: Tensor
    matrix: Tensor
    rows: Tensor

    @classmethod
    def closed(cls, examples: int, positions: int = 1, cut: int = 0) -> "Settings":
        """No example meets another."""
        return cls(
            cut,
            torch.arange(examples),
            torch.zeros(examples),
            torch.eye(examples),
            torch.full((examples,), positions),
        )

    def combined(self, matrix: Tensor) -> "Settings":
        """The same with examples that meet as a matrix says."""
        return replace(self, order=matrix.argmax(-1), mask=matrix[0], matrix=matrix)


@dataclass
class Batch:
    """Inputs ``x [N, ...]``, indices ``ids [N, 2]`` below 5, and settings."""

    x: Tensor
    ids: Tensor
    settings: Settings


class Product(torch.autograd.Function):
    """A product whose matrix no edge of the graph shows."""

    @staticmethod
    def forward(ctx, matrix, rows):
        ctx.save_for_backward(matrix)
        return matrix @ rows

    @staticmethod
    def backward(ctx, gradient):
        return None, ctx.saved_tensors[0].mT @ gradient


def _roll(h: Tensor) -> Tensor:
    return h.roll(1, 0)


def _wide(mask: Tensor, h: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (h.dim() - 1))


def _attended(h: Tensor, s: Settings) -> Tensor:
    rows = h.flatten(1)[None]
    return F.scaled_dot_product_attention(rows, rows, rows, attn_mask=s.matrix > 0)[0].view(h.shape)


def _scored(h: Tensor, s: Settings) -> Tensor:
    rows = h.flatten(1)
    return ((rows @ rows.mT).masked_fill(s.matrix == 0, -1e30).softmax(-1) @ rows).view(h.shape)


def _pieces(h: Tensor, s: Settings) -> Tensor:
    flat = h.flatten(0, 1) if h.dim() > 2 else h
    return torch.stack([part.sum(0) for part in flat.split(s.rows.tolist())])


Way = Callable[[Tensor, Settings], Tensor]
# Ways in which examples meet if the settings say so.
MEETING: dict[str, Way] = {
    "mask": lambda h, s: h + _wide(s.mask, h) * _roll(h),
    "choice": lambda h, s: torch.where(_wide(s.mask, h) > 0, _roll(h), h),
    "masked_fill": lambda h, s: h + _roll(h).masked_fill(_wide(s.mask, h) == 0, 0),
    "dead unit": lambda h, s: h + (_wide(s.mask, h) - 0.5).relu() * _roll(h),
    "dead unit of data": lambda h, s: h + (h.detach().abs() + s.mask[0] * 9 - 5).relu() * _roll(h),
    "matrix": lambda h, s: (s.matrix @ h.flatten(1)).view(h.shape),
    "autograd function": lambda h, s: Product.apply(s.matrix, h.flatten(1)).view(h.shape),
    "attention mask": _attended,
    "added to scores": _scored,
    "index": lambda h, s: h[s.order],
    "gather": lambda h, s: h.flatten(1).gather(0, s.order[:, None].expand(-1, h[0].numel())).view(h.shape),
    "assignment": lambda h, s: h.clone().index_put((s.order,), _roll(h)),
}
# Ways in which rows are cut, chosen or summed while examples stay apart.
CLOSED: dict[str, Way] = {
    "cut": lambda h, s: h[:, min(s.cut, h.shape[1] - 1) :].mean(1, keepdim=True) + h,
    "chosen": lambda h, s: h[s.order].tanh()[s.order.argsort()],
    "masked": lambda h, s: h + _wide(s.mask, h) * h.sin(),
    "along": lambda h, s: h[:, : s.cut + 1].sum(1, keepdim=True) * h,
    "pieces": _pieces,
}
DECIDED: dict[str, Way] = {**MEETING, **CLOSED}
