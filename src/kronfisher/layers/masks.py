"""Weights of which constants mask elements, by other operators than products."""

from typing import Any

import torch
from torch import Tensor

from kronfisher.layers.expressions import Expressions, Term, computes, depends, masked

__all__: list[str] = []


@computes(torch.masked_fill, Tensor.masked_fill)
def filled(record: Expressions, result: Tensor, input: Tensor, mask: Tensor, value: Any) -> list[Term] | None:
    """Some elements are constants."""
    return None if depends(value) or not depends(input) else masked(record, input, ~mask)


@computes(torch.where, Tensor.where)
def chosen(record: Expressions, result: Tensor, *args: Tensor) -> list[Term] | None:
    """Some elements are those of one matrix, the others those of another."""
    if len(args) != 3:
        return None
    condition, one, other = args if args[0].dtype == torch.bool else (args[1], args[0], args[2])
    terms: list[Term] = []
    for value, mask in ((one, condition), (other, ~condition)):
        if depends(value):
            if value.shape != result.shape:
                return None
            terms += masked(record, value, mask)
    return terms


@computes(torch.tril, Tensor.tril)
def lower(record: Expressions, result: Tensor, input: Tensor, diagonal: int = 0) -> list[Term] | None:
    """The lower triangle of a matrix."""
    return masked(record, input, torch.ones_like(input).tril(diagonal))


@computes(torch.triu, Tensor.triu)
def upper(record: Expressions, result: Tensor, input: Tensor, diagonal: int = 0) -> list[Term] | None:
    """The upper triangle of a matrix."""
    return masked(record, input, torch.ones_like(input).triu(diagonal))
