"""How far predictions are from the data: where nothing is left to predict, there is no noise that steps average."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kronfisher.likelihoods import Likelihood

__all__ = ["Misfit", "sum_of_misfits"]

MEMORY = 0.8  # of the averages, over batches that bring statistics
FITTED = 0.05  # the share of a constant's misfit below which data count as fitted
FORGIVING = 1.05  # by how much the lowest excess rises with every batch: what was lost long ago is no measure
RELAPSE = 2.0  # times the lowest excess, up to which losses scatter in healthy training
UNKNOWN = 1e30  # in place of an excess, more than any step promises
KNOWN = 1e20  # what is less is an excess; an unknown one is divided by the number of examples
MOST = 2**18  # numbers of outputs that are looked at: of a large vocabulary, some examples are enough


def sum_of_misfits(likelihood: Likelihood, outputs: Tensor, targets: Any, share: float | Tensor | None = 1.0) -> Tensor:
    """Squared derivatives of the loss with respect to the outputs, less their mean, summed over examples: ``[3]``.

    The first number is that of these outputs, the second that of outputs of zero, a constant prediction. For a Gaussian
    these are squared errors less what a constant explains, for classes squared differences of probabilities and labels.
    They are zero only where the data are fitted exactly, while losses have other least values: the entropy of soft
    targets, the logarithm of a variance. The third is how far the losses can fall (`Likelihood.excess`), times `share`;
    None: that is not known.
    """
    size, each = len(outputs), max(outputs[:1].numel(), 1)
    step = -(-size // max(MOST // each, 2)) if isinstance(targets, Tensor) else 1
    if step > 1:
        outputs, targets = outputs[::step], targets[::step]
    outputs = outputs.detach()
    sums = [_squares(likelihood.observed(one, targets)) for one in (outputs, torch.zeros_like(outputs))]
    excess = None if share is None else likelihood.excess(outputs, targets)
    reach = sums[0].new_tensor(UNKNOWN) if excess is None or share is None else excess.sum().to(sums[0]) * share
    return torch.stack([*sums, torch.nan_to_num(reach, nan=UNKNOWN, posinf=UNKNOWN)]) * (size / len(outputs))


def _squares(errors: Tensor) -> Tensor:
    errors = errors.flatten(1 if errors.dim() > 1 else 0)
    errors = errors.to(torch.promote_types(errors.dtype, torch.float32))
    if len(errors) > 1:  # a wrong mean at the start tells nothing of how well the rest can be fitted
        errors = errors - errors.mean(0)
    return errors.square().sum()


@dataclass
class Misfit:
    """Averages of the mean misfit, of a constant's, and of the excess; a rule of this library's own, from no paper.

    What follows from them is computed once for every batch that brings statistics: steps ask for it all the time.

    Attributes:
        now: the average of the model's, 0-dim; negative before the first batch.
        constant: that of a constant prediction, 0-dim.
        excess: by how much the mean loss exceeds the least that there could be, 0-dim; `KNOWN` or more if that is not
            known of the last batch.
        lowest: the least that the excess has been of late, 0-dim.
        latest: that of the last batch, 0-dim.
    """

    now: Tensor = field(default_factory=lambda: torch.tensor(-1.0))
    constant: Tensor = field(default_factory=lambda: torch.zeros(()))
    excess: Tensor = field(default_factory=lambda: torch.tensor(UNKNOWN))
    lowest: Tensor = field(default_factory=lambda: torch.tensor(UNKNOWN))
    latest: Tensor = field(default_factory=lambda: torch.tensor(UNKNOWN))

    def follow(self, means: Tensor, device: torch.device) -> None:
        """Take over the mean misfits of one batch ``[3]``, unless they are not finite."""
        old = torch.stack([each.to(device) for each in (self.now, self.constant, self.excess)])
        new = means.to(old)
        finite = torch.isfinite(new).all()
        self.latest = torch.where(finite, new[2], self.latest.to(device))
        new = torch.where(finite, new, old)
        # An excess is averaged with known ones alone.
        fresh = torch.stack([old[0] < 0, old[0] < 0, torch.maximum(old[2], new[2]) >= KNOWN])
        self.now, self.constant, self.excess = torch.where(fresh, new, old.lerp(new, 1 - MEMORY)).unbind()
        self.lowest = torch.minimum(self.excess, self.lowest.to(device) * FORGIVING)
        self._forget()

    def _forget(self) -> None:
        for name in ("left", "present", "calm", "leaps"):
            vars(self).pop(name, None)

    @cached_property
    def left(self) -> Tensor:
        """The share that is left to fit, 0-dim: 1 down to a twentieth of a constant's misfit, then the rest of that."""
        return torch.where(self.constant > 0, self.now / (FITTED * self.constant), 1.0).clamp(max=1.0)

    @cached_property
    def present(self) -> Tensor:
        """The excess, or that of the last batch where it is less, 0-dim: averages lag where losses fall fast."""
        return torch.minimum(self.excess, self.latest)

    @cached_property
    def calm(self) -> Tensor:
        """The factor on all rates, 0-dim: below one while the excess is more than twice its lowest, as after a leap.

        The root of how much more: smaller steps leap no further, and larger ones come back sooner.
        """
        known = (self.excess > 0) & (self.excess < KNOWN)
        return torch.where(known, RELAPSE * self.lowest / self.excess, 1.0).clamp(max=1.0).sqrt()

    @cached_property
    def leaps(self) -> Tensor:
        """Whether that is below one, 0-dim."""
        return self.calm < 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` gave."""
        self.now, self.constant, self.excess = (state[name].to(device) for name in ("now", "constant", "excess"))
        self.lowest = state["lowest"].to(device)
        self.latest = state.get("latest", state["excess"]).to(device)
        self._forget()
