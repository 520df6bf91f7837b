"""Reads the data as often as the fits need and streams the samples of every block into its fit's state."""

import logging
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.capture.batches import Batches, positions_of
from kronfisher.capture.capture import Receiver
from kronfisher.capture.forward import not_finite_error
from kronfisher.capture.inner_product import Seed
from kronfisher.capture.isolation import isolate
from kronfisher.capture.observation import Observation, observe
from kronfisher.capture.per_sample import FALLBACK
from kronfisher.capture.refusals import refuse, strict_error
from kronfisher.distributed import describe
from kronfisher.errors import DataError, NumericalError, RankError, UnsupportedError, together
from kronfisher.estimation.assignment import Assignment, Known, Refusals, assign
from kronfisher.estimation.groups import Fits, Group, Groups, plan_groups, rows_of_example
from kronfisher.estimation.kept import Kept
from kronfisher.estimation.meeting import LateKnowledge, Meeting, Said, facts_of
from kronfisher.estimation.progress import Progress, writer
from kronfisher.estimation.recipe import Recipe
from kronfisher.estimation.repeated import Repeated
from kronfisher.estimation.routing import Stream
from kronfisher.estimation.targets import name_targets
from kronfisher.fisher.blocks import Block
from kronfisher.fisher.parameters import trainable
from kronfisher.fits import Choice, Diagonal, Fit, asked_for, choose
from kronfisher.likelihoods import Draws, Likelihood, Residuals, along_outputs, masked_positions
from kronfisher.linalg import plain_arithmetic

__all__ = ["Accumulator"]

log = logging.getLogger("kronfisher")

_FEW = 2**16  # numbers in the vectors of a batch that are back-propagated at once, where that can be


class LateError(UnsupportedError):
    """A batch shows that earlier ones should have been treated in another way."""

    def __init__(self, message: str, known: Known, again: bool = True) -> None:
        super().__init__(message)
        self.known, self.again = known, again


