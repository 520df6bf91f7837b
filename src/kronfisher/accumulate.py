"""Batches in, states out: runs a model under capture and streams samples of every block into its fit."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal

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

__all__ = ["Accumulator", "Choice", "Group", "Labels"]

Labels = Literal["exact", "sampled", "observed"]
Choice = Fit | str | Mapping[str, Fit | str]
Key = tuple[View | None, View | None]
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
            raise ValueError(f"samples={self.samples!r}: the number of label draws per datum is an integer of at least 1.")
        self._fits = choose(self.fit, self.parameters)
        self._places: dict[Key, tuple[Group, int]] = {}
        self._owners: dict[tuple, Ownership] = {}
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
        with Capture(self.parameters) as capture:
            outputs, targets = run(self.model, batch, self.forward, self.device, where)
        proof = covered(capture, outputs, where)
        values = outputs.detach()
        try:
            self.likelihood.check(values, targets, where, self.labels)
        except NumericalError as error:
            raise not_finite(batch, where) from error
        mask = self.likelihood.positions(values, targets)
        if mask is not None and mask.device.type == "cpu" and bool(mask.all()):
            mask = None
        parts = {index: self._parts(capture.calls[index]) for index in sorted(proof.alive)}
        self._place([part.block for several in parts.values() for part in several])
        parts = {index: kept for index, several in parts.items() if (kept := [p for p in several if self._wanted(p)])}
        owners = self._find_owners(capture, outputs, parts, mask is not None)
        stream = Stream(self._places, parts, owners, mask)
        steps = self.likelihood.columns(values, targets) if self.labels == "exact" else self.samples
        for column, vector in enumerate(self._vectors(values, targets, where)):
            stream.first = column == 0
            capture.backward(outputs, vector, stream.receive, proof.sources, retain=column + 1 < steps)
            stream.flush()
            self.backward_passes += 1
        size = float(len(outputs)) if mask is None else mask.any(dim=1).sum().to(torch.float64)
        self.count = self.count + size
        for group in self.groups:
            if not group.done:
                group.state.count = group.state.count + size

    def _vectors(self, outputs: Tensor, targets: Any, where: str) -> Iterator[Tensor]:
        if self.labels == "exact":
            columns = self.likelihood.columns(outputs, targets)
            log.info("%s: exact labels take %d backward passes", where, columns)
            if columns > self.exact_limit:
                raise DataError(
                    f"{where}: exact labels take {columns} backward passes for each batch, the limit is {self.exact_limit}. Use "
                    f"labels='sampled' with samples=M, or raise exact_limit."
                )
            yield from self.likelihood.exact(outputs, targets)
        elif self.labels == "sampled":
            for draws in self._draws:
                yield self.likelihood.sampled(outputs, targets, draws) / len(self._draws) ** 0.5
        else:
            yield self.likelihood.observed(outputs, targets)

    def _parts(self, call: Call) -> list[Part]:
        """Blocks of a call's uses: a weight and its bias together where one fit treats both, else each alone."""
        parts: list[Part] = []
        for use in call.uses:
            weight, bias = use.weight, use.bias
            if weight and bias and self._fits[weight.parameter] == self._fits[bias.parameter]:
                parts.append(Part(use, Block(weight.parameter, call.operator, weight, bias), True, True))
                continue
            if weight:
                parts.append(Part(use, Block(weight.parameter, call.operator, weight, None), True, False))
            if bias:
                parts.append(Part(use, Block(bias.parameter, call.operator, None, bias), False, True))
        return parts

    def _wanted(self, part: Part) -> bool:
        return not self._places[part.block.key][0].done

    def _place(self, blocks: list[Block]) -> None:
        """Plan groups for blocks seen for the first time."""
        new = {block.key: block for block in blocks if block.key not in self._places}
        if not new:
            return
        check_windows([*(block for group in self.groups for block in group.blocks), *new.values()], self.parameters)
        by_fit: dict[Fit, list[Block]] = {}
        for block in new.values():
            by_fit.setdefault(self._fits[block.name], []).append(block)
        planned = []
        for fit, members in by_fit.items():
            for group in fit.groups(members):
                like = promote(self.parameters[group[0].name].detach()[:0])
                planned.append((fit, group, fit.plan(group, like.element_size()), like))
        workspace = self._afford([*(group.state.plan for group in self.groups), *(plan for _, _, plan, _ in planned)])
        for fit, group, plan, like in planned:
            entry = Group(fit, group, fit.init(group, replace(plan, workspace=workspace), like))
            entry.state.count = self.count
            self.groups.append(entry)
            self._places.update({block.key: (entry, position) for position, block in enumerate(group)})

    def _afford(self, plans: list[Plan]) -> int:
        """Bytes left for temporaries, once the states have theirs."""
        needed = sum(plan.bytes for plan in plans)
        limit = available_memory(self.device) if self.memory_budget is None else self.memory_budget
        if needed > limit:
            raise MemoryBudgetError(
                f"The estimate needs {needed:,} bytes ({needed / 2**30:.2f} GiB) for its matrices, more than the "
                f"{'free memory' if self.memory_budget is None else 'memory_budget'} of {limit:,} bytes ({limit / 2**30:.2f} GiB). Use a "
                "smaller structure for the largest layers, for example fit={'name.of.layer*': 'diagonal', '*': 'kfac'}."
            )
        return WORKSPACE if self.memory_budget is None else max(min(WORKSPACE, limit - needed), 1)

    def _find_owners(
        self, capture: Capture, outputs: Tensor, parts: Mapping[int, list[Part]], masked: bool
    ) -> dict[tuple[int, int], Ownership]:
        """Which sample owns each row of each use: by shape where that decides, else by a probe, remembered for later batches."""
        owners: dict[tuple[int, int], Ownership] = {}
        doubtful: list[tuple[int, int, tuple]] = []
        samples = len(outputs)
        for index, several in parts.items():
            call = capture.calls[index]
            for position, part in enumerate(several):
                lead = part.use.lead(call.shape)
                plan = self._places[part.block.key][0].state.plan
                key = (index, call.operator, part.block.key, lead, samples)
                known = self._owners.get(key)
                if known is None and not (plan.owned or masked or part.use.summing):
                    known = Ownership(prod(lead))  # every row for itself: the fit sums over all of them anyway
                if known is None and part.use.certain:
                    known = Ownership.by_shape(lead, samples)
                if known is None:
                    doubtful.append((index, position, key))
                else:
                    owners[index, position] = known
        if doubtful:
            gradients = capture.probe(outputs, {index for index, _, _ in doubtful})
            for index, position, key in doubtful:
                use = parts[index][position].use
                plain, scaled = (use.rows(promote(gradient)) for gradient in gradients[index])
                what = f"{use.name} (used by {capture.calls[index].operator})"
                owners[index, position] = self._owners[key] = Ownership.by_probe(plain, scaled, samples, what)
        return owners


