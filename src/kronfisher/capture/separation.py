"""Which parts of a graph keep examples apart whatever values flow through it: by the kinds, shapes and axes of nodes.

A probe sees one batch: a mask of zeros, a dead unit, a weight of zero or an index may close a path that is open in the
next batch. What a probe found is remembered only where this walk proves it. From the outputs, whose first axis counts
examples, the axis is followed backwards through operators that act on every index of it alone. Everything else
(products along the axis, selections by index, functions written by users, operators not listed) ends the proof, and
such graphs are probed in every batch.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge

__all__ = ["Separated", "separate"]

Place = tuple[int, int]  # axis and k: index i of the axis belongs to example (i // k) mod N
Separated = Mapping[tuple[Node, int], Place]
"""(node, number of its output) → where examples lie in it."""

Shape = tuple[int, ...]
Shapes = Sequence["Shape | None"]
Answer = Sequence["int | None"]  # for each input the axis of examples, None where examples may meet


def separate(outputs: Tensor) -> Separated:
    """The outputs of nodes in which examples are apart for all values."""
    end = get_gradient_edge(outputs)
    states: dict[tuple[Node, int], Place | None] = {(end.node, end.output_nr): (0, 1)}
    for node in _consumers_first(end.node):
        shapes = _shapes(node)
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        for place, shape in enumerate(shapes):
            if (node, place) not in states:
                continue
            before = states[node, place]
            inputs = [_shapes(child)[k] if child is not None else None for child, k in node.next_functions]
            answer: Sequence[Place | None] = [None] * len(inputs)
            if before is None or isinstance(node, BackwardCFunction):
                pass
            elif name in _VIEWS:
                answer = [_viewed(before, shape, inputs[0], len(outputs)), *answer[1:]]
            elif name in _RULES:
                axes = _RULES[name](node, before[0], shape, inputs)
                answer = [None if axis is None else (axis, before[1]) for axis in axes]
            for (child, k), found in zip(node.next_functions, answer, strict=True):
                if child is not None:
                    known = states.setdefault((child, k), found)
                    states[child, k] = found if known == found else None
    return {key: found for key, found in states.items() if found is not None}


def _consumers_first(end: Node) -> list[Node]:
    """All nodes, each after those that its output goes to."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(end, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None]
    return order[::-1]


def _shapes(node: Any) -> list[Shape]:
    return [tuple(output.shape) for output in node._input_metadata]


