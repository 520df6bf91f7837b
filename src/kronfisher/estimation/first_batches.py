"""What the first batch of data shows of a model's parameters, of every rank where there are several."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kronfisher.capture.batches import Batches
from kronfisher.capture.observation import Observation, observe
from kronfisher.distributed import describe
from kronfisher.errors import DataError, RankError
from kronfisher.estimation.accumulator import Accumulator, LateError
from kronfisher.estimation.assignment import Assignment, Known
from kronfisher.estimation.meeting import Entry, LateKnowledge, Meeting, Said, facts_of, union

__all__ = ["Seen", "examine"]


@dataclass(frozen=True)
class Seen:
    """What a batch showed.

    Attributes:
        reached: parameters that the outputs depend on.
        looked_up: those whose rows are looked up.
        operators: parameter → those that use it.
        beside: parameter → operators of its uses, also where they are not understood.
        notes: where chains are cut.
    """

    reached: frozenset[str] = frozenset()
    looked_up: frozenset[str] = frozenset()
    operators: dict[str, set[str]] = field(default_factory=dict)
    beside: dict[str, set[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, run: Accumulator, observation: Observation, assignment: Assignment) -> "Seen":
        """What the assignment of a forward pass says."""
        graph, known = observation.graph, assignment.known
        blocks = {part.block.key: part.block for parts in assignment.parts.values() for part in parts}
        operators = {name: set(graph.unclaimed.get(name, ())) for name in run.parameters}
        beside: dict[str, set[str]] = {name: set() for name in run.parameters}
        for block in blocks.values():
            for name in block.parameters:
                operators[name].add(block.operator)
        for call in observation.calls:
            for use in call.uses:
                beside.setdefault(use.name, set()).add(call.operator)
        looked_up = frozenset(name for block in blocks.values() if block.onehot for name in block.parameters)
        notes = tuple(known.neighbours.notes(blocks.values(), run.fits))
        return cls(frozenset(graph.reached), looked_up, operators, beside, notes)


def examine(run: Accumulator, batches: Batches) -> tuple[Sequence[Seen], Known]:
    """What the first batch shows, of every rank where there are several, and how parameters are treated then."""
    if run.meeting is None:
        observation = _first(run, batches)
        if observation is None:
            raise DataError("The data contain no batch, so there is nothing to run the model on.")
        assignment = run.assign(observation)
        return [Seen.of(run, observation, assignment)], assignment.known
    observation, problem = None, None
    try:
        observation = _first(run, batches)
    except RankError:  # ranks have met while they read, and all know
        raise
    except Exception as error:
        problem = error
    while True:
        begun = run.known
        try:
            return _agreed(run, run.meeting, observation, problem)
        except LateKnowledge as late:
            if late.known == begun:
                raise RankError(str(late)) from None
            run.known = late.known


def _first(run: Accumulator, batches: Batches) -> Observation | None:
    _, batch = next(batches.read(0), ("", None))
    return None if batch is None else observe(run.model, run.parameters, batch, run.recipe.forward, "the batch")


def _agreed(
    run: Accumulator, meeting: Meeting, observation: Observation | None, problem: Exception | None
) -> tuple[Sequence[Seen], Known]:
    """What the batches of all ranks show.

    Raises:
        RankError: it failed on another rank, or ranks differ.
        LateKnowledge: ranks treat parameters in different ways; on all of them.
    """
    late, assignment = None, None
    if observation is not None and problem is None:
        try:
            assignment = run.assign(observation)
        except LateError as error:
            late = error.known
        except Exception as error:
            problem = error
    new = () if assignment is None else assignment.new
    entries = tuple(Entry(planned.blocks, {"fit": repr(planned.fit)}) for planned in new)
    known, read = run.known if assignment is None else assignment.known, int(observation is not None)
    facts = facts_of(run.recipe, run.parameters)
    said = Said(facts, describe(problem), late=late, known=known, batches=read, entries=entries)
    try:
        everywhere = meeting.compare(said, "lists how parameters are treated")
    except RankError:
        if problem is None:
            raise
        raise problem from None
    if not any(other.batches for other in everywhere):
        raise DataError("The data contain no batch on any rank, so there is nothing to run the model on.")
    own = Seen() if observation is None or assignment is None else Seen.of(run, observation, assignment)
    return meeting.ranks.gather(own, "lists how parameters are treated"), union([other.known for other in everywhere])