class Stream:
    """Receives output gradients during one backward pass and passes samples on as soon as a group is complete."""

    def __init__(
        self,
        places: Mapping[Key, tuple[Group, int]],
        parts: Mapping[int, list[Part]],
        owners: Mapping[tuple[int, int], Ownership],
        mask: Tensor | None,
    ) -> None:
        self._places, self._parts, self._owners, self._mask = places, parts, owners, mask
        self._expected = Counter(part.block.key for several in parts.values() for part in several)
        self._arrived: dict[Key, list[Samples]] = {}
        self._ready: dict[int, dict[int, Samples]] = {}
        self.first = True

    def receive(self, call: Call, gradient: Tensor) -> None:
        """Turn the gradient of a call's output into samples."""
        with full_precision(gradient.device.type):
            for position, part in enumerate(self._parts.get(call.index, ())):
                began = time.perf_counter()
                owner = self._owners[call.index, position]
                group, _ = self._places[part.block.key]
                samples = Samples(
                    part.use.activations(owner, gradient, part.weight, part.bias),
                    part.use.gradients(owner, gradient),
                    self.first,
                    workspace=group.state.plan.workspace,
                )
                if self._mask is not None:
                    samples = samples.masked(self._mask)
                uses = self._arrived.setdefault(part.block.key, [])
                uses.append(samples)
                if len(uses) == self._expected[part.block.key]:
                    self._complete(part.block.key)
                group.seconds += time.perf_counter() - began

    def flush(self) -> None:
        """Pass on what waits for uses whose gradient was zero everywhere and never came."""
        for key in list(self._arrived):
            self._complete(key)
        for identity in list(self._ready):
            group = next(group for group, _ in self._places.values() if id(group) == identity)
            some = next(iter(self._ready[identity].values()))
            for position, block in enumerate(group.blocks):
                if position not in self._ready[identity]:
                    self._ready[identity][position] = _nothing(block, some, self.first)
            self._update(group)

    def _complete(self, key: Key) -> None:
        group, position = self._places[key]
        ready = self._ready.setdefault(id(group), {})
        ready[position] = join(self._arrived.pop(key))
        if len(ready) == len(group.blocks):
            self._update(group)

    def _update(self, group: Group) -> None:
        ready = self._ready.pop(id(group))
        group.state = group.fit.update(group.state, tuple(ready[position] for position in range(len(group.blocks))))


