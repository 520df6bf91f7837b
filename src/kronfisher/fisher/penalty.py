"""A Fisher matrix as a penalty: the quadratic form of the distance from an anchor, to be added to a loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function

from kronfisher.errors import DataError
from kronfisher.fisher.parameters import covered, unwrapped
from kronfisher.fisher.vectors import Shapes, flatten, read
from kronfisher.operators.algebra import as_number, nonnegative

__all__ = ["Matrix", "Parameters", "Penalty", "anchored", "values"]

Parameters = nn.Module | Mapping[str, Tensor]


class Matrix(Protocol):
    """What is needed of a Fisher matrix."""

    @property
    def shapes(self) -> Shapes: ...
    def __matmul__(self, v: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Term:
    """``weight · ½ (θ − θ*)ᵀ F (θ − θ*)``.

    Attributes:
        matrix: F.
        anchor: θ*, ``[P]`` in the order of F.
        weight: of at least 0.
    """

    matrix: Matrix
    anchor: Tensor
    weight: float = 1.0

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The number, 0-dim, and differentiable any number of times."""
        own: dict[str, Tensor] = {}
        for name, shape in self.matrix.shapes.items():
            tensor = parameters.get(name)
            if tensor is None or tensor.shape != shape:
                found = "is missing" if tensor is None else f"is {list(tensor.shape)}"
                raise DataError(f"the penalty covers {name} {list(shape)}, which {found} among the parameters given")
            if tensor.device != self.anchor.device:
                raise DataError(
                    f"{name} is on {tensor.device}, the penalty on {self.anchor.device}; move either: "
                    "fisher.to(device).penalty(anchor)."
                )
            own[name] = tensor[None]
        theta = flatten(own)[0]
        return self.weight * _Quadratic.apply(theta - self.anchor, self.matrix)[0]


@dataclass(frozen=True, eq=False, repr=False)
class Penalty:
    """A sum of quadratic forms ``½ (θ − θ*)ᵀ F (θ − θ*)``, differentiable by θ; ``fisher.penalty(anchor)`` makes one.

    Penalties add up (``sum(penalties)`` too) and may be multiplied by numbers, so that one of every task learnt before
    keeps a network near all of them (Kirkpatrick et al. 2017, arXiv:1612.00796; Ritter et al. 2018, arXiv:1805.07810).

    Attributes:
        terms: one for each anchor.

    Example:
        >>> import kronfisher as kf
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(50, 3)
        >>> fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact")
        >>> penalty = fisher.penalty(model) + 2.0 * fisher.penalty({"weight": torch.zeros(1, 3), "bias": torch.ones(1)})
        >>> penalty
        <Penalty of 2 anchors over 4 parameters>
        >>> value = penalty(model)
        >>> value.backward()
        >>> value.shape, model.weight.grad.shape
        (torch.Size([]), torch.Size([1, 3]))
    """

    terms: Sequence[Term]

    def __call__(self, parameters: Parameters) -> Tensor:
        """The penalty at the parameters of a model, or at tensors by name.

        Args:
            parameters: a model, wrapped or not, or name → tensor; it may have parameters that no term covers.

        Returns:
            0-dim, in the widest dtype of the parameters and the matrices; it is differentiable any number of times.

        Raises:
            DataError: a covered parameter is missing, has another shape or lies on another device.
        """
        if isinstance(parameters, nn.Module):
            parameters = dict(unwrapped(parameters).named_parameters())
        elif not isinstance(parameters, Mapping):
            raise DataError(f"a penalty takes a model or tensors by name, not {type(parameters).__name__}")
        return torch.stack([term(parameters) for term in self.terms]).sum()

    def __add__(self, other: object) -> "Penalty":
        if isinstance(other, int) and other == 0:  # where sum() begins
            return self
        return Penalty((*self.terms, *other.terms)) if isinstance(other, Penalty) else NotImplemented

    __radd__ = __add__

    def __mul__(self, factor: float) -> "Penalty":
        if as_number(factor) is None:
            return NotImplemented
        factor = nonnegative(factor, "the factor of a penalty")
        return Penalty(tuple(replace(term, weight=factor * term.weight) for term in self.terms))

    __rmul__ = __mul__

    def __repr__(self) -> str:
        shapes = {name: shape for term in self.terms for name, shape in term.matrix.shapes.items()}
        numbers = sum(shape.numel() for shape in shapes.values())
        anchors = f"{len(self.terms)} anchor{'s' if len(self.terms) > 1 else ''}"
        return f"<Penalty of {anchors} over {numbers} parameters>"


def anchored(matrix: Matrix, anchor: Parameters, device: torch.device, estimated: str) -> Penalty:
    """The penalty of one matrix; `estimated` is the fingerprint of where it was estimated, if that is known.

    Raises:
        DataError: the anchor is a model of other parameters than the matrix was estimated at, or does not fit.
    """
    return Penalty((Term(matrix, flatten(values(matrix.shapes, anchor, device, estimated))[0].clone()),))


def values(shapes: Shapes, parameters: Parameters, device: torch.device, estimated: str) -> dict[str, Tensor]:
    """``{name: [1, *shape]}`` of the parameters that a matrix covers, without their history.

    Args:
        shapes: of the covered parameters.
        parameters: a model, which must be as it was when the matrix was estimated, or tensors by name, which may be
            anything.
        device: of the matrix.
        estimated: fingerprint of the parameters at which the matrix was estimated, empty if unknown.

    Raises:
        DataError: they do not fit.
    """
    if isinstance(parameters, nn.Module):
        parameters = covered(parameters, shapes, device, estimated)
    elif not isinstance(parameters, Mapping):
        raise DataError(f"give the model, or tensors by name, not {type(parameters).__name__}")
    rows, form = read({name: value for name, value in parameters.items() if name in shapes}, shapes)
    if form.many:
        raise DataError("these are several vectors of parameters; give one at a time")
    if odd := [f"{name} on {tensor.device}" for name, tensor in rows.items() if tensor.device != device]:
        raise DataError(f"the Fisher is on {device}, {', '.join(odd)}; move either")
    return {name: tensor.detach() for name, tensor in rows.items()}


class _Product(Function):
    """``F v``: its own derivative, F being symmetric."""

    @staticmethod
    def forward(vector: Tensor, matrix: Matrix) -> Tensor:
        return matrix @ vector

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Matrix], output: Tensor) -> None:
        ctx.matrix = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Product.apply(grads[0], ctx.matrix), None


class _Quadratic(Function):
    """``½ vᵀ F v`` and ``F v``, which is its gradient: one product serves both passes."""

    @staticmethod
    def forward(vector: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
        image = matrix @ vector
        return (vector * image).sum() / 2, image

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Matrix], output: tuple[Tensor, Tensor]) -> None:
        ctx.matrix = inputs[1]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        vector, image = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone is going to differentiate the gradient
            image = _Product.apply(vector, ctx.matrix)
        return grads[0] * image, None
