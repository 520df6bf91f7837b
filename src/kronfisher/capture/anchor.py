"""Where the gradient of an operator's result arrives, whatever is done to the result in place later."""

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kronfisher.fisher.blocks import Window

__all__ = ["Anchor", "home"]


@dataclass(frozen=True)
class Anchor:
    """An edge of the graph, and the part of its tensor that is meant.

    A view that is changed in place gets a new history: torch leads its base to where it was before, past the view's
    own node. Nothing arrives there any more, and a pass that asks for its gradient ends in an assertion of torch's, so
    that no pass asks for gradients of views.

    Attributes:
        edge: of the result, or of the tensor that it is a view of.
        window: the part of that tensor that the result is; None: all of it.
    """

    edge: GradientEdge
    window: Window | None = None

    @classmethod
    def of(cls, result: Tensor, base: Tensor | None = None) -> Self:
        """The anchor of a tensor with a graph.

        Args:
            result: the tensor.
            base: where its gradient is looked for; None: its `home`.

        Example:
            >>> import torch
            >>> rows = torch.ones(2, 3, requires_grad=True) * 2
            >>> anchor = Anchor.of(part := rows[:, 1:])
            >>> part *= 3
            >>> anchor.part(torch.autograd.grad(rows[0].sum(), anchor.edge)[0]).tolist()
            [[3.0, 3.0], [0.0, 0.0]]
        """
        base = home(result) if base is None else base
        return cls(get_gradient_edge(base), None if base is result else Window.of("", base, result))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor whose gradient arrives."""
        end: Any = self.edge.node._input_metadata[self.edge.output_nr]  # pyright: ignore[reportAttributeAccessIssue]
        return tuple(end.shape)

    def part(self, arriving: Tensor) -> Tensor:
        """The gradient of the result, out of the one that arrives at the edge."""
        return arriving if self.window is None else self.window.gather(arriving[None])[0]

    def whole(self, gradient: Tensor) -> Tensor:
        """What arrives at the edge where this is the gradient of the result."""
        if self.window is None:
            return gradient
        out = gradient.new_zeros(1, *self.shape)
        self.window.scatter(gradient[None], out)
        return out[0]


def home(result: Tensor) -> Tensor:
    """The tensor whose history keeps the gradient of a result: the one that it is a view of.

    Of views that show an element several times the gradients are told apart at the view alone, which torch changes
    nothing in. What some of torch's operators call a view (`slice_inverse`) has a gradient where its base has none.
    """
    base = result._base
    overlapping = any(step == 0 and n > 1 for n, step in zip(result.shape, result.stride(), strict=True))
    return result if base is None or overlapping or not base.requires_grad else base
