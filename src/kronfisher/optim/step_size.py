"""Step size and momentum: from the exact quadratic model, or a fixed rate within a limit on the KL divergence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from sys import float_info
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kronfisher.likelihoods import Likelihood
from kronfisher.linalg import plain_arithmetic
from kronfisher.optim.exact_fisher import Products
from kronfisher.optim.intervals import Refresh
from kronfisher.optim.quadratic_model import minimum, model_change
from kronfisher.optim.replay import Pass

__all__ = ["Problem", "Search", "inner"]

GROWTH = 1.5  # how much more than the last model promised a step between two models may promise
KEPT = 0.9  # the largest momentum that is kept between two models


@dataclass(frozen=True)
class Problem:
    """What a step is chosen from.

    Attributes:
        model: unwrapped.
        likelihood: whose Hessian the quadratic model takes.
        passes: the forward passes of this step.
        natural: ``(F̆ + λ)⁻¹ ∇h`` by parameter name.
        last: the last step.
        gradients: ``∇h``.
        slope: ``naturalᵀ ∇h``, a 0-dim tensor.
        damping: λ, which is added to the exact curvature.
        decays: parameter name → weight decay, which is added to it too, and is in the gradients.
        own: whether ∇h is the gradient of these passes and nobody else had a hand in it.
    """

    model: nn.Module
    likelihood: Likelihood
    passes: Sequence[Pass]
    natural: Mapping[str, Tensor]
    last: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    slope: Tensor
    damping: float
    decays: Mapping[str, float]
    own: bool


@dataclass
class Search:
    """Chooses ``δ = −α·natural + μ·last``.

    Attributes:
        momentum: ``"exact"`` for both α and μ from the model, or a fixed μ.
        kl_limit: for a fixed rate, the largest ``lr²·slope``.
        refresh: says how many steps lie between two models.
        step_size: α of the last step, before the learning rate.
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
    products: Products = field(default_factory=Products)
    refusal: str = ""

    @property
    def exact(self) -> bool:
        return self.momentum == "exact" and not self.refusal

    def solves(self, step: int) -> bool:
        """Whether a model is due."""
        return self.exact and step >= self.due

    def solve(
        self, problem: Problem, step: int, rate: float, longest: float = inf
    ) -> tuple[float | Tensor, float, float]:
        """What multiplies natural and last, and what the exact model promises for it.

        `longest` bounds the change of a weight matrix by the natural gradient, relative to its norm.
        """
        moved = bool(problem.last) and any(bool(update.any()) for update in problem.last.values())
        matrix, slopes = self.quadratic(problem, moved)
        if not self.exact:
            along, again = self.fixed(problem.slope, rate)
            taken = [float(along), *([again] if moved else [])]
            return along, again, float(model_change(matrix, slopes, torch.tensor(taken, dtype=torch.float64)))
        found = minimum(matrix, slopes)
        if not bool(torch.isfinite(found).all()):
            found = torch.zeros_like(found)
        if longest < inf and (most := longest / max(_share(problem), float_info.min)) < float(found[0]):
            found[0] = most
        alpha, mu = float(found[0]), float(found[1]) if moved else 0.0
        self.step_size, self.used, self.kept = alpha, mu, (alpha, mu)
        self.fall, self.due = alpha * float(problem.slope), self.refresh.after(step, self.refresh.model)
        return rate * alpha, rate * mu, float(model_change(matrix, slopes, rate * found))

    def quadratic(self, problem: Problem, moved: bool) -> tuple[Tensor, Tensor]:
        """Matrix ``[K, K]`` and slopes ``[K]`` of the model along ``−natural`` and, if there was one, the last step."""
        directions = [{name: -value for name, value in problem.natural.items()}, *([problem.last] if moved else [])]
        parameters = dict(problem.model.named_parameters())
        slopes = [-float(problem.slope), *([float(inner(problem.last, problem.gradients))] if moved else [])]
        known = None
        if problem.own and len(problem.passes) == 1:
            weights = {name: parameters[name].detach() for name in problem.natural}
            decayed = [float(inner(each, weights, problem.decays)) for each in directions]
            known = [slope - part for slope, part in zip(slopes, decayed, strict=True)]
        size = len(directions)
        matrix = torch.zeros(size, size, dtype=torch.float64)
        for one in problem.passes:
            with plain_arithmetic(problem.slope.device):
                found = self.products.gram(problem.model, parameters, one, directions, problem.likelihood, known)
                matrix += found.cpu()
        added = {name: problem.damping + decay for name, decay in problem.decays.items()}
        for i, left in enumerate(directions):
            for j, right in enumerate(directions[: i + 1]):
                extra = float(inner(left, right, added))
                matrix[i, j] += extra
                if i != j:
                    matrix[j, i] += extra
        return matrix, torch.tensor(slopes, dtype=torch.float64)

    def reuse(self, slope: Tensor, rate: float) -> tuple[float | Tensor, float]:
        """What multiplies natural and last between two models: the last answer, within bounds."""
        if not self.exact:
            return self.fixed(slope, rate)
        alpha, mu = self.kept
        mu = min(mu, KEPT)
        if slope.device.type == "cpu":  # elsewhere it would take a synchronisation
            alpha = min(alpha, GROWTH * self.fall / max(float(slope), 1e-300))
        self.step_size, self.used = alpha, mu
        return rate * alpha, rate * mu

    def fixed(self, slope: Tensor, rate: float) -> tuple[Tensor, float]:
        """The rate, or less where ``rate²·slope`` is beyond the limit; and the fixed momentum."""
        momentum = KEPT if isinstance(self.momentum, str) else self.momentum
        self.step_size, self.used = rate, momentum
        within = (self.kl_limit / (rate * rate * slope.abs()).clamp_min(1e-300)).sqrt().clamp(max=1.0)
        return rate * within, momentum

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs."""
        names = ("step_size", "used", "kept", "fall", "due", "refusal")
        return {name: getattr(self, name) for name in names} | {"way": self.products.way}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.products.way = state["way"]
        for key, value in state.items():
            if key != "way":
                setattr(self, key, tuple(value) if key == "kept" else value)


def _share(problem: Problem) -> float:
    """The largest ``‖natural‖ / ‖W‖`` of a weight matrix; those that are zero have nothing to lose."""
    parameters = dict(problem.model.named_parameters())
    shares = [
        (value.norm() / norm.where(norm > 0, torch.inf)).double()
        for name, value in problem.natural.items()
        if value.dim() > 1
        for norm in (parameters[name].detach().norm(),)
    ]
    return float(torch.stack(shares).max()) if shares else 0.0


def inner(
    left: Mapping[str, Tensor], right: Mapping[str, Tensor], weights: Mapping[str, float] | None = None
) -> Tensor:
    """``Σ wₙ ⟨leftₙ, rightₙ⟩`` over common names, in float64."""
    terms = []
    for name, value in left.items():
        if name in right:
            product = torch.dot(value.flatten(), right[name].flatten().to(value.dtype)).double()
            terms.append(product if weights is None else product * weights[name])
    return torch.stack(terms).sum()
