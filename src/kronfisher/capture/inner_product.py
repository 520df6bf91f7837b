"""The scalar through which vectors are back-propagated from outputs."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

__all__ = ["inner_product"]


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


class _InnerProduct(Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, vector: Tensor) -> Tensor:
        ctx.vector = vector.detach().expand_as(outputs).to(outputs.dtype).contiguous()
        return outputs.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        vector, ctx.vector = ctx.vector, None  # the pass goes on for long after this
        return vector, None
