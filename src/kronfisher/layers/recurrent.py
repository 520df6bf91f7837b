"""Recurrent layers and cells: weights that are shared over time, so that times are positions.

The fused kernels hide their steps, so they are run step by step instead. The gates of step t are
``z_t = W_ih x_t + b_ih + W_hh h_{t−1} + b_hh``. The products with all inputs are taken at once, and the gradients that
arrive there are those of the products with the hidden states, too: two blocks with one output gradient ``[T, n, O]``.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from kronfisher.layers.linear import RowUse, grouped
from kronfisher.layers.row_order import RowOrder
from kronfisher.layers.use import Recorder, Use, rewrites

__all__ = ["StepUse", "Steps"]

State = tuple[Tensor, ...]  # h, or h and c


@dataclass(frozen=True)
class Steps:
    """How rows follow each other in time.

    Attributes:
        sizes: of packed sequences: how many of them reach each step, the longest first; None: all reach every step.
    """

    sizes: tuple[int, ...] | None = None

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """The rows of each step."""
        return rows.unbind(0) if self.sizes is None else rows.split(self.sizes)

    def join(self, steps: Mapping[int, Tensor]) -> Tensor:
        """The rows of all steps, from the rows at each time."""
        rows = [steps[t] for t in range(len(steps))]
        return torch.stack(rows) if self.sizes is None else torch.cat(rows)

    def valid(self, device: torch.device) -> Tensor:
        """``[T, n]``: where a packed sequence has a row."""
        assert self.sizes is not None
        lengths = torch.tensor(self.sizes, device=device)
        return torch.arange(self.sizes[0], device=device) < lengths[:, None]

    def pad(self, rows: Tensor) -> Tensor:
        """``[T, n, *]`` from the rows of packed sequences, zero where one has ended."""
        if self.sizes is None:
            return rows
        valid = self.valid(rows.device)
        padded = rows.new_zeros(*valid.shape, *rows.shape[1:])
        padded[valid] = rows
        return padded


@dataclass
class StepUse(RowUse):
    """``z_t = W x_t + b`` at every step.

    Attributes:
        steps: how rows follow each other.
        factor: what the gradient is multiplied by, shaped like it; None: one.
        hidden: whether the inputs are hidden states, which are no data, whatever the detached tensors show.
    """

    steps: Steps = Steps()
    factor: Tensor | None = None
    hidden: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reads_data = self.reads_data and not self.hidden

    def _rows(self, tensor: Tensor) -> Tensor:
        return self.steps.pad(tensor)

    def lead(self, output: tuple[int, ...]) -> tuple[int, ...]:
        sizes = self.steps.sizes
        return output[:-1] if sizes is None else (len(sizes), sizes[0])

    def gradients(self, order: RowOrder, gradient: Tensor) -> Tensor:
        gradient = gradient if self.factor is None else gradient * self.factor
        # They fade over time, and where squares are subnormal a product takes a CPU up to a hundred times as long.
        least = torch.finfo(gradient.dtype).tiny ** 0.5
        return super().gradients(order, F.hardshrink(gradient, least))

    def same_gradients(self, other: Use) -> bool:
        return isinstance(other, StepUse) and other.steps is self.steps and other.factor is self.factor

    def mask(self, order: RowOrder) -> Tensor | None:
        if self.steps.sizes is None:
            return None
        return order.group(self.steps.valid(torch.device("cpu")), 2)


def _lstm(z: Tensor, c: Tensor) -> State:
    into, keep, new, out = z.chunk(4, 1)
    c = keep.sigmoid() * c + into.sigmoid() * new.tanh()
    return out.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, old: Tensor) -> tuple[State, Tensor]:
    """The new state, and the factor of the gradient of the last third of h: the reset gate."""
    width = old.shape[1]
    reset, update = (x[:, : 2 * width] + h[:, : 2 * width]).sigmoid().chunk(2, 1)
    new = (x[:, 2 * width :] + reset * h[:, 2 * width :]).tanh()
    return (new + update * (old - new),), reset


@dataclass(frozen=True)
class Weights:
    """The weights of one layer in one direction, or of a cell.

    Attributes:
        inputs: W_ih ``[O, I]``.
        hidden: W_hh ``[O, P]``.
        biases: b_ih and b_hh ``[O]``, or twice None.
        projection: W_hr ``[P, H]`` of an LSTM whose hidden state is projected, or None.
    """

    inputs: Tensor
    hidden: Tensor
    biases: tuple[Tensor | None, Tensor | None]
    projection: Tensor | None = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor], biased: bool) -> "Weights":
        """From the tensors in torch's order."""
        rest = tensors[4 if biased else 2 :]
        biases = (tensors[2], tensors[3]) if biased else (None, None)
        return cls(tensors[0], tensors[1], biases, rest[0] if rest else None)

    @cached_property
    def transposed(self) -> Tensor:
        """W_hhᵀ, the same at all steps."""
        return self.hidden.t()

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.inputs, self.hidden, *self.biases, self.projection) if t is not None]


