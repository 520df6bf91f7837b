"""Batches in, states out: runs a model under capture and streams samples of every block into its fit."""

import logging
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kronfisher.batches import Forward, not_finite, run
from kronfisher.blocks import Block, View
from kronfisher.capture import Capture, Proof
from kronfisher.claims import covered, misused, refuse
from kronfisher.errors import DataError, MemoryBudgetError, NumericalError, UnsupportedError
from kronfisher.fits import Choice, Fit, Plan, choose
from kronfisher.likelihoods import Draws, Likelihood
from kronfisher.linalg import promote
from kronfisher.operators.memory import available_memory
from kronfisher.samples import WORKSPACE
from kronfisher.stream import Group, Part, Stream
from kronfisher.uses import Ownership, Use
from kronfisher.uses.ownership import coupled, scattered

__all__ = ["Accumulator", "Labels"]

Labels = Literal["exact", "sampled", "observed"]
Key = tuple[View | None, View | None]
# Model → graph → (call, block, sorted by sample) → rule. A model that is gone takes its rules with it.
_RULES: WeakKeyDictionary[nn.Module, dict[int, dict[tuple, Ownership]]] = WeakKeyDictionary()
log = logging.getLogger("kronfisher")


@dataclass(frozen=True)
class Planned:
    """A group that a fit is going to treat."""

    fit: Fit
    blocks: tuple[Block, ...]
    plan: Plan
    like: Tensor