def _nothing(block: Block, like: Samples, first: bool) -> Samples:
    heads, outputs, inputs = block.shape
    zeros = like.gradients.new_zeros
    return Samples(Dense(zeros(heads, len(like), 1, inputs)), zeros(heads, len(like), 1, outputs), first)


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
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in parameters)]
    if idle:
        raise ValueError(f"fit: the patterns {idle} match no trainable parameter; there are {list(parameters)}.")
    chosen = {}
    for name in parameters:
        match = next((choice for pattern, choice in patterns.items() if fnmatchcase(name, pattern)), None)
        if match is None:
            raise ValueError(f"fit: no pattern matches {name}; add '*' for the rest, or freeze it with requires_grad_(False).")
        chosen[name] = match
    return chosen


def covered(capture: Capture, outputs: Tensor, where: str) -> Proof:
    """The proof that every way from the outputs to a trainable parameter is understood.

    Raises:
        UnsupportedError: naming the parameters and the operators that are not, or outputs without any trainable parameter.
    """
    proof = capture.prove(outputs)
    if proof.unclaimed:
        lines = [f"  {name}: used by {', '.join(sorted(operators))}" for name, operators in proof.unclaimed.items()]
        raise UnsupportedError(
            f"{where}: these trainable parameters are used by operators that are not supported yet:\n" + "\n".join(lines) + "\n"
            "Freeze them with requires_grad_(False) to leave them out of the Fisher matrix."
        )
    if not proof.alive:
        raise UnsupportedError(
            f"{where}: the outputs depend on no trainable parameter, or were detached from them (torch.no_grad, .detach()) "
            "inside the model."
        )
    return proof


def check_windows(blocks: list[Block], parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that several blocks share or that blocks show only in part.

    Raises:
        UnsupportedError: naming the parameter and the operators.
    """
    windows: dict[str, list[tuple[View, Block]]] = {}
    for block in blocks:
        for view in block.views:
            windows.setdefault(view.parameter, []).append((view, block))
    for name, several in windows.items():
        counts = several[0][0].counter()
        for view, _ in several:
            view.mark(counts)
        operators = ", ".join(sorted({block.operator for _, block in several}))
        if bool((counts > 1).any()):
            raise UnsupportedError(
                f"{name} is used in {len(several)} different ways (by {operators}), for example as a matrix and as its transpose; that is not "
                "supported yet. Freeze it with requires_grad_(False)."
            )
        if bool((counts == 0).any()):
            raise UnsupportedError(
                f"{name}: only {int((counts > 0).sum())} of its {parameters[name].numel()} elements are used (by {operators}); that is not "
                "supported yet. Freeze it, or split it into parameters of their own."
            )
