"""The gradients of every number of a tensor, through any graph: products with weights are read off the graph itself.

Capture by operator does not see a weight that is met again in the backward pass of a derivative, as in residuals of
differential equations. The graph does: whatever made it, a product ``X Wᵀ`` or ``Y W`` is a node that holds the other
operand, and its gradient arrives in one backward pass for all rows. Parameters that meet anything else get their
gradients column by column (by differentiating ``Jᵀ v`` by v) or row by row, whichever are fewer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from kronfisher.capture.graph import dtypes_within
from kronfisher.capture.separation import separate
from kronfisher.layers.row_order import Probe
from kronfisher.linalg import full_precision

__all__ = ["Jacobian"]


@dataclass(frozen=True)
class _Product:
    """A node that multiplies rows with a parameter: of the matrix ``[A, B]`` each row's gradient is ``left ⊗ right``.

    Attributes:
        node: of the graph; its gradient is `right`.
        parameter: name.
        left: the other operand ``[R, A]``; None for a bias, whose gradient is that of the node.
        turned: the parameter is ``[B, A]``.
    """

    node: Node
    parameter: str
    left: Tensor | None
    turned: bool


@dataclass(frozen=True)
class Jacobian:
    """Reads ``J [n, P]``, the gradients of n numbers by all parameters, one after the other in their order.

    Which row belongs to which number follows from the graph where it keeps numbers apart whatever the values
    (`kronfisher.capture.separation`), and is probed elsewhere. Nothing is kept for other graphs.

    Attributes:
        parameters: name → leaf.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> x = torch.tensor([[1.0], [2.0]], requires_grad=True)
        >>> (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        >>> J = Jacobian(dict(layer.named_parameters())).rows(slope.flatten())  # d/dw, d/db of 2 w (w x + b)
        >>> w, b = layer.weight.item(), layer.bias.item()
        >>> torch.allclose(J, torch.tensor([[4 * w + 2 * b, 2 * w], [8 * w + 2 * b, 2 * w]]))
        True
    """

    parameters: Mapping[str, Tensor]

    def rows(self, numbers: Tensor, chosen: Tensor | None = None) -> Tensor:
        """``[n, P]`` of `numbers` ``[n]``, or the rows of those that are chosen, by their places; the graph is kept.

        Raises:
            UnsupportedError: rows that meet a parameter belong to several of the numbers each, in a way that only row
                by row could be followed, and does not come out right either.
        """
        products, rest, linear = self._walk(numbers)
        gradients = self._gradients(numbers, products, torch.ones_like(numbers))
        orders, mixed = self._orders(numbers, products, gradients)
        rest |= mixed  # what belongs to several numbers at once is followed one by one
        uses = {}
        for name in self.parameters:
            if name not in rest:
                own = [k for k, product in enumerate(products) if product.parameter == name]
                uses[name] = [(products[k], gradients[k], orders[k]) for k in own]
        leaves = self.parameters.values()
        others = {name: self.parameters[name] for name in self.parameters if name in rest}
        alone = self._one_by_one(numbers, others, chosen, columns=linear) if others else {}
        size = len(numbers) if chosen is None else len(chosen), sum(p.numel() for p in leaves)
        J = numbers.new_empty(size, dtype=reduce(torch.promote_types, (p.dtype for p in leaves), numbers.dtype))
        start = 0
        for name, parameter in self.parameters.items():
            own = J[:, start : (start := start + parameter.numel())]
            if name in alone:
                own.copy_(alone[name])
            else:
                self._assemble_(own.view(len(J), *parameter.shape), len(numbers), chosen, uses[name])
        return J

    def reached(self, numbers: Tensor) -> bool:
        """Whether any of the parameters has a part in the numbers."""
        products, rest, _ = self._walk(numbers)
        return bool(products or rest)

    # The graph --------------------------------------------------------------------------------------------------------

    def _walk(self, numbers: Tensor) -> tuple[list[_Product], set[str], bool]:
        """Products with parameters, parameters that meet anything else, and whether gradients show how they are made.

        Functions of users may make theirs out of sight.
        """
        leaves = {id(p): name for name, p in self.parameters.items()}
        products, rest, linear = [], set(), True
        start = numbers.grad_fn
        assert start is not None
        seen, stack = {start}, [start]
        while stack:
            node = stack.pop()
            linear &= not isinstance(node, BackwardCFunction)
            for place, (child, _) in enumerate(node.next_functions):
                if child is None:
                    continue
                parameter, turned = _leaf(child, leaves)
                if parameter is not None:
                    product = _product(node, place, parameter, turned)
                    if product is None:
                        rest.add(parameter)
                    else:
                        products.append(product)
                elif child not in seen:
                    seen.add(child)
                    stack.append(child)
        return products, rest, linear

    def _gradients(self, numbers: Tensor, products: Sequence[_Product], vector: Tensor) -> list[Tensor | None]:
        """The gradient of every product's node, by one backward pass."""
        found: dict[Node, Tensor] = {}

        def note(node: Node) -> Any:
            def hook(gradients: tuple[Tensor, ...]) -> None:
                if gradients[0] is not None:
                    found[node] = gradients[0].detach()

            return node.register_prehook(hook)

        handles = [note(node) for node in {product.node: None for product in products}]
        try:
            used = {product.parameter: self.parameters[product.parameter] for product in products}
            if used:
                torch.autograd.grad(numbers, list(used.values()), vector, retain_graph=True, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        return [found.get(product.node) for product in products]

    def _orders(
        self, numbers: Tensor, products: Sequence[_Product], plain: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], set[str]]:
        """The number that each row of a product belongs to (None: in their order), and parameters where rows mix."""
        proved, count = separate(numbers), len(numbers)
        places = [proved.get((product.node, 0)) for product in products]
        probe, passes = Probe(count, dtypes_within(numbers)), []
        if not all(place and place[0] == 0 for place in places):
            # Not a vector of ones: the gradients of numbers whose sum is constant would cancel.
            drawn = torch.randn(count, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(numbers)
            passes = [self._gradients(numbers, products, drawn * f.to(numbers)) for f in probe.factors()]
        orders: list[Tensor | None] = [None] * len(products)
        mixed = set()
        for k, (product, place) in enumerate(zip(products, places, strict=True)):
            first = plain[k]
            if first is None:
                continue
            if first.dim() != 2 or (product.left is not None and len(product.left) != len(first)):
                mixed.add(product.parameter)
                continue
            same = torch.arange(len(first), device="cpu")
            if place and place[0] == 0:
                examples: Tensor | None = same // place[1] % count
            else:
                rows = [gradient for each in passes if (gradient := each[k]) is not None]
                examples = probe.examples([probe.project(row) for row in rows])
            if examples is None:
                mixed.add(product.parameter)
            elif len(examples) != count or not torch.equal(examples.where(examples >= 0, same), same):
                orders[k] = examples.clamp_min(0).to(numbers.device)
        return orders, mixed

    def _assemble_(
        self,
        total: Tensor,
        count: int,
        chosen: Tensor | None,
        uses: Sequence[tuple[_Product, Tensor | None, Tensor | None]],
    ) -> None:
        """Write the sum over the products with one parameter into `total` ``[n, ...]``, the rows of `count` numbers."""
        lefts, rights, biases, moved = [], [], [], []
        for product, gradient, order in uses:
            if gradient is None:
                continue
            if product.left is None:
                left, right = gradient.reshape(len(gradient), *total.shape[1:]), None
            else:
                left, right = (gradient, product.left) if product.turned else (product.left, gradient)
            if order is not None:
                moved.append((order, left, right))
                continue
            left = left if chosen is None else left[chosen]
            if right is None:
                biases.append(left)
            else:
                lefts.append(left)
                rights.append(right if chosen is None else right[chosen])
        with torch.no_grad(), full_precision(total.device.type):
            if len(lefts) == 1:
                torch.mul(lefts[0][:, :, None], rights[0][:, None], out=total)
            elif lefts:
                total.copy_(torch.bmm(torch.stack(lefts, 2), torch.stack(rights, 1)))
            else:
                total.zero_()
            for rows in biases:
                total += rows
            for order, left, right in moved:
                if chosen is not None:
                    places = torch.full((count,), -1, device=order.device)
                    places[chosen] = torch.arange(len(chosen), device=order.device)
                    kept = places[order] >= 0
                    order, left, right = places[order][kept], left[kept], None if right is None else right[kept]
                total.index_add_(0, order, left if right is None else left[:, :, None] * right[:, None])

    # Whatever else ----------------------------------------------------------------------------------------------------

    def _one_by_one(
        self, numbers: Tensor, parameters: Mapping[str, Tensor], chosen: Tensor | None, *, columns: bool
    ) -> dict[str, Tensor]:
        """``{name: [n, numel]}``, column by column, where these can be had and are fewer, or row by row."""
        leaves = list(parameters.values())
        numbers = numbers if chosen is None else numbers[chosen]
        if columns and sum(p.numel() for p in leaves) <= len(numbers):
            try:
                return self._columns(numbers, parameters)
            except RuntimeError:  # a function that cannot be differentiated once more
                pass
        parts = {name: numbers.new_zeros(len(numbers), p.numel()) for name, p in parameters.items()}
        for k in range(len(numbers)):
            found = torch.autograd.grad(numbers[k], leaves, retain_graph=True, allow_unused=True)
            for part, gradient in zip(parts.values(), found, strict=True):
                if gradient is not None:
                    part[k] = gradient.flatten()
        return parts

    def _columns(self, numbers: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        vector = torch.zeros_like(numbers, requires_grad=True)
        leaves = list(parameters.values())
        found = torch.autograd.grad(numbers, leaves, vector, create_graph=True, allow_unused=True)
        parts = {}
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
            part = numbers.new_zeros(len(numbers), parameter.numel())
            if gradient is not None:
                for place, entry in enumerate(gradient.flatten()):
                    (column,) = torch.autograd.grad(entry, vector, retain_graph=True, allow_unused=True)
                    if column is not None:
                        part[:, place] = column
            parts[name] = part
        if not all(bool(torch.isfinite(part).all()) for part in parts.values()):
            raise RuntimeError("the formula of a gradient, right as it is, has no derivative at zero")
        return parts


def _leaf(node: Node, leaves: Mapping[int, str]) -> tuple[str | None, bool]:
    """The parameter that a node stands for, perhaps transposed."""
    turned, found = False, node
    while found is not None:
        variable = getattr(found, "variable", None)
        if variable is not None:
            return leaves.get(id(variable)), turned
        if found.name() != "TBackward0":
            return None, False
        turned, found = not turned, found.next_functions[0][0]
    return None, False


def _product(node: Node, place: int, parameter: str, turned: bool) -> _Product | None:
    """What a node does with a parameter in the place of an operand, where it is understood."""
    name, saved = node.name(), node
    if name == "AddmmBackward0":
        if saved._saved_alpha != 1 or saved._saved_beta != 1:  # pyright: ignore[reportAttributeAccessIssue]
            return None
        if place == 0 and not turned:
            return _Product(node, parameter, None, False)
        left = saved._saved_mat1 if place == 2 else None  # pyright: ignore[reportAttributeAccessIssue]
    elif name == "MmBackward0":
        left = saved._saved_self if place == 1 else None  # pyright: ignore[reportAttributeAccessIssue]
    else:
        return None
    return None if left is None else _Product(node, parameter, left.detach(), turned)
