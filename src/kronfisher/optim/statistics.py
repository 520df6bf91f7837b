"""The second part of a step: statistics from some batches, as moving averages of the states of the fits."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.capture.capture import Capture, Receiver
from kronfisher.capture.observation import Observation
from kronfisher.distributed import Ranks, Spread, train_on_what_is_read
from kronfisher.errors import DataError, NumericalError, UnsupportedError, together
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.estimation.assignment import Known
from kronfisher.estimation.recipe import Labels, Recipe
from kronfisher.fisher.blocks import Block, Key, Window
from kronfisher.fisher.storage import block_of
from kronfisher.fisher.windows import swapped
from kronfisher.fits import Choice, Diagonal, asked_for, choose
from kronfisher.likelihoods import Likelihood
from kronfisher.linalg import full_precision, plain_arithmetic
from kronfisher.optim.batch_figures import BatchFigures
from kronfisher.optim.intervals import Refresh
from kronfisher.optim.kinds import Kinds
from kronfisher.optim.largest_factor import Largest, bounded, kept_as_diagonals, largest_factor
from kronfisher.optim.layer_statistics import LayerStatistics, periods
from kronfisher.optim.misfit import sum_of_misfits
from kronfisher.optim.moving_average import MovingAverage
from kronfisher.optim.shared_buffers import SharedBuffers
from kronfisher.optim.sharing import Sharing
from kronfisher.optim.watch import require_one_process

__all__ = ["Statistics"]


class Statistics:
    """Moving averages of the curvature of all layers.

    Args:
        model: unwrapped.
        parameters: name → parameter, all that may be trained.
        likelihood: what the outputs mean.
        fit: structure, as in `estimate`.
        refresh: periods.
        labels: as in `estimate`.
        samples: label draws per example.
        seed: of the draws; those of a step depend on the seed and the step alone.
        ranks: the processes that train together; None: there is one.
        alone: this process was said to train alone, by a group of it; else there must be no others.
        spread: the parameters, if `fully_shard` spread them over ranks.
        treats: whether the curvature of a block is wanted; statistics of the others are left out, even of all. None:
            it is wanted of every block, and of at least one.
        misfit: whether to measure how far predictions are from the data.
        partly: whether part of the rows of a batch does, where a layer has many.
        bounds: whether factors that would be too dear are kept as their diagonals, where a fit has no bound of its own.

    Attributes:
        layers: one for each group of blocks, in the order of the first batch.
        next_due: the step at which a batch is to bring statistics again.
        dropped: the number of batches that were left out, because their statistics were not finite or incomplete.
        figures: of the last batch that brought statistics.
        seconds: spent here; `seconds_in_backward` of them within backward passes of the caller's.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        likelihood: Likelihood,
        *,
        fit: Choice,
        refresh: Refresh,
        labels: Labels,
        samples: int,
        seed: int,
        ranks: Ranks | None = None,
        alone: bool = False,
        spread: Spread | None = None,
        treats: Callable[[Block], bool] | None = None,
        misfit: bool = False,
        partly: bool = False,
        bounds: bool = False,
    ) -> None:
        self.model, self.likelihood, self.refresh = model, likelihood, refresh
        self.labels: Labels = labels
        self.layers: list[LayerStatistics] = []
        self.next_due = self.dropped = 0
        self.seconds = self.seconds_in_backward = 0.0
        self.figures = BatchFigures()
        self._measures_misfit, self._partly = misfit, partly
        self._largest = None if bounds else Largest()  # factors; None: the first batch is going to tell
        self._fit, self._samples, self._seed, self._treats = fit, samples, seed, treats or (lambda block: True)
        self._needed = treats is None
        self.ranks, self._alone, self._spread = ranks, alone, spread
        self._sharing = None if ranks is None else Sharing(ranks, next(iter(parameters.values())).device)
        self._buffers = SharedBuffers()
        self._run: Accumulator | None = None
        self._tables: tuple[Any, set[str]] = (None, set())
        self._groups: int | None = None  # of the run, when the layers were chosen
        self._masked = False  # whether the batch that was accepted has positions that do not count
        self._missed = -1  # the last step of which some rank had no statistics when they met within it
        self._open = False  # whether this step's batch has brought statistics that are not merged yet
        self._kinds = Kinds()
        self._trained: frozenset[str] | None = None  # names of the parameters that were trained at the last step
        self.extend(parameters)
        self._accumulator()  # refuses bad settings now, not at the first batch

    def extend(self, parameters: dict[str, nn.Parameter]) -> None:
        """Treat these parameters from now on; statistics of the others are kept."""
        self.parameters = parameters
        self._chosen = choose(self._fit, parameters)  # one fit has one average, so that its blocks stay together
        largest = self._largest or Largest()
        averages = {id(fit): MovingAverage(bounded(fit, largest)) for fit in self._chosen.values()}
        self._fits = {name: averages[id(fit)] for name, fit in self._chosen.items()}
        self._spare = MovingAverage(Diagonal())
        self._trained = None

    def _accumulator(self) -> Accumulator:
        recipe = Recipe(self.model, self.likelihood, self.labels, self._samples, seed=self._seed, ranks=self.ranks)
        asked = asked_for(self._fit, self.parameters)
        return Accumulator(recipe, self._fits, self.parameters, training=True, fallback=self._spare, asked=asked)

    # Answers ---------------------------------------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        """Whether any forward pass was prepared for, or a state loaded."""
        return self._run is not None

    @property
    def ready(self) -> bool:
        """Whether there are statistics at all."""
        return any(layer.average is not None for layer in self.layers)

    @property
    def tables(self) -> set[str]:
        """Parameters whose rows are looked up."""
        if self._run is None:
            return set()
        known = self._run, len(self._run.groups)  # training asks at every step
        if known != self._tables[0]:
            blocks = (block for group in self._run.groups for block in group.blocks if block.onehot)
            self._tables = known, {name for block in blocks for name in block.parameters}
        return self._tables[1]

    @property
    def examined(self) -> bool:
        """Whether a batch has shown which layers there are."""
        return self._groups is not None

    @property
    def backward_passes(self) -> int:
        """How many backward passes were run for statistics."""
        return 0 if self._run is None else self._run.backward_passes

    @property
    def sent(self) -> int:
        """Bytes that all ranks gave to each other."""
        return 0 if self.ranks is None else self.ranks.sent

    @property
    def collectives(self) -> int:
        """How many calls that took."""
        return 0 if self.ranks is None else self.ranks.collectives

    @property
    def uncovered(self) -> dict[str, str]:
        """Parameter → why no block covers it."""
        return {} if self._run is None else dict(self._run.known.fallback)

    @property
    def coupled(self) -> list[str]:
        """Names of blocks whose rows mix examples."""
        return [] if self._run is None else sorted(self._run.known.mixed)

    @property
    def cuts(self) -> list[str]:
        """Where chains of layers are cut and why, for fits that treat neighbours together, and factors too dear."""
        blocks = [block for layer in self.layers for block in layer.blocks]
        if self._run is None:
            return []
        largest = self._largest or Largest()
        told = (kept_as_diagonals(block, self._chosen[block.parameters[0]], largest) for block in blocks)
        return [*self._run.notes(blocks), *chain.from_iterable(told)]

    # Forward ----------------------------------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether this step's batch is to bring statistics."""
        return step >= self.next_due

    def prepare(self, step: int) -> None:
        """Begin with empty states, at first and whenever other parameters are trained than before.

        Raises:
            UnsupportedError: parameters were converted or moved since the first step; or there are other processes.
            DataError: other ranks have no batch of a shard when this one has.
        """
        self._kinds.require(self.parameters)
        if self.ranks is None and not self._alone:
            require_one_process()
        if self._spread is not None:
            self._spread.follow()
        if self.ranks is not None:
            train_on_what_is_read(self.ranks)
            self._buffers.begin(self.model)
        trained = frozenset(name for name, p in self.parameters.items() if p.requires_grad)
        if trained != self._trained:
            self._run, self._trained, self.next_due = self._accumulator(), trained, step

    @contextmanager
    def captured(self) -> Iterator[Capture]:
        """Capture a forward pass of the caller's."""
        assert self._run is not None
        fixed = self.model.parameters() if self._spread is None else self._spread.parameters.values()
        constants = (*fixed, *self.model.buffers())
        with _eager(), Capture(self._run.parameters, constants, lenient=True) as capture:
            yield capture

    def held(self) -> AbstractContextManager[None]:
        """While statistics are read from a pass: several ranks come, and some may run no backward pass."""
        return nullcontext() if self._spread is None else self._spread.held()

    def watched(self) -> AbstractContextManager[None]:
        """While passes run in which ranks wait for each other: an error names those that have ended."""
        return nullcontext() if self.ranks is None else self.ranks.watched()

    @property
    def shared(self) -> bool:
        """Whether others wait for this rank's gradients."""
        return self.ranks is not None or self._spread is not None

    # Statistics of a batch --------------------------------------------------------------------------------------------

    def accepts(self, outputs: Tensor, targets: Any, step: int) -> bool:
        """Whether a batch is finite; that it fits is required. The one wait for a device before `absorb`.

        Raises:
            DataError: outputs or targets do not fit the likelihood.
        """
        assert self._run is not None
        try:
            self._masked = self._run.is_masked(outputs.detach(), targets, f"step {step}")
        except NumericalError:
            self.discard()
            return False
        return True

    def read(self, capture: Capture, outputs: Tensor, targets: Any, step: int) -> None:
        """Add the statistics of a pass whose graph the user goes backward through afterwards, if it is finite."""
        before = self.seconds_in_backward
        with suppress(NumericalError), self.held():  # the loss shows that, too
            if self.accepts(outputs, targets, step):
                self.absorb(capture, outputs, targets, step, retain=True)
            else:
                self.miss(step)
        self.seconds_in_backward = before  # the backward pass is the user's own, and nobody takes its time

    def needs_second_backward(self, step: int) -> bool:
        """Whether statistics of this step may need the graph once more, because a basis is renewed."""
        elsewhere = self.ranks is not None and self._renews  # a layer that is new on another rank renews its basis, too
        return not self.layers or elsewhere or any(layer.renews_basis(step) for layer in self.layers)

    def absorb(
        self,
        capture: Capture,
        outputs: Tensor,
        targets: Any,
        step: int,
        *,
        retain: bool,
        own: Callable[[Receiver, float | Tensor], None] | None = None,
        weight: float | Tensor | None = None,
    ) -> None:
        """Add the statistics of one batch that `accepts` took, or of one part of it; see `Accumulator.absorb`.

        `weight` tells how the loss that is differentiated compares with the likelihood's, if that is known. This step's
        statistics are left out if anything goes wrong.
        """
        began = time.perf_counter()
        self._bound(capture)
        run = self._run
        assert run is not None
        if not self._open:
            self._open = True
            self.figures.begin()
            run.start_pass((self._seed << 32) + step)
            for layer in self.layers:
                layer.begin()
        for layer in self.layers:
            layer.make_room()
        try:
            with full_precision(run.device.type):
                self._absorb(run, capture, outputs, targets, step, retain, own, weight)
        except BaseException:  # out of memory, an interruption, values that are not finite: half a batch is none
            self.discard()
            raise
        spent = time.perf_counter() - began
        self.seconds += spent
        self.seconds_in_backward += spent

    def _bound(self, capture: Capture) -> None:
        """See from the first batch which factors would be too dear."""
        if self._largest is None:
            self._largest, trained = largest_factor(capture), self._trained
            if self._largest != Largest():
                self.extend(self.parameters)
                self._run, self._trained = self._accumulator(), trained

    def _absorb(
        self,
        run: Accumulator,
        capture: Capture,
        outputs: Tensor,
        targets: Any,
        step: int,
        retain: bool,
        own: Any,
        weight: float | Tensor | None,
    ) -> None:
        observation = Observation.of(self.model, capture, outputs, targets, f"step {step}")
        chosen = [layer.group for layer in self.layers] if self.layers else list(run.groups)
        for layer in self.layers:
            layer.announce(len(observation) if self._partly else 0)
        before, complete = run.count, self._complete(run)
        if not complete:
            self._leave_others(run, room=True)
        try:
            with run.groups.only(chosen) if complete else nullcontext():
                run.absorb(observation, retain=retain or self.needs_second_backward(step), own=own, masked=self._masked)
        except NumericalError:
            self.miss(step)
            raise
        self._find_layers(run, step)
        if not complete:
            self._leave_others(run, room=False)
        self._find_ends(observation)
        measured = self._measures_misfit and self.likelihood.labelled(targets)
        counted = run.count - before
        share = None if weight is None else weight / (counted if isinstance(counted, Tensor) else max(counted, 1.0))
        misfits = sum_of_misfits(self.likelihood, outputs, targets, share) if measured else None
        self.figures.add(capture, counted, len(observation), misfits)
        if not self._meet_within(step, brought=True):
            return
        keep = self.refresh.average
        renewed = [layer for layer in self.layers if layer.renews_basis(step) and layer.renew_basis(keep)]
        if renewed:
            try:
                with run.groups.only(layer.group for layer in renewed):
                    run.absorb(observation, retain=retain, masked=self._masked)
            except NumericalError:
                self.miss(step)
                raise
            if self._meet_within(step, brought=True):
                for layer in renewed:
                    layer.merge_second_pass(step)

    def miss(self, step: int) -> None:
        """Tell other ranks, where they meet to renew bases, that this rank's batch has nothing for them."""
        self._meet_within(step, brought=False)

    def _meet_within(self, step: int, *, brought: bool) -> bool:
        """Put statistics from which bases are renewed, or that are measured in new ones, together with other ranks'.

        Returns:
            Whether the step's statistics stay: every rank has some.
        """
        if self._sharing is None or self._run is None or not self.is_due(step) or not self._renews:
            return brought
        sums = self._sharing.share(
            self._run,
            lambda: self._current_layers(step),
            step,
            brought=brought,
            numbers={},
            only=lambda layer: layer.renews_basis(step),
        )
        self._missed = step if sums is None else -1
        if sums is None and self._open:
            self.discard()
        return sums is not None

    @property
    def _renews(self) -> bool:
        """Whether any fit renews a basis within a step."""
        return any(average.fit.renews for average in self._fits.values())

    def _current_layers(self, step: int) -> list[LayerStatistics]:
        assert self._run is not None
        self._find_layers(self._run, step)
        return self.layers

    def _complete(self, run: Accumulator) -> bool:
        """Whether the layers that are wanted are known, and others need not be read."""
        return len(self.layers) < len(run.groups) == self._groups

    def _leave_others(self, run: Accumulator, *, room: bool) -> None:
        """Give groups that are not wanted room for a batch in which they have to be read, or take it away again."""
        wanted = {id(layer.group) for layer in self.layers}
        for group in run.groups:
            if self.layers and id(group) not in wanted:
                assert isinstance(group.fit, MovingAverage)
                group.state = (group.fit.fresh if room else group.fit.without_sums)(group.state)  # pyright: ignore[reportArgumentType]

    def _find_ends(self, observation: Observation) -> None:
        """See which layers read data directly, and which make the outputs."""
        from_data: dict[Key, bool] = {}
        last: set[Key] = set()
        for index, call in enumerate(observation.calls):
            for use in call.uses:
                for key in ((use.weight, use.bias), (use.weight, None)):
                    from_data[key] = from_data.get(key, True) and use.reads_data
                    if index in observation.graph.last:
                        last.add(key)
        for layer in self.layers:
            layer.reads_data = all(from_data.get(block.key, False) for block in layer.blocks)
            layer.makes_outputs = any(block.key in last for block in layer.blocks)

    def _find_layers(self, run: Accumulator, step: int) -> None:
        """One layer for every group; averages of the same blocks are kept, except in a basis of their own."""
        treated = [any(map(self._treats, group.blocks)) for group in run.groups]
        left = [b.weight for group, treats in zip(run.groups, treated, strict=True) if not treats for b in group.blocks]
        wanted = [
            group
            for group, treats in zip(run.groups, treated, strict=True)
            if treats and not any(_in_two_roles(b.weight, other) for b in group.blocks for other in left)
        ]
        self._groups = len(run.groups)
        same = len(self.layers) == len(wanted)
        if same and self.layers and all(x.group is y for x, y in zip(self.layers, wanted, strict=True)):
            return
        before = {layer.blocks: layer for layer in self.layers}
        self.layers = []
        for group in wanted:
            layer = before.get(group.blocks)
            if layer is None or (layer.group is not group and group.state.plan.passes > 1):
                layer = LayerStatistics(group, basis_due=step)
            layer.group = group
            self.layers.append(layer)
        if not self.layers and self._needed:
            reasons = "\n  ".join(self.uncovered.values())
            raise UnsupportedError(f"No block covers any of the parameters:\n  {reasons}\nUse a first-order optimiser.")

    def merge(self, step: int) -> None:
        """Take this step's statistics, of all ranks, into the averages; if any is not finite, all are left out.

        Running statistics, and other buffers that forward passes change, become those of all ranks, at every step.
        """
        if self.ranks is not None:
            self._buffers.share(self.model, self.ranks)
        if self._sharing is not None and self._run is not None and self.is_due(step):
            self._share(self._sharing, self._run, step)
        if not self._open:
            return
        assert self._run is not None
        self._open = False
        began = time.perf_counter()
        with plain_arithmetic(self._run.device):
            try:
                with together() as counts:
                    for layer in self.layers:
                        layer.group.state.check()
                        counts.append(layer.counts)
                filled = [layer for layer, some in zip(self.layers, counts, strict=True) if some]
                with together():
                    for layer in (waiting := [layer for layer in filled if layer.waits]):
                        layer.merge(self.refresh.average, step)
                for layer in filled:
                    if layer not in waiting:  # these cannot fail now
                        layer.merge(self.refresh.average, step)
            except NumericalError:
                self.discard()
            else:
                for layer in self.layers:
                    layer.before = None
                self.next_due = periods(self.refresh, self.layers).after(step, self.refresh.statistics)
        self.seconds += time.perf_counter() - began

    def _share(self, sharing: Sharing, run: Accumulator, step: int) -> None:
        """Put this step's statistics together with those of other ranks; if any rank has none, all leave them out."""
        sums = None
        if self._missed != step:
            numbers = self.figures.numbers()
            sums = sharing.share(run, lambda: self._current_layers(step), step, brought=self._open, numbers=numbers)
        self.figures.settle(sums)
        if sums is None and self._open:
            self.discard()

    def discard(self) -> None:
        """Leave this step's statistics out."""
        self._open = False
        self.dropped += 1
        known = {id(layer.group) for layer in self.layers}
        new = [LayerStatistics(group) for group in self._run.groups if id(group) not in known] if self._run else []
        for layer in (*self.layers, *new):
            layer.discard()
        for layer in new:
            layer.begin()

    def schedule_bases(self, due: Mapping[LayerStatistics, int]) -> None:
        """Renew the basis of each layer at the given step: with its next inverse."""
        for layer, step in due.items():
            layer.basis_due = step

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs, as tensors, numbers and strings."""
        return {
            "next_due": self.next_due,
            **self.figures.state_dict(),
            "dropped": self.dropped,
            "uncovered": dict(self.uncovered),
            "coupled": list(self.coupled),
            "apart": sorted(self._run.known.apart) if self._run else [],
            "dear": dict(self._run.known.dear) if self._run else {},
            "trained": sorted(self._trained or ()),
            "dtypes": self._kinds.state_dict(),
            "shapes": self._kinds.shapes(),
            "fits": self._described(),
            "largest": None if self._largest is None else self._largest.state_dict(),
            "layers": [layer.state_dict() for layer in self.layers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            DataError: it belongs to another model or to other fits.
        """
        if state["trained"]:  # otherwise there was no batch that could tell
            self._largest = Largest.of(state.get("largest"))
            self.extend(self.parameters)
        own, saved = self._described(), state["fits"]
        if differ := sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name)):
            raise DataError(
                f"the state was saved with other parameters or other fits; they differ at {', '.join(differ)}"
            )
        dtypes, shapes = (state.get(key, {}) for key in ("dtypes", "shapes"))  # earlier versions did not say
        self._kinds.load_state_dict(dtypes, self.parameters, shapes)
        self.next_due, self.dropped = state["next_due"], state["dropped"]
        self.figures.load_state_dict(state)
        self._open, self._groups = False, None
        if not state["trained"]:  # saved before the first forward pass: go on as before that
            self._run, self._trained, self.layers, self.next_due = None, None, [], 0
            return
        run = self._accumulator()
        written: dict[tuple[Block, ...], Any] = {
            tuple(block_of(block) for block in entry["blocks"]): entry for entry in state["layers"]
        }
        known = Known.restore(state["uncovered"], set(state["apart"]), set(state["coupled"]), written, state["dear"])
        run.resume(known, written)
        self._run, self._trained = run, frozenset(state["trained"])
        self.layers = [LayerStatistics(group) for group in run.groups]
        for layer, entry in zip(self.layers, written.values(), strict=True):
            layer.load_state_dict(entry, run.device)
        if not self.layers:  # which there are is found out again
            self.next_due = 0

    def _described(self) -> dict[str, str]:
        return {name: repr(average.fit) for name, average in self._fits.items()}


def _in_two_roles(weight: Window | None, other: Window | None) -> bool:
    return weight is not None and other is not None and swapped([weight, other])


@contextmanager
def _eager() -> Iterator[None]:
    """Without compiling: a compiled model shows none of its layers."""
    if "torch._dynamo" not in sys.modules:  # otherwise nothing can be compiled, and importing it takes seconds
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield
