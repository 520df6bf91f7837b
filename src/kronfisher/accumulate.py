"""Batches in, states out: runs a model under capture and streams samples of every block into its fit."""

import logging
import time
from collections import Counter
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kronfisher.batches import Forward, not_finite, run
from kronfisher.blocks import Block, View
from kronfisher.capture import Call, Capture, Proof
from kronfisher.errors import DataError, MemoryBudgetError, NumericalError, UnsupportedError
from kronfisher.fits import Fit, Plan, State, named
from kronfisher.likelihoods import Draws, Likelihood
from kronfisher.linalg import full_precision, promote
from kronfisher.operators.memory import available_memory
from kronfisher.samples import WORKSPACE, Dense, Samples, join
from kronfisher.uses import Ownership, Use
from kronfisher.uses.ownership import coupled, scattered

__all__ = ["Accumulator", "Choice", "Group", "Labels"]

Labels = Literal["exact", "sampled", "observed"]
Choice = Fit | str | Mapping[str, Fit | str]
Key = tuple[View | None, View | None]
# Model → graph → (call, block, sorted by sample) → rule. A model that is gone takes its rules with it.
_RULES: WeakKeyDictionary[nn.Module, dict[int, dict[tuple, Ownership]]] = WeakKeyDictionary()
log = logging.getLogger("kronfisher")


@dataclass
class Group:
    """Blocks that one fit treats together, with its state and the seconds spent on it."""

    fit: Fit
    blocks: tuple[Block, ...]
    state: State
    seconds: float = 0.0
    done: bool = False


@dataclass(frozen=True)
class Part:
    """What one use contributes to one block: its weight, its bias, or both."""

    use: Use
    block: Block
    weight: bool
    bias: bool


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
        self.count = 0.0

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
        log.info("%s: exact labels take %d backward passes", where, columns)
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


class Stream:
    """Receives output gradients during one backward pass and passes samples on as soon as a group is complete.

    Args:
        entries: index of a call → its parts, with the group that each belongs to and its place in it.
        owners: (index of a call, number of the part) → which sample owns each row.
        mask: ``[N, P]`` output positions that count, or None.
    """

    def __init__(
        self,
        entries: Mapping[int, list[tuple[Part, Group, int]]],
        owners: Mapping[tuple[int, int], Ownership],
        mask: Tensor | None,
    ) -> None:
        self._entries, self._owners, self._mask = entries, owners, mask
        places = [(id(group), position) for several in entries.values() for _, group, position in several]
        self._expected = Counter(places)
        self._groups = {id(group): group for several in entries.values() for _, group, _ in several}
        self._arrived: dict[tuple[int, int], list[Samples]] = {}
        self._ready: dict[int, dict[int, Samples]] = {}
        self._counted: set[tuple[int, int]] = set()  # uses whose activations a fit has seen, in whatever column it was

    def receive(self, call: Call, gradient: Tensor) -> None:
        """Turn the gradient of a call's output into samples."""
        with full_precision(gradient.device.type):
            for number, (part, group, position) in enumerate(self._entries.get(call.index, ())):
                began = time.perf_counter()
                owner, own = self._owners[call.index, number], gradient.to(part.use.dtype)
                samples = Samples(
                    part.use.activations(owner, own, part.weight, part.bias),
                    part.use.gradients(owner, own),
                    (call.index, number) not in self._counted,
                    workspace=group.state.plan.workspace,
                )
                self._counted.add((call.index, number))
                if self._mask is not None:
                    samples = samples.masked(self._mask)
                if group.state.plan.owned:
                    self._arrive(group, position, samples)
                else:  # sums over rows: uses of one weight need not wait for each other
                    group.state = group.fit.update(group.state, (samples,))
                group.seconds += time.perf_counter() - began

    def flush(self) -> None:
        """Pass on what waits for uses whose gradient was zero everywhere and never came."""
        for key, position in list(self._arrived):
            self._complete(self._groups[key], position)
        for key in list(self._ready):
            group, ready = self._groups[key], self._ready[key]
            some = next(iter(ready.values()))
            for position, block in enumerate(group.blocks):
                if position not in ready:
                    ready[position] = _nothing(block, some)
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
        group.state = group.fit.update(group.state, samples)


def _nothing(block: Block, like: Samples) -> Samples:
    heads, outputs, inputs = block.shape
    zeros = like.gradients.new_zeros
    return Samples(Dense(zeros(heads, len(like), 1, inputs)), zeros(heads, len(like), 1, outputs), first=False)


def choose(fit: Choice, parameters: Mapping[str, Any]) -> dict[str, Fit]:
    """The fit of every parameter, by the first pattern that its name matches.

    Raises:
        ValueError: a pattern matches nothing, or a parameter no pattern.

    Example:
        >>> choose({"*.bias": "diagonal", "*": "kfac"}, {"fc.weight": 0, "fc.bias": 0})
        {'fc.weight': KFAC(mode='expand'), 'fc.bias': Diagonal()}
    """
    if not isinstance(fit, Mapping):
        return dict.fromkeys(parameters, named(fit))
    patterns = {pattern: named(choice) for pattern, choice in fit.items()}
    idle = [pattern for pattern in patterns if not any(_matches(name, pattern) for name in parameters)]
    if idle:
        raise ValueError(f"fit: the patterns {idle} match no trainable parameter; there are {list(parameters)}.")
    chosen = {}
    for name in parameters:
        match = next((choice for pattern, choice in patterns.items() if _matches(name, pattern)), None)
        if match is None:
            raise ValueError(
                f"fit: no pattern matches {name}; add '*' for the rest, or freeze it with requires_grad_(False)."
            )
        chosen[name] = match
    return chosen


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)  # a name may hold brackets, which mean something in a pattern


def covered(capture: Capture, outputs: Tensor, where: str) -> Proof:
    """The proof that every way from the outputs to a trainable parameter is understood.

    Raises:
        UnsupportedError: naming the parameters and the operators that are not, or outputs without any of them.
    """
    proof = capture.prove(outputs)
    if proof.unclaimed:
        lines = [unclaimed(name, operators) for name, operators in proof.unclaimed.items()]
        raise UnsupportedError(
            f"{where}: these trainable parameters are used by operators that are not supported yet:\n  "
            + "\n  ".join(lines)
            + "\nFreeze them with requires_grad_(False) to leave them out of the Fisher matrix."
        )
    if not proof.alive:
        raise detached(where)
    return proof


def unclaimed(name: str, operators: Iterable[str]) -> str:
    """What to say of a parameter used by operators that are not understood."""
    hint = (
        " (reentrant checkpointing hides its layers: use_reentrant=False)" if "CheckpointFunction" in operators else ""
    )
    return f"{name}: used by {', '.join(sorted(operators))}{hint}"


def detached(where: str) -> UnsupportedError:
    """The error for outputs that no trainable parameter has a part in."""
    return UnsupportedError(
        f"{where}: the outputs depend on no trainable parameter, or were detached from them (torch.no_grad, .detach()) "
        "inside the model."
    )


def misused(blocks: Iterable[Block]) -> dict[str, str]:
    """Name → reason of parameters that several blocks share or that blocks show only in part."""
    windows: dict[str, list[tuple[View, Block]]] = {}
    for block in blocks:
        for view in block.views:
            windows.setdefault(view.parameter, []).append((view, block))
    problems = {}
    for name, several in windows.items():
        if len(several) == 1 and several[0][0].whole:
            continue
        counts = several[0][0].counter()
        for view, _ in several:
            view.mark(counts)
        operators = ", ".join(sorted({block.operator for _, block in several}))
        if bool((counts > 1).any()):
            problems[name] = (
                f"{name} is used in {len(several)} different ways (by {operators}), for example as a matrix and as its "
                "transpose, with and without a bias, or with different biases; that is not supported yet. Freeze it "
                "with requires_grad_(False)."
            )
        elif bool((counts == 0).any()):
            problems[name] = (
                f"{name}: only {int((counts > 0).sum())} of its {counts.numel()} elements are used (by {operators}); "
                "that is not supported yet. Freeze it, or split it into parameters of their own."
            )
    return problems


def refuse(problems: Mapping[str, str], where: str) -> None:
    """Raise an UnsupportedError that lists what is wrong with which parameter, if anything is."""
    if problems:
        raise UnsupportedError(f"{where}: " + "\n".join(problems.values()))
