"""Each unit's rate, moved by evidence: does the gradient of a new batch still point along the unit's path?"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp
from typing import Any

import torch
from torch import Tensor

__all__ = ["LARGEST", "Paths", "Rates"]

MEMORY = 0.9  # of the averages of the evidence
SPEED = 0.02  # by how much full agreement lengthens a step, and full contradiction shortens it
SPAN = 100.0  # steps after which the bounds of the rates begin to part
POWER = 0.5  # with which they do: averages of iterates still converge, and noise alone is no reason to fall faster
OVERSHOT = 0.15  # the share of a gradient that opposes the path from which on steps are too long, whatever the noise
BRAKE = 0.3  # by how much such a share, beyond that, lowers the bounds of the rate
RECOVERY = 0.02  # by how much the bounds rise again at every step
CERTAIN = 0.5  # the share of a gradient along the path from which on signal so outweighs noise that steps may grow
ALLOWED = 1 / 6  # the power of the share that is left to fit with which steps that overshoot may grow
HEAVIER = (
    0.01  # by how much a step that only overshoots lowers the gain of an average, and one along the path raises it
)
LEAST_GAIN = 0.1  # of an average: at momentum .9 it then looks back over a hundred steps
LARGEST = 10.0  # factor, of units whose gain is one
TOLERANCE = 0.05  # the share of a gradient that may oppose the path where there is room
TOLERANCE_FITTED = 0.25  # the same where nothing is left to fit: what opposes is then more the valley than the noise


class Paths:
    """How the averages p of gradients are made that units move along.

    Args:
        decay: β ``[U]``.
        natural: whether they are of natural gradients ``[U]``.
    """

    def __init__(self, decay: Tensor, natural: Tensor) -> None:
        self.natural, self._share = natural, 1 - decay

    def share(self, gain: Tensor) -> Tensor:
        """The weight of a new gradient in the averages of these gains, ``[U]``."""
        return self._share * gain

    def square(self, before: Tensor, products: Tensor, squares: Tensor, gain: Tensor) -> Tensor:
        """``‖p‖² [U]`` after gradients g, from that of before, ``⟨g, p⟩``, ``⟨g, d⟩`` and the gains."""
        share = self.share(gain)
        inner = torch.addcmul((1 - share) * before, share, products, value=2)
        return torch.addcmul((1 - share) * inner, share.square(), squares).clamp_min_(0)


@dataclass
class Rates:
    """Factors on the rates of all units, in ``[u/s, 1 + h (s − 1)]`` with ``s = (1 + k/100)^1/2`` at step k.

    That is times a brake b, or a boost, and h is the room that the scatter of iterates leaves (`Scatter`). The lower
    bound of natural units is ``u/s^(1 − h)`` and rises, no faster than evidence could, to ``(u b/s)^(1 − h)``: where
    scatter costs nothing, noise is no reason to go slower. Nor are gradients that oppose the path whatever the rate, as
    those of few batches in turn, each of which fits what the others do not.

    ``r = EMA(⟨g, p⟩) / EMA(|⟨g, p⟩|)`` of a new gradient g and the path p, an average of earlier natural gradients:
    near 1, the path still leads down; near −1, it has gone too far. ``f ← f exp(.02 r)``. Noise alone makes r negative,
    but small beside the gradient: ``c = EMA(⟨g, p⟩ / (‖g‖ ‖p‖))``, with norms in the metric of the inverse curvature,
    falls below −.15 only where steps overshoot, and then lowers the bounds of f, too; above .15, it raises them again,
    and above .5, beyond one: there is hardly any noise, and a step of one size is only as long as it is by convention.

    While the average of the iterates takes the noise out, a small share of a gradient may oppose the path: r is made
    of ``⟨g, p⟩ + t h ‖g‖ ‖p‖`` with t from .05 to, where the data are fitted, .25. It takes out steps to and fro across
    a valley, too, while others go on along it.
    While all is left to fit, steps that overshoot (c < −.15) therefore grow up to s, whatever the scatter costs: r is
    1, and there is no brake below one. They go on along the flat directions, and where there is little noise, as with
    functions of coordinates, that decides how fast the loss falls. Later r lies as far between its own value and 1 as
    the sixth root of u says, which is also the least that a brake can be; or, while the scatter is cheap, all is as it
    was. Then natural units that overshoot also get a heavier average: the weight ``1 − β`` of a new gradient is
    multiplied by a gain q, which falls by a hundredth a step, down to a tenth, and rises again where gradients are
    along the path. Such an average holds less of what goes to and fro, and bears steps longer by 1/q.

    Attributes:
        factors: f ``[U]``.
        signed: the average of ``⟨g, p⟩ + t h ‖g‖ ‖p‖``, ``[U]``.
        absolute: the average of its absolute value, ``[U]``.
        cosine: c ``[U]``.
        path: ``‖p‖²``, ``[U]``.
        brake: the factor on the bounds of f, ``[U]``.
        gain: q, ``[U]``.
        steps: k.
    """

    factors: Tensor = field(default_factory=lambda: torch.ones(0))
    signed: Tensor = field(default_factory=lambda: torch.zeros(0))
    absolute: Tensor = field(default_factory=lambda: torch.zeros(0))
    cosine: Tensor = field(default_factory=lambda: torch.zeros(0))
    path: Tensor = field(default_factory=lambda: torch.zeros(0))
    brake: Tensor = field(default_factory=lambda: torch.ones(0))
    gain: Tensor = field(default_factory=lambda: torch.ones(0))
    steps: int = 0

    def resize(self, places: list[int | None], device: torch.device) -> None:
        """Reorder the units: for each its place before, or None for a new one."""
        index = [0 if place is None else 1 + place for place in places]
        for name in ("factors", "signed", "absolute", "cosine", "path", "brake", "gain"):
            new = name in ("factors", "brake", "gain")
            values = getattr(self, name).to(device)
            setattr(self, name, torch.cat([values.new_full((1,), float(new)), values])[index])

    def update(
        self,
        products: Tensor,
        squares: Tensor,
        paths: Paths,
        finite: Tensor,
        left: Tensor,
        room: Tensor,
        settled: Tensor,
        cheap: Tensor,
    ) -> Tensor:
        """Take over the evidence of one step, unless that is not finite; the new factors ``[U]``.

        Args:
            products: ``⟨g, p⟩ [U]``.
            squares: ``⟨g, d⟩ [U]`` with the natural gradient d.
            paths: how the averages p are made.
            finite: whether the gradients are, 0-dim.
            left: u, the share of the data that is left to fit (`Misfit`), 0-dim.
            room: h, 0-dim.
            settled: how far training has settled since its last leap (`Scatter`), 0-dim; 0 where there is no average.
            cheap: how far the scatter is so cheap that steps may overshoot (`Scatter`), 0-dim; likewise.
        """
        squares = squares.clamp_min(0)
        norms = (squares * self.path).sqrt_()
        cosine = self.cosine.lerp((products / torch.where(norms > 0, norms, 1)).clamp_(-1, 1), 1 - MEMORY)
        gradual = 1 - paths.natural * room
        overshoot = torch.maximum(settled * left**ALLOWED, cheap)
        least = torch.maximum(settled * left ** gradual.clamp(max=ALLOWED), cheap)
        brake = torch.maximum(self._bound(cosine), least)
        overshooting = cosine < -OVERSHOT
        heavier = paths.natural * cheap * overshooting
        change = HEAVIER * ((cosine > 0).to(cosine) - heavier)
        gain = (self.gain * change.exp_()).clamp_(LEAST_GAIN, 1.0)
        path = paths.square(self.path, products, squares, gain)
        tolerance = TOLERANCE_FITTED + (TOLERANCE - TOLERANCE_FITTED) * left
        excused = products + tolerance * room * norms
        signed = self.signed.lerp(excused, 1 - MEMORY)
        absolute = self.absolute.lerp(excused.abs(), 1 - MEMORY)
        agreement = signed / absolute.clamp_min(torch.finfo(absolute.dtype).tiny)  # which is no less than |signed|
        allowed = overshooting * overshoot
        agreement = agreement + allowed * (1 - agreement)
        freedom = torch.maximum(room, allowed)
        reach = (1 + self.steps / SPAN) ** POWER
        highest = 1 + freedom * (min(reach, LARGEST) / self.gain - 1)
        most = torch.where(brake < 1, brake, torch.maximum(brake, highest))
        rising = torch.minimum((left / reach * brake) ** gradual, self.factors * exp(SPEED))
        lowest = torch.maximum(left / reach**gradual * brake, rising)
        factors = (self.factors * (SPEED * agreement).exp_()).clamp_(lowest, most)
        old = self.signed, self.absolute, self.cosine, self.path, self.brake, self.factors, self.gain
        new = torch.stack([signed, absolute, cosine, path, brake, factors, gain])
        kept = torch.where(finite, new, torch.stack(old))
        self.signed, self.absolute, self.cosine, self.path, self.brake, self.factors, self.gain = kept.unbind()
        self.steps += 1
        return self.factors

    def _bound(self, cosine: Tensor) -> Tensor:
        """The factor on the bounds after a step of this cosine: up to one, or beyond."""
        boosted = (self.brake * (cosine - CERTAIN).mul_(BRAKE).exp_()).clamp_(max=LARGEST)
        change = torch.nn.functional.softshrink(cosine, OVERSHOT).mul_(BRAKE).add_(RECOVERY)
        braked = (self.brake * change.exp_()).clamp_(max=1.0)
        return torch.where(torch.where(cosine > CERTAIN, self.brake >= 1, self.brake > 1), boosted, braked)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` gave; earlier versions gave no gains."""
        self.gain = torch.ones_like(state["factors"], device=device)
        for key, value in state.items():
            setattr(self, key, value.to(device) if isinstance(value, Tensor) else value)
