"""The fourth part of a step: its length, from the exact quadratic model or a fixed rate within a limit on the KL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from sys import float_info
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kronfisher.errors import UnsupportedError
from kronfisher.likelihoods import Likelihood
from kronfisher.linalg import plain_arithmetic
from kronfisher.optim.direction import Descent
from kronfisher.optim.exact_fisher import FisherProducts
from kronfisher.optim.inner_product import inner
from kronfisher.optim.intervals import Refresh
from kronfisher.optim.quadratic_model import minimum, model_change
from kronfisher.optim.replay import ForwardPass

__all__ = ["StepInputs", "StepLength", "StepSize"]

GROWTH = 1.5  # by how much a step between two models may exceed the decrease that the last model predicted
MODEL = 10  # steps between two models
SMALL = 0.1  # entries of a matrix count as no smaller than this share of those of all matrices
KEPT = 0.9  # the largest momentum that is kept between two models


@dataclass(frozen=True)
class StepInputs:
    """Everything that the length of a step is chosen from.

    Attributes:
        model: unwrapped.
        likelihood: whose Hessian the quadratic model takes.
        passes: the forward passes of this step.
        descent: the direction.
        last: the last step δ₀ by parameter name.
        damping: λ, which is added to the exact curvature.
        decays: parameter name → weight decay, which is added to it too, and is in the gradients.
        own: whether ∇h is the gradient of these passes and no other code touched it.
    """

    model: nn.Module
    likelihood: Likelihood
    passes: Sequence[ForwardPass]
    descent: Descent
    last: Mapping[str, Tensor]
    damping: float
    decays: Mapping[str, float]
    own: bool


@dataclass(frozen=True)
class StepLength:
    """The step is ``−along·natural + again·last``.

    Attributes:
        along: multiplies the natural gradient; a tensor where reading its value would wait for a device.
        again: multiplies the last step.
        predicted: the change of the loss that the exact quadratic model predicts; None if no model was solved.
    """

    along: float | Tensor
    again: float
    predicted: float | None = None


@dataclass
class StepSize:
    """Chooses α and μ of ``δ = −α·natural + μ·last``.

    Attributes:
        momentum: ``"exact"`` for both α and μ from the model, or a fixed μ.
        kl_limit: for a fixed rate, the largest ``lr²·slope``.
        refresh: says how many steps lie between two models.
        step_size: α of the last step, before the learning rate and bounds that need no host.
        used: μ of the last step, before the learning rate.
        kept: α and μ as the last model gave them.
        fall: ``α·slope`` of the last model's step.
        due: the step at which the next model is due.
        products: with the exact Fisher matrix.
        refusal: why there is no exact model; then the rate is fixed, and the momentum `KEPT`.
    """

    momentum: float | Literal["exact"]
    kl_limit: float
    refresh: Refresh
    step_size: float = 1.0
    used: float = 0.0
    kept: tuple[float, float] = (1.0, 0.0)
    fall: float = 0.0
    due: int = 0
    products: FisherProducts = field(default_factory=FisherProducts)
    refusal: str = ""

    @property
    def exact(self) -> bool:
        """Whether α and μ come from exact models."""
        return self.momentum == "exact" and not self.refusal

    def solves(self, step: int) -> bool:
        """Whether a model is due."""
        return self.exact and step >= self.due

    def solve_next(self, step: int) -> None:
        """Make a model due at this step, because the one before it was undone."""
        self.due = step

    def choose(self, inputs: StepInputs, step: int, *, solve: bool, longest: float = inf) -> StepLength:
        """The length of a step.

        Args:
            inputs: what it is chosen from.
            step: number of the step.
            solve: whether to evaluate the exact quadratic model.
            longest: bounds the change of a weight matrix by the natural gradient, relative to its norm.

        Raises:
            UnsupportedError: there is no exact model, and with a momentum of the user's it is needed to compare.
        """
        if solve:
            try:
                return self._solve(inputs, step, longest)
            except UnsupportedError as error:
                if not self.exact:
                    raise
                self.refusal = str(error)
        return self._reuse(inputs.descent, step)

    def _solve(self, inputs: StepInputs, step: int, longest: float) -> StepLength:
        descent, rate = inputs.descent, inputs.descent.rate
        moved = bool(inputs.last) and any(bool(update.any()) for update in inputs.last.values())
        matrix, slopes = self._quadratic(inputs, moved)
        if not self.exact:
            along, again = self._fixed(descent)
            taken = [float(along), *([again] if moved else [])]
            change = model_change(matrix, slopes, torch.tensor(taken, dtype=torch.float64))
            return StepLength(along, again, float(change))
        best = minimum(matrix, slopes)
        if not bool(torch.isfinite(best).all()):
            best = torch.zeros_like(best)
        if longest < inf and (most := longest / max(_share(inputs), float_info.min)) < float(best[0]):
            best[0] = most
        alpha, mu = float(best[0]), float(best[1]) if moved else 0.0
        self.step_size, self.used, self.kept = alpha, mu, (alpha, mu)
        self.fall, self.due = alpha * float(descent.slope), self.refresh.after(step, self.refresh.model or MODEL)
        return StepLength(rate * alpha, rate * mu, float(model_change(matrix, slopes, rate * best)))

    def _quadratic(self, inputs: StepInputs, moved: bool) -> tuple[Tensor, Tensor]:
        """Matrix ``[K, K]`` and slopes ``[K]`` of the model along ``−natural`` and, if there was one, the last step."""
        natural, slope = inputs.descent.natural, inputs.descent.slope
        directions = [{name: -value for name, value in natural.items()}, *([inputs.last] if moved else [])]
        parameters = dict(inputs.model.named_parameters())
        slopes = [-float(slope), *([float(inner(inputs.last, inputs.descent.gradients))] if moved else [])]
        known = None
        if inputs.own and len(inputs.passes) == 1:
            weights = {name: parameters[name].detach() for name in natural}
            decayed = [float(inner(each, weights, inputs.decays)) for each in directions]
            known = [whole - part for whole, part in zip(slopes, decayed, strict=True)]
        size = len(directions)
        matrix = torch.zeros(size, size, dtype=torch.float64)
        for one in inputs.passes:
            with plain_arithmetic(slope.device):
                gram = self.products.gram(inputs.model, parameters, one, directions, inputs.likelihood, known)
                matrix += gram.cpu()
        added = {name: inputs.damping + decay for name, decay in inputs.decays.items()}
        for i, left in enumerate(directions):
            for j, right in enumerate(directions[: i + 1]):
                extra = float(inner(left, right, added))
                matrix[i, j] += extra
                if i != j:
                    matrix[j, i] += extra
        return matrix, torch.tensor(slopes, dtype=torch.float64)

    def _reuse(self, descent: Descent, step: int) -> StepLength:
        """Between two models: α and μ of the last one, within bounds; a fixed rate where a model is due."""
        if not self.exact or self.solves(step):
            return StepLength(*self._fixed(descent))
        alpha, mu = self.kept
        mu = min(mu, KEPT)
        bounded = (GROWTH * self.fall / descent.slope.clamp_min(torch.finfo(descent.slope.dtype).tiny)).clamp(max=alpha)
        self.step_size, self.used = alpha, mu
        return StepLength(descent.rate * bounded, descent.rate * mu)

    def _fixed(self, descent: Descent) -> tuple[Tensor, float]:
        """The rate, or less where ``rate²·slope`` is beyond the limit; and the fixed momentum."""
        rate, momentum = descent.rate, KEPT if isinstance(self.momentum, str) else self.momentum
        self.step_size, self.used = rate, momentum
        within = (self.kl_limit / (rate * rate * descent.slope.abs()).clamp_min(1e-300)).sqrt().clamp(max=1.0)
        return rate * within, momentum

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        names = ("step_size", "used", "kept", "fall", "due", "refusal")
        return {name: getattr(self, name) for name in names} | {"way": self.products.way}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.products.way = state["way"]
        for key, value in state.items():
            if key != "way":
                setattr(self, key, tuple(value) if key == "kept" else value)


def _share(inputs: StepInputs) -> float:
    """The largest ``‖natural‖ / ‖W‖`` of a weight matrix; those that are zero have nothing to lose.

    Entries of W count as at least a share `SMALL` of their root mean square over all matrices: tokens and adapters that
    begin near zero are to grow, and bound no step.
    """
    parameters = dict(inputs.model.named_parameters())
    matrices = {name: value for name, value in inputs.descent.natural.items() if value.dim() > 1}
    if not matrices:
        return 0.0
    norms = torch.stack([parameters[name].detach().norm().double() for name in matrices])
    sizes = torch.tensor([value.numel() for value in matrices.values()], dtype=torch.float64).to(norms.device)
    least = SMALL * (norms.square().sum() / sizes.sum()).sqrt() * sizes.sqrt()
    lengths = torch.stack([value.norm().double() for value in matrices.values()])
    return float((lengths / torch.where(norms > 0, torch.maximum(norms, least), torch.inf)).max())
