"""The third part of a step: from the gradient to the natural gradient, by damped inverses of the curvature."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kronfisher.fisher.damping import Damping
from kronfisher.optim.inner_product import inner
from kronfisher.optim.intervals import Refresh
from kronfisher.optim.inverses import Inverses
from kronfisher.optim.layer_inverse import LayerInverse
from kronfisher.optim.layer_statistics import periods
from kronfisher.optim.ownership import Ownership
from kronfisher.optim.row_inverse import RowInverse

__all__ = ["Descent", "Direction"]

DRIFT = 2.0  # the factor by which λ may leave the one in an inverse before that is made anew out of turn


@dataclass(frozen=True)
class Descent:
    """The direction of a step.

    Attributes:
        natural: ``(F̆ + λ)⁻¹ ∇h`` by parameter name, times each group's share of the largest learning rate.
        gradients: ``∇h``, those that were formed from rows among them.
        slope: ``naturalᵀ ∇h``, a 0-dim tensor.
        rate: the largest learning rate.
    """

    natural: dict[str, Tensor]
    gradients: dict[str, Tensor]
    slope: Tensor
    rate: float


class Direction(Inverses):
    """Damped inverses of all layers.

    Args:
        parameters: name → parameter, all that may be trained.
        damping: how λ enters.
        refresh: periods.
        ownership: as in `Inverses`.

    Attributes:
        inverses: one for each layer, in the order of the layers.
        seconds: spent on making inverses.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        damping: Damping,
        refresh: Refresh,
        ownership: Ownership | None = None,
    ) -> None:
        super().__init__(parameters, refresh, ownership)
        self.damping = damping

    # Inverses ---------------------------------------------------------------------------------------------------------

    def measure(self) -> float:
        """The mean eigenvalue of the statistics as they are now."""
        with self._arithmetic():
            for one in self.inverses:
                if one.ready:
                    one.measure()
        return _mean(self.inverses)

    def renew(self, value: float, step: int) -> None:
        """Make the inverses that are due with λ = `value`, and those whose λ is far from it."""
        began, rhythm = time.perf_counter(), periods(self.refresh, (one.layer for one in self.inverses))
        self._assign()
        with self._arithmetic():
            for place, one in enumerate(self.inverses):
                if not one.ready:
                    continue
                drifted = one.value > 0 and not 1 / DRIFT <= value / one.value <= DRIFT
                if one.due <= step or one.made < 0:
                    one.measure()
                    self._make(one, value, step)
                    one.due = rhythm.turn(step, place, len(self.inverses))
                elif one.spectral and value != one.value:
                    self._make(one, value, one.made)
                elif drifted:
                    one.measure()
                    self._make(one, value, step)
        self.seconds += time.perf_counter() - began

    def _make(self, one: LayerInverse, value: float, step: int) -> None:
        with self._making([one], value, step) as own:
            for each in own:
                each.make(self.damping, value, step)

    # Directions -------------------------------------------------------------------------------------------------------

    def descend(
        self, gradients: Mapping[str, Tensor], value: float, rates: Mapping[str, float], rows: RowInverse | None = None
    ) -> Descent:
        """The natural gradient of the loss for λ = `value`.

        Args:
            gradients: ``∇h`` by parameter name.
            value: λ.
            rates: parameter name → learning rate.
            rows: of layers whose gradient was not formed, or need not be.
        """
        gradients = dict(gradients)
        if rows is not None:
            rows.form_missing(gradients, self._parameters)
        natural = self.precondition(gradients, value, rows)
        top = max(rates[name] for name in natural)
        shares = {name: rates[name] / (top or 1.0) for name in natural}
        slope = inner(natural, gradients, shares) if gradients else None
        slopes = {} if rows is None else rows.slopes
        for one in self.inverses:
            name = one.blocks[0].parameters[0]
            if one.name in slopes and name not in gradients:
                part = slopes[one.name] * shares[name]
                slope = part if slope is None else slope + part
        assert slope is not None
        for name, direction in natural.items():
            if top and rates[name] != top:
                direction.mul_(shares[name])
        return Descent(natural, gradients, slope, top)

    def precondition(
        self, gradients: Mapping[str, Tensor], value: float, rows: RowInverse | None = None
    ) -> dict[str, Tensor]:
        """``(F̆ + λ)⁻¹`` times a vector ``{name: [*shape]}``; uncovered parameters are divided by a number.

        The number is the mean eigenvalue of the covered part plus λ, so that they move neither faster nor slower than
        the others do on average. Layers with `rows` take them in place of the gradient.
        """
        out = self.apply(gradients, rows)
        with self._arithmetic():
            # The mean eigenvalue as the last factorisations saw it.
            mean = _mean([one for one in self.inverses if one.mean or one.made >= 0])
            rest = 1 / (mean + value)
            return out | {name: tensor * rest for name, tensor in gradients.items() if name not in out}


def _mean(inverses: Sequence[LayerInverse]) -> float:
    """Their mean eigenvalue, weighted by dimensions."""
    return sum(one.mean * one.dim for one in inverses) / max(sum(one.dim for one in inverses), 1)