class Accumulator:
    """Everything between batches and the states of the fits.

    Args:
        recipe: the settings of the estimate.
        fit: one fit for all parameters, or parameter-name patterns → fit.
        parameters: name → trainable parameter; None: all of the model.
        training: avoid expensive passes: parameters that only the fallback can treat are left out, and rows that mix
            examples (normalisation over the batch) are used regardless if a fit treats rows independently.
        score: whether to sum the log likelihood of the observed targets.
        fallback: for parameters that can have a diagonal only; None: `Diagonal`.
        asked: parameters whose fit is kept at any price; None: those with a pattern of their own in `fit`.

    Attributes:
        known: the assignment of earlier batches; later ones have to agree with it.
        groups: of blocks, with their states; filled by the first batch.
        count: N so far.
        backward_passes: how many were run.
        batches: in a pass over the data, as far as that is known.
        tell: receives a line before anything that takes long.
        log_likelihood: its sum so far; None if there were no targets, or a mask unknown to the likelihood.
        outputs: the number of output elements that it covers.
        targets: what was taken for the targets of the first batch that had any, in words.
    """

    def __init__(
        self,
        recipe: Recipe,
        fit: Choice,
        parameters: dict[str, nn.Parameter] | None = None,
        *,
        training: bool = False,
        score: bool = False,
        fallback: Fit | None = None,
        asked: AbstractSet[str] | None = None,
    ) -> None:
        self.recipe, self.model, self.score = recipe, recipe.model, score
        self.parameters = trainable(recipe.model) if parameters is None else parameters
        self.device = next(iter(self.parameters.values())).device
        chosen = choose(fit, self.parameters)
        asked = asked_for(fit, self.parameters) if asked is None else asked
        by_rows = isinstance(recipe.likelihood, Residuals)
        self.fits = Fits(chosen, self.parameters, training, fallback or Diagonal(), asked, by_rows=by_rows)
        self.known = Known()
        self.groups = Groups(self.device, recipe.memory_budget)
        self.backward_passes, self.batches = 0, 1
        self.targets = ""
        self.meeting = None if recipe.ranks is None else Meeting(recipe.ranks, self.device)
        self.tell: Callable[[str], None] = log.debug
        self._kept: Kept | None = None
        self._repeated: Repeated | None = None
        self.start_pass()

    def start_pass(self, seed: int | None = None) -> None:
        """Begin to read the data (again): the label draws start over, so that every pass draws the same labels.

        Args:
            seed: of the draws; None: the recipe's.
        """
        seed = self.recipe.seed if seed is None else seed
        first = self.recipe.samples * (self.recipe.ranks.rank if self.recipe.ranks else 0)  # ranks draw apart
        self._draws = [Draws(seed, first + stream) for stream in range(self.recipe.samples)]
        self.count: float | Tensor = 0.0
        self.log_likelihood: Tensor | None = None
        self.outputs = self._dealt = 0

    def resume(self, known: Known, groups: Iterable[tuple[Block, ...]]) -> None:
        """Continue from the knowledge of an earlier run, with empty states for its groups, in their order."""
        self.known, self.fits = known, replace(self.fits, dear=known.dear.keys())
        order = {blocks: place for place, blocks in enumerate(groups)}
        planned = plan_groups([block for blocks in order for block in blocks], self.fits, (), known.neighbours.after)
        assert not isinstance(planned, str), planned
        self.groups.add(sorted(planned, key=lambda entry: order[entry.blocks]))
        self.known = replace(known, groups=tuple(self.groups))

    def begin_again(self, known: Known) -> None:
        """Forget what was read, but for the knowledge of how it is to be treated."""
        self.known, self.groups = known, Groups(self.device, self.recipe.memory_budget)

    def next_pass(self) -> bool:
        """Ask every fit whether it needs the data once more; True if one does."""
        reading = [group for group in self.groups if not group.done]
        for group, again in zip(reading, self.of(reading, lambda group: group.fit.next_pass(group.state)), strict=True):
            group.done = again is None
            if again is not None:
                group.state = again if again.blocks is group.blocks else replace(again, blocks=group.blocks)
        return not all(group.done for group in self.groups)

    def of(self, groups: Iterable[Group], function: Callable[[Group], Any]) -> Iterable[Any]:
        """The function of each group, whose state holds the sums of all ranks; at a group's owner, then known to all.

        Raises:
            RankError: it failed on another rank.
        """
        return map(function, groups) if self.meeting is None else self.meeting.at_owners(groups, function)

    @property
    def passes(self) -> int:
        """The maximum number of passes over the data."""
        return max((group.state.plan.passes for group in self.groups), default=1)

    def notes(self, blocks: Iterable[Block]) -> list[str]:
        """Notes for a report on these blocks: where a chain of layers is cut before one, and what was too dear."""
        blocks = list(blocks)
        dear = [self.known.dear[name] for b in blocks for name in b.parameters[:1] if name in self.known.dear]
        return [*self.known.neighbours.notes(blocks, self.fits), *dict.fromkeys(dear)]

    # Data -------------------------------------------------------------------------------------------------------------

    def read(self, data: Any, progress: Progress = False, *, anew: bool = False) -> None:
        """Read the data as often as the fits need and fill their states.

        Args:
            data: as for `estimate`.
            progress: as for `estimate`.
            anew: begin again, with what it showed, where a batch shows that earlier ones should have been treated in
                another way, so that the order of batches does not matter; for fits that keep nothing outside states.

        Raises:
            DataError: there are no data, they cannot be read again, or they came in another order.
        """
        tell = self.tell = writer(progress)
        begun = self.known
        try:
            while True:
                batches = Batches(data)
                self.batches = batches.number
                try:
                    return self._read(batches, tell)
                except LateError as late:
                    if not (anew and batches.again and late.again) or late.known == begun:
                        raise
                    begun = late.known
                    self.begin_again(late.known)
        finally:
            tell("")

    def _read(self, batches: Batches, tell: Callable[[str], None]) -> None:
        number = 0
        try:
            while True:
                self.start_pass()
                if self.meeting is None:
                    self._read_pass(batches, number, tell)
                else:
                    problem = None
                    try:
                        self._read_pass(batches, number, tell)
                    except RankError:  # ranks have met while they read, and all know
                        raise
                    except Exception as error:
                        problem = error
                    self._meet(self.meeting, batches, number, problem)
                if not float(self.count):
                    raise DataError("No example counts: all positions are masked, or their targets are ignored.")
                with plain_arithmetic(self.device):
                    more = self.next_pass()
                if not more:
                    break
                number += 1
        except BaseException as error:
            if not isinstance(error, Exception):  # interrupted from outside
                error.add_note(
                    f"kronfisher stopped after {batches.index} batches of pass {number + 1}; no estimate was made. The "
                    "model, its gradients and buffers and the random state are as before. Estimate on fewer "
                    "examples, or with a cheaper fit."
                )
            raise

    def _read_pass(self, batches: Batches, number: int, tell: Callable[[str], None]) -> None:
        if not number:
            self._kept = Kept(self.batches) if self.recipe.memory_budget is None else None
        elif self._kept is not None and self._kept.whole:
            return self._pass_on_again(self._kept, batches, number, tell)
        with isolate(self.model, self.recipe.seed):
            for where, batch in batches.read(number):
                state = None if self._kept is None else torch.get_rng_state()
                observation = observe(self.model, self.parameters, batch, self.recipe.run, where)
                if self._kept is not None and state is not None:
                    same = torch.equal(state, torch.get_rng_state()) and not batches.modified(observation.batch)
                    self._kept.begin(same)
                self._absorb(observation)
                if self.passes > 1:
                    batches.recognise(observation.batch)
                else:  # nothing is read again
                    self._kept = None
                del observation  # or its tensors would stay alive during the next forward pass
                tell(
                    f"pass {number + 1}/{self.passes}, {batches.index} batches, {self.backward_passes} backward passes"
                )
        batches.require_same_number(some=self.meeting is None)
        if self._kept is not None:
            self._kept.score = self.log_likelihood, self.outputs

    def _pass_on_again(self, kept: Kept, batches: Batches, number: int, tell: Callable[[str], None]) -> None:
        """A later pass without the model: its batches are those of the first pass, and bring the same."""
        with isolate(self.model, self.recipe.seed):  # loaders may draw from the global generators
            for _, batch in batches.read(number):
                batches.recognise(batch)
        batches.require_same_number(some=self.meeting is None)
        with plain_arithmetic(self.device):
            for size in kept.pass_on():
                self._count(size)
        self.log_likelihood, self.outputs = kept.score
        tell(f"pass {number + 1}/{self.passes}, {batches.index} batches, {self.backward_passes} backward passes")

    def _meet(self, meeting: Meeting, batches: Batches, number: int, problem: Exception | None) -> None:
        """Put what this rank has read in a pass together with what the others have.

        Raises:
            RankError: a rank failed, or ranks disagree.
            DataError: no rank has read a batch; on all of them.
        """
        late = problem if isinstance(problem, LateError) else None
        said = Said(
            facts={} if number else facts_of(self.recipe, self.parameters),
            error="" if late else describe(problem),
            again=batches.again,
            late=late and late.known,
            known=self.known,
            count=float(self.count),
            score=None if self.log_likelihood is None else float(self.log_likelihood),
            outputs=self.outputs,
            batches=batches.index,
            targets=self.targets,
            order=batches.order,
        )
        try:
            everywhere, parcels = meeting.agree(said, self.groups)
        except LateKnowledge as error:
            raise LateError(str(error), error.known, error.again) from problem
        except RankError:
            if problem is None or late:
                raise
            raise problem from None
        if not any(other.batches for other in everywhere):
            raise DataError(
                f"The data contain no batch on any of the {len(everywhere)} ranks. Pass loaders of which at least one "
                "has a batch; a generator can be read only once."
            )
        self.known = meeting.complete(everywhere, self.fits, self.groups, self.count)
        meeting.merge(everywhere, parcels, self.groups)
        self.count, self.outputs = sum(other.count for other in everywhere), sum(other.outputs for other in everywhere)
        scores = [other.score for other in everywhere if other.score is not None]
        self.log_likelihood = torch.tensor(sum(scores), dtype=torch.float64) if scores else None
        self.targets = next((other.targets for other in everywhere if other.targets), "")

    def add(self, batch: Any, where: str) -> None:
        """Run one batch forward and backward and update every state.

        Raises:
            UnsupportedError: a trainable parameter is used in a way that is not understood.
            DataError: the batch does not fit the model or the likelihood.
            NumericalError: the batch or the outputs hold NaN or Inf.
            MemoryBudgetError: the states do not fit the budget.
        """
        self._absorb(observe(self.model, self.parameters, batch, self.recipe.run, where))

    def _absorb(self, observation: Observation) -> None:
        """`absorb`, with an error that says whether values that are not finite come from the batch."""
        try:
            self.absorb(observation)
        except NumericalError as error:
            if bool(torch.isfinite(observation.outputs).all()):  # a gradient was not; the error names the block
                raise
            raise not_finite_error(observation.batch, observation.where) from error

    def absorb(
        self,
        observation: Observation,
        *,
        retain: bool = False,
        own: Callable[[Receiver, float | Tensor], None] | None = None,
        masked: bool | None = None,
    ) -> None:
        """Back-propagate through an observed forward pass and update every state.

        Args:
            observation: of the forward pass.
            retain: whether the caller goes backward through the same graph afterwards.
            own: replaces our backward passes: ``own(receive, count)`` runs the caller's and passes on every gradient of
                a call's output, scaled as that of each example's own loss.
            masked: what `is_masked` said of the batch, if the caller asked.
        """
        outputs, targets, where = observation.outputs, observation.targets, observation.where
        values, likelihood = outputs.detach(), self.recipe.likelihood
        masked = self.is_masked(values, targets, where) if masked is None else masked
        likelihood = likelihood if masked else likelihood.where_all_count()
        mask, kept = likelihood.positions(values, targets) if masked else None, None
        if self.recipe.mask is not None:
            mask, kept = self._masks(observation, values, mask)
            mask = None if mask is not None and bool(mask.all()) else mask
        scored = self.score and self.recipe.mask is None and likelihood.labelled(targets)
        score = likelihood.log_likelihood(values, targets) if scored else None
        steps = self._steps(values, targets, where)
        assignment = self.assign(observation, masked=mask is not None)
        if self.recipe.strict and assignment.known.fallback:
            raise strict_error(assignment.known.fallback, where)
        self._take_on(observation, assignment, masked=mask is not None)
        entries, singles = self.groups.open(assignment.parts, assignment.singles)
        if singles:
            self.tell(f"{where}: {len(outputs) * steps} backward passes for {', '.join(singles)} ({FALLBACK})")
        later = self._kept if self.passes > 1 else None  # else all groups of this batch read the data once
        repeated, ranks = own is None and steps > 1, self.recipe.ranks
        batch = 0 if ranks is None else ranks.rank + ranks.size * self._dealt  # as `shard` deals them
        self._dealt += 1
        stream = Stream(entries, assignment.orders, mask, singles, repeated, later, batch)
        size = likelihood.count(outputs) if mask is None else mask.any(dim=1).sum().to(torch.float64)
        if own is not None:
            own(stream.receive, size)
            stream.flush(end=True)
        vectors, left = () if own else self._vectors(likelihood, values, targets), steps
        unordered = all(group.fit.takes_columns(block) for group in self.groups for block in group.blocks)
        if repeated and unordered and not singles and kept is None and steps * outputs.numel() <= _FEW:
            vectors = list(vectors)
            if (found := observation.gradients_of_calls(torch.stack(vectors))) is not None:
                stream.receive_columns(found, steps, retain=retain)
                self.backward_passes, vectors = self.backward_passes + steps, ()
        for vector in vectors:  # enumerate would hold on to the vectors
            vector, left = vector if kept is None else vector * kept, left - 1  # masked positions have no loss
            again = retain or left > 0 or bool(singles)
            stream.last = not again
            seed = Seed.of(outputs, vector)
            vector = vector if singles else None  # free it during the pass
            observation.backward(seed, stream.receive, retain=again)
            self.backward_passes += 1
            if vector is not None:
                stream.receive_single(outputs, vector, self.parameters)
                self.backward_passes += len(outputs)
            stream.flush(end=not left)
        if self._kept is not None:
            self._kept.end(size)
        self._count(size)
        if self.score and not self.targets:
            self.targets = name_targets(observation, likelihood, needed=self.recipe.labels == "observed")
        if score is not None:
            self.log_likelihood = score if self.log_likelihood is None else self.log_likelihood + score
            self.outputs += values.numel()

    def _count(self, size: float | Tensor) -> None:
        """Count examples, in every state that reads data."""
        self.count = self.count + size
        for group in self.groups:
            if not group.done:
                group.state.count = group.state.count + size

    def is_masked(self, outputs: Tensor, targets: Any, where: str) -> bool:
        """Whether the likelihood leaves positions out, once the batch is known to fit: the host waits once for both.

        Raises:
            DataError: outputs or targets do not fit the likelihood.
            NumericalError: outputs are not finite.
        """
        likelihood = self.recipe.likelihood
        with together() as partly:
            likelihood.check(outputs, targets, where, self.recipe.labels)
            if (mask := likelihood.positions(outputs, targets)) is not None:
                partly.append(~mask.all())
        return any(partly)

    def assign(self, observation: Observation, *, masked: bool = False) -> Assignment:
        """Assign the batch to fits, given the assignment of earlier batches.

        Raises:
            UnsupportedError: examples are coupled, or earlier batches were treated in another way.
        """
        before = self._repeated
        if before is not None and (same := before.again(observation, self.fits, self.known, masked=masked)):
            return same
        answer = assign(observation, self.fits, self.known, masked=masked, batches=self.batches)
        if isinstance(answer, Refusals):
            try:
                refuse(answer.problems, observation.where)
            except UnsupportedError as error:
                raise error if answer.anew is None else LateError(str(error), answer.anew) from None
        assert isinstance(answer, Assignment)
        return answer

    def _take_on(self, observation: Observation, assignment: Assignment, *, masked: bool) -> None:
        """Remember the assignment of the batch, and create states for new groups."""
        if assignment.known is self.known:  # as the batch before
            return
        if assignment.new:
            self.groups.add(assignment.new, rows_of_example(observation, assignment.parts), self.count)
        self.known = replace(assignment.known, groups=tuple(self.groups))
        self._repeated = Repeated.of(assignment, self.known, observation, self.fits, masked=masked)

    def _masks(
        self, observation: Observation, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Positions ``[N, P]`` that count by likelihood and recipe, and the recipe's mask shaped as the outputs."""
        assert self.recipe.mask is not None
        joint_dim, where = self.recipe.likelihood.joint_dim(values, observation.targets), observation.where
        given = positions_of(observation.batch, self.recipe.mask, values, where)
        kept = along_outputs(given, values, joint_dim, where)
        return masked_positions(given, mask, where), kept

    def _steps(self, outputs: Tensor, targets: Any, where: str) -> int:
        """The number of backward passes that the batch takes."""
        recipe = self.recipe
        if recipe.labels != "exact":
            return recipe.samples if recipe.labels == "sampled" else 1
        columns = recipe.likelihood.columns(outputs, targets)
        announcement = f"{where}: exact labels take {columns} backward passes"
        log.info(announcement)
        self.tell(announcement)
        if columns > recipe.exact_limit:
            raise DataError(
                f"{where}: exact labels take {columns} backward passes for each batch, and the limit is "
                f"{recipe.exact_limit}. Use labels='sampled' with samples=M, or raise exact_limit."
            )
        return columns

    def _vectors(self, likelihood: Likelihood, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
        if self.recipe.labels == "exact":
            yield from likelihood.exact(outputs, targets)
        elif self.recipe.labels == "sampled":
            for draws in self._draws:
                if len(self._draws) == 1:  # without a copy, which may be as large as anything
                    yield likelihood.sampled(outputs, targets, draws)
                else:
                    yield likelihood.sampled(outputs, targets, draws) / len(self._draws) ** 0.5
        else:
            yield likelihood.observed(outputs, targets)
