"""How a weight that is computed from others depends on them: sums of products ``L θ R`` with known L and R.

An operator that receives parameters and constants alone, no data, computes a weight. A rule for it says what its result
is as a matrix ``[O, I]``, whose first axis is O and whose others are I. Where no rule holds, a `Term` without a window
names the parameters that the result depends on in some other way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kronfisher.fisher.blocks import Window

__all__ = ["RULES", "Expressions", "Term", "computes", "depends", "few_products", "leaves", "masked"]


@dataclass(frozen=True)
class Term:
    """A parameter θ, or a part of it, in a sum of products ``L₁ L₂ … θ … R₂ R₁`` that is a matrix ``[O, I]``.

    Attributes:
        parameter: θ's name.
        window: on θ, ``[1, O', I']``, or ``[1, O']`` where it is a diagonal; None: it enters in a way without a rule.
        left: numbers, diagonals and matrices to the left of θ, the outermost first.
        right: diagonals and matrices to its right, the outermost first.
        diagonal: θ stands for the diagonal matrix with these entries, or with this single one.
        operator: the operator without a rule.
        derivative: with it θ enters by a number q(θ) that multiplies ``left right``: ``∂q/∂θ = P Q``, as
            P ``[O', r]`` and Q ``[r, I']``.
        slopes: with them θ enters by numbers q between ``left`` and ``right``, each of its own row of θ, or, with
            `columns`, of its own column: ``∂q_o/∂θ_o`` as ``[O', I']``.
        columns: see `slopes`.
    """

    parameter: str
    window: Window | None
    left: tuple[Tensor, ...] = ()
    right: tuple[Tensor, ...] = ()
    diagonal: bool = False
    operator: str = ""
    derivative: tuple[Tensor, Tensor] | None = None
    slopes: Tensor | None = None
    columns: bool = False

    @property
    def transposed(self) -> "Term":
        """The same θ in the transposed matrix."""
        derivative = None if self.derivative is None else (self.derivative[1].mT, self.derivative[0].mT)
        numbers, left = tuple(t for t in self.left if not t.dim()), tuple(t for t in self.left if t.dim())
        window = self.window
        if window is not None and not self.diagonal:
            window = window.permuted(0, 2, 1)
        return replace(
            self,
            window=window,
            derivative=derivative,
            slopes=None if self.slopes is None else self.slopes.mT,
            columns=self.slopes is not None and not self.columns,
            left=(*numbers, *(t.mT if t.dim() == 2 else t for t in self.right)),
            right=tuple(t.mT if t.dim() == 2 else t for t in left),
        )

    def within(self, left: Sequence[Tensor] = (), right: Sequence[Tensor] = ()) -> "Term":
        """θ with more factors outside."""
        return replace(self, left=(*left, *self.left), right=(*right, *self.right))


class Expressions(Protocol):
    """What rules ask of the record of a forward pass.

    Attributes:
        lenient: as in training, where the norm by which a matrix is divided is held constant.
    """

    lenient: bool

    def terms(self, tensor: Tensor) -> list[Term]:
        """How a matrix (or what flattens to one) that does not depend on the data depends on parameters."""
        ...

    def rest(self, tensor: Tensor, operator: str) -> list[Term]:
        """The parameters that a tensor depends on, without their windows."""
        ...

    def scale(self, tensor: Tensor) -> Term | None:
        """A window on a parameter as a diagonal; None if the tensor is no such window."""
        ...

    def number(self, tensor: Tensor) -> list[Term]:
        """How a matrix that a number multiplies depends on the parameters that the number depends on."""
        ...


_NUMBERS = 2**19  # of an example, at most, where each row of a weight has a norm

Rule = Callable[..., "list[Term] | None"]

RULES: dict[Callable, Rule] = {}
"""Operator of torch → rule of a record, the result and the operator's arguments, which returns None where it fails."""


def computes(*operators: Callable) -> Callable[[Rule], Rule]:
    """Register the rule of some operators."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, rule))
        return rule

    return register


def leaves(tensor: Tensor) -> list[Tensor]:
    """The leaves of the autograd graph that a tensor depends on, itself if it is one."""
    if tensor.grad_fn is None:
        return [tensor]
    found: list[Tensor] = []
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack += [child for child, _ in node.next_functions]
    return found


def depends(value: Any) -> bool:
    """Whether a value is a tensor that depends on trainable parameters."""
    return isinstance(value, Tensor) and value.requires_grad


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(len(tensor), -1)


def few_products(matrix: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """P ``[O, r]`` and Q ``[r, I]``, whose product is the matrix, r up to so many, by crosses; None: it takes more."""
    rest, columns, rows = matrix.clone(), [], []
    size = rest.abs().amax() * torch.finfo(rest.dtype).eps * 32
    for _ in range(most):
        place = rest.abs().argmax()
        row, column = place // rest.shape[1], place % rest.shape[1]
        pivot = rest[row, column]
        columns.append(rest[:, column] / torch.where(pivot == 0, 1, pivot))
        rows.append(rest[row].clone())
        rest = rest - torch.outer(columns[-1], rows[-1])
        if bool(rest.abs().amax() <= size):
            return torch.stack(columns, 1), torch.stack(rows)
    return None


@computes(
    Tensor.to, Tensor.float, Tensor.double, Tensor.type, Tensor.type_as, Tensor.contiguous, Tensor.clone, torch.clone
)
def copied(record: Expressions, result: Tensor, input: Tensor, *_: Any, **__: Any) -> list[Term] | None:
    """The same elements."""
    return record.terms(input)


@computes(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def added(record: Expressions, result: Tensor, input: Any, other: Any, *, alpha: float = 1) -> list[Term] | None:
    """``V + α W``; constants may be broadcast."""
    terms: list[Term] = []
    for value, factor in ((input, 1.0), (other, alpha)):
        if not depends(value):
            continue
        if value.shape != result.shape:
            return None
        own = record.terms(value)
        terms += own if factor == 1 else [term.within((result.new_tensor(factor),)) for term in own]
    return terms


@computes(torch.sub, Tensor.sub, Tensor.__sub__)
def subtracted(record: Expressions, result: Tensor, input: Any, other: Any, *, alpha: float = 1) -> list[Term] | None:
    """``V − α W``."""
    return added(record, result, input, other, alpha=-alpha)


@computes(Tensor.__rsub__)
def subtracted_from(record: Expressions, result: Tensor, input: Any, other: Any) -> list[Term] | None:
    """``W − V``."""
    return added(record, result, other, input, alpha=-1)


@computes(torch.neg, Tensor.neg, Tensor.__neg__)
def negated(record: Expressions, result: Tensor, input: Tensor) -> list[Term] | None:
    """``−V``."""
    return [term.within((result.new_tensor(-1.0),)) for term in record.terms(input)]


Factors = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # to the left and to the right


def _scaling(value: Any, result: Tensor) -> Factors | None:
    """Factors on the left and on the right that stand for an elementwise product with a tensor or number."""
    if not isinstance(value, Tensor):
        return (result.new_tensor(float(value)),), ()
    value = value.detach()
    if value.numel() == 1:
        return (value.reshape(()),), ()
    sizes = [1] * (result.dim() - value.dim()) + list(value.shape)
    if prod(sizes[1:]) == 1:
        return (value.reshape(-1),), ()
    if sizes[0] == 1:
        return (), (value.expand(1, *result.shape[1:]).reshape(-1),)
    return None


@computes(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply)
def multiplied(record: Expressions, result: Tensor, input: Any, other: Any) -> list[Term] | None:
    """A matrix times a number, or times a number for each row or column, all of which may be trained."""
    terms: list[Term] = []
    for value, factor in ((input, other), (other, input)):
        if not depends(value):
            continue
        if value.shape == result.shape and (factors := _scaling(factor, result)) is not None:
            terms += [term.within(*factors) for term in record.terms(value)]
        elif (own := _diagonal(record, value, factor, result)) is not None:
            terms.append(own)
        elif value.shape == result.shape and not depends(factor):
            terms += masked(record, value, factor)
        else:
            return None
    return terms


def masked(record: Expressions, value: Tensor, mask: Tensor) -> list[Term]:
    """A matrix times constant numbers, one for each element, as the zeros and ones of a pruned weight.

    Whole rows and columns are diagonals beside it. Any other mask leaves no product of two factors: by those of the
    weight that the layer sees, elements would count that are zero in the Fisher matrix. An estimate has the exact
    diagonal by the fallback, which is closer where half of the elements are masked. In training gradients are zero
    there, and the other elements have the layer's curvature: factors are those of the layer, with one number in place
    of all that are not zero.
    """
    numbers = _matrix(mask.to(value).expand_as(value))
    product = few_products(numbers, 1)
    if product is not None:
        column, row = product
        return [term.within((column[:, 0],), (row[0],)) for term in record.terms(value)]
    if not record.lenient:
        return record.rest(value, "a mask")
    size = numbers.square().sum() / numbers.count_nonzero()
    return [term.within((size.sqrt(),)) for term in record.terms(value)]


def _diagonal(record: Expressions, value: Tensor, factor: Any, result: Tensor) -> Term | None:
    """A window on a parameter that has one number for each row or column of the other factor."""
    factors, term = _scaling(value, result), record.scale(value)
    if factors is None or term is None or not isinstance(factor, Tensor) or factor.shape != result.shape:
        return None
    return term.within((), (_matrix(factor),)) if factors[0] else term.within((_matrix(factor),))


@computes(torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide)
def divided(record: Expressions, result: Tensor, input: Tensor, other: Any) -> list[Term] | None:
    """A matrix divided by a constant, or by one for each row or column, or by a number of its own, as its norm.

    In training norms of its own are held constant; elsewhere ``V/s`` depends on the parameters of s by
    ``−V/s² · ∂s/∂θ``.
    """
    if not depends(input):
        return None
    terms: list[Term] = []
    if depends(other) and not (record.lenient and {*map(id, leaves(other))} <= {*map(id, leaves(input))}):
        if other.numel() != 1:
            return None
        factors = (-other.detach().reshape(()).square().reciprocal(),), (_matrix(input.detach()),)
        terms = [term.within(*factors) for term in record.number(other)]
    held = multiplied(record, result, input, 1 / (other.detach() if isinstance(other, Tensor) else other))
    return None if held is None else [*held, *terms]


@computes(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def product(record: Expressions, result: Tensor, input: Tensor, other: Tensor | None = None, **named: Any):
    """``V W``."""
    other = named.get("mat2", other)
    if other is None or input.dim() != 2 or other.dim() != 2:
        return None
    left, right = (record.terms(each) if each.requires_grad else [] for each in (input, other))
    return [term.within((), (other.detach(),)) for term in left] + [term.within((input.detach(),)) for term in right]


@computes(F.linear)
def linear(record: Expressions, result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None):
    """``V Wᵀ + 1 bᵀ``."""
    if input.dim() != 2 or weight.dim() != 2:
        return None
    left, right = (record.terms(each) if each.requires_grad else [] for each in (input, weight))
    outer = (input.detach(),)
    shifts = record.terms(bias) if bias is not None and bias.requires_grad else []
    ones = (result.new_ones(len(input), 1),)
    return [
        *(term.within((), (weight.detach().mT,)) for term in left),
        *(term.transposed.within(outer) for term in right),
        *(term.transposed.within(ones) for term in shifts),
    ]


@computes(torch._weight_norm)  # pyright: ignore[reportPrivateImportUsage]
def weight_norm(record: Expressions, result: Tensor, v: Tensor, g: Tensor, dim: int = 0) -> list[Term] | None:
    """``diag(g/‖v‖) v``."""
    norm = torch.norm_except_dim(v.detach(), 2, dim)
    ratio = g.detach() / norm
    scale = _scaling(ratio, result)
    if scale is None:
        return None
    own = _diagonal(record, g, v.detach() / norm, result) if g.requires_grad else None
    size = [] if not g.requires_grad else record.rest(g, "weight_norm") if own is None else [own]
    return [*size, *_directions(record, v, scale, -ratio / norm.square() * v.detach(), "weight_norm")]


@computes(F.normalize)
def normalised(record: Expressions, result: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> list[Term] | None:
    """``diag(1/‖v‖) v``."""
    norm = torch.linalg.vector_norm(input.detach(), keepdim=True)
    p, dim, eps = _normalisation(*args, **kwargs)
    if isinstance(dim, int):
        norm = torch.linalg.vector_norm(input.detach(), p, dim, keepdim=True)
    scale = _scaling(1 / norm.clamp_min(eps), result)
    if scale is None:
        return None
    known = p == 2 and bool((norm > eps).all())
    return _directions(record, input, scale, -input.detach() / norm**3 if known else None, "normalize")


def _normalisation(p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> tuple[float, Any, float]:
    return p, dim, eps


def _directions(record: Expressions, v: Tensor, scale: Factors, slopes: Tensor | None, operator: str) -> list[Term]:
    """A matrix whose rows or columns are multiplied by numbers, each of its own, with these slopes if they are known.

    In training the numbers are held constant. Elsewhere they have a form of their own where that is small enough.
    """
    if not v.requires_grad:
        return []
    terms = record.terms(v)
    held = [term.within(*scale) for term in terms]
    if record.lenient:
        return held
    by_rows, by_columns = (
        len(some) == 1 and some[0].dim() == 1 and not others for some, others in (scale, scale[::-1])
    )
    plain = len(terms) == 1 and terms[0].window is not None and not (terms[0].left or terms[0].right)
    outputs, inputs = _matrix(v).shape
    small = (inputs if by_columns else min(outputs, inputs)) * (outputs + inputs) <= _NUMBERS
    if slopes is None or not ((by_rows or by_columns) and plain and small):
        return record.rest(v, operator)
    factors = {"right" if by_rows else "left": (_matrix(v).detach(),)}
    return [*held, replace(terms[0], **factors, slopes=_matrix(slopes), columns=by_columns)]
