"""The motion of all units: momentum, outliers clipped, steps of one size, weight decay."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor

from kronfisher.optim.foreach import average_squares_, divided, lerp_, lerp_to_each_, mul_, norms, over_roots
from kronfisher.optim.layerwise.pieces import Pieces
from kronfisher.optim.layerwise.rates import Paths, Rates
from kronfisher.optim.layerwise.scatter import Scatter
from kronfisher.optim.layerwise.units import Unit
from kronfisher.optim.misfit import Misfit
from kronfisher.optim.trained_parameters import TrainedParameters

__all__ = ["Motion"]

RMS = 0.2  # of the elements of a natural unit's step of rate one: where the rates of Muon and of AdamW agree
CLIP = 5.0  # a direction longer than its mean length by this factor is clipped to it
OUTLIER = 10.0  # and by this factor counts as so long in the mean, which follows lengths that rise in earnest
CLIP_MEMORY = 0.95  # of the mean length
SECOND_MOMENT = 0.999  # the decay of Adam's second moments
FIRST_MOMENT = 0.9  # the decay of Adam's first moments
EPSILON = 1e-8
PROMISE = 0.5  # the share of how far the loss can fall that a step may promise, by its gradient, in one go


@dataclass
class Motion:
    """Moves every unit along its momentum.

    Attributes:
        momentum: decay β of the average of natural gradients, while gains are one (`Rates`); the step looks one average
            ahead (Nesterov).
        adaptive: the step of one element of the other units, relative to the rate.
        rates: of the units.
        scatter: of the iterates about their average.
        lengths: the mean length of each unit's direction, ``[U]``.
        skipped: how many steps moved nothing because a gradient was not finite, 0-dim.
        units: in the order of `rates` and `lengths`.
    """

    momentum: float
    adaptive: float = 1.0
    rates: Rates = field(default_factory=Rates)
    scatter: Scatter = field(default_factory=Scatter)
    lengths: Tensor = field(default_factory=lambda: torch.zeros(0))
    skipped: Tensor = field(default_factory=lambda: torch.zeros(()))
    units: list[Unit] = field(default_factory=list)
    _followed: Sequence[Unit] | None = field(default=None, init=False, repr=False)
    _members: list[tuple[int, str]] = field(default_factory=list, init=False, repr=False)  # natural units first
    _pieces: Pieces | None = field(default=None, init=False, repr=False)

    def follow(self, units: Sequence[Unit], device: torch.device) -> None:
        """Treat these units from now on; what is known of the same parameters is kept."""
        if units is self._followed:
            return
        self._followed, known = units, list(units) == self.units
        members = [(place, name) for place, unit in enumerate(units) for name in unit.parameters]
        self._members = sorted(members, key=lambda member: not units[member[0]].natural)
        if known:
            return
        before = {unit.parameters: place for place, unit in enumerate(self.units)}
        places = [before.get(unit.parameters) for unit in units]
        self.rates.resize(places, device)
        lengths = torch.cat([self.lengths.new_zeros(1).to(device), self.lengths.to(device)])
        self.lengths = lengths[[0 if place is None else 1 + place for place in places]]
        self.skipped = self.skipped.to(device)
        self.units, self._pieces = list(units), None

    def move(
        self,
        trained: TrainedParameters,
        gradients: Mapping[str, Tensor],
        natural: Mapping[str, Tensor],
        rate: float | Tensor,
        misfit: Misfit,
        averages: Mapping[str, Tensor] | None = None,
        even: Callable[[Mapping[str, Tensor]], None] | None = None,
    ) -> None:
        """One step of every unit that has a gradient.

        All are shortened alike where natural units promise that the loss falls by more than half of its excess, or
        rises by that where momentum leads uphill: no linear model of a loss holds that far. Wide layers and few rows
        make such steps, whose directions are as many as rows, and each of them as long as if there were as many as the
        layer is wide.

        Args:
            trained: the parameters.
            gradients: of this batch, by parameter name.
            natural: natural gradients of natural units, by parameter name; used up.
            rate: of a unit whose factor and learning rate are one, but for what `misfit` makes of it.
            misfit: what is left to fit, and how far the loss can fall.
            averages: of the iterates, by parameter name; None: there are none.
            even: changes updates of natural units in place, by parameter name, and keeps their lengths.
        """
        where = self._find_pieces(gradients, natural, trained)
        states = [self._state(trained, name) for name in where.names]
        parameters = [trained.named[name] for name in where.names]
        given = where.cut([gradients[name] for name in where.names])
        momenta = where.lasting("momenta", [state["momentum"] for state in states])
        directions = where.cut(
            [
                natural[name] if own else gradients[name].clone()
                for name, own in zip(where.names, where.own, strict=True)
            ]
        )
        evidence, across, lengths = where.measure(given, momenta, directions)
        clip, finite = self._clip(lengths.sqrt(), where.moving)
        decay = 1 - where.paths.share(self.rates.gain)
        promise = across * clip + decay.square() * (evidence.abs() - across * clip)  # of gradient and update
        evidence, squares = (torch.nan_to_num(v, 0.0, 0.0, 0.0) for v in (evidence * clip, across * clip.square()))
        left, excess, calm = misfit.left, misfit.excess, misfit.calm
        self.scatter.settle(misfit.leaps)
        room = settled = cheap = where.nothing
        if averages is not None:  # which takes out what only goes to and fro, unless that throws training back
            room, settled = self.scatter.room(misfit.present), self.scatter.settled
            means = [averages.get(name, trained.named[name]) for name in where.names]
            ends = where.lasting("parameters", parameters), where.lasting("averages", means)
            cost = where.product_with_differences(given, *ends)
            self.scatter.update(cost, finite)
            cheap = self.scatter.cheap(misfit.present, left)
        factors = self.rates.update(evidence, squares, where.paths, finite, left, room, settled, cheap)
        updates, sizes = self._advance(where, directions, momenta, states, clip)
        if even is not None:
            even(natural)  # which the updates are pieces of
        longest = torch.maximum(self.lengths, sizes)  # an average is no longer than what it is made of, but for changes
        scale = torch.where(longest > 0, where.size / longest, where.size)
        scale = torch.where(where.natural, scale, where.relative)
        rate = rate * calm
        top = max((trained.rates[name] for name in where.names), default=0.0) or 1.0
        promised = (promise * factors * scale).masked_fill_(where.adaptive, 0.0).sum() * (rate * top)
        short = (PROMISE * excess / promised).clamp(max=1.0)
        lost = ~finite
        base = (rate * factors * torch.where(promised > 0, short, 1.0)).masked_fill_(lost, 0.0)
        self.skipped = self.skipped + lost
        if any(trained.decays[name] for name in where.names):
            shrinking = where.spread(base, parameters, where.firsts)
            for parameter, factor, name in zip(parameters, shrinking, where.names, strict=True):
                if decay := trained.decays[name]:
                    parameter.mul_(1 - factor * (trained.rates[name] * decay))
        where.share_rates([trained.rates[name] / top for name in where.names])
        where.add_to(parameters, updates, base * scale * -top)
        torch.clear_autocast_cache()  # it may hold the weights as they were

    def _find_pieces(
        self, gradients: Mapping[str, Tensor], natural: Mapping[str, Tensor], trained: TrainedParameters
    ) -> Pieces:
        """The same ones as long as the same parameters have gradients: a copy to a device would be waited for."""
        members = [(k, n) for k, n in self._members if n in (natural if self.units[k].natural else gradients)]
        if self._pieces is None or self._pieces.members != members:
            sizes = [trained.named[name].numel() for _, name in members]
            self._pieces = Pieces(members, self.units, sizes, self.lengths.device)
            own = self._pieces.natural
            self._pieces.paths = Paths(torch.where(own, self.momentum, FIRST_MOMENT), own)
            self._pieces.size = RMS * self._pieces.root
            self._pieces.relative = torch.where(self._pieces.table, 1.0, self.adaptive)
        return self._pieces

    def _clip(self, lengths: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        """Factors ``[U]`` that clip outliers, and whether all lengths are finite; the mean lengths are updated."""
        finite = (lengths < inf).all()
        known = self.lengths > 0
        most = torch.where(known, CLIP * self.lengths, lengths)
        counted = torch.minimum(lengths, OUTLIER * self.lengths)
        mean = torch.where(known, self.lengths.lerp(counted, 1 - CLIP_MEMORY), lengths)
        self.lengths = torch.where(finite & moving, mean, self.lengths)
        return torch.where(finite & (lengths > most), most / lengths, 1.0), finite

    def _state(self, trained: TrainedParameters, name: str) -> dict[str, Any]:
        parameter = trained.named[name]
        state = trained.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return state

    def _advance(
        self,
        where: Pieces,
        directions: list[Tensor],
        momenta: list[Tensor],
        states: list[dict[str, Any]],
        clip: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        """Take the directions, clipped, into the momenta; the updates, piece by piece, and their lengths ``[U]``."""
        moments = [state for state, own in zip(states, where.own, strict=True) if not own]
        squares, first, second = _second_moments(moments, where)
        clips, lengths = where.spread(clip, directions), []
        share = where.paths.share(self.rates.gain)
        shares, decays = where.spread(share, directions), where.spread(1 - share, directions)
        for some in where.turns:
            own = directions[some]
            for direction in own:
                direction.nan_to_num_(0.0, 0.0, 0.0)
            mul_(own, clips[some])
            if some.start < where.border:
                lerp_to_each_(momenta[some], own, shares[some])
                lerp_to_each_(own, momenta[some], decays[some])
            else:
                place = slice(some.start - where.border, some.stop - where.border)
                moved = _adaptive(own, momenta[some], squares[place], first[place], second[place])
                directions[some] = own = moved
            lengths += norms(own)
        return directions, where.lengths(lengths)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        return {
            "rates": self.rates.state_dict(),
            "scatter": self.scatter.state_dict(),
            "lengths": self.lengths,
            "skipped": self.skipped,
            "units": [[list(unit.parameters), unit.natural, unit.numel, unit.table] for unit in self.units],
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` gave."""
        self.rates.load_state_dict(state["rates"], device)
        self.scatter.load_state_dict(state.get("scatter", {}), device)
        self.lengths, self.skipped = state["lengths"].to(device), state["skipped"].to(device)
        self.units = [Unit(tuple(names), *rest) for names, *rest in state["units"]]
        self._followed = self._pieces = None


def _second_moments(states: list[dict[str, Any]], where: Pieces) -> tuple[list[Tensor], list[float], list[float]]:
    """Adam's second moments of adaptive parameters by piece, and what corrects both moments for their start at zero."""
    for state in states:
        if "square" not in state:
            state["square"], state["steps"] = torch.zeros_like(state["momentum"]), 0
        state["steps"] += 1
    squares = where.lasting("squares", [state["square"] for state in states])
    steps = [state["steps"] for state in states for _ in range(max(-(-state["square"].numel() // where.most), 1))]
    return squares, [1 - FIRST_MOMENT**k for k in steps], [1 - SECOND_MOMENT**k for k in steps]


def _adaptive(
    gradients: list[Tensor], momenta: list[Tensor], squares: list[Tensor], first: list[float], second: list[float]
) -> list[Tensor]:
    """Adam's updates, of size one per element (2014, Kingma & Ba)."""
    lerp_(momenta, gradients, 1 - FIRST_MOMENT)
    average_squares_(squares, gradients, SECOND_MOMENT)
    return over_roots(divided(momenta, first), divided(squares, second), EPSILON)
