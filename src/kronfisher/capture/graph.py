"""The record of a forward pass, and a walk over its autograd graph that proves that no use was missed.

Every edge of the graph into a trainable parameter must be claimed by a use of that parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from kronfisher.capture.anchor import Anchor
from kronfisher.errors import UnsupportedError
from kronfisher.layers import Use

__all__ = ["UNSEEN", "Call", "Graph", "Recording", "dtypes_within", "walk"]

UNSEEN = "out of sight"
"""Where a node of the graph used a parameter that no operator was seen to receive."""

_NONE: frozenset[int] = frozenset()
_NAMELESS: frozenset[str] = frozenset()
# Nodes that select rows by index, or at places that they do not show.
_GATHERING = (
    "Index",
    "Gather",
    "Scatter",
    "Take",
    "Masked",
    "Embedding",
    "Put",
    "CopySlices",
)  # their places are not saved
# Nodes through which torch takes several vectors at once as it takes each, in a pass that costs little more.
_TOGETHER = {
    f"{name}Backward0"
    for name in ("Addmm", "Add", "Elu", "Gelu", "LeakyRelu", "LogSoftmax", "Mm", "Mul", "Relu", "Sigmoid", "Silu", "T")
} | {"TanhBackward0", "ViewBackward0", "UnsafeViewBackward0", "torch::autograd::AccumulateGrad"}
_ATTRIBUTES: dict[type, tuple[str, ...]] = {}  # type of a node → its saved sizes, axes and flags


@dataclass
class Call:
    """One call of an operator with trainable parameters.

    Attributes:
        index: position in the order of the forward pass.
        operator: the operator's name.
        uses: its uses of them.
        shape: the output's shape.
        anchor: where the output's gradient arrives.
        constant: whether the inputs are only parameters, buffers and constants, no data.
        hooks: of the output tensor, including our own.
    """

    index: int
    operator: str
    uses: tuple[Use, ...]
    shape: tuple[int, ...]
    anchor: Anchor
    constant: bool
    hooks: Mapping[int, Any] = field(default_factory=dict)

    @property
    def edge(self) -> GradientEdge:
        """The edge of the anchor."""
        return self.anchor.edge

    def gradient(self, arriving: Tensor) -> Tensor:
        """Extract the gradient of the call's output from the gradient that arrives at its edge."""
        part = self.anchor.part(arriving)
        return part if part.shape == self.shape else part.reshape(self.shape)


@dataclass
class Graph:
    """An autograd graph, summarised by a walk from the outputs.

    Attributes:
        reached: names of trainable parameters that the outputs depend on.
        unclaimed: name → operators that use it without a use that accounts for them.
        hidden: name → autograd functions that use it internally, where no graph shows its gradient.
        meetings: (operator, anchor of its output) of operators, not understood, that combine data and parameters.
        alive: indices of the calls that the outputs depend on.
        sources: indices of the calls that depend on no other call.
        before: index of a call → calls that its inputs depend on directly, with no other call in between.
        last: indices of the calls that the outputs depend on directly, with no other call in between.
        gathers: whether rows are selected by index anywhere, in an order that may change from batch to batch.
        combines: whether a matrix that is no parameter may combine rows, in a way that may change from batch to batch.
        takes_several: whether several vectors may be back-propagated at once, by what torch has for each node.
        signature: a hash of the graph's nodes, their edges, shapes and saved sizes; a different value means a different
            computation.
    """

    reached: set[str] = field(default_factory=set)
    unclaimed: dict[str, set[str]] = field(default_factory=dict)
    hidden: dict[str, set[str]] = field(default_factory=dict)
    meetings: list[tuple[str, Anchor]] = field(default_factory=list)
    alive: set[int] = field(default_factory=set)
    sources: list[int] = field(default_factory=list)
    before: dict[int, frozenset[int]] = field(default_factory=dict)
    last: frozenset[int] = frozenset()
    signature: int = 0
    gathers: bool = False
    combines: bool = False
    takes_several: bool = False


