"""How far predictions are from the data: where nothing is left to predict, there is no noise that steps average."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kronfisher.likelihoods import Likelihood

__all__ = ["Misfit", "sum_of_misfits"]

MEMORY = 0.8  # of the average, over batches that bring statistics
FITTED = 0.05  # the share of the largest misfit below which data count as fitted


def sum_of_misfits(likelihood: Likelihood, outputs: Tensor, targets: Any) -> Tensor:
    """The squared derivatives of the loss with respect to the outputs, less their mean, summed over examples: 0-dim.

    For a Gaussian these are squared errors less what a constant explains, for classes squared differences of
    probabilities and labels. They are zero only where the data are fitted exactly, while losses have other least
    values: the entropy of soft targets, the logarithm of a variance.
    """
    errors = likelihood.observed(outputs.detach(), targets).flatten(1 if outputs.dim() > 1 else 0)
    errors = errors.to(torch.promote_types(errors.dtype, torch.float32))
    if len(errors) > 1:  # a wrong mean at the start tells nothing of how well the rest can be fitted
        errors = errors - errors.mean(0)
    return errors.square().sum()


@dataclass
class Misfit:
    """The average of the mean misfit, and the largest it was; a rule of this library's own, from no paper.

    Attributes:
        now: the average, 0-dim; negative before the first batch.
        worst: its largest value, 0-dim.
    """

    now: Tensor = field(default_factory=lambda: torch.tensor(-1.0))
    worst: Tensor = field(default_factory=lambda: torch.zeros(()))

    def follow(self, mean: float | Tensor, device: torch.device) -> None:
        """Take over the mean misfit of one batch, unless that is not finite."""
        now, worst = self.now.to(device), self.worst.to(device)
        new = mean.to(now) if isinstance(mean, Tensor) else now.new_tensor(mean)
        new = torch.where(torch.isfinite(new), new, now)
        self.now = torch.where(now < 0, new, now.lerp(new, 1 - MEMORY))
        self.worst = torch.maximum(worst, self.now)

    @property
    def left(self) -> Tensor:
        """The share that is left to fit, 0-dim: 1 until a twentieth of the worst is reached, then the rest of that."""
        return torch.where(self.worst > 0, self.now / (FITTED * self.worst), 1.0).clamp(max=1.0)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` gave."""
        self.now, self.worst = state["now"].to(device), state["worst"].to(device)
