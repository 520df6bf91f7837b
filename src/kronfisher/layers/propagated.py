"""A linear layer on a value and its derivatives, propagated forward side by side: one position for each of them.

A bias enters the value alone. Derivatives by the inputs of a chain of layers are then what any shared weight is: a few
positions of each example, which every fit treats (Dangel, Müller & Zeinhofer 2024).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from kronfisher.layers.activations import Activations, Dense
from kronfisher.layers.linear import RowUse, grouped
from kronfisher.layers.row_order import RowOrder
from kronfisher.layers.use import Use, Windows, handles

__all__ = ["PropagatedUse", "affine"]


def affine(stack: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``W x + b`` for the first position of ``[n, T, I]``, ``W x`` for all others: ``[n, T, O]``.

    Example:
        >>> stack, weight = torch.tensor([[[2.0], [1.0]]]), torch.tensor([[3.0]])  # x and dx/dx
        >>> affine(stack, weight, torch.tensor([5.0])).tolist()
        [[[11.0], [3.0]]]
    """
    if has_torch_function((stack, weight)):
        return handle_torch_function(affine, (stack, weight), stack, weight, bias)
    product = F.linear(stack, weight)
    return product if bias is None else torch.cat([product[:, :1] + bias, product[:, 1:]], dim=1)


class PropagatedUse(RowUse):
    """`affine`: the homogeneous coordinate of a bias is one at the value and zero at derivatives."""

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        rows = self.cast_inputs() if weight else gradient[..., :0]
        if bias:
            column = rows.new_zeros(*rows.shape[:2], 1)
            column[:, 0] = 1
            rows = torch.cat([rows, column], dim=-1)
        return Dense(order.group(rows, 2).unsqueeze(0))


@handles(affine)
def propagate(view: Windows, stack: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Use]:
    """The operator above."""
    matrix, vector = view(weight), view(bias)
    if not (matrix or vector) or (vector and vector.size != weight.shape[:1]):
        return
    yield PropagatedUse(grouped(matrix), grouped(vector), stack if matrix else None)
