"""One forward pass, understood: a single record of what ran, that later steps ask and that nobody changes."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from kronfisher.capture.batches import Batches, Forward, run
from kronfisher.capture.capture import Capture, Receiver
from kronfisher.capture.graph import Call, Graph, walk
from kronfisher.capture.refusals import detached, hidden, refuse
from kronfisher.layers import Probe, Use
from kronfisher.linalg import promote

__all__ = ["Observation", "observe", "observe_all"]


@dataclass(frozen=True, eq=False)
class Observation:
    """A forward pass with the graph that it left, for as long as the graph is there.

    Attributes:
        model: unwrapped.
        capture: the record of its operators.
        graph: what a walk from the outputs found; every edge into a trainable parameter is accounted for.
        outputs: ``[N, ...]``, with their graph.
        targets: as the likelihood takes them, or None.
        where: the batch's name in messages.
        batch: as the loader gave it, from which masks are read.
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
            raise detached(where)
        refuse({name: hidden(name, functions) for name, functions in graph.hidden.items()}, where)
        return cls(model, capture, graph, outputs, targets, where, batch)

    def __len__(self) -> int:
        """N, examples in the batch."""
        return len(self.outputs)

    @property
    def calls(self) -> list[Call]:
        """Calls of operators with trainable parameters, in the order of the forward pass."""
        return self.capture.calls

    def backward(self, product: Tensor, receive: Receiver, *, retain: bool) -> None:
        """Go backward from a number made of the outputs; see `Capture.backward`."""
        self.capture.backward(product, receive, self.graph.sources, retain=retain)

    def examples_of_rows(self, uses: Mapping[tuple[int, Hashable], Use]) -> dict[Any, Tensor | None]:
        """The example that each row of some uses belongs to, by a probe: a few backward passes.

        Args:
            uses: (index of a call, anything) → a use made by it.

        Returns:
            The same keys → the example of every row, −1 where no gradient tells; None where rows mix examples.
        """
        probe = Probe(len(self), self.outputs.dtype)
        passes: dict[Any, list[Tensor]] = {key: [] for key in uses}
        wanted: dict[int, list[Any]] = {}
        for key in uses:
            wanted.setdefault(key[0], []).append(key)

        def receive(call: Call, gradient: Tensor) -> None:
            for key in wanted.get(call.index, ()):
                passes[key].append(probe.project(uses[key].rows(promote(gradient))))

        for vector in self._probing(probe):
            self.backward((self.outputs * vector).sum(), receive, retain=True)
        unknown = {key: torch.full(use.lead(self.calls[key[0]].shape), -1, device="cpu") for key, use in uses.items()}
        return {key: probe.examples(each) if each else unknown[key] for key, each in passes.items()}

    def mixing(self, edges: Sequence[GradientEdge]) -> list[int]:
        """Places among some edges of the graph at which the gradient of a single element comes from several examples.

        Args:
            edges: where to look.
        """
        probe, passes = Probe(len(self), self.outputs.dtype), [[] for _ in edges]
        for vector in self._probing(probe):
            product = (self.outputs * vector).sum()
            gradients = torch.autograd.grad(product, edges, retain_graph=True, allow_unused=True)
            for each, gradient in zip(passes, gradients, strict=True):
                if gradient is not None:
                    rows = promote(gradient.to_dense() if gradient.layout is not torch.strided else gradient).flatten()
                    chosen = torch.Generator("cpu").manual_seed(len(rows))
                    some = torch.randint(max(len(rows), 1), (min(len(rows), 2**14),), generator=chosen, device="cpu")
                    each.append(probe.project(rows[some.to(rows.device), None]))
        return [place for place, each in enumerate(passes) if each and probe.examples(each) is None]

    def between(self, later: Call, earlier: Call, vector: Tensor) -> Tensor | None:
        """Carry `vector`, a gradient of the output of one call, back to the output of a call before it.

        None where no path leads from the one to the other.
        """
        arrives = later.edge.node._input_metadata[later.edge.output_nr]  # pyright: ignore[reportAttributeAccessIssue]
        start = vector.to(arrives.device, arrives.dtype)
        if later.window is not None:
            size, stride, offset = later.window
            start = start.new_zeros(tuple(arrives.shape))
            start.as_strided(size, stride, offset).copy_(vector)
        (gradient,) = torch.autograd.grad([later.edge], [earlier.edge], [start], retain_graph=True, allow_unused=True)
        return None if gradient is None else earlier.gradient(gradient)

    def _probing(self, probe: Probe) -> Iterator[Tensor]:
        """The vectors of a probe's passes."""
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = promote(self.outputs.detach().new_empty(0)).dtype
        vector = torch.randn(self.outputs.shape, generator=generator, dtype=drawn, device="cpu").to(self.outputs)
        for factor in probe.factors().to(self.outputs):
            yield vector * factor.reshape(-1, *[1] * (self.outputs.dim() - 1))


def observe(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Any, forward: Forward | None, where: str
) -> Observation:
    """Run a model on one batch under capture.

    Args:
        model: unwrapped.
        parameters: name → trainable parameter.
        batch: as the loader gave it.
        forward: ``forward(model, batch) -> (outputs, targets)`` for batches of a form of its own.
        where: the batch's name in messages.

    Raises:
        DataError: the batch does not fit the model.
        UnsupportedError: as for `Observation.of`.
    """
    device = next(iter(parameters.values())).device
    with Capture(parameters, (*model.parameters(), *model.buffers())) as capture:
        outputs, targets = run(model, batch, forward, device, where)
    return Observation.of(model, capture, outputs, targets, where, batch)


def observe_all(
    model: nn.Module, parameters: Mapping[str, Tensor], batches: Batches, forward: Forward | None, number: int
) -> Iterator[Observation]:
    """`observe` every batch of the pass of this number, each when it is asked for."""
    for where, batch in batches.read(number):
        yield observe(model, parameters, batch, forward, where)
