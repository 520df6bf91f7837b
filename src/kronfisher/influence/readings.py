"""Readings of data under capture: answers about the gradient of every example's own loss or measurement."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.capture.batches import Batches, Mask
from kronfisher.capture.forward import Forward
from kronfisher.capture.isolation import isolate
from kronfisher.capture.observation import observe
from kronfisher.errors import DataError, NumericalError
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.estimation.progress import Progress, writer
from kronfisher.estimation.recipe import Recipe
from kronfisher.fisher.blocks import Block, Key
from kronfisher.fisher.layout import Blocks
from kronfisher.fits import State
from kronfisher.fits.visitor import Visitor
from kronfisher.layers.samples import Samples
from kronfisher.likelihoods import Likelihood

__all__ = ["Answers", "Network", "Question", "Reading", "endless", "read", "require_finite"]

Question = Callable[[Blocks, tuple[Samples, ...]], Tensor]
"""Blocks treated together and their samples → ``[n, ...]``, one answer an example."""


@dataclass(frozen=True)
class Network:
    """A network, and how batches go through it.

    Attributes:
        model: unwrapped.
        names: of the parameters that count.
        forward: as for `kronfisher.estimate`.
        mask: as for `kronfisher.estimate`.
        seed: of whatever the model draws.
    """

    model: nn.Module
    names: tuple[str, ...]
    forward: Forward | None = None
    mask: Mask | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Answers(Visitor):
    """Puts questions to the samples of every group of blocks and keeps the answers of one batch.

    Attributes:
        questions: name → question.
        together: puts blocks into groups.
        apart: whether blocks that sum their positions out keep them.
        kept: (name, blocks) → answers that came so far; per-example gradients come a few at a time.
    """

    questions: Mapping[str, Question]
    together: Callable[[Sequence[Block]], list[Blocks]] | None = None
    apart: bool = False
    kept: dict[tuple[str, Blocks], list[Tensor]] = field(default_factory=dict)

    exact = True  # for any source of gradients, per-example ones included
    additive = True

    @property
    def positions_apart(self) -> bool:
        return self.apart

    def groups(self, blocks: Sequence[Block], after: Mapping[Key, Key]) -> list[Blocks]:
        """One block at a time, unless the questions ask for more."""
        return super().groups(blocks, after) if self.together is None else self.together(blocks)

    def update(self, state: State, samples: tuple[Samples, ...]) -> State:
        """Put every question."""
        for name, question in self.questions.items():
            self.kept.setdefault((name, state.blocks), []).append(question(state.blocks, samples))
        return state

    def take(self, name: str) -> dict[Blocks, Tensor]:
        """The answers to one question, ``[n, ...]`` for every group of blocks, which are then forgotten."""
        found = {blocks: self.kept.pop((asked, blocks)) for asked, blocks in list(self.kept) if asked == name}
        return {blocks: parts[0] if len(parts) == 1 else torch.cat(parts) for blocks, parts in found.items()}


@dataclass(frozen=True)
class Reading:
    """One batch that was read.

    Attributes:
        where: its name in messages.
        size: n, its examples.
        batch: as the loader returned it.
        answers: question → blocks → ``[n, ...]``.
        fallback: parameter → why only per-example gradients cover it.
    """

    where: str
    size: int
    batch: Any
    answers: Mapping[str, Mapping[Blocks, Tensor]]
    fallback: Mapping[str, str]


def read(
    network: Network,
    likelihood: Likelihood,
    data: Any,
    questions: Mapping[str, Question],
    together: Callable[[Sequence[Block]], list[Blocks]] | None = None,
    *,
    what: str = "batch",
    number: int = 0,
    again: bool = False,
    progress: Progress = False,
    skip: Callable[[int, Any], bool] | None = None,
    positions_apart: bool = False,
    meet: Callable[[Any], None] | None = None,
    at_most: float = inf,
) -> Iterator[Reading]:
    """Read data once, batch by batch, with questions about the gradient of ``-log p(targets)`` of every example.

    Args:
        network: the model, and how batches go through it.
        likelihood: whose observed vectors are sent backwards.
        data: as for `kronfisher.estimate`, or `Batches` of which this is not the first reading.
        questions: name → question.
        together: puts blocks into groups; None: every block alone.
        what: a batch is called in messages.
        number: of the reading, from zero; later ones must read the same batches.
        again: whether there may be later ones.
        progress: as for `kronfisher.estimate`.
        skip: number and batch → whether it is passed over.
        positions_apart: whether scales, shifts and tables keep the positions that they sum out else.
        meet: is told every batch, and None at the end, for ranks that have to read the same.
        at_most: examples that are read of a loader without a length: one that never ends gives more.

    Raises:
        DataError: there are no data, or they do not fit, or may never end.
        UnsupportedError: examples are coupled.
        NumericalError: outputs are not finite.
    """
    parameters = {name: p for name, p in network.model.named_parameters() if name in network.names}
    if frozen := [name for name, p in parameters.items() if not p.requires_grad]:
        raise DataError(f"{', '.join(frozen)}: frozen now, but part of the Fisher; call requires_grad_(True) on them.")
    visitor = Answers(questions, together, positions_apart)
    recipe = Recipe(
        network.model,
        likelihood,
        "observed",
        forward=network.forward,
        mask=network.mask,
        exact_limit=sys.maxsize,
        seed=network.seed,
    )
    run = Accumulator(recipe, visitor, parameters)
    batches, tell = data if isinstance(data, Batches) else Batches(data), writer(progress)
    run.tell = tell
    try:
        for where, batch in batches.read(number):
            where = where.replace("batch", what, 1)
            if number or again:
                batches.recognise(batch)
            if skip is not None and skip(batches.index - 1, batch):
                continue
            if meet is not None:
                meet(batch)
            with isolate(network.model, network.seed + batches.index):
                observation = observe(network.model, parameters, batch, network.forward, where)
                run.absorb(observation)
                size = len(observation)
                del observation
            if not batches.ends and float(run.count) > at_most:
                raise endless(where, at_most)
            answers = {name: visitor.take(name) for name in questions}
            tell(f"{batches.index} batches")
            yield Reading(where, size, batch, answers, run.known.fallback)
        if meet is not None:
            meet(None)
    finally:
        tell("")
    batches.require_same_number()


def endless(where: str, count: float, what: str = "training data") -> DataError:
    """Of data that go on after as many examples as the Fisher has, and do not say how long."""
    return DataError(
        f"{where}: the {what} have given more than the {count:,.0f} examples of the Fisher, and may never end, "
        "because their loader has no length. Pass a list, or a loader whose data set has one (__len__)."
    )


def require_finite(values: Tensor, where: str) -> Tensor:
    """The same values; NumericalError if one is NaN or Inf."""
    if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
        raise NumericalError(f"{where}: a gradient holds NaN or Inf; drop the example, or look at the weights.")
    return values
