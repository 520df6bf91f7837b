"""The motion of all units: momentum, outliers clipped, steps of one size, weight decay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kronfisher.optim.foreach import add_, average_squares_, divided, lerp_, mul_, norms, over_roots
from kronfisher.optim.layerwise.rates import Rates
from kronfisher.optim.layerwise.units import Unit
from kronfisher.optim.trained_parameters import TrainedParameters

__all__ = ["Motion"]

RMS = 0.2  # of the elements of a natural unit's step of rate one: where the rates of Muon and of AdamW agree
CLIP = 10.0  # a direction longer than its mean length by this factor is clipped to it
CLIP_MEMORY = 0.95  # of the mean length
SECOND_MOMENT = 0.999  # the decay of Adam's second moments
FIRST_MOMENT = 0.9  # the decay of Adam's first moments
EPSILON = 1e-8


@dataclass
class Motion:
    """Moves every unit along its momentum.

    Attributes:
        momentum: decay β of the average of natural gradients; the step looks one average ahead (Nesterov).
        adaptive: the step of one element of the other units, relative to the rate.
        rates: of the units.
        lengths: the mean length of each unit's direction, ``[U]``.
        skipped: how many steps moved nothing because a gradient was not finite, 0-dim.
        units: in the order of `rates` and `lengths`.
    """

    momentum: float
    adaptive: float = 1.0
    rates: Rates = field(default_factory=Rates)
    lengths: Tensor = field(default_factory=lambda: torch.zeros(0))
    skipped: Tensor = field(default_factory=lambda: torch.zeros(()))
    units: list[Unit] = field(default_factory=list)
    _places: "_Places | None" = field(default=None, init=False, repr=False)

    def follow(self, units: Sequence[Unit], device: torch.device) -> None:
        """Treat these units from now on; what is known of the same parameters is kept."""
        if list(units) == self.units:
            return
        before = {unit.parameters: place for place, unit in enumerate(self.units)}
        places = [before.get(unit.parameters) for unit in units]
        self.rates.resize(places, device)
        lengths = torch.cat([self.lengths.new_zeros(1).to(device), self.lengths.to(device)])
        self.lengths = lengths[[0 if place is None else 1 + place for place in places]]
        self.skipped = self.skipped.to(device)
        self.units, self._places = list(units), None

    def move(
        self,
        trained: TrainedParameters,
        gradients: Mapping[str, Tensor],
        natural: Mapping[str, Tensor],
        rate: float | Tensor,
    ) -> None:
        """One step of every unit that has a gradient.

        Args:
            trained: the parameters.
            gradients: of this batch, by parameter name.
            natural: natural gradients of natural units, by parameter name; used up.
            rate: of a unit whose factor and learning rate are one.
        """
        places, names = [], []
        for place, unit in enumerate(self.units):
            for name in unit.parameters:
                if name in (natural if unit.natural else gradients):
                    places.append(place)
                    names.append(name)
        where = self._find_places(places, [trained.named[name].numel() for name in names])
        plain = [gradients[name] for name in names]
        directions = [
            natural[n] if self.units[k].natural else gradients[n].clone() for k, n in zip(places, names, strict=True)
        ]
        states = [self._state(trained, name) for name in names]
        momenta = [state["momentum"] for state in states]
        evidence = where.sum([torch.dot(g.reshape(-1), m.reshape(-1)) for g, m in zip(plain, momenta, strict=True)])
        squares = where.sum([torch.dot(g.reshape(-1), d.reshape(-1)) for g, d in zip(plain, directions, strict=True)])
        lengths = where.lengths(directions)
        clip, finite = self._clip(lengths, where.moving)
        decay = torch.where(where.natural, self.momentum, FIRST_MOMENT)
        evidence, squares = (torch.nan_to_num(v, 0.0, 0.0, 0.0) for v in (evidence * clip, squares * clip.square()))
        factors = self.rates.update(evidence, squares, decay, finite)
        for direction in directions:
            direction.nan_to_num_(0.0, 0.0, 0.0)
        mul_(directions, where.spread(clip, directions))
        updates = self._advance(directions, states, places)
        sizes = where.lengths(updates)
        longest = torch.maximum(self.lengths, sizes)  # an average is no longer than what it is made of, but for changes
        scale = torch.where(
            where.natural,
            RMS * where.numel.sqrt() / torch.where(longest > 0, longest, 1),
            where.relative(self.adaptive),
        )
        base = torch.where(finite, rate * factors, 0.0)
        self.skipped = self.skipped + ~finite
        parameters = [trained.named[name] for name in names]
        if any(trained.decays[name] for name in names):
            for parameter, factor, name in zip(parameters, where.spread(base, parameters), names, strict=True):
                if decay := trained.decays[name]:
                    parameter.mul_(1 - factor * (trained.rates[name] * decay))
        top = max((trained.rates[name] for name in names), default=0.0) or 1.0
        where.share_rates([trained.rates[name] / top for name in names])
        mul_(updates, where.spread(base * scale * -top, updates, where.shares))
        add_(parameters, updates)
        torch.clear_autocast_cache()  # it may hold the weights as they were

    def _find_places(self, places: list[int], numel: list[int]) -> "_Places":
        """The same ones as long as the same parameters have gradients: a copy to a device would be waited for."""
        if self._places is None or (self._places.places, self._places.sizes) != (places, numel):
            self._places = _Places(places, self.units, numel, self.lengths.device)
        return self._places

    def _clip(self, lengths: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        """Factors ``[U]`` that clip outliers, and whether all lengths are finite; the mean lengths are updated."""
        finite = torch.isfinite(lengths).all()
        known = self.lengths > 0
        most = torch.where(known, CLIP * self.lengths, lengths)
        mean = torch.where(known, self.lengths.lerp(torch.minimum(lengths, most), 1 - CLIP_MEMORY), lengths)
        self.lengths = torch.where(finite & moving, mean, self.lengths)
        return torch.where(finite & (lengths > most), most / lengths, 1.0), finite

    def _state(self, trained: TrainedParameters, name: str) -> dict[str, Any]:
        parameter = trained.named[name]
        state = trained.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return state

    def _advance(self, directions: list[Tensor], states: list[dict[str, Any]], places: list[int]) -> list[Tensor]:
        """Take the directions into the momenta; the updates, in their order."""
        natural = [k for k, place in enumerate(places) if self.units[place].natural]
        own, momenta = [directions[k] for k in natural], [states[k]["momentum"] for k in natural]
        if own:
            lerp_(momenta, own, 1 - self.momentum)
            lerp_(own, momenta, self.momentum)
        updates = list(directions)
        others = [k for k, place in enumerate(places) if not self.units[place].natural]
        if others:
            made = _adaptive([directions[k] for k in others], [states[k] for k in others])
            for k, update in zip(others, made, strict=True):
                updates[k] = update
        return updates

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        return {
            "rates": self.rates.state_dict(),
            "lengths": self.lengths,
            "skipped": self.skipped,
            "units": [[list(unit.parameters), unit.natural, unit.numel, unit.table] for unit in self.units],
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` gave."""
        self.rates.load_state_dict(state["rates"], device)
        self.lengths, self.skipped = state["lengths"].to(device), state["skipped"].to(device)
        self.units = [Unit(tuple(names), *rest) for names, *rest in state["units"]]


