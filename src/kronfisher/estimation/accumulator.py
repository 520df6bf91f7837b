"""Batches in, states out: runs a model under capture and streams samples of every block into its fit."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kronfisher.capture.batches import Forward, Mask, not_finite, positions_of, run
from kronfisher.capture.capture import Capture, Receiver
from kronfisher.capture.graph import Proof
from kronfisher.capture.parts import Part
from kronfisher.capture.per_sample import FALLBACK
from kronfisher.capture.refusals import detached, hidden, refuse, unclaimed, unknown
from kronfisher.capture.row_orders import RowOrders
from kronfisher.errors import DataError, NumericalError
from kronfisher.estimation.assignment import Treatment
from kronfisher.estimation.groups import Groups, rows_each
from kronfisher.estimation.neighbours import Following
from kronfisher.estimation.routing import Stream
from kronfisher.fisher.blocks import Block
from kronfisher.fits import Choice
from kronfisher.layers import RowOrder
from kronfisher.likelihoods import Draws, Likelihood, along_outputs, masked_positions

__all__ = ["Accumulator", "Labels"]

Labels = Literal["exact", "sampled", "observed"]
log = logging.getLogger("kronfisher")


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
        treatment: which fit treats which parameter, and what is left to the fallback.
        owners: which sample owns each row; in training, which blocks mix data.
        following: which layers follow which, for fits that treat neighbours together.
        groups: of blocks, with their states; filled by the first batch.
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
        self.device = next(iter(self.parameters.values())).device
        self.treatment = Treatment(self.model, self.parameters, self.fit, self.training)
        self.owners = RowOrders(self.model, self.training)
        self.following = Following(self.treatment)
        self.groups = Groups(self.treatment, self.following, self.memory_budget)
        self.start_pass()

    def start_pass(self) -> None:
        """Begin to read the data (again): the label draws start over, so that every pass sees the same."""
        self._draws = [Draws(self.seed, stream) for stream in range(self.samples)]
        self.count, self.log_likelihood, self.outputs = 0.0, None, 0

    def resume(
        self, fallback: Mapping[str, str], apart: set[str], mixed: set[str], groups: Sequence[tuple[Block, ...]]
    ) -> None:
        """Take up what an earlier run found out, with empty states for its groups, in their order."""
        self.treatment.fallback, self.treatment.apart, self.owners.mixed = dict(fallback), apart, mixed
        self.following.after = {x.key: y.key for blocks in groups for x, y in pairwise(blocks)}  # others ignore it
        self.groups.resume(groups, "the saved state")

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
        if self.strict and self.treatment.fallback:
            raise unknown(self.treatment.fallback, where)
        alone = self.treatment.singles()
        blocks = [part.block for several in parts.values() for part in several] + [*alone.values()]
        self.groups.add(blocks, where, rows_each(capture, parts, len(outputs)), self.count)
        entries, singles = self.groups.wanting(parts, alone)
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
        if self.score and self.mask is None and self.likelihood.labelled(targets):
            score = self.likelihood.log_likelihood(values, targets)
            self.log_likelihood = score if self.log_likelihood is None else self.log_likelihood + score
            self.outputs += values.numel()
        for group in self.groups:
            if not group.done:
                group.state.count = group.state.count + size

    def understand(
        self, capture: Capture, outputs: Tensor, masked: bool, where: str
    ) -> tuple[Proof, dict[int, list[Part]], dict[tuple[int, int], RowOrder]]:
        """What a batch's uses are, which sample owns their rows, and for which parameters only the fallback is left.

        Raises:
            UnsupportedError: data are coupled, or parameters are used where nothing can be seen.
        """
        proof, treatment, known = capture.prove(outputs), self.treatment, self.groups.blocks
        if not proof.reached and not proof.hidden:
            raise detached(where)
        refuse({name: hidden(name, functions) for name, functions in proof.hidden.items()}, where)
        strange = {name: unclaimed(name, operators) for name, operators in proof.unclaimed.items()}
        treatment.give_up(strange, known.values(), where)
        while True:
            parts = treatment.parts(capture, proof)
            blocks = {part.block.key: part.block for several in parts.values() for part in several}
            if not treatment.settled(blocks, known, where):
                continue
            blocks |= {block.key: block for block in treatment.singles().values()}
            planned = self.groups.planned([block for key, block in blocks.items() if key not in known], where)
            found = self.owners.find(capture, outputs, proof, parts, self.groups.owned(planned), masked)
            refuse(found.refused, where)
            if not found.problems:
                break
            treatment.give_up(found.problems, known.values(), where)
        treatment.check_fallback(capture, outputs, proof, where)
        self.following.follow(capture, proof, parts, found.owners, known, where)
        return proof, parts, found.owners

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
