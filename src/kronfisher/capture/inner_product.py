"""Where vectors are back-propagated from outputs: through a scalar, unless they are small."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge

__all__ = ["Seed", "back_propagate_together", "inner_product"]

_SMALL = 2**16  # numbers that may stay during a pass


def _private(module: str, name: str) -> Callable[..., Any] | None:
    """A function of torch that is not public, where this version of torch has it."""
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


_engine_run_backward = _private("torch.autograd.graph", "_engine_run_backward")
_vmap = _private("torch._vmap_internals", "_vmap")


@dataclass(frozen=True, eq=False)
class Seed:
    """Where a backward pass begins.

    Small vectors are handed to torch's engine, which keeps them for the whole pass: a function written in Python would
    take as long as the pass through a small network. By way of ``torch.autograd.grad`` they would import symbolic
    algebra at the first call, which takes half a second; that way they go where torch has no other.

    Attributes:
        tensor: of the graph.
        gradient: of the tensor; None: it is a scalar.

    Example:
        >>> outputs = torch.zeros(2, requires_grad=True)
        >>> Seed.of(outputs, torch.tensor([1.0, 2.0])).back_propagate([outputs], retain=False)
        (tensor([1., 2.]),)
    """

    tensor: Tensor
    gradient: Tensor | None = None

    @classmethod
    def of(cls, outputs: Tensor, vector: Tensor) -> Self:
        """The vector as the gradient of the outputs."""
        if outputs.numel() > _SMALL:
            return cls(inner_product(outputs, vector))
        vector = vector.detach() if vector.shape == outputs.shape else vector.detach().expand_as(outputs)
        return cls(outputs, vector.to(outputs.dtype).contiguous())

    def back_propagate(
        self, inputs: Sequence[Tensor] | Sequence[GradientEdge], *, retain: bool
    ) -> tuple[Tensor | None, ...]:
        """The gradients of some tensors or edges of the graph, None where nothing arrives."""
        if self.gradient is None:
            return torch.autograd.grad(self.tensor, inputs, retain_graph=retain, allow_unused=True)
        if not _as_known():
            options: dict[str, Any] = {"retain_graph": retain, "allow_unused": True}
            return torch.autograd.grad(self.tensor, inputs, self.gradient, **options)
        return _run(self.tensor, self.gradient, inputs, retain=retain)


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


def back_propagate_together(
    outputs: Tensor, vectors: Tensor, edges: Sequence[GradientEdge]
) -> tuple[Tensor | None, ...] | None:
    """The gradients ``[V, ...]`` at some edges of several vectors ``[V, *outputs]`` in one pass; None if it failed.

    A hook of the model's own may read values, or torch lack a rule: then vectors have to go one by one, through the
    graph, which is kept.
    """
    vectors = vectors.detach().to(outputs.dtype)
    try:
        if not _as_known():
            options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
            return torch.autograd.grad(outputs, edges, vectors, is_grads_batched=True, **options)
        return _run_together(outputs, vectors, edges)
    except RuntimeError:
        return None


def _run(
    outputs: Tensor, vector: Tensor, ends: Sequence[Tensor] | Sequence[GradientEdge], *, retain: bool
) -> tuple[Tensor | None, ...]:
    """A pass by torch's engine, without the checks of the public function."""
    assert _engine_run_backward is not None
    return _engine_run_backward((outputs,), (vector,), retain, False, tuple(ends), True, accumulate_grad=False)


def _run_together(
    outputs: Tensor, vectors: Tensor, ends: Sequence[Tensor] | Sequence[GradientEdge]
) -> tuple[Tensor | None, ...]:
    """One pass for all vectors ``[V, *outputs]``, likewise."""
    assert _vmap is not None

    def gradients(vector: Tensor) -> tuple[Tensor | None, ...]:
        return _run(outputs, vector, ends, retain=True)

    return _vmap(gradients, 0, 0, allow_none_pass_through=True)(vectors)


@cache
def _as_known() -> bool:
    """Whether this version of torch has the two functions that are not public, and they take what they are given here.

    A pass through one sum tells, once: in the pass through a model a refusal looks like an error of the model's own.
    """
    if _engine_run_backward is None or _vmap is None:
        return False
    with torch.inference_mode(False), torch.enable_grad():
        start = torch.ones(2, dtype=torch.float32, device="cpu", requires_grad=True)
        vectors = torch.eye(2, dtype=torch.float32, device="cpu")
        try:
            twice = start + start
            (single,), (both,) = _run(twice, vectors[0], [start], retain=True), _run_together(twice, vectors, [start])
        except Exception:  # whatever another form of them is refused by
            return False
        return all(
            isinstance(found, Tensor) and torch.equal(found, 2 * expected)
            for found, expected in ((single, vectors[0]), (both, vectors))
        )


class _InnerProduct(Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, vector: Tensor) -> Tensor:
        ctx.vector = vector.detach().expand_as(outputs).to(outputs.dtype).contiguous()
        return outputs.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        vector, ctx.vector = ctx.vector, None  # the pass goes on for long after this
        return vector, None