def _adaptive(gradients: list[Tensor], states: list[dict[str, Any]]) -> list[Tensor]:
    """Adam's updates, of size one per element (2014, Kingma & Ba)."""
    for state in states:
        if "square" not in state:
            state["square"], state["steps"] = torch.zeros_like(state["momentum"]), 0
        state["steps"] += 1
    momenta, squares = ([state[key] for state in states] for key in ("momentum", "square"))
    lerp_(momenta, gradients, 1 - FIRST_MOMENT)
    average_squares_(squares, gradients, SECOND_MOMENT)
    first = [1 - FIRST_MOMENT ** state["steps"] for state in states]
    second = [1 - SECOND_MOMENT ** state["steps"] for state in states]
    return over_roots(divided(momenta, first), divided(squares, second), EPSILON)


class _Places:
    """Which unit each of some parameters belongs to.

    Attributes:
        places: parameter → unit.
        sizes: parameter → its number of elements.
        index: parameter → unit, ``[P]``.
        moving: units with any of these parameters, ``[U]``.
        natural: units that follow the natural gradient, ``[U]``.
        numel: elements of these parameters by unit, ``[U]``.
        table: units that move at the full rate though they are no matrices of layers, ``[U]``.
        shares: parameter → its learning rate as a share of the largest, ``[P]``; None where all are equal.
    """

    def __init__(self, places: list[int], units: Sequence[Unit], numel: list[int], device: torch.device) -> None:
        self.places, self.sizes = places, numel
        self.shares: Tensor | None = None
        self._shares: list[str] = []
        sizes, natural = [0.0] * len(units), [unit.natural for unit in units]
        for place, size in zip(places, numel, strict=True):
            sizes[place] += size
        self.index = torch.tensor(places, device=device)
        self.numel = torch.tensor(sizes, device=device)
        self.moving, self.natural = self.numel > 0, torch.tensor(natural, device=device)
        self.table = torch.tensor([unit.table for unit in units], device=device)

    def relative(self, adaptive: float) -> Tensor:
        """The rates of adaptive units ``[U]``, relative to the rate: of tables 1."""
        return torch.where(self.table, 1.0, adaptive)

    def share_rates(self, shares: Sequence[float]) -> None:
        """Take over shares of the largest learning rate; schedules that scale all rates alike leave them alone."""
        if all(share == 1.0 for share in shares):
            self.shares = None
            return
        digits = [f"{share:.6g}" for share in shares]  # beyond these, quotients of scheduled rates are noise
        if self.shares is None or digits != self._shares:
            self._shares, self.shares = digits, torch.tensor(list(map(float, digits)), device=self.index.device)

    def sum(self, values: Sequence[Tensor]) -> Tensor:
        """Sums over units ``[U]`` of 0-dim tensors."""
        values = values if len({value.dtype for value in values}) == 1 else [value.float() for value in values]
        stacked = torch.stack(list(values)).to(self.numel.dtype)
        return torch.zeros_like(self.numel).index_add_(0, self.index, stacked)

    def lengths(self, tensors: Sequence[Tensor]) -> Tensor:
        """Norms of units ``[U]``."""
        each = norms(tensors)
        each = each if len({norm.dtype for norm in each}) == 1 else [norm.float() for norm in each]
        stacked = torch.stack(each).to(self.numel.dtype)
        return torch.zeros_like(self.numel).index_add_(0, self.index, stacked.square()).sqrt()

    def spread(self, values: Tensor, like: Sequence[Tensor], own: Tensor | None = None) -> list[Tensor]:
        """The values ``[U]`` of their units, one 0-dim tensor for each parameter, times numbers of its own."""
        chosen = values[self.index]
        each = (chosen if own is None else chosen * own).unbind()
        return [value.to(tensor.dtype) for value, tensor in zip(each, like, strict=True)]