def _viewed(place: Place, shape: Shape, other: "Shape | None", examples: int) -> Place | None:
    """Elements keep their order: one in `every` elements further on begins the next example."""
    axis, inner = place
    every = inner * prod(shape[axis + 1 :])
    for k, size in enumerate(other or ()):
        rest = prod((other or ())[k + 1 :])
        if every and rest and every % rest == 0 and size % (examples * (every // rest)) == 0:
            return k, every // rest
    return None


def _axes(value: "int | Sequence[int]", rank: int) -> list[int]:
    """Saved axes, which are negative modulo 2^64, from zero."""
    values = [value] if isinstance(value, int) else value
    return [(axis - 2**64 if axis >= 2**63 else axis) % rank for axis in values]


Rule = Callable[[Any, int, Shape, Shapes], Answer]


def _elementwise(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
    """Axes are aligned at the end; an operand that is broadcast over the examples meets all of them."""
    return [_aligned(axis, shape, each) for each in inputs]


def _aligned(axis: int, shape: Shape, other: "Shape | None") -> int | None:
    place = axis - len(shape) + len(other or ())
    return place if other and place >= 0 and other[place] == shape[axis] else None


def _along(attribute: str) -> Rule:
    """Operators that act along one or several axes, keep the number of axes, and all others elementwise."""

    def rule(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
        dims = getattr(node, attribute)
        return [None] * len(inputs) if not _rest(axis, dims, len(shape)) else [_same(axis, shape, i) for i in inputs]

    return rule


def _rest(axis: int, dims: "int | Sequence[int]", rank: int) -> bool:
    return dims != () and axis not in _axes(dims, rank)


def _same(axis: int, shape: Shape, other: "Shape | None") -> int | None:
    return axis if other and len(other) == len(shape) and other[axis] == shape[axis] else None


def _reduced(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
    """Sums and the like over some axes."""
    rank = len(inputs[0] or ())
    dims = getattr(node, "_saved_dim", None)
    if dims is None or dims == () or rank == 0:  # over all of them
        return [None] * len(inputs)
    gone = _axes(dims, rank)
    kept = [k for k in range(rank) if k not in gone]
    if rank == len(shape):  # kept as axes of size one
        return [axis if axis in kept else None, *[None] * (len(inputs) - 1)]
    return [kept[axis], *[None] * (len(inputs) - 1)]


def _removed(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
    """One index of an axis is taken."""
    (dim,) = _axes(node._saved_dim, len(shape) + 1)
    return [axis + (axis >= dim)]


def _stacked(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
    (dim,) = _axes(node._saved_dim, len(shape))
    return [None if axis == dim else axis - (axis > dim)] * len(inputs)


def _sliced(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
    """A slice that takes all of an axis keeps it."""
    return [_same(axis, shape, each) for each in inputs]


def _padded(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
    ends = tuple(node._saved_pad)[2 * (len(shape) - 1 - axis) :][:2]  # from the last axis
    return [axis if not any(ends) else None]


def _transposed(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
    first, second = _axes((node._saved_dim0, node._saved_dim1), len(shape))
    return [{first: second, second: first}.get(axis, axis)]


def _permuted(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
    return [_axes(node._saved_dims, len(shape))[axis]]


def _repeated(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
    return [_aligned(axis, shape, inputs[0]) if node._saved_repeats[axis] == 1 else None]


def _unfolded(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
    """Windows along an axis go to a new last axis."""
    (dim,) = _axes(node._saved_dimension, len(shape) - 1)
    return [axis if axis not in (dim, len(shape) - 1) else None]


def _inserted(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
    """One index of an axis is filled, the others are zero."""
    (dim,) = _axes(node._saved_dim, len(shape))
    return [None if axis == dim else axis - (axis > dim)]


def _normalised(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
    if axis >= len(shape) - len(node._saved_normalized_shape):
        return [None] * len(inputs)
    return [axis, *[None] * (len(inputs) - 1)]


def _evaluated(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
    """Batch normalisation, which mixes examples in train mode."""
    return [None if getattr(node, "_saved_training", True) else axis, *[None] * (len(inputs) - 1)]


def _batched(count: int) -> Rule:
    """Operators that treat the first axis index by index, in the first `count` operands."""

    def rule(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
        first = [0 if each and axis == 0 and each[0] == shape[0] else None for each in inputs[:count]]
        return [*first, *[None] * (len(inputs) - len(first))]

    return rule


def _attended(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
    """Attention treats all axes but the last two index by index."""
    if axis >= len(shape) - 2:
        return [None] * len(inputs)
    return [_same(axis, shape, each) for each in inputs[:3]] + [None] * (len(inputs) - 3)


def _multiplied(first: int) -> Rule:
    """Matrix products: rows come from the left operand, columns from the right one; before them, an addend."""

    def rule(node: Any, axis: int, shape: Shape, inputs: Shapes) -> Answer:
        rank = len(shape)
        left = axis if axis != rank - 1 else None
        right = axis if axis != rank - 2 else None
        if len(inputs) == first + 1 or rank != len(inputs[first] or inputs[first + 1] or ()):
            return [None] * len(inputs)
        return [*(_aligned(axis, shape, each) for each in inputs[:first]), left, right]

    return rule


_ELEMENTWISE = (
    "Add", "Sub", "Rsub", "Mul", "Div", "Pow", "Neg", "Abs", "Exp", "Exp2", "Expm1", "Log", "Log2", "Log10", "Log1P",
    "Sqrt", "Rsqrt", "Reciprocal", "Sin", "Cos", "Tan", "Sinh", "Cosh", "Tanh", "Asin", "Acos", "Atan", "Asinh",
    "Acosh", "Atanh", "Atan2", "Erf", "Erfc", "Sigmoid", "LogSigmoid", "Relu", "LeakyRelu", "Elu", "Celu", "Gelu",
    "Silu", "Mish", "Softplus", "Softshrink", "Hardshrink", "Hardtanh", "Hardsigmoid", "Hardswish", "Threshold",
    "Clamp", "ClampMin", "ClampMax", "Maximum", "Minimum", "Fmax", "Fmin", "Where", "MaskedFill", "Lerp", "Addcmul",
    "Addcdiv", "Logaddexp", "Sgn", "NativeDropout", "ToCopy", "Clone", "Alias", "Expand", "Tril", "Triu", "PreluKernel",
)  # fmt: skip

_TWICE = (  # derivatives of some of them, which are operators of their own in second derivatives
    "TanhBackward", "SigmoidBackward", "ThresholdBackward", "LogSigmoidBackward", "LeakyReluBackward", "EluBackward",
    "GeluBackward", "SoftplusBackward", "SoftshrinkBackward", "HardshrinkBackward", "HardtanhBackward",
    "HardswishBackward",
)  # fmt: skip

_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze")

_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_TWICE, _elementwise),
    **dict.fromkeys(
        ["Sum", "Mean", "Amax", "Amin", "Max", "Min", "Median", "Nanmedian", "Prod", "Logsumexp", "Var", "Std", "Mode",
         "Kthvalue", "LinalgVectorNorm", "Norm", "Aminmax"], _reduced
    ),
    **dict.fromkeys(
        ["Softmax", "LogSoftmax", "SafeSoftmax", "Cumsum", "Cumprod", "Cummax", "Cummin", "Logcumsumexp", "Cat",
         "Split", "SplitWithSizes", "Topk", "Sort", "Glu", "IndexSelect", "Gather"], _along("_saved_dim")
    ),
    **dict.fromkeys(["Flip", "Roll"], _along("_saved_dims")),
    **dict.fromkeys(["Select", "Unbind"], _removed),
    "Stack": _stacked,
    "Slice": _sliced,
    "SliceBackward": _sliced,
    "SelectBackward": _inserted,
    "ConstantPadNd": _padded,
    "Transpose": _transposed,
    "T": lambda node, axis, shape, inputs: [len(shape) - 1 - axis],
    "Permute": _permuted,
    "Repeat": _repeated,
    "Unfold": _unfolded,
    **dict.fromkeys(["NativeLayerNorm", "FusedRmsNorm"], _normalised),
    **dict.fromkeys(["NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"], _evaluated),
    **dict.fromkeys(
        ["Convolution", "NativeGroupNorm", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AvgPool2D", "AvgPool3D",
         "MkldnnAdaptiveAvgPool2D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D",
         "ReflectionPad1D", "ReflectionPad2D", "ReflectionPad3D", "ReplicationPad1D", "ReplicationPad2D",
         "ReplicationPad3D", "Im2Col", "Col2Im", "PixelShuffle", "PixelUnshuffle", "UpsampleNearest1D",
         "UpsampleNearest2D", "UpsampleNearest3D", "UpsampleNearestExact1D", "UpsampleNearestExact2D",
         "UpsampleLinear1D", "UpsampleBilinear2D", "UpsampleTrilinear3D", "UpsampleBicubic2D"], _batched(1)
    ),
    **dict.fromkeys(
        ["ScaledDotProductFlashAttentionForCpu", "ScaledDotProductFlashAttention", "ScaledDotProductEfficientAttention",
         "ScaledDotProductCudnnAttention"], _attended
    ),
    **dict.fromkeys(["Mm", "Bmm"], _multiplied(0)),
    **dict.fromkeys(["Addmm", "Baddbmm"], _multiplied(1)),
}  # fmt: skip
