"""One forward pass, understood: a single immutable record of the operators that ran."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.capture.anchor import Anchor
from kronfisher.capture.capture import Capture, Receiver
from kronfisher.capture.forward import Forward, run
from kronfisher.capture.graph import Call, Graph, dtypes_within, walk
from kronfisher.capture.inner_product import Seed, back_propagate_together
from kronfisher.capture.refusals import detached_outputs_error, hidden_use_message, refuse
from kronfisher.capture.remade import RemadeInputs
from kronfisher.capture.separation import Separated, separate
from kronfisher.layers import Probe, Use
from kronfisher.linalg import promote

__all__ = ["Observation", "observe"]

_FEW = 2**20  # output gradients of all calls that are made at once, in place of one pass after the other


@dataclass(frozen=True, eq=False)
class Observation:
    """A forward pass together with its autograd graph, as long as that graph exists.

    Attributes:
        model: unwrapped.
        capture: the record of its operators.
        graph: the result of a walk from the outputs; every edge into a trainable parameter is accounted for.
        outputs: ``[N, ...]``, with their graph.
        targets: in the form that the likelihood expects, or None.
        where: the batch's name in messages.
        batch: as the loader returned it; masks are read from it.
    """

    model: nn.Module
    capture: Capture
    graph: Graph
    outputs: Tensor
    targets: Any
    where: str
    batch: Any = None

    @classmethod
    def of(
        cls, model: nn.Module, capture: Capture, outputs: Tensor, targets: Any, where: str, batch: Any = None
    ) -> "Observation":
        """The observation of a captured forward pass.

        Raises:
            UnsupportedError: the outputs depend on no trainable parameter, a parameter is used where no graph shows
                its gradient, or the graph holds a reentrant checkpoint.
        """
        graph = walk(capture.recording, outputs)
        if not graph.reached and not graph.hidden:
            raise detached_outputs_error(where)
        refuse({name: hidden_use_message(name, functions) for name, functions in graph.hidden.items()}, where)
        return cls(model, capture, graph, outputs, targets, where, batch)

    def __len__(self) -> int:
        """N, examples in the batch."""
        return len(self.outputs)

    @property
    def calls(self) -> list[Call]:
        """Calls of operators with trainable parameters, in the order of the forward pass."""
        return self.capture.calls

    def backward(self, seed: Seed, receive: Receiver, *, retain: bool) -> None:
        """Back-propagate from the outputs; see `Capture.backward`."""
        self.capture.backward(seed, receive, self.graph.sources, retain=retain)

    def gradients_of_calls(self, vectors: Tensor) -> list[tuple[Call, Tensor]] | None:
        """Calls, the last first, with the gradients ``[V, ...]`` of vectors ``[V, *outputs]`` at their edges, at once.

        None where that is not worth it, or torch cannot: each vector takes a pass of its own then.
        """
        calls = [self.calls[index] for index in sorted(self.graph.alive, reverse=True)]
        numbers = len(vectors) * sum(prod(call.shape) for call in calls)
        if not self.graph.takes_several or numbers > _FEW:
            return None
        edges = [call.edge for call in calls]
        with self.capture.without_gradients_of_weights():
            found = back_propagate_together(self.outputs, vectors, edges)
        if found is None:
            return None
        return [(call, gradient) for call, gradient in zip(calls, found, strict=True) if gradient is not None]

    def examples_of_rows(self, uses: Mapping[tuple[int, Hashable], Use]) -> dict[Any, Tensor | None]:
        """The example that each row of some uses belongs to, by a probe: a few backward passes.

        Args:
            uses: (index of a call, any key) → a use made by that call.

        Returns:
            The same keys → the example of every row, −1 where the gradient is zero; None if rows mix examples.
        """
        probe = self._probe()
        passes: dict[Any, list[Tensor]] = {key: [] for key in uses}
        wanted: dict[int, list[Any]] = {}
        for key in uses:
            wanted.setdefault(key[0], []).append(key)

        def receive(call: Call, gradient: Tensor) -> None:
            for key in wanted.get(call.index, ()):
                passes[key].append(probe.project(uses[key].rows(promote(gradient))))

        for vector in self._probe_vectors(probe):
            self.backward(Seed.of(self.outputs, vector), receive, retain=True)
        unknown = {key: torch.full(use.lead(self.calls[key[0]].shape), -1, device="cpu") for key, use in uses.items()}
        return {key: probe.examples(each) if each else unknown[key] for key, each in passes.items()}

    @cached_property
    def separated(self) -> Separated:
        """Where examples are apart whatever the values, so that it holds for other batches with the same graph."""
        return separate(self.outputs)

    def proved_examples(self, call: Call, use: Use) -> Tensor | None:
        """The example that each row of a use belongs to for any values; None if values may decide."""
        place = self.separated.get((call.edge.node, call.edge.output_nr))
        if place is None:
            return None
        axis, inner = place
        shape = call.anchor.shape
        numbers = torch.arange(shape[axis], dtype=torch.float64, device="cpu") // inner % len(self)
        numbers = numbers.reshape(-1, *[1] * (len(shape) - axis - 1)).expand(shape)
        rows = use.rows(call.gradient(numbers))
        if not rows.numel() or not bool((rows == rows[..., :1]).all()):
            return None
        return rows[..., 0].long()

    def mixing_places(self, anchors: Sequence[Anchor]) -> list[int]:
        """Indices of those places of the graph where the gradient of a single element comes from several examples."""
        probe, passes, edges = self._probe(), [[] for _ in anchors], [anchor.edge for anchor in anchors]
        for vector in self._probe_vectors(probe):
            gradients = Seed.of(self.outputs, vector).back_propagate(edges, retain=True)
            for each, anchor, gradient in zip(passes, anchors, gradients, strict=True):
                if gradient is not None:
                    dense = anchor.part(gradient.to_dense() if gradient.layout is not torch.strided else gradient)
                    rows = promote(torch.view_as_real(dense) if dense.is_complex() else dense).flatten()
                    chosen = torch.Generator("cpu").manual_seed(len(rows))
                    some = torch.randint(max(len(rows), 1), (min(len(rows), 2**14),), generator=chosen, device="cpu")
                    each.append(probe.project(rows[some.to(rows.device), None]))
        return [place for place, each in enumerate(passes) if each and probe.examples(each) is None]

    def carry_back(self, later: Call, earlier: Call, vector: Tensor) -> Tensor | None:
        """Carry `vector`, a gradient of the output of one call, back to the output of an earlier call.

        None if no path connects the two.
        """
        end = later.edge.node._input_metadata[later.edge.output_nr]  # pyright: ignore[reportAttributeAccessIssue]
        start = later.anchor.whole(vector.to(end.device, end.dtype))
        (gradient,) = torch.autograd.grad([later.edge], [earlier.edge], [start], retain_graph=True, allow_unused=True)
        return None if gradient is None else earlier.gradient(gradient)

    def _probe(self) -> Probe:
        return Probe(len(self), self._dtypes)

    @cached_property
    def _dtypes(self) -> set[torch.dtype]:
        return dtypes_within(self.outputs)

    def _probe_vectors(self, probe: Probe) -> Iterator[Tensor]:
        """The vectors that the passes of a probe back-propagate, each in the memory of the one before."""
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = promote(self.outputs.detach().new_empty(0)).dtype
        vector = torch.randn(self.outputs.shape, generator=generator, dtype=drawn, device="cpu").to(self.outputs)
        for factor in probe.factors().to(self.outputs):
            factor = factor.reshape(-1, *[1] * (self.outputs.dim() - 1))
            yield vector.mul_(factor)
            vector.div_(factor)  # of powers of two, which leave no trace


def observe(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Any, forward: Forward | None, where: str
) -> Observation:
    """Run a model on one batch under capture.

    Args:
        model: unwrapped.
        parameters: name → trainable parameter.
        batch: as the loader returned it.
        forward: ``forward(model, batch) -> (outputs, targets)`` for batches of any other form.
        where: the batch's name in messages.

    Raises:
        DataError: the batch does not fit the model.
        UnsupportedError: as for `Observation.of`.
    """
    device = next(iter(parameters.values())).device
    capture = Capture(parameters, _constants(model))
    capture.remade = RemadeInputs()
    outputs, targets = run(model, batch, forward, device, where, capture)
    return Observation.of(model, capture, outputs, targets, where, batch)


def _constants(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers: what ``parameters()`` and ``buffers()`` give, without names, which cost more."""
    for module in _modules(model):
        for kind in (module._parameters, module._buffers):
            for tensor in kind.values():
                if tensor is not None:
                    yield tensor


def _modules(module: nn.Module) -> list[nn.Module]:
    found, seen = [module], {id(module)}
    for each in found:
        for child in each._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found
