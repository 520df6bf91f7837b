"""Batches in, states out: runs a model under capture and streams samples of every block into its fit."""

import logging
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kronfisher.batches import Forward, Mask, not_finite, positions_of, run
from kronfisher.blocks import Block, Key
from kronfisher.capture import Capture, Proof, Receiver
from kronfisher.chain import chains
from kronfisher.claims import detached, hidden, refuse, settle, unclaimed, unknown
from kronfisher.errors import DataError, MemoryBudgetError, NumericalError, UnsupportedError
from kronfisher.fallback import FALLBACK, per_sample_block
from kronfisher.fits import Choice, Diagonal, Fit, Plan, choose
from kronfisher.likelihoods import Draws, Likelihood, along_outputs, masked_positions
from kronfisher.linalg import promote
from kronfisher.operators.memory import available_memory
from kronfisher.samples import WORKSPACE
from kronfisher.stream import Group, Part, Stream
from kronfisher.uses import Ownership, Use
from kronfisher.uses.ownership import coupled, scattered

__all__ = ["Accumulator", "Labels"]

Labels = Literal["exact", "sampled", "observed"]
# Model → graph → (call, block, sorted by sample) → rule. A model that is gone takes its rules with it.
_RULES: WeakKeyDictionary[nn.Module, dict[int, dict[tuple, Ownership]]] = WeakKeyDictionary()
# Model → graphs in which data are known to stay apart where they meet the parameters that the fallback treats.
_APART: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()
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
        mask: which positions count, as for `estimate`.
        strict: refuse what only the fallback can treat.
        training: take what is cheap: parameters that only the fallback can treat are left out, and rows that mix data
            (normalisation over the batch) are taken as they are where a fit treats rows apart.
        groups: filled by the first batch.
        mixed: in training, names of blocks whose rows mix data.
        after: key of a block → key of the one after it, where a fit treats them together.
        cuts: key of a block → why it is not treated together with what comes before, where its fit might do so.
        apart: names of weights and biases that have several partners and are treated without them.
        fallback: parameter → reason why only the gradients of single data, one by one, tell about it.
        count: N so far.
        backward_passes: how many were run.
        tell: receives a line on what is about to take long.
        score: whether to sum the log likelihood of the observed targets.
        log_likelihood: that sum so far; None if there were no targets, or a mask that the likelihood does not know.
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
    mask: Mask | None = None
    strict: bool = False
    training: bool = False
    groups: list[Group] = field(default_factory=list)
    fallback: dict[str, str] = field(default_factory=dict)
    apart: set[str] = field(default_factory=set)
    mixed: set[str] = field(default_factory=set)
    after: dict[Key, Key] = field(default_factory=dict)
    cuts: dict[Key, str] = field(default_factory=dict)
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
        self._followed: set[int] = set()  # graphs in which it is known what follows what
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
        """How many times the data are read, at most."""
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
        try:
            self.absorb(capture, outputs, targets, where, batch=batch)
        except NumericalError as error:
            if bool(torch.isfinite(outputs).all()):  # a gradient was not; the block is named
                raise
            raise not_finite(batch, where) from error

    def absorb(
        self,
        capture: Capture,
        outputs: Tensor,
        targets: Any,
        where: str,
        *,
        batch: Any = None,
        retain: bool = False,
        own: Callable[[Receiver, float | Tensor], None] | None = None,
    ) -> None:
        """Back-propagate through a captured forward pass and update every state.

        Args:
            capture: of the forward pass.
            outputs: what it returned.
            targets: as the likelihood takes them, or None.
            where: the batch's name in messages.
            batch: from which `mask` takes positions.
            retain: whether the caller goes backward through the same graph afterwards.
            own: in place of our backward passes, ``own(receive, count)`` runs the caller's, and hands on every gradient
                of a call's output as that of each datum's own loss.
        """
        values = outputs.detach()
        self.likelihood.check(values, targets, where, self.labels)
        steps = self._steps(values, targets, where)
        mask, kept = self.likelihood.positions(values, targets), None
        if self.mask is not None:
            given = positions_of(batch, self.mask, values, where)
            kept = along_outputs(given, values, self.likelihood.joint_dim(values, targets), where)
            mask = masked_positions(given, mask, where)
        if mask is not None and mask.device.type == "cpu" and bool(mask.all()):
            mask = None
        proof, parts, owners = self.understand(capture, outputs, mask is not None, where)
        if self.strict and self.fallback:
            raise unknown(self.fallback, where)
        alone = self._alone()
        blocks = [part.block for several in parts.values() for part in several] + [*alone.values()]
        self.place(blocks, where, _rows_each(capture, parts, len(outputs)))
        entries = {}
        for index, several in parts.items():
            placed = [(part, *self._places[part.block.key]) for part in several]
            if wanted := [(part, group, position) for part, group, position in placed if not group.done]:
                entries[index] = wanted
        places = {name: self._places[block.key] for name, block in alone.items()}
        singles = {name: place for name, place in places.items() if not place[0].done}
        if singles:
            self.tell(f"{where}: {len(outputs) * steps} backward passes for {', '.join(singles)} ({FALLBACK})")
        stream = Stream(entries, owners, mask, singles)
        size = float(len(outputs)) if mask is None else mask.any(dim=1).sum().to(torch.float64)
        if own is not None:
            own(stream.receive, size)
            stream.flush()
        left = steps
        for vector in () if own else self._vectors(values, targets):  # enumerate would hold on to the vectors
            vector, left = vector if kept is None else vector * kept, left - 1  # what is masked has no loss
            again = retain or left > 0 or bool(singles)
            stream.last = not again
            product = (outputs * vector).sum()
            vector = vector if singles else None  # it may go while the pass is on
            capture.backward(product, stream.receive, proof.sources, retain=again)
            self.backward_passes += 1
            if vector is not None:
                stream.receive_single(outputs, vector, self.parameters)
                self.backward_passes += len(outputs)
            stream.flush()
        self.count = self.count + size
        if self.score and targets is not None and self.mask is None:
            score = self.likelihood.log_likelihood(values, targets)
            self.log_likelihood = score if self.log_likelihood is None else self.log_likelihood + score
            self.outputs += values.numel()
        for group in self.groups:
            if not group.done:
                group.state.count = group.state.count + size

    def understand(
        self, capture: Capture, outputs: Tensor, masked: bool, where: str
    ) -> tuple[Proof, dict[int, list[Part]], dict[tuple[int, int], Ownership]]:
        """What a batch's uses are, which sample owns their rows, and for which parameters only the fallback is left.

        Raises:
            UnsupportedError: data are coupled, or parameters are used where nothing can be seen.
        """
        proof = capture.prove(outputs)
        if not proof.reached and not proof.hidden:
            raise detached(where)
        refuse({name: hidden(name, functions) for name, functions in proof.hidden.items()}, where)
        self._give_up({name: unclaimed(name, operators) for name, operators in proof.unclaimed.items()}, where)
        while True:
            parts = self.parts(capture, proof)
            blocks = {part.block.key: part.block for several in parts.values() for part in several}
            known = {block.key: block for group in self.groups for block in group.blocks}
            if not blocks.keys() <= known.keys():
                whole = [name for name, fit in self.fits.items() if self.training or fit.exact]
                claims = settle({**known, **blocks}.values(), whole)
                self._keep_apart(claims.apart, known.values(), where)
                self._give_up(claims.problems, where)
                if claims.apart or claims.problems:
                    continue
            blocks |= {block.key: block for block in self._alone().values()}
            planned = self.planned([block for key, block in blocks.items() if key not in known], where)
            owned = {block.key for group in self.groups if group.state.plan.owned for block in group.blocks}
            owned |= {block.key for entry in planned if entry.plan.owned for block in entry.blocks}
            owners, refused, problems = self.find_owners(capture, outputs, proof, parts, owned, masked)
            refuse(refused, where)
            if not problems:
                break
            self._give_up(problems, where)
        if self.fallback and not self.training:
            self._check_apart(capture, outputs, proof, where)
        self._follow(capture, proof, parts, owners, where)
        return proof, parts, owners

    def _follow(
        self,
        capture: Capture,
        proof: Proof,
        parts: Mapping[int, list[Part]],
        owners: Mapping[tuple[int, int], Ownership],
        where: str,
    ) -> None:
        """Find the chains of layers that fits treat together; those that were begun to be counted have to hold."""
        blocks = {part.block.key: part.block for several in parts.values() for part in several}
        if proof.graph in self._followed or not any(self.fit_of(block).chained for block in blocks.values()):
            return
        found = chains(capture, proof, parts, owners, self._apart)
        begun = {block.key for group in self.groups for block in group.blocks}
        broken = [
            (key, later)
            for key, later in self.after.items()
            if blocks.keys() & {key, later} and found.after.get(key) != later
        ]
        refuse(
            {
                names: f"{names}: in earlier batches these layers followed each other and were counted so, here they "
                f"do not ({found.cuts.get(later) or other}). Choose a fit that treats layers apart, such as 'kfac'."
                for key, later in broken
                for names in [", ".join(view.label for part in (key, later) for view in part[:1] if view)]
                for other in ["another comes between" if {key, later} <= blocks.keys() else "one of them is not used"]
            },
            where,
        )
        self.after |= {key: later for key, later in found.after.items() if not begun & {key, later}}
        self.cuts = found.cuts | self.cuts
        if not proof.gathers:  # else the rows of the next batch may come in another order
            self._followed.add(proof.graph)

    def _apart(self, earlier: Block, later: Block) -> str:
        """Why no fit takes two blocks together."""
        first, second = self.fit_of(earlier), self.fit_of(later)
        if first != second:
            return f"{earlier.name} has another fit"
        if not first.chained:
            return "their fit treats layers apart"
        dtypes = [self.parameters[block.parameters[0]].dtype for block in (earlier, later)]
        if dtypes[0] != dtypes[1]:
            return f"{earlier.name} is {dtypes[0]}, {later.name} {dtypes[1]}"
        return first.alone(earlier) or first.alone(later)

    def cut_notes(self, blocks: Iterable[Block]) -> list[str]:
        """Where a chain of layers is cut before one of these blocks, and why."""
        return [
            f"cut before {block.name}: {self.cuts[block.key]}"
            for block in blocks
            if block.key in self.cuts and self.fit_of(block).chained
        ]

    def _alone(self) -> dict[str, Block]:
        """The blocks of parameters that the fallback treats."""
        if self.training:
            return {}
        return {name: per_sample_block(name, p) for name, p in self.parameters.items() if name in self.fallback}

    def _keep_apart(self, names: set[str], known: Iterable[Block], where: str) -> None:
        """Treat weights and biases with several partners without these, from the first batch on."""
        late = {name for block in known if len(block.views) > 1 for name in block.parameters} & names
        refuse(
            {
                name: f"{name} is used with another bias, or without one, than in earlier batches, which were counted "
                "together with it. Put a batch first in which it is used in all ways."
                for name in late
            },
            where,
        )
        self.apart |= names

    def _give_up(self, problems: Mapping[str, str], where: str) -> None:
        """Leave parameters to the fallback, unless earlier batches were counted for them in another way."""
        names = {name for group in self.groups for block in group.blocks for name in block.parameters}
        late = {
            name: f"{reason}. Earlier batches used it in another way and were counted so: put a batch like this one "
            "first, or freeze the parameter with requires_grad_(False)."
            for name, reason in problems.items()
            if name in names and name not in self.fallback
        }
        refuse(late, where)
        self.fallback |= {name: reason for name, reason in problems.items() if name not in self.fallback}

    def _check_apart(self, capture: Capture, outputs: Tensor, proof: Proof, where: str) -> None:
        """The gradient of single data exists only if none of the places where they meet a parameter mixes them."""
        fine = _APART.setdefault(self.model, set())
        if len(outputs) == 1 or proof.graph in fine:
            return
        edges = list(proof.meetings)
        for index in proof.alive:
            call = capture.calls[index]
            if not call.constant and any(use.name in self.fallback for use in call.uses):
                edges.append((call.operator, call.edge))
        if mixing := capture.mixing(outputs, [edge for _, edge in edges]) if edges else []:
            names = ", ".join(sorted({edges[place][0] for place in mixing}))
            refuse({names: coupled(f"{names} (with {', '.join(self.fallback)})")}, where)
        fine.add(proof.graph)

    def observe(self, batch: Any, where: str) -> tuple[Capture, Tensor, Any]:
        """Run one batch forward under capture: with its outputs and targets."""
        constants = (*self.model.parameters(), *self.model.buffers())
        with Capture(self.parameters, constants) as capture:
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
                weight, bias = (v if v and v.parameter not in self.fallback else None for v in (use.weight, use.bias))
                if weight and bias and self._together(weight.parameter, bias.parameter):
                    several.append(Part(use, Block(weight.label, call.operator, weight, bias, use.onehot), True, True))
                    continue
                if weight:
                    several.append(Part(use, Block(weight.label, call.operator, weight, None, use.onehot), True, False))
                if bias:
                    several.append(Part(use, Block(bias.label, call.operator, None, bias), False, True))
        return parts

    def _together(self, weight: str, bias: str) -> bool:
        return self.fits[weight] == self.fits[bias] and not self.apart & {weight, bias}

    def fit_of(self, block: Block) -> Fit:
        """The fit that its parameters were given, if it can treat the block."""
        fit = self.fits[block.parameters[0]]
        return Diagonal() if block.operator == FALLBACK and not fit.exact else fit

    def planned(self, blocks: Iterable[Block], where: str) -> list[Planned]:
        """Groups for the blocks that are seen for the first time.

        Raises:
            UnsupportedError: a fit would have to change a group that it has begun to fill.
        """
        new: dict[Fit, list[Block]] = {}
        for block in blocks:
            new.setdefault(self.fit_of(block), []).append(block)
        planned = []
        for fit, members in new.items():
            begun = [group.blocks for group in self.groups if group.fit == fit]
            groups = fit.groups([*(block for group in begun for block in group), *members], self.after)
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

    def place(self, blocks: list[Block], where: str, rows: Mapping[Key, int] | None = None) -> None:
        """Make states for blocks seen for the first time, of which a datum has about so many `rows`."""
        new = {block.key: block for block in blocks if block.key not in self._places}
        if not new:
            return
        planned = [_with_sample(entry, rows or {}) for entry in self.planned(new.values(), where)]
        known = [*(group.state.plan for group in self.groups), *(entry.plan for entry in planned)]
        workspace = self._afford(known)
        for entry in planned:
            plan = replace(entry.plan, workspace=workspace)
            group = Group(entry.fit, entry.blocks, entry.fit.init(entry.blocks, plan, entry.like))
            group.state.count = self.count
            self.groups.append(group)
            self._places.update({block.key: (group, position) for position, block in enumerate(entry.blocks)})

    def _afford(self, plans: list[Plan]) -> int:
        """Bytes left for temporaries, once matrices and samples that wait have theirs."""
        standing = sum(plan.standing for plan in plans) + max(plan.temporary for plan in plans)
        needed = sum(plan.standing for plan in plans) + max(plan.least for plan in plans)
        limit = available_memory(self.device) if self.memory_budget is None else self.memory_budget
        if needed > limit:
            raise MemoryBudgetError(
                f"The estimate needs {needed:,} bytes ({needed / 2**30:.2f} GiB) for its matrices and one datum, more "
                f"than the {'free memory' if self.memory_budget is None else 'memory_budget'} of {limit:,} bytes "
                f"({limit / 2**30:.2f} GiB). Use a smaller structure for the largest layers, for example "
                "fit={'name.of.layer*': 'diagonal', '*': 'kfac'}."
            )
        return WORKSPACE if self.memory_budget is None else max(min(WORKSPACE, limit - standing), 1)

    def find_owners(
        self,
        capture: Capture,
        outputs: Tensor,
        proof: Proof,
        parts: Mapping[int, list[Part]],
        owned: Container[Key],
        masked: bool,
    ) -> tuple[dict[tuple[int, int], Ownership], dict[str, str], dict[str, str]]:
        """Which sample owns each row of each use; where nobody can say, parameter → reason.

        Reasons come in two mappings: of what has no per-datum gradient, and of what has one, though not by rows.

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
        refused: dict[str, str] = {}
        problems: dict[str, str] = {}
        for (index, position), found in (capture.probe(outputs, doubtful, proof.sources) if doubtful else {}).items():
            call, part = capture.calls[index], parts[index][position]
            sort = sorting(part.use, part.block)
            what = f"{part.block.name} (used by {call.operator})"
            if found is None:
                if call.constant:
                    for name in part.block.parameters:
                        problems[name] = f"{name}: used by {call.operator} before it meets the data"
                elif not self.training:
                    refused[part.block.name] = coupled(what)
                elif sort:
                    problems |= dict.fromkeys(part.block.parameters, coupled(what))
                else:
                    self.mixed.add(part.block.name)
                    owners[index, position] = Ownership(prod(part.use.lead(call.shape)))
                    self._guesses[proof.graph, index, part.block.key, sort] = owners[index, position]
                continue
            rule, sure = Ownership.by_owners(found, samples) if sort else (Ownership(found.numel()), True)
            if rule is None:
                reason = scattered(what, tuple(found.shape), samples)
                problems |= dict.fromkeys(part.block.parameters, reason)
                continue
            owners[index, position] = rule
            if sure and bool((found >= 0).any()):
                rules[index, part.block.key, sort] = rule
            elif sure:
                self._guesses[proof.graph, index, part.block.key, sort] = rule
        return owners, refused, problems


def _rows_each(capture: Capture, parts: Mapping[int, list[Part]], samples: int) -> dict[Key, int]:
    """Block → positions of a datum times groups, over all uses of it, by the sizes of their outputs."""
    found: dict[Key, int] = {}
    for index, several in parts.items():
        for part in several:
            rows = -(-prod(capture.calls[index].shape) // (part.block.shape[1] * samples))
            found[part.block.key] = found.get(part.block.key, 0) + rows
    return found


def _with_sample(entry: Planned, rows: Mapping[Key, int]) -> Planned:
    """With the bytes that a datum takes."""
    widths = {b.key: b.shape[1] if b.onehot else b.shape[1] + b.shape[2] for b in entry.blocks}
    numbers = sum(rows.get(key, 1) * width for key, width in widths.items())
    return replace(entry, plan=replace(entry.plan, sample=entry.like.element_size() * numbers))