@dataclass
class Recording:
    """The record that `Capture` makes of one forward pass.

    Attributes:
        parameters: name → trainable parameter.
        constant: id → tensor that does not depend on the data.
        calls: in their order.
        claims: (node, child) for the edges into parameters that a call accounts for → its index.
        makers: node created by a call → the call's index.
        entrances: node that belongs to operators called out of sight, but whose result others may use → the edges that
            lead out of these operators, or to where output gradients arrive within them.
        inside: index of a call of such operators → the parameters that they use.
        chains: node between parameters and their uses (a view, a cast, what computes a weight) → the parameters' names.
        left_out: index of a call that used computed weights → parameters that no use accounts for, with operators.
        meetings: (operator, anchor of its output) of operators, not understood, that combine data and parameters.
        touched: name → operators, not understood, that received the parameter.
        hidden: name → autograd functions that use it internally, where no graph is recorded.
        combines: whether a product with a tensor that is no parameter may combine rows, as its entries say.
    """

    parameters: dict[str, Tensor]
    constant: dict[int, Tensor]
    calls: list[Call] = field(default_factory=list)
    claims: dict[tuple[Node, Node], int] = field(default_factory=dict)
    makers: dict[Node, int] = field(default_factory=dict)
    entrances: dict[Node, tuple[tuple[Node | None, int], ...]] = field(default_factory=dict)
    inside: dict[int, set[str]] = field(default_factory=dict)
    chains: dict[Node, frozenset[str]] = field(default_factory=dict)
    left_out: dict[int, Mapping[str, set[str]]] = field(default_factory=dict)
    meetings: list[tuple[str, Anchor]] = field(default_factory=list)
    touched: dict[str, set[str]] = field(default_factory=dict)
    hidden: dict[str, set[str]] = field(default_factory=dict)
    combines: bool = False


