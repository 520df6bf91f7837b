"""Routes output gradients, as they arrive, to the states of the fits."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kronfisher.capture.graph import Call
from kronfisher.capture.parts import Part
from kronfisher.capture.per_sample import per_sample_gradients, samples_of_gradients
from kronfisher.estimation.groups import Group
from kronfisher.estimation.kept import Kept
from kronfisher.fisher.blocks import Block
from kronfisher.fits.columns import MOST, together
from kronfisher.layers import RowOrder
from kronfisher.layers.activations import Activations, Dense
from kronfisher.layers.samples import Samples, Shared, join
from kronfisher.linalg import full_precision

__all__ = ["Stream"]

_FEW = 2**18  # bytes of output gradients that may wait for further columns, whatever the fit lets wait


@dataclass
class _Waiting:
    """Columns of one call that wait for further ones of the same examples.

    Attributes:
        part: the only one of the call.
        group: that it belongs to, of which it is all.
        order: of its rows.
        first: the samples of the first of them.
        further: output gradients of the others, as they came.
        bytes: that each of them takes.
    """

    part: Part
    group: Group
    order: RowOrder
    first: Samples
    further: list[Tensor]
    bytes: int

    @property
    def full(self) -> bool:
        """Whether no more may wait."""
        number = 1 + len(self.further)
        return number == MOST or number * self.bytes > max(self.group.state.plan.waiting, _FEW)

    def samples(self) -> Samples:
        """All columns together."""
        use = self.part.use
        others = [use.gradients(self.order, gradient.to(use.dtype)) for gradient in self.further]
        return together(self.first, others)


class Stream:
    """Receives output gradients during one backward pass and passes samples on as soon as a group is complete.

    Args:
        entries: index of a call → its parts, with the group that each belongs to and its place in it.
        orders: (index of a call, number of the part) → which example each row belongs to.
        mask: ``[N, P]`` output positions that count, or None.
        singles: parameter that the fallback treats → the group of its block, and its place in it.
        repeated: whether several backward passes follow each other, all of which have the same inputs.
        kept: receives what is passed on, for later passes.
        batch: its number, as batches were dealt to the ranks of a process group.

    Attributes:
        last: whether this is the last backward pass, so that inputs are released once their gradients have arrived.
    """

    last = False

    def __init__(
        self,
        entries: Mapping[int, list[tuple[Part, Group, int]]],
        orders: Mapping[tuple[int, int], RowOrder],
        mask: Tensor | None,
        singles: Mapping[str, tuple[Group, int]] | None = None,
        repeated: bool = False,
        kept: Kept | None = None,
        batch: int = 0,
    ) -> None:
        self._singles, self._kept, self._batch = dict(singles or {}), kept, batch
        self._entries, self._orders, self._mask = entries, orders, mask
        places = [(id(group), position) for placed in entries.values() for _, group, position in placed]
        self._expected = Counter([*places, *((id(group), position) for group, position in self._singles.values())])
        self._groups = {id(group): group for placed in entries.values() for _, group, _ in placed}
        self._groups |= {id(group): group for group, _ in self._singles.values()}
        self._arrived: dict[tuple[int, int], list[Samples]] = {}
        self._ready: dict[int, dict[int, Samples]] = {}
        self._counted: set[tuple[int, int]] = set()  # uses whose activations were counted, in any column
        self._repeated = repeated
        self._inputs: dict[tuple[int, int], Activations] = {}  # so that fits can tell that they are the same
        self._columns: dict[int, _Waiting] = {}  # index of a call → what waits of it

    def receive(self, call: Call, gradient: Tensor) -> None:
        """Convert the gradient of a call's output to samples."""
        entries = self._entries.get(call.index)
        if not entries:
            return
        waiting = self._columns.get(call.index)
        if waiting is not None:
            waiting.further.append(gradient)
            self._settle(call.index, waiting)
        else:
            self._convert(call, gradient, entries)
        if self.last:
            for part, _, _ in entries:
                part.use.forget()

    def receive_columns(self, gradients: Sequence[tuple[Call, Tensor]], number: int, *, retain: bool) -> None:
        """Receive the gradients ``[V, ...]`` of so many columns, made at once, as if one came after the other.

        Args:
            gradients: of calls' edges, the last call first.
            number: V.
            retain: whether the inputs are needed afterwards.
        """
        for column in range(number):
            end = column == number - 1
            self.last = end and not retain
            for call, arriving in gradients:
                self.receive(call, call.gradient(arriving[column]))
            self.flush(end)

    def _convert(self, call: Call, gradient: Tensor, entries: list[tuple[Part, Group, int]]) -> None:
        made: list[tuple[Part, RowOrder, Shared]] = []
        with full_precision(gradient.device.type):
            for number, (part, group, position) in enumerate(entries):
                began = time.perf_counter()
                order, own = self._orders[call.index, number], gradient.to(part.use.dtype)
                waits = group.state.plan.by_example or len(group.blocks) > 1
                shares = any(other is not part and part.use.same_gradients(other.use) for other, *_ in entries)
                shared = _found(part, order, made) if shares else None
                if shares and shared is None:
                    made.append((part, order, shared := Shared(part.use.gradients(order, own))))
                gradients = part.use.gradients(order, own) if shared is None else shared.gradients
                exists = part.use.mask(order)
                if exists is None and not part.use.summing:
                    exists = order.exists(gradients.shape[2])
                samples = Samples(
                    self._activations((call.index, number), part, order, own),
                    gradients,
                    (call.index, number) not in self._counted,
                    exists if exists is None else exists.to(own),
                    workspace=group.state.plan.workspace,
                    shared=None if waits else shared,  # which would keep the gradients for as long as samples wait
                    batch=self._batch,
                )
                self._counted.add((call.index, number))
                if self._mask is not None:
                    mask = self._mask.any(dim=1, keepdim=True) if order.padded else self._mask
                    samples = samples.apply_mask(mask)
                if self._repeated and self._awaits_columns((call.index, number), group, position, samples):
                    self._columns[call.index] = _Waiting(part, group, order, samples, [], gradient.nbytes)
                    self._settle(call.index, self._columns[call.index])
                elif waits:
                    self._arrive(group, position, samples)
                else:  # sums over rows: each use of a weight can be added by itself
                    if self._kept is not None:
                        self._kept.note(group, (samples,))
                    group.state = group.fit.update(group.state, (samples,))
                group.seconds += time.perf_counter() - began

    def _activations(self, place: tuple[int, int], part: Part, order: RowOrder, gradient: Tensor) -> Activations:
        """The inputs of a part, which are made once for all passes where they read no gradient."""
        found = self._inputs.get(place)
        if found is None:
            found = part.use.activations(order, gradient, part.weight, part.bias)
            if self._repeated and part.weight:
                self._inputs[place] = found
        return found

    def receive_single(self, outputs: Tensor, vector: Tensor, parameters: Mapping[str, Tensor]) -> None:
        """Back-propagate one example at a time, for parameters that the fallback treats."""
        leaves = {name: parameters[name] for name in self._singles}
        groups = [group for group, _ in self._singles.values()]
        # A group of several blocks needs all examples at once; others take as many as fit the workspace.
        whole = any(len(group.blocks) > 1 for group in groups)
        workspace = min(group.state.plan.workspace for group in groups)
        began = time.perf_counter()
        for rows in per_sample_gradients(outputs, vector, leaves, None if whole else workspace):
            with full_precision(outputs.device.type):
                for name, (group, position) in self._singles.items():
                    own, workspace = samples_of_gradients(rows[name]), group.state.plan.workspace
                    samples = replace(own, workspace=workspace, batch=self._batch)
                    if whole:
                        self._arrive(group, position, samples)
                    else:
                        self._pass_on(group, (samples,))
        for group in {id(group): group for group in groups}.values():
            group.seconds += (time.perf_counter() - began) / len(groups)

    def flush(self, end: bool) -> None:
        """Pass on samples that wait for uses whose gradient was zero and never arrived.

        Args:
            end: no further backward pass follows, so that columns wait no longer.
        """
        for index, waiting in list(self._columns.items()) if end else ():
            self._settle(index, waiting, end=True)
        for key, position in list(self._arrived):
            self._complete(self._groups[key], position)
        for key in list(self._ready):
            group, ready = self._groups[key], self._ready[key]
            some = next(iter(ready.values()))
            for position, block in enumerate(group.blocks):
                if position not in ready:
                    ready[position] = _zero_samples(block, some)
            self._update(group)

    def _arrive(self, group: Group, position: int, samples: Samples) -> None:
        uses = self._arrived.setdefault((id(group), position), [])
        uses.append(samples)
        if len(uses) == self._expected[id(group), position]:
            self._complete(group, position)

    def _complete(self, group: Group, position: int) -> None:
        ready = self._ready.setdefault(id(group), {})
        ready[position] = join(self._arrived.pop((id(group), position)))
        if len(ready) == len(group.blocks):
            self._update(group)

    def _update(self, group: Group) -> None:
        ready = self._ready.pop(id(group))
        samples = tuple(ready[position] for position in range(len(group.blocks)))
        self._pass_on(group, samples)

    def _pass_on(self, group: Group, samples: tuple[Samples, ...]) -> None:
        if self._kept is not None:
            self._kept.note(group, samples)
        group.state = group.fit.update(group.state, samples)

    def _awaits_columns(self, place: tuple[int, int], group: Group, position: int, samples: Samples) -> bool:
        """Whether samples may wait for further columns: their inputs are those of all columns, with one position."""
        groups, _, positions, _ = samples.gradients.shape
        if place not in self._inputs or samples.activations.onehot or groups * positions > 1:
            return False
        alone = len(group.blocks) == len(self._entries[place[0]]) == self._expected[id(group), position] == 1
        return alone and group.fit.takes_columns(group.blocks[0])

    def _settle(self, index: int, waiting: _Waiting, end: bool = False) -> None:
        """Pass on the columns of a call where no more may wait, or none will come."""
        if not (end or self.last or waiting.full):
            return
        began = time.perf_counter()
        with full_precision(waiting.first.gradients.device.type):
            self._pass_on(waiting.group, (waiting.samples(),))
        del self._columns[index]
        waiting.group.seconds += time.perf_counter() - began


def _found(part: Part, order: RowOrder, made: Iterable[tuple[Part, RowOrder, Shared]]) -> Shared | None:
    """The output gradients of a part, if an earlier one of the same call has the same."""
    for other, its, shared in made:
        if part.use.same_gradients(other.use) and order.places is its.places and order == its:
            return shared
    return None


def _zero_samples(block: Block, like: Samples) -> Samples:
    groups, outputs, inputs = block.shape
    zeros = like.gradients.new_zeros
    return Samples(Dense(zeros(groups, len(like), 1, inputs)), zeros(groups, len(like), 1, outputs), first=False)