@dataclass
class Accumulator:
    """Everything between a batch and the states of the fits.

    Attributes:
        model: unwrapped.
        parameters: name → trainable parameter.
        likelihood: which vectors are back-propagated.
        fit: one fit for all, or parameter-name patterns → fit.
        labels: exact columns of the output Hessian's root, labels drawn from the model, or the observed ones.
        samples: label draws per datum.
        seed: of the label draws.
        forward: how a batch goes through the model, if not as `batches.run` does it.
        memory_budget: bytes for states and temporaries; None: what is free.
        exact_limit: backward passes per batch beyond which exact labels are refused.
        groups: filled by the first batch.
        count: N so far.
        backward_passes: how many were run.
        tell: receives a line on what is about to take long.
        score: whether to sum the log likelihood of the observed targets.
        log_likelihood: that sum so far; None if there were no targets.
        outputs: how many numbers the model gave for them.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    likelihood: Likelihood
    fit: Choice
    labels: Labels = "sampled"
    samples: int = 1
    seed: int = 0
    forward: Forward | None = None
    memory_budget: int | None = None
    exact_limit: int = 1000
    groups: list[Group] = field(default_factory=list)
    count: float | Tensor = 0.0
    backward_passes: int = 0
    tell: Callable[[str], None] = log.debug
    score: bool = False
    log_likelihood: Tensor | None = None
    outputs: int = 0

    def __post_init__(self) -> None:
        if self.labels not in ("exact", "sampled", "observed"):
            raise ValueError(f"labels={self.labels!r}: use 'exact', 'sampled' or 'observed'.")
        if not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(
                f"samples={self.samples!r}: the number of label draws per datum is an integer of at least 1."
            )
        if not isinstance(self.likelihood, Likelihood):
            raise TypeError(
                f"likelihood={self.likelihood!r}: pass an instance such as kf.Categorical() or kf.Gaussian()."
            )
        self.fits = choose(self.fit, self.parameters)
        self._places: dict[Key, tuple[Group, int]] = {}
        self._guesses: dict[tuple, Ownership] = {}
        self.device = next(iter(self.parameters.values())).device
        self.start_pass()

    def start_pass(self) -> None:
        """Begin to read the data (again): the label draws start over, so that every pass sees the same."""
        self._draws = [Draws(self.seed, stream) for stream in range(self.samples)]
        self.count, self.log_likelihood, self.outputs = 0.0, None, 0

    def next_pass(self) -> bool:
        """Let every fit say whether it needs the data once more; True if one does."""
        for group in self.groups:
            again = None if group.done else group.fit.next_pass(group.state)
            group.state, group.done = again or group.state, again is None
        return not all(group.done for group in self.groups)

    @property
    def passes(self) -> int:
        """How many times the data are read."""
        return max((group.state.plan.passes for group in self.groups), default=1)

    def add(self, batch: Any, where: str) -> None:
        """Run one batch forward and backward and update every state.

        Raises:
            UnsupportedError: a trainable parameter is used in a way that is not understood.
            DataError: the batch does not fit the model or the likelihood.
            NumericalError: the batch or the outputs hold NaN or Inf.
            MemoryBudgetError: the states do not fit the budget.
        """
        capture, outputs, targets = self.observe(batch, where)
        proof = covered(capture, outputs, where)
        values = outputs.detach()
        try:
            self.likelihood.check(values, targets, where, self.labels)
        except NumericalError as error:
            raise not_finite(batch, where) from error
        steps = self._steps(values, targets, where)
        mask = self.likelihood.positions(values, targets)
        if mask is not None and mask.device.type == "cpu" and bool(mask.all()):
            mask = None
        parts = self.parts(capture, proof)
        self._place([part.block for several in parts.values() for part in several], where)
        entries = {}
        for index, several in parts.items():
            placed = [(part, *self._places[part.block.key]) for part in several]
            if wanted := [(part, group, position) for part, group, position in placed if not group.done]:
                entries[index] = wanted
        plain = {index: [part for part, _, _ in several] for index, several in entries.items()}
        owned = {block.key for group in self.groups if group.state.plan.owned for block in group.blocks}
        owners, problems = self.find_owners(capture, outputs, proof, plain, owned, mask is not None)
        refuse(problems, where)
        stream = Stream(entries, owners, mask)
        for column, vector in enumerate(self._vectors(values, targets)):
            capture.backward(outputs, vector, stream.receive, proof.sources, retain=column + 1 < steps)
            stream.flush()
            self.backward_passes += 1
        size = float(len(outputs)) if mask is None else mask.any(dim=1).sum().to(torch.float64)
        self.count = self.count + size
        if self.score and targets is not None:
            score = self.likelihood.log_prob(values, targets).sum(dtype=torch.float64)
            self.log_likelihood = score if self.log_likelihood is None else self.log_likelihood + score
            self.outputs += values.numel()
        for group in self.groups:
            if not group.done:
                group.state.count = group.state.count + size

    def observe(self, batch: Any, where: str) -> tuple[Capture, Tensor, Any]:
        """Run one batch forward under capture: with its outputs and targets."""
        with Capture(self.parameters) as capture:
            outputs, targets = run(self.model, batch, self.forward, self.device, where)
        return capture, outputs, targets

    def _steps(self, outputs: Tensor, targets: Any, where: str) -> int:
        """How many backward passes the batch takes."""
        if self.labels != "exact":
            return self.samples if self.labels == "sampled" else 1
        columns = self.likelihood.columns(outputs, targets)
        announcement = f"{where}: exact labels take {columns} backward passes"
        log.info(announcement)
        self.tell(announcement)
        if columns > self.exact_limit:
            raise DataError(
                f"{where}: exact labels take {columns} backward passes for each batch, and the limit is "
                f"{self.exact_limit}. Use labels='sampled' with samples=M, or raise exact_limit."
            )
        return columns

    def _vectors(self, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
        if self.labels == "exact":
            yield from self.likelihood.exact(outputs, targets)
        elif self.labels == "sampled":
            for draws in self._draws:
                yield self.likelihood.sampled(outputs, targets, draws) / len(self._draws) ** 0.5
        else:
            yield self.likelihood.observed(outputs, targets)

    def parts(self, capture: Capture, proof: Proof) -> dict[int, list[Part]]:
        """Index of a call → blocks of its uses: weight and bias together where one fit treats both, else each alone."""
        parts: dict[int, list[Part]] = {}
        for index in sorted(proof.alive):
            call = capture.calls[index]
            if not prod(call.shape):
                continue  # no positions at all: it adds nothing
            several = parts.setdefault(index, [])
            for use in call.uses:
                weight, bias = use.weight, use.bias
                if weight and bias and self.fits[weight.parameter] == self.fits[bias.parameter]:
                    several.append(Part(use, Block(weight.label, call.operator, weight, bias), True, True))
                    continue
                if weight:
                    several.append(Part(use, Block(weight.label, call.operator, weight, None), True, False))
                if bias:
                    several.append(Part(use, Block(bias.label, call.operator, None, bias), False, True))
        return parts

    def planned(self, blocks: Iterable[Block], where: str) -> list[Planned]:
        """Groups for the blocks that are seen for the first time.

        Raises:
            UnsupportedError: a fit would have to change a group that it has begun to fill.
        """
        new: dict[Fit, list[Block]] = {}
        for block in blocks:
            new.setdefault(self.fits[block.parameters[0]], []).append(block)
        planned = []
        for fit, members in new.items():
            begun = [group.blocks for group in self.groups if group.fit == fit]
            groups = fit.groups([*(block for group in begun for block in group), *members])
            if any(group not in groups for group in begun):
                raise UnsupportedError(
                    f"{where}: {', '.join(block.name for block in members)} is used here for the first time, and "
                    f"{fit!r} treats it together with layers that earlier batches have been counted for. Put a batch "
                    "that uses every parameter first, or choose a fit that treats layers apart."
                )
            for group in groups:
                if group not in begun:
                    like = promote(self.parameters[group[0].parameters[0]].detach().new_empty(0))
                    planned.append(Planned(fit, group, fit.plan(group, like.element_size()), like))
        return planned

    def _place(self, blocks: list[Block], where: str) -> None:
        """Make states for blocks seen for the first time."""
        new = {block.key: block for block in blocks if block.key not in self._places}
        if not new:
            return
        refuse(misused([*(block for group in self.groups for block in group.blocks), *new.values()]), where)
        planned = self.planned(new.values(), where)
        workspace = self._afford([*(group.state.plan for group in self.groups), *(entry.plan for entry in planned)])
        for entry in planned:
            plan = replace(entry.plan, workspace=workspace)
            group = Group(entry.fit, entry.blocks, entry.fit.init(entry.blocks, plan, entry.like))
            group.state.count = self.count
            self.groups.append(group)
            self._places.update({block.key: (group, position) for position, block in enumerate(entry.blocks)})

    def _afford(self, plans: list[Plan]) -> int:
        """Bytes left for temporaries, once the states have theirs."""
        needed = sum(plan.bytes for plan in plans)
        limit = available_memory(self.device) if self.memory_budget is None else self.memory_budget
        if needed > limit:
            raise MemoryBudgetError(
                f"The estimate needs {needed:,} bytes ({needed / 2**30:.2f} GiB) for its matrices, more than the "
                f"{'free memory' if self.memory_budget is None else 'memory_budget'} of {limit:,} bytes "
                f"({limit / 2**30:.2f} GiB). Use a smaller structure for the largest layers, for example "
                "fit={'name.of.layer*': 'diagonal', '*': 'kfac'}."
            )
        return WORKSPACE if self.memory_budget is None else max(min(WORKSPACE, limit - needed), 1)

    def find_owners(
        self,
        capture: Capture,
        outputs: Tensor,
        proof: Proof,
        parts: Mapping[int, list[Part]],
        owned: Container[Key],
        masked: bool,
    ) -> tuple[dict[tuple[int, int], Ownership], dict[str, str]]:
        """Which sample owns each row of each use, and parameter → reason where nobody can say.

        A probe looks once at every use; what it found holds for the same graph of the same model, in later estimates
        too. What a use without any gradient leaves to be guessed from its shape holds for this estimate only. Where
        rows need not be sorted by sample, each stands for itself, if it belongs to a single sample at all.
        """
        rules = _RULES.setdefault(self.model, {}).setdefault(proof.graph, {})
        owners: dict[tuple[int, int], Ownership] = {}
        doubtful: dict[tuple[int, Hashable], Use] = {}
        samples = len(outputs)

        def sorting(use: Use, block: Block) -> bool:
            return use.summing or masked or block.key in owned

        for index, several in parts.items():
            call = capture.calls[index]
            for position, part in enumerate(several):
                lead = part.use.lead(call.shape)
                sort = sorting(part.use, part.block)
                rule = rules.get(place := (index, part.block.key, sort)) or self._guesses.get((proof.graph, *place))
                if sort and proof.gathers:
                    rule = None  # the next batch may come in another order
                if samples == 1:
                    owners[index, position] = Ownership(1)
                elif not sort and rule:
                    owners[index, position] = Ownership(prod(lead))
                elif rule and (fitted := rule.fitted(lead, samples)):
                    owners[index, position] = fitted
                else:
                    doubtful[index, position] = part.use
        problems: dict[str, str] = {}
        for (index, position), found in (capture.probe(outputs, doubtful, proof.sources) if doubtful else {}).items():
            call, part = capture.calls[index], parts[index][position]
            what = f"{part.block.name} (used by {call.operator})"
            if found is None:
                problems[part.block.name] = coupled(what)
                continue
            sort = sorting(part.use, part.block)
            rule, sure = Ownership.by_owners(found, samples) if sort else (Ownership(found.numel()), True)
            if rule is None:
                problems[part.block.name] = scattered(what, tuple(found.shape), samples)
                continue
            owners[index, position] = rule
            if sure and bool((found >= 0).any()):
                rules[index, part.block.key, sort] = rule
            elif sure:
                self._guesses[proof.graph, index, part.block.key, sort] = rule
        return owners, problems