def walk(recording: Recording, outputs: Tensor) -> Graph:
    """Walk the graph from the outputs and compare every edge into a trainable parameter with the claims.

    Raises:
        UnsupportedError: the graph contains a reentrant checkpoint, which hides the operators inside it.
    """
    graph = Graph(hidden={name: set(functions) for name, functions in recording.hidden.items()})
    if not outputs.requires_grad:
        return graph
    leaves = {id(p): name for name, p in recording.parameters.items()}
    # A lookup that does not depend on the data lies between a parameter and the use that combines it with data.
    calls = {call.edge.node: call.index for call in recording.calls if call.edge.node not in recording.chains}
    below: dict[Node, frozenset[int]] = {}  # the nearest calls below a node
    claimed: set[int] = set()
    nodes: list[tuple[object, ...]] = []
    names: set[str] = set()
    alone = {node: frozenset((index,)) for node, index in calls.items()}
    numbers: dict[Node, int] = {}
    end = get_gradient_edge(outputs).node
    stack: list[tuple[Node, bool]] = [(end, False)]
    makers, chains, entrances, claims = recording.makers, recording.chains, recording.entrances, recording.claims
    while stack:
        node, done = stack.pop()
        following = entrances.get(node, node.next_functions)
        children = [child for child, _ in following if child is not None]
        if done:
            nearest = {alone[child] if child in alone else below.get(child, _NONE) for child in children}
            below[node] = nearest.pop() if len(nearest) == 1 else _NONE.union(*nearest)
            continue
        if node in below:
            continue
        below[node] = _NONE
        stack.append((node, True))
        name = node.name()
        nodes.append((name, *[(numbers.setdefault(child, len(numbers)), k) for child, k in following if child]))
        nodes.append(_describe(node))
        names.add(name)
        if "CheckpointFunction" in name:
            raise UnsupportedError(
                "The model uses reentrant checkpointing, which hides its layers from the graph. "
                "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        if isinstance(node, BackwardCFunction):
            _note_arguments(recording, node, graph, leaves)
        maker_of_node, in_chain = makers.get(node), node in chains
        for child in children:
            maker = makers.get(child)
            if (
                maker is not None
                and maker != maker_of_node
                and not (child in calls or child in chains or child in entrances)
            ):
                # for example a second derivative, which uses the weight within the operator's own nodes
                for use_name in recording.inside.get(maker) or {use.name for use in recording.calls[maker].uses}:
                    graph.unclaimed.setdefault(use_name, set()).add(name)
            leaf = getattr(child, "variable", None)
            own = None if leaf is None else leaves.get(id(leaf))
            below_child = chains.get(child) or (frozenset((own,)) if own else _NAMELESS)
            if not below_child or in_chain:
                stack.append((child, False))
                continue
            graph.reached |= below_child
            index = claims.get((node, child))
            if index is not None:
                claimed.add(index)
                for each, operators in recording.left_out.get(index, {}).items():
                    graph.unclaimed.setdefault(each, set()).update(operators)
                continue
            for each in below_child:
                graph.unclaimed.setdefault(each, set()).update(recording.touched.get(each) or {f"{name} {UNSEEN}"})
    graph.alive = {index for node, index in calls.items() if node in below}
    for index in claimed - graph.alive:  # its output was replaced later, so that its gradient would never arrive
        for use in recording.calls[index].uses:
            operator = f"{recording.calls[index].operator}, whose output is a view that was modified in place"
            graph.unclaimed.setdefault(use.name, set()).add(operator)
    graph.before = {index: below[node] for node, index in calls.items() if node in below}
    graph.last = frozenset((calls[end],)) if end in calls else below[end]
    graph.sources = [index for index, before in graph.before.items() if not before]
    graph.hidden = {name: functions for name, functions in graph.hidden.items() if functions}
    graph.meetings += recording.meetings
    graph.signature = hash(tuple(nodes))
    graph.takes_several = names <= _TOGETHER
    if any(name.startswith(_GATHERING) for name in names):
        selecting = (node for node in below if node.name().startswith(_GATHERING))
        graph.gathers = any(makers.get(node) not in graph.alive for node in selecting)  # from weights is from no data
    graph.combines = recording.combines
    return graph


def dtypes_within(outputs: Tensor) -> set[torch.dtype]:
    """Those of all gradients on the way from the outputs: a network may end in others than it computes in."""
    dtypes, seen = {outputs.dtype}, set()
    stack: list[Any] = [outputs.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        dtypes.update(output.dtype for output in getattr(node, "_input_metadata", ()))
        stack += [child for child, _ in node.next_functions]
    return {dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex}


def _describe(node: Any) -> tuple[object, ...]:
    """The shapes and dtypes of a node's outputs and what it saved but tensors: sizes, axes, places, flags.

    What it saved is written out: it may have no hash, and -1 has that of -2.
    """
    names = _ATTRIBUTES.get(type(node))
    if names is None:
        saved = [name for name in dir(node) if name.startswith("_saved_")]
        names = tuple(name for name in saved if not hasattr(type(node), f"_raw{name}"))  # a tensor has both
        if type(node).__name__ == "AccumulateGrad" or isinstance(node, BackwardCFunction):
            names = ()
        _ATTRIBUTES[type(node)] = names
    outputs = [(tuple(output.shape), output.dtype) for output in getattr(node, "_input_metadata", ())]
    return (*outputs, repr([getattr(node, name, None) for name in names])) if names else tuple(outputs)


def _note_arguments(recording: Recording, node: Any, graph: Graph, leaves: Mapping[int, str]) -> None:
    """Note the parameters that a function written in Python received: it computes their gradients itself."""
    constant = {tensor.grad_fn for tensor in recording.constant.values() if tensor.grad_fn is not None}
    below, stack, names = set(), [child for child, _ in node.next_functions], set()
    while stack:
        child = stack.pop()
        if child is None or child in below:
            continue
        below.add(child)
        name = leaves.get(id(getattr(child, "variable", None)))
        if name is not None:
            names.add(name)
        elif child in constant or child in recording.chains:
            stack += [deeper for deeper, _ in child.next_functions]
    if names and node not in constant:
        outputs = len(getattr(node, "_input_metadata", (None,)))
        graph.meetings += [(node.name(), Anchor(GradientEdge(node, place))) for place in range(outputs)]
    for name in names:
        graph.hidden.get(name, set()).discard(node.name().removesuffix("Backward"))
