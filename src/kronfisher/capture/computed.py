"""Weights computed from weights: what a layer's use of one means for the parameters that it was computed from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Window
from kronfisher.layers import Use
from kronfisher.layers.computed import DiagonalUse, FactorUse, MappedUse, NumberUse, RowsUse, VectorUse
from kronfisher.layers.elementwise import ElementwiseUse
from kronfisher.layers.expressions import RULES, Term, few_products, leaves
from kronfisher.layers.joined import Joined
from kronfisher.layers.picked import PICKING, Picked, picked

__all__ = ["Computed", "ComputedWeights"]

_FEW = 4  # products of a column and a row in the derivative of a number


@dataclass(frozen=True)
class Computed:
    """The uses that a call makes of parameters by way of computed weights.

    Attributes:
        uses: of parameters.
        parameters: all that the computed weights depend on.
        left_out: parameter that no use accounts for → the operators that received it.
    """

    uses: tuple[Use, ...]
    left_out: Mapping[str, set[str]]


@dataclass(frozen=True)
class Expression:
    """A call of an operator without data.

    Attributes:
        version: of the result, which tells whether it was changed in place since.
        spread: a parameter is repeated along axes that it does not have, which may be those of the examples.
    """

    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    result: Tensor
    version: int
    spread: bool


@dataclass
class ComputedWeights:
    """The computed weights of one forward pass.

    Attributes:
        view: the window on a trainable parameter that a tensor is.
        parameters: name → trainable parameter.
        lenient: as in training.
    """

    view: Callable[[Any], Window | None]
    parameters: Mapping[str, Tensor]
    lenient: bool
    _expressions: dict[int, Expression] = field(default_factory=dict)
    _known: dict[str, Tensor] = field(default_factory=dict)
    _picked: dict[int, Picked] = field(default_factory=dict)
    _weights: dict[int, Tensor] = field(default_factory=dict)  # that an index picked

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._expressions or self._picked)

    def note(
        self, function: Callable, args: tuple, kwargs: dict[str, Any], result: Any, uses: Sequence[Use] = ()
    ) -> None:
        """Remember an operator that received parameters and constants alone, and the uses that it made by itself."""
        if isinstance(result, Tensor) and result.requires_grad and result.grad_fn is not None:
            shape = tuple(result.shape)
            wide = any(isinstance(use, ElementwiseUse) and prod(use.lead(shape)) > 1 for use in uses)
            # A repetition is for the examples even where a batch has a single one: all batches are read alike.
            spread = wide or (function is Tensor.repeat and bool(uses))
            spread = spread or any(self._expressions[id(v)].spread for v in args if id(v) in self._expressions)
            self._expressions[id(result)] = Expression(function, args, kwargs, result, result._version, spread)

    def note_picked(self, function: Callable, args: tuple, result: Any) -> None:
        """Remember what a tensor index picked of a parameter."""
        if function not in PICKING or not isinstance(result, Tensor):
            return
        if id(args[0]) in self._expressions or self.view(args[0]) is not None or self.picks(args[0]):
            self._weights[id(result)] = result
        if own := picked(self.view(args[0]), args, result):
            self._picked[id(result)] = own

    def picks(self, tensor: Tensor) -> bool:
        """Whether it holds weights that an index picked, or is a view of such."""
        return id(tensor) in self._weights or id(tensor._base) in self._weights

    def window(self, tensor: Tensor) -> Window | None:
        """A window on all of a computed weight, under a name that no parameter has; None if it is none."""
        base = tensor if tensor._base is None else tensor._base
        if (chosen := self._picked.get(id(base))) and chosen.version == tensor._version:
            return Window.of(f"picked {id(base)}", base, tensor)
        own = self._expressions.get(id(tensor))
        if own is None or own.version != tensor._version or self.view(tensor) is not None:
            return None
        name = f"computed {id(tensor)}"
        self._known[name] = tensor
        return Window.of(name, tensor)

    def terms(self, tensor: Tensor) -> list[Term]:
        """How a matrix ``[O, I]`` (or what flattens to one) depends on parameters."""
        window = self.view(tensor)
        if window is not None:
            try:
                matrix = window.reshaped(1, len(tensor), -1)
            except RuntimeError:  # memory does not allow to merge the axes
                return [Term(window.parameter, None, operator="a view")]
            return [] if matrix.overlaps else [Term(window.parameter, matrix)]
        own = self._expressions.get(id(tensor))
        if own is None or own.version != tensor._version:
            return self.rest(tensor, "an operator in place")
        name = getattr(own.function, "__name__", str(own.function)).strip("_")
        rule, found = RULES.get(own.function), None
        if tensor._is_view():
            found = self._of_view(tensor)
        elif rule is not None:
            try:
                found = rule(self, tensor, *own.args, **own.kwargs)
            except (TypeError, ValueError, RuntimeError):  # a form that the rule does not know
                found = None
        return self.rest(tensor, name) if found is None else found

    def _of_view(self, tensor: Tensor) -> list[Term] | None:
        """The terms of a view of a computed weight: its transpose, or the same rows in another shape."""
        base = tensor._base
        assert base is not None
        if not tensor.dim() or not base.dim() or tensor.numel() != base.numel():
            return None
        if tensor.is_contiguous() and base.is_contiguous() and len(tensor) == len(base):
            return self.terms(base)
        if base.dim() == 2 and tensor.shape == base.shape[::-1] and tensor.stride() == base.stride()[::-1]:
            return [term.transposed for term in self.terms(base)]
        return None

    def rest(self, tensor: Tensor, operator: str) -> list[Term]:
        """The parameters that a tensor depends on, without their windows."""
        return [Term(name, None, operator=operator) for name in self._names(tensor)]

    def _names(self, tensor: Tensor) -> list[str]:
        """Names of the trainable parameters that a tensor depends on."""
        below = {id(leaf) for leaf in leaves(tensor)}
        return [name for name, parameter in self.parameters.items() if id(parameter) in below]

    def scale(self, tensor: Tensor) -> Term | None:
        """A window on a parameter as a diagonal; None if the tensor is no such window."""
        window = self.view(tensor)
        if window is None or window.overlaps:
            return None
        return Term(window.parameter, window.reshaped(1, -1), diagonal=True)

    def number(self, tensor: Tensor) -> list[Term]:
        """How a matrix that a number multiplies depends on the parameters that the number depends on."""
        found = []
        for name in self._names(tensor):
            origin = self.parameters[name]
            (slope,) = torch.autograd.grad(tensor.sum(), origin, retain_graph=True)
            derivative = few_products(slope.reshape(len(slope), -1), _FEW) if slope.dim() > 1 else None
            if derivative is None:
                found.append(Term(name, None, operator="a norm"))
            else:
                window = Window.of(name, origin).reshaped(1, len(origin), -1)
                found.append(Term(name, window, derivative=derivative))
        return found

    def uses(self, of_computed: Sequence[Use], dimensions: int) -> Computed | None:
        """The uses of parameters that some uses of parameters and computed weights amount to; None: of none.

        Args:
            of_computed: what a handler made of windows on computed weights.
            dimensions: of the output, where the operator is elementwise.
        """
        uses: list[Use] = []
        left_out: dict[str, set[str]] = {}
        for use in of_computed:
            itself = use.inner if isinstance(use, MappedUse) else use
            own = self._known.get(use.bias.parameter) if isinstance(itself, ElementwiseUse) and use.bias else None
            if own is not None and (self._expressions[id(own)].spread or not use.lead((1,) * dimensions)):
                return None  # it met the examples before, or has elements of its own for each
            if use.bias is not None and self._picked_by_name(use.bias.parameter):
                return None
            found = list(self._translate(use))
            if not found:
                return None
            for one in found:
                if isinstance(one, Term):
                    left_out.setdefault(one.parameter, set()).add(one.operator)
                else:
                    uses.append(one)
        if not uses:
            return None
        whole = [
            use for use in uses if not {view.parameter for view in (use.weight, use.bias) if view} & left_out.keys()
        ]
        return Computed(tuple(whole), left_out) if whole else None

    def _translate(self, use: Use) -> Iterator[Use | Term]:
        """The uses that one use amounts to, and what no use accounts for."""
        if use.weight is not None and (chosen := self._picked_by_name(use.weight.parameter)):
            yield from chosen.uses(use)
            return
        weight, bias = (self._known.get(view.parameter) if view else None for view in (use.weight, use.bias))
        if weight is None and bias is None:
            yield use
            return
        if bias is None and weight is not None and (found := self._of_joined(use, weight)):
            yield from found
            return
        if bias is None and (same := self._same(use, "weight")):
            yield same
            return
        if weight is None and (same := self._same(use, "bias")):
            yield same
            return
        if use.weight is not None:
            alone = use.with_windows(use.weight, None)
            if weight is None:
                yield alone
            else:
                yield from self._of_matrix(alone, weight)
        if use.bias is not None:
            alone = use.with_windows(None, use.bias)
            if bias is None:
                yield alone
            else:
                yield from self._of_vector(alone, bias)

    def _of_joined(self, use: Use, weight: Tensor) -> list[Use | Term] | None:
        """The uses of weights that were stacked, or put one after the other; None if this was not so."""
        whole = weight if weight._base is None else weight._base
        own = self._expressions.get(id(whole))
        if own is None or own.version != weight._version or weight.numel() != whole.numel():
            return None
        joined = Joined.of(own.function, own.args, own.kwargs, whole)
        return joined and joined.uses(use, lambda part: self.view(part) or self.window(part), self._translate)

    def _picked_by_name(self, name: str) -> Picked | None:
        return self._picked.get(int(name.removeprefix("picked "))) if name.startswith("picked ") else None

    def _same(self, use: Use, place: str) -> Use | None:
        """The use with the window on a parameter whose elements are those of the computed weight, up to constants."""
        window = getattr(use, place)
        terms = self.terms(self._known[window.parameter]) if self._known[window.parameter].dim() else []
        if len(terms) != 1:
            return None
        (term,) = terms
        if term.window is None or term.diagonal or term.left or term.right:
            return None
        try:
            seen = term.window.reshaped(*window.shape)
        except (RuntimeError, ValueError):  # memory does not allow it
            return None
        if any(n > 1 and s != t for n, s, t in zip(window.shape, seen.stride, window.layout, strict=True)):
            return None
        own = replace(seen, size=window.size, stride=window.stride, offset=seen.offset + window.offset)
        return use.with_windows(**{"weight": use.weight, "bias": use.bias, place: own})

    def _of_matrix(self, use: Use, weight: Tensor) -> Iterator[Use | Term]:
        view = use.weight
        assert view is not None
        terms = self.terms(weight) if weight.dim() > 1 else self.rest(weight, "a vector as a matrix")
        if _normal(view):
            pass
        elif _transposed(view):
            terms = [term.transposed for term in terms]
        else:
            terms = self.rest(weight, "a part of it")
        known = {term.parameter for term in terms}
        for term in (*terms, *(term for term in self.rest(weight, "computation") if term.parameter not in known)):
            if term.window is None:
                yield term
            elif term.derivative is not None:
                yield NumberUse(term.window, None, None, use, term.left, term.right, derivative=term.derivative)
            elif term.slopes is not None:
                yield RowsUse(
                    term.window, None, None, use, term.left, term.right, slopes=term.slopes, columns=term.columns
                )
            elif term.diagonal:
                single = term.window.numel == 1
                yield DiagonalUse(None, term.window, None, use, term.left, term.right, single)
            else:
                yield FactorUse(term.window, None, use.inputs, use, term.left, term.right)

    def _of_vector(self, use: Use, vector: Tensor) -> Iterator[Use | Term]:
        view = use.bias
        assert view is not None
        for axis, (n, step) in enumerate(zip(vector.shape, vector.stride(), strict=True)):
            if step == 0 and n > 1:
                vector = vector.narrow(axis, 0, 1)
        if view.numel != vector.numel():
            yield from self.rest(vector, "a part of it")
            return
        for name in self._names(vector):
            origin = self.parameters[name]
            yield VectorUse(None, Window.of(name, origin).reshaped(1, *origin.shape), None, use, vector, origin)


def _normal(view: Window) -> bool:
    """Whether a window ``[1, O, *]`` shows all of a computed weight as the matrix that its shape says."""
    if view.whole:
        return view.size[0] == 1 and view.size[1] == view.shape[0]
    return view.size == (1, *view.shape) and view.stride[1:] == view.layout


def _transposed(view: Window) -> bool:
    return len(view.shape) == 2 and view.size == (1, *view.shape[::-1]) and view.stride[1:] == view.layout[::-1]