@dataclass
class Trace:
    """What the steps of a layer leave behind, by time.

    Attributes:
        hidden: the hidden state before each step.
        resets: reset gates of a GRU.
        inner: hidden states of an LSTM before they are projected.
        outputs: the hidden state after each step.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    resets: dict[int, Tensor] = field(default_factory=dict)
    inner: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)


def _step(name: str, x: Tensor, state: State, weights: Weights, trace: Trace, t: int) -> State:
    """The state after step t, whose gates get x from the inputs."""
    trace.hidden[t] = state[0].detach()
    if name == "gru":
        after, reset = _gru(x, F.linear(state[0], weights.hidden, weights.biases[1]), state[0])
        trace.resets[t] = reset.detach()
        return after
    z = torch.addmm(x, state[0], weights.transposed)
    return _lstm(z, state[1]) if name == "lstm" else (z.tanh() if name == "rnn_tanh" else z.relu(),)


def _layer(
    recorder: Recorder, name: str, x: Tensor, start: State, weights: Weights, steps: Steps, *, backwards: bool
) -> tuple[Tensor, State]:
    """One layer in one direction: the hidden states of all steps, and the last state of every sequence."""
    first, second = weights.biases
    if name != "gru" and first is not None and second is not None:  # a GRU's second bias meets the reset gate
        first = first + second
    gates = F.linear(x, weights.inputs, first)
    if not gates.requires_grad:
        gates.requires_grad_()  # nothing else would receive the gradient of the products with the hidden states
    pieces, zeros = list(enumerate(steps.split(gates))), None
    if weights.projection is not None:
        zeros = gates.new_zeros(*gates.shape[:-1], len(weights.projection)).requires_grad_()  # as do these
    lifts = () if zeros is None else steps.split(zeros)
    trace, ended = Trace(), []
    pieces = pieces[::-1] if backwards else pieces
    start = tuple(each.to(gates.dtype) for each in start)
    now = tuple(each[: len(pieces[0][1])] for each in start)
    for t, own in pieces:
        count, old = len(own), len(now[0])
        if count < old:
            ended.append(tuple(each[count:] for each in now))
            now = tuple(each[:count] for each in now)
        elif count > old:
            now = tuple(torch.cat([each, first[old:count]]) for each, first in zip(now, start, strict=True))
        now = _step(name, own, now, weights, trace, t)
        if weights.projection is not None:
            trace.inner[t] = now[0].detach()
            now = (torch.addmm(lifts[t], now[0], weights.projection.t()), *now[1:])
        trace.outputs[t] = now[0]
    for rest in reversed(ended):
        now = tuple(torch.cat([each, more]) for each, more in zip(now, rest, strict=True))
    output = steps.join(trace.outputs)
    noted = _uses(recorder, x, weights, steps, trace, gates, zeros)
    recorder.record(name, noted, [x, *start, *weights.tensors], [output, *now])
    return output, now


def _uses(
    recorder: Recorder,
    x: Tensor,
    weights: Weights,
    steps: Steps,
    trace: Trace,
    gates: Tensor,
    zeros: Tensor | None,
) -> list[tuple[Tensor, tuple[Use, ...]]]:
    """Where output gradients arrive, and the uses that these are of."""
    matrix, recurrent, projection = map(recorder.view, (weights.inputs, weights.hidden, weights.projection))
    shift, second = map(recorder.view, weights.biases)
    uses = []
    if matrix or shift:
        uses.append(StepUse(grouped(matrix), grouped(shift), x if matrix else None, steps))
    if recurrent or second:
        factor = None
        if trace.resets:
            resets = steps.join(trace.resets)
            factor = torch.cat([torch.ones_like(resets), torch.ones_like(resets), resets], dim=-1)
        before = steps.join(trace.hidden) if recurrent else None
        uses.append(StepUse(grouped(recurrent), grouped(second), before, steps, factor, hidden=True))
    noted: list[tuple[Tensor, tuple[Use, ...]]] = [(gates, tuple(uses))]
    if projection and zeros is not None:
        noted.append((zeros, (StepUse(grouped(projection), None, steps.join(trace.inner), steps, hidden=True),)))
    return [entry for entry in noted if entry[1]]


def _run(
    recorder: Recorder,
    name: str,
    x: Tensor,
    steps: Steps,
    states: State,
    tensors: Sequence[Tensor],
    biased: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    """All layers, as torch's kernels compute them: outputs with time first, and last states ``[layers, n, *]``."""
    each = len(tensors) // (layers * (2 if bidirectional else 1))
    last: list[State] = []
    for layer in range(layers):
        outputs = []
        for backwards in (False, True) if bidirectional else (False,):
            place = len(last)
            weights = Weights.of(tensors[place * each : (place + 1) * each], biased)
            start = tuple(state[place] for state in states)
            output, end = _layer(recorder, name, x, start, weights, steps, backwards=backwards)
            outputs.append(output)
            last.append(end)
        x = torch.cat(outputs, dim=-1) if bidirectional else outputs[0]
        if dropout and training and layer < layers - 1:
            x = F.dropout(x, dropout)
    return x, *(torch.stack(ends) for ends in zip(*last, strict=True))


