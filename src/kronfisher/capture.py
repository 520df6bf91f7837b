"""One forward pass under observation, then backward passes that stream output gradients; nothing of the model is changed.

Operators are seen, not modules: a mode of torch's function protocol receives every call with the very parameters. For each use the
gradient edge of its output is kept and a hook waits there, so that in-place activations and views later on do no harm. The backward
pass asks only for the outputs of the earliest uses: no parameter gradient is ever computed. Coverage is proved on the autograd graph:
every edge into a trainable parameter must have been claimed by a use.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from inspect import Signature, signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from kronfisher.blocks import View
from kronfisher.errors import UnsupportedError
from kronfisher.uses import OPERATORS, Use

__all__ = ["Call", "Capture", "Proof"]

Receiver = Callable[["Call", Tensor], None]

# New tensors with the elements of an old one, in the same order: the parameter seen through a change of dtype.
COPIES = {
    Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type, Tensor.type_as,
    Tensor.contiguous, Tensor.clone, torch.clone,
}  # fmt: skip


@dataclass
class Call:
    """One call of an operator with trainable parameters.

    Attributes:
        index: position in the order of the forward pass.
        operator: the operator's name.
        uses: what it did with them.
        shape: the output's shape.
        edge: where the output's gradient arrives.
    """

    index: int
    operator: str
    uses: tuple[Use, ...]
    shape: tuple[int, ...]
    edge: GradientEdge


@dataclass
class Proof:
    """What a walk over the graph from the outputs found.

    Attributes:
        reached: names of trainable parameters that the outputs depend on.
        unclaimed: name → operators through which the outputs depend on it that no use accounts for.
        alive: indices of the calls that the outputs depend on.
        sources: indices of those below which no other call lies.
    """

    reached: set[str] = field(default_factory=set)
    unclaimed: dict[str, set[str]] = field(default_factory=dict)
    alive: set[int] = field(default_factory=set)
    sources: list[int] = field(default_factory=list)


class Capture(TorchFunctionMode):
    """Records how a forward pass uses trainable parameters.

    Args:
        parameters: name → parameter; those that do not require a gradient are ignored and cost nothing.

    Example:
        >>> layer = torch.nn.Linear(2, 3)
        >>> with Capture(dict(layer.named_parameters())) as capture:
        ...     outputs = layer(torch.randn(5, 2))
        >>> [(call.operator, call.shape) for call in capture.calls]
        [('linear', (5, 3))]
        >>> capture.prove(outputs).unclaimed
        {}
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.calls: list[Call] = []
        self._roots = {id(p): (name, p) for name, p in self.parameters.items()}
        self._claims: dict[tuple[Node, Node], int] = {}
        self._chains: dict[Node, str] = {}  # nodes between a parameter and its uses: views and casts
        self._touched: dict[str, set[str]] = {}
        self._receiver: Receiver | None = None

    def view(self, tensor: Any) -> View | None:
        """The window on a trainable parameter that the tensor is, or None."""
        if not isinstance(tensor, Tensor):
            return None
        found = self._roots.get(id(tensor))
        if found is None and tensor._base is not None:
            found = self._roots.get(id(tensor._base))
        return View.of(*found, tensor) if found else None

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = OPERATORS.get(func)
        uses: tuple[Use, ...] = ()
        if handler is not None and torch.is_grad_enabled():
            bound = _bind(handler, args, kwargs, self.view)
            uses = tuple(bound) if bound is not None else ()
        if not uses:
            result = func(*args, **kwargs)
            self._note(func, args, kwargs, result)
            return result
        operands = {get_gradient_edge(t).node: self.view(t) for t in _tensors(args, kwargs) if t.requires_grad}
        result = func(*args, **kwargs)
        return self._record(_name(func), uses, operands, result)

    def _record(self, operator: str, uses: tuple[Use, ...], operands: dict[Node, View | None], result: Tensor) -> Tensor:
        if torch._C._functorch.is_functorch_wrapped_tensor(result):
            raise UnsupportedError(
                f"{uses[0].name}: {operator} runs inside vmap or another functional transform, where single data cannot be "
                "told apart. Write the model without it, or freeze the parameter with requires_grad_(False)."
            )
        if not result.requires_grad:
            return result
        anchor = result
        if result._is_view():
            # A view that is later changed in place gets a new history; its base, made by this operator, keeps its own.
            base = result._base
            if base is not None and base.numel() == result.numel() and base.is_contiguous() and result.is_contiguous():
                anchor = base
            else:
                anchor = result = result.clone()
        call = Call(len(self.calls), operator, uses, tuple(result.shape), get_gradient_edge(anchor))
        self.calls.append(call)
        anchor.register_hook(lambda gradient: self._receive(call, gradient))
        for node, view in operands.items():
            if view is not None:
                self._chain(node, view.parameter)
        for edge in _edges_into(get_gradient_edge(anchor).node, operands):
            if operands[edge[1]] is not None:
                self._claims[edge] = call.index
        return result

    def _chain(self, node: Node | None, name: str) -> None:
        while node is not None and node not in self._chains:
            self._chains[node] = name
            node = node.next_functions[0][0] if node.next_functions else None

    def _note(self, func: Callable, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Follow copies of parameters, and remember for messages which operators saw which parameter."""
        if not isinstance(result, Tensor) or not result.requires_grad:
            return
        for tensor in _tensors(args, kwargs):
            found = self._roots.get(id(tensor))
            if found is None and tensor._base is not None:
                found = self._roots.get(id(tensor._base))
            if found is None or id(result) in self._roots:
                continue
            name, root = found
            if result._base is root:
                continue
            if func in COPIES and tensor is root and result.shape == root.shape and result._base is None:
                self._roots[id(result)] = (name, result)
            else:
                self._touched.setdefault(name, set()).add(_name(func))

    def prove(self, outputs: Tensor) -> Proof:
        """Walk the graph from the outputs and compare every edge into a trainable parameter with what was claimed.

        Raises:
            UnsupportedError: the graph holds a reentrant checkpoint, inside which nothing can be seen.
        """
        proof = Proof()
        if not outputs.requires_grad:
            return proof
        leaves = {id(p): name for name, p in self.parameters.items()}
        calls = {call.edge.node: call.index for call in self.calls}
        below: dict[Node, bool] = {}
        claimed: set[int] = set()
        stack: list[tuple[Node, bool]] = [(get_gradient_edge(outputs).node, False)]
        while stack:
            node, done = stack.pop()
            children = [child for child, _ in node.next_functions if child is not None]
            if done:
                below[node] = any(below.get(child, False) or child in calls for child in children)
                continue
            if node in below:
                continue
            below[node] = False
            stack.append((node, True))
            if "CheckpointFunction" in node.name():
                raise UnsupportedError(
                    "The model uses reentrant checkpointing, which hides its layers from the graph. "
                    "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
                )
            for child in children:
                name = self._chains.get(child) or leaves.get(id(getattr(child, "variable", None)))
                if name is None or node in self._chains:
                    stack.append((child, False))
                    continue
                proof.reached.add(name)
                index = self._claims.get((node, child))
                if index is not None:
                    claimed.add(index)
                else:
                    proof.unclaimed.setdefault(name, set()).update(self._touched.get(name) or {node.name()})
        proof.alive = {index for node, index in calls.items() if node in below}
        for index in claimed - proof.alive:  # its output was replaced behind our back, its gradient would never arrive
            for use in self.calls[index].uses:
                operator = f"{self.calls[index].operator}, whose output is a view that was modified in place"
                proof.unclaimed.setdefault(use.name, set()).add(operator)
        proof.sources = [index for node, index in calls.items() if node in below and not below[node]]
        return proof

    def backward(self, outputs: Tensor, vector: Tensor, receive: Receiver, sources: list[int], *, retain: bool) -> None:
        """Back-propagate `vector`, shaped like the outputs, and hand each call's output gradient to `receive` on arrival.

        Args:
            outputs: what the captured forward pass returned.
            vector: the direction.
            receive: called with a call and the gradient of its output, in reverse order of the forward pass.
            sources: indices of the earliest calls that are wanted (`Proof.sources`); the pass ends there.
            retain: whether another backward pass follows.
        """
        edges = dict.fromkeys(self.calls[index].edge for index in sources)
        if not edges:
            return
        self._receiver = receive
        try:
            torch.autograd.grad(outputs, list(edges), vector, retain_graph=retain, allow_unused=True)
        finally:
            self._receiver = None

    def probe(self, outputs: Tensor, calls: set[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Gradients at the outputs of some calls: of a random combination of all outputs, and with datum k times k = 1..N."""
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
        factor = torch.arange(1, len(outputs) + 1, device=outputs.device).to(outputs.dtype)
        scaled = vector * factor.reshape(-1, *[1] * (outputs.dim() - 1))
        order = sorted(calls)
        edges = [self.calls[index].edge for index in order]
        found = [
            torch.autograd.grad(outputs, edges, direction, retain_graph=True, allow_unused=True)
            for direction in (vector, scaled)
        ]
        gradients = {}
        for index, pair in zip(order, zip(*found, strict=True), strict=True):
            shape = self.calls[index].shape
            gradients[index] = tuple(outputs.new_zeros(shape) if g is None else g.reshape(shape) for g in pair)
        return gradients

    def _receive(self, call: Call, gradient: Tensor) -> None:
        if self._receiver is not None and gradient is not None:
            self._receiver(call, gradient.reshape(call.shape))


def _bind(handler: Callable, args: tuple, kwargs: dict[str, Any], view: Callable) -> Iterator[Use] | None:
    try:
        _signature(handler).bind(view, *args, **kwargs)
    except TypeError:
        return None  # a form of the operator that the handler does not know; the graph will show what it leaves unclaimed
    return handler(view, *args, **kwargs)


@lru_cache(maxsize=None)
def _signature(handler: Callable) -> Signature:
    return signature(handler)


def _name(func: Callable) -> str:
    return getattr(func, "__name__", str(func)).strip("_")


def _tensors(args: tuple, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


def _edges_into(start: Node, stops: Mapping[Node, Any]) -> Iterator[tuple[Node, Node]]:
    """Edges of the graph from the nodes that one operator made into its operands."""
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            if child in stops:
                yield node, child
            elif child not in seen:
                seen.add(child)
                stack.append(child)
