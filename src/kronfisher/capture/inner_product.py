"""Where vectors are back-propagated from outputs: through a scalar, unless they are small."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch._vmap_internals import _vmap
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, _engine_run_backward

__all__ = ["Seed", "back_propagate_together", "inner_product"]

_SMALL = 2**16  # numbers that may stay during a pass


@dataclass(frozen=True, eq=False)
class Seed:
    """Where a backward pass begins.

    Small vectors are handed to torch's engine, which keeps them for the whole pass: a function written in Python would
    take as long as the pass through a small network. By way of ``torch.autograd.grad`` they would import symbolic
    algebra at the first call, which takes half a second.

    Attributes:
        tensor: of the graph.
        gradient: of the tensor; None: it is a scalar.

    Example:
        >>> outputs = torch.zeros(2, requires_grad=True)
        >>> Seed.of(outputs, torch.tensor([1.0, 2.0])).back_propagate([outputs], retain=False)
        (tensor([1., 2.]),)
    """

    tensor: Tensor
    gradient: Tensor | None = None

    @classmethod
    def of(cls, outputs: Tensor, vector: Tensor) -> Self:
        """The vector as the gradient of the outputs."""
        if outputs.numel() > _SMALL:
            return cls(inner_product(outputs, vector))
        return cls(outputs, vector.detach().expand_as(outputs).to(outputs.dtype).contiguous())

    def back_propagate(
        self, inputs: Sequence[Tensor] | Sequence[GradientEdge], *, retain: bool
    ) -> tuple[Tensor | None, ...]:
        """The gradients of some tensors or edges of the graph, None where nothing arrives."""
        if self.gradient is None:
            return torch.autograd.grad(self.tensor, inputs, retain_graph=retain, allow_unused=True)
        start, ends = (self.tensor,), tuple(inputs)
        return _engine_run_backward(start, (self.gradient,), retain, False, ends, True, accumulate_grad=False)


def inner_product(outputs: Tensor, vector: Tensor) -> Tensor:
    """A scalar whose derivative by the outputs is the vector; its value is of no use.

    The product itself, and its derivative, would each be another tensor as large as the outputs, which for a vocabulary
    are the largest of all.

    Example:
        >>> import torch
        >>> outputs = torch.zeros(2, requires_grad=True)
        >>> torch.autograd.grad(inner_product(outputs, torch.tensor([1.0, 2.0])), outputs)[0]
        tensor([1., 2.])
    """
    return _InnerProduct.apply(outputs, vector)


def back_propagate_together(
    outputs: Tensor, vectors: Tensor, edges: Sequence[GradientEdge]
) -> tuple[Tensor | None, ...] | None:
    """The gradients ``[V, ...]`` at some edges of several vectors ``[V, *outputs]`` in one pass; None if it failed.

    A hook of the model's own may read values, or torch lack a rule: then vectors have to go one by one, through the
    graph, which is kept.
    """

    def gradients(vector: Tensor) -> tuple[Tensor | None, ...]:
        return _engine_run_backward((outputs,), (vector,), True, False, tuple(edges), True, accumulate_grad=False)

    try:
        return _vmap(gradients, 0, 0, allow_none_pass_through=True)(vectors.detach().to(outputs.dtype))
    except RuntimeError:
        return None


class _InnerProduct(Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, vector: Tensor) -> Tensor:
        ctx.vector = vector.detach().expand_as(outputs).to(outputs.dtype).contiguous()
        return outputs.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        vector, ctx.vector = ctx.vector, None  # the pass goes on for long after this
        return vector, None