def _begun(recorder: Recorder, x: Tensor, states: State, weights: Sequence[Tensor]) -> State | None:
    """The initial states, if the kernel can be run step by step and has weights to be recorded.

    A state that is learnt is used by an addition, where it meets the examples.
    """
    learnt = [recorder.view(state) is not None for state in states]
    others = [state for state, own in zip(states, learnt, strict=True) if not own]
    if not any(map(recorder.view, weights)) or not recorder.understands([x, *others, *weights]) or _runs_again():
        return None
    with recorder:
        return tuple(
            state + x.new_zeros(state.shape) if own else state for state, own in zip(states, learnt, strict=True)
        )


def _runs_again() -> bool:
    """Whether a checkpoint runs the kernel: it will do so again, without us, and expects the same tensors."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


def _kernel(name: str, recorder: Recorder, *args: Any, **kwargs: Any) -> Any:
    """A layer of several steps: ``(x, state, weights, …, batch_first)``, or ``(rows, sizes, state, weights, …)``."""
    packed = len(args) > 1 and isinstance(args[1], Tensor) and not args[1].is_floating_point()
    if kwargs or len(args) != 9:
        return NotImplemented
    x, given, tensors, *options = (args[0], *args[2:]) if packed else args
    states: State = tuple(given) if isinstance(given, tuple | list) else (given,)
    steps, batch_first = (Steps(tuple(args[1].tolist())), False) if packed else (Steps(), options.pop())
    begun = _begun(recorder, x, states, tensors)
    if begun is None:
        return NotImplemented
    output, *last = _run(recorder, name, x.transpose(0, 1) if batch_first else x, steps, begun, tensors, *options)
    return output.transpose(0, 1) if batch_first else output, *last


def _cell(name: str, recorder: Recorder, x: Tensor, given: Any, *tensors: Tensor | None, **kwargs: Any) -> Any:
    """One step ``(x, state, W_ih, W_hh, b_ih, b_hh)``."""
    states: State = tuple(given) if isinstance(given, tuple | list) else (given,)
    weights = [tensor for tensor in tensors if tensor is not None]
    begun = None if kwargs or x.dim() != 2 else _begun(recorder, x, states, weights)
    if begun is None:
        return NotImplemented
    own = Weights.of(weights, len(weights) == 4)
    _, after = _layer(recorder, name, x[None], begun, own, Steps(), backwards=False)
    return after if name == "lstm" else after[0]


for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    rewrites(getattr(torch, _name))(partial(_kernel, _name))
    rewrites(getattr(torch, f"{_name}_cell"))(partial(_cell, _name))
