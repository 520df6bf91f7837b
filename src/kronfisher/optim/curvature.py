"""Curvature during training: statistics from some batches, moving averages, inverses that are renewed in turns."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.capture.capture import Capture, Receiver
from kronfisher.errors import DataError, NumericalError, UnsupportedError
from kronfisher.estimation.accumulator import Accumulator, Labels
from kronfisher.fisher.blocks import Block
from kronfisher.fisher.damping import Damping
from kronfisher.fisher.storage import block_of
from kronfisher.fits import Choice, Fit, choose
from kronfisher.likelihoods import Likelihood
from kronfisher.linalg import full_precision, plain_arithmetic
from kronfisher.optim.intervals import Refresh
from kronfisher.optim.layer_state import Layer
from kronfisher.optim.moving_average import Phased, Phases
from kronfisher.optim.row_inverse import Rows, apply

__all__ = ["Curvature"]

DRIFT = 2.0  # the factor by which λ may leave the one in an inverse before that is made anew out of turn


class Curvature:
    """What `NaturalGradient` and `Preconditioner` know of the Fisher matrix.

    Args:
        model: unwrapped.
        parameters: name → parameter, all that may be trained.
        likelihood: what the outputs mean.
        fit: structure, as in `estimate`.
        damping: how λ enters.
        refresh: periods.
        labels: as in `estimate`.
        samples: label draws per datum.
        seed: of the draws; those of a step depend on the seed and the step alone.

    Attributes:
        step: how many steps were made.
        dropped: how many batches brought statistics that were not finite and were left out.
        seconds: by phase.
        absorbing: of those for statistics, the seconds within backward passes.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        likelihood: Likelihood,
        *,
        fit: Choice,
        damping: Damping,
        refresh: Refresh,
        labels: Labels,
        samples: int,
        seed: int,
    ) -> None:
        self.model, self.parameters, self.likelihood = model, parameters, likelihood
        self.damping, self.refresh, self.samples, self.seed = damping, refresh, samples, seed
        self.labels: Labels = labels
        self.fits: dict[str, Fit] = {name: Phased(one) for name, one in choose(fit, parameters).items()}
        self._accumulator()  # refuses bad settings now, not at the first batch
        self.run: Accumulator | None = None
        self.layers: list[Layer] = []
        self.step = 0
        self.statistics_due = 0
        self.dropped = 0
        self.seconds = {"statistics": 0.0, "inverses": 0.0}
        self.absorbing = 0.0
        self._open = False
        self._trained: frozenset[str] | None = None  # names of the parameters that were trained at the last step

    @property
    def due(self) -> bool:
        """Whether this step's batch is to bring statistics."""
        return self.step >= self.statistics_due

    @property
    def uncovered(self) -> dict[str, str]:
        """Parameter → why no block covers it."""
        return {} if self.run is None else self.run.treatment.fallback

    @property
    def coupled(self) -> list[str]:
        """Names of blocks whose rows mix data."""
        return [] if self.run is None else sorted(self.run.owners.mixed)

    @property
    def cuts(self) -> list[str]:
        """Where chains of layers are cut and why, for fits that treat neighbours together."""
        blocks = [block for layer in self.layers for block in layer.blocks]
        return [] if self.run is None else self.run.following.notes(blocks)

    def _accumulator(self) -> Accumulator:
        return Accumulator(
            self.model,
            self.parameters,
            self.likelihood,
            self.fits,
            self.labels,
            self.samples,
            self.seed,
            training=True,
        )

    # Forward ----------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Begin with empty states, at first and whenever other parameters are trained than before."""
        trained = frozenset(name for name, p in self.parameters.items() if p.requires_grad)
        if trained != self._trained:
            self.run, self._trained, self.statistics_due = self._accumulator(), trained, self.step

    @contextmanager
    def captured(self) -> Iterator[Capture]:
        """Watch a forward pass of the caller's."""
        assert self.run is not None
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # otherwise nothing can be compiled, and importing it takes seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            constants = (*self.model.parameters(), *self.model.buffers())
            yield stack.enter_context(Capture(self.run.parameters, constants, lenient=True))

    def extend(self, parameters: dict[str, nn.Parameter], fit: Choice) -> None:
        """Treat these parameters from now on; what is known of the others stays."""
        self.parameters = parameters
        self.fits = {name: Phased(one) for name, one in choose(fit, parameters).items()}
        self._trained = None

    # Statistics -------------------------------------------------------------------------------------------------------

    def absorb(
        self,
        capture: Capture,
        outputs: Tensor,
        targets: Any,
        *,
        retain: bool,
        own: Callable[[Receiver, float | Tensor], None] | None = None,
    ) -> None:
        """Statistics of one batch, or of one part of it, for this step; see `Accumulator.absorb`.

        Whatever goes wrong, this step's statistics are left out then.
        """
        run = self.run
        assert run is not None
        began = time.perf_counter()
        if not self._open:
            self._open = True
            run.seed = (self.seed << 32) + self.step
            run.start_pass()
        try:
            self._absorb(run, capture, outputs, targets, retain, own)
        except BaseException:  # out of memory, an interruption, values that are not finite: half a batch is none
            self.discard()
            raise
        spent = time.perf_counter() - began
        self.seconds["statistics"] += spent
        self.absorbing += spent

    def _absorb(
        self, run: Accumulator, capture: Capture, outputs: Tensor, targets: Any, retain: bool, own: Any
    ) -> None:
        where = f"step {self.step}"
        with full_precision(run.device.type):
            run.absorb(capture, outputs, targets, where, retain=retain or self.turns, own=own)
            self._adopt()
            if turning := [layer for layer in self.layers if self._turns(layer) and layer.turn(self.refresh.average)]:
                for group in run.groups:
                    group.done = all(group is not layer.group for layer in turning)
                run.absorb(capture, outputs, targets, where, retain=retain)
                for group in run.groups:
                    group.done = False
                for layer in turning:
                    layer.turned = self.step
                    layer.merge_last()

    def _adopt(self) -> None:
        """A layer for every group; those that treated the same blocks before go on."""
        assert self.run is not None
        same = len(self.layers) == len(self.run.groups)
        if same and self.layers and all(x.group is y for x, y in zip(self.layers, self.run.groups, strict=True)):
            return
        before = {layer.blocks: layer for layer in self.layers}
        self.layers = []
        for group in self.run.groups:
            layer = before.get(group.blocks)
            if layer is None or (layer.group is not group and group.state.plan.passes > 1):
                layer = Layer(group, due=self.step)
            layer.group = group
            self.layers.append(layer)
        if not self.layers:
            reasons = "\n  ".join(self.uncovered.values())
            raise UnsupportedError(f"No block covers any of the parameters:\n  {reasons}\nUse a first-order optimiser.")

    @property
    def turns(self) -> bool:
        """Whether statistics of this step may need the graph twice."""
        return not self.layers or any(self._turns(layer) for layer in self.layers)

    @property
    def _rhythm(self) -> Refresh:
        """Periods for the fits in use."""
        stale = any(layer.group.state.plan.passes > 1 for layer in self.layers)
        return self.refresh.careful() if stale else self.refresh

    def _turns(self, layer: Layer) -> bool:
        """Whether the second pass of the layer's fit begins anew with this batch."""
        return layer.group.state.plan.passes > 1 and layer.due <= self.step and layer.turned != self.step

    def merge(self) -> None:
        """Take this step's statistics into the averages; if any is not finite, all are left out."""
        if not self._open:
            return
        self._open = False
        began = time.perf_counter()
        with self._arithmetic():
            try:
                for layer in self.layers:
                    layer.group.state.checked()
            except NumericalError:
                self.discard()
            else:
                for layer in self.layers:
                    layer.merge(self.refresh.average)
                self.statistics_due = self._rhythm.after(self.step, self.refresh.statistics)
        self.seconds["statistics"] += time.perf_counter() - began

    def discard(self) -> None:
        """Leave this step's statistics out."""
        self._open = False
        self.dropped += 1
        for group in self.run.groups if self.run else ():
            fit, state = group.fit, group.state
            assert isinstance(fit, Phased) and isinstance(state, Phases)
            group.state, group.done = fit.fresh(state), False

    # Inverses ---------------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether there are statistics at all."""
        return any(layer.average is not None for layer in self.layers)

    @property
    def mean(self) -> float:
        """The mean eigenvalue of the covered part, as the last factorisations saw it."""
        known = [layer for layer in self.layers if layer.mean or layer.made >= 0]
        return sum(layer.mean * layer.dim for layer in known) / max(sum(layer.dim for layer in known), 1)

    def measure(self) -> float:
        """The mean eigenvalue of the averages as they are now."""
        with self._arithmetic():
            for layer in self.layers:
                if layer.average is not None:
                    layer.estimate()
        return sum(layer.mean * layer.dim for layer in self.layers) / max(sum(layer.dim for layer in self.layers), 1)

    def renew(self, value: float) -> None:
        """Make the inverses that are due with λ = `value`, and those that λ has left far behind."""
        began, rhythm = time.perf_counter(), self._rhythm
        with self._arithmetic():
            for place, layer in enumerate(self.layers):
                if layer.average is None:
                    continue
                moved = layer.value > 0 and not 1 / DRIFT <= value / layer.value <= DRIFT
                if layer.due <= self.step or layer.inverse is None:
                    layer.estimate()
                    layer.invert(self.damping, value, self.step)
                    layer.due = rhythm.turn(self.step, place, len(self.layers))
                elif layer.operator is not None and value != layer.value:  # its spectrum is at hand
                    layer.invert(self.damping, value, layer.made)
                elif moved:
                    layer.estimate()
                    layer.invert(self.damping, value, self.step)
        self.seconds["inverses"] += time.perf_counter() - began

    def precondition(
        self, gradients: Mapping[str, Tensor], value: float, rows: Rows | None = None
    ) -> dict[str, Tensor]:
        """``(F̆ + λ)⁻¹`` times a vector ``{name: [*shape]}``; uncovered parameters are divided by a number.

        The number is the mean eigenvalue of what is covered plus λ, so that they move neither faster nor slower than
        the others do on average. Layers of which `rows` are given take them in place of the gradient.
        """
        rows = rows or Rows({})
        with self._arithmetic():
            rows_of = {name: tensor[None] for name, tensor in gradients.items()}
            out: dict[str, Tensor] = {}
            for layer in self.layers:
                if layer.inverse is None:
                    continue
                given = layer.name in rows.found and layer.separable
                for name in (name for block in layer.blocks for name in block.parameters):
                    if name not in out and (given or name in rows_of):
                        like = self.parameters[name].unsqueeze(0)
                        out[name] = torch.zeros_like(like, memory_format=torch.contiguous_format)
                if given:
                    apply(layer, rows, out)
                else:
                    layer.apply(rows_of, out)
            rest = 1 / (self.mean + value)
            left = {name: tensor * rest for name, tensor in gradients.items() if name not in out}
            return {name: tensor[0] for name, tensor in out.items()} | left

    def _arithmetic(self) -> AbstractContextManager[None]:
        assert self.run is not None
        return plain_arithmetic(self.run.device)

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs, as tensors, numbers and strings."""
        return {
            "step": self.step,
            "statistics_due": self.statistics_due,
            "uncovered": dict(self.uncovered),
            "coupled": list(self.coupled),
            "apart": sorted(self.run.treatment.apart) if self.run else [],
            "trained": sorted(self._trained or ()),
            "dropped": self.dropped,
            "fits": {name: repr(fit) for name, fit in self.fits.items()},
            "layers": [layer.state() for layer in self.layers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` wrote.

        Raises:
            DataError: it belongs to another model or to other fits.
        """
        fits = {name: repr(fit) for name, fit in self.fits.items()}
        if state["fits"] != fits:
            differ = sorted(
                name for name in fits.keys() | state["fits"].keys() if fits.get(name) != state["fits"].get(name)
            )
            raise DataError(
                f"the state was saved with other parameters or other fits; they differ at {', '.join(differ)}"
            )
        self.step, self.statistics_due, self.dropped = state["step"], state["statistics_due"], state["dropped"]
        run = self._accumulator()
        written: dict[tuple[Block, ...], Any] = {
            tuple(block_of(block) for block in entry["blocks"]): entry for entry in state["layers"]
        }
        run.resume(state["uncovered"], set(state["apart"]), set(state["coupled"]), list(written))
        self.run, self._trained = run, frozenset(state["trained"])
        self.layers = [Layer(group) for group in run.groups]
        for layer, entry in zip(self.layers, written.values(), strict=True):
            layer.load(entry, run.device)


def require_outputs(outputs: Any) -> None:
    """DataError unless these are the outputs of a model."""
    if not isinstance(outputs, Tensor):
        raise DataError(
            f"the model returned {type(outputs).__name__}, not a tensor; pass a function that returns the outputs, "
            "such as step(lambda: model(x).logits, y)"
        )
    if outputs.dim() == 0:
        raise DataError("the outputs are a single number; step(lambda: model(x), y) takes the outputs, not the loss")
