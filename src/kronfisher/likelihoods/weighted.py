"""Weights of examples or positions, around any likelihood."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kronfisher.errors import require
from kronfisher.likelihoods.checks import fail, refusal, sum_per_example
from kronfisher.likelihoods.draws import Draws
from kronfisher.likelihoods.likelihood import Likelihood
from kronfisher.likelihoods.positions import masked_positions, spread
from kronfisher.likelihoods.prediction import Prediction, log_mean_exp
from kronfisher.linalg import promote


@dataclass(frozen=True, eq=False)
class Weighted(Likelihood):
    """A likelihood whose targets come with weights: the loss of an example is `Σ_t -w_t log p_t` over its positions.

    Targets are pairs `(targets, weight)`, so that a batch is `(inputs, (targets, weight))`. Weights are non-negative:
    `[N]`, or with further leading dimensions of the positions (the outputs' shape without the classes, or means and
    log-variances). What weighs zero does not count, as if it were ignored. Weights are of importance: they multiply the
    Hessian, while N stays the number of examples and K-FAC's input factors count every position once. Where labels are
    not needed, the pair may be `(None, weight)`.

    Args:
        base: The likelihood that is weighted. Weights per position need its `log_probs` (all likelihoods here have it).

    Examples:
        >>> from kronfisher import Gaussian
        >>> weighted = Weighted(Gaussian())
        >>> targets, weight = torch.zeros(2, 1), torch.tensor([1.0, 4.0])
        >>> weighted.observed(torch.ones(2, 1), (targets, weight)).tolist()
        [[1.0], [4.0]]
        >>> [v.tolist() for v in weighted.exact(torch.ones(2, 1), (None, weight))]
        [[[1.0], [2.0]]]
    """

    base: Likelihood

    def __post_init__(self) -> None:
        """Refuses a base that is no likelihood."""
        if not isinstance(self.base, Likelihood):
            raise TypeError(f"Weighted({self.base!r}): pass an instance such as Categorical() or Gaussian()")

    def log_prob(self, outputs: Tensor, targets: Any) -> Tensor:
        """`Σ w log p` over the positions of an example, `[N]`; see the base class."""
        targets, weight = _pair(targets)
        weight = weight.to(torch.promote_types(outputs.dtype, torch.float32))
        if weight.ndim == 1:
            return weight * self.base.log_prob(outputs, targets)
        return sum_per_example(self.log_probs(outputs, (targets, weight)))

    def log_probs(self, outputs: Tensor, targets: Any) -> Tensor:
        """`w log p` of every position; see the base class."""
        targets, weight = _pair(targets)
        terms = self.base.log_probs(outputs, targets)
        return terms * weight.reshape(*weight.shape, *[1] * (terms.ndim - weight.ndim)).to(terms.dtype)

    def excess(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """That of the base times w; None where weights are those of positions."""
        targets, weight = _pair(targets)
        own = self.base.excess(outputs, targets) if weight.ndim == 1 else None
        return None if own is None else weight.to(own.dtype) * own

    def joint_dim(self, outputs: Tensor, targets: Any = None) -> int | None:
        """That of the base."""
        return self.base.joint_dim(outputs, None if targets is None else _pair(targets)[0])

    def labelled(self, targets: Any) -> bool:
        """Whether the pair has labels besides its weights."""
        return targets is not None and self.base.labelled(_pair(targets)[0])

    def with_layout(self, outputs: Tensor, targets: Any) -> "Weighted":
        """With that of the base."""
        return replace(self, base=self.base.with_layout(outputs, _pair(targets)[0]))

    def sample(self, outputs: Tensor, draws: Draws) -> Any:
        """Labels of the base, each of weight one."""
        weight = torch.ones(
            len(outputs), device=outputs.device, dtype=torch.promote_types(outputs.dtype, torch.float32)
        )
        return self.base.sample(outputs, draws), weight

    def mean(self, outputs: Tensor) -> Tensor:
        """That of the base: weights say how much an example counts, not how its targets scatter."""
        return self.base.mean(outputs)

    def noise_variance(self, outputs: Tensor) -> Tensor:
        """That of the base."""
        return self.base.noise_variance(outputs)

    def predict_from_variances(self, outputs: Tensor, variances: Tensor, noise_factor: float = 1.0) -> Prediction:
        """That of the base."""
        return self.base.predict_from_variances(outputs, variances, noise_factor)

    def predict_from_covariances(self, outputs: Tensor, covariances: Tensor) -> Prediction:
        """That of the base."""
        return self.base.predict_from_covariances(outputs, covariances)

    def predict_from_draws(self, outputs: Tensor, noise_factor: float = 1.0) -> Prediction:
        """That of the base."""
        return self.base.predict_from_draws(outputs, noise_factor)

    def log_predictive_density(self, prediction: Prediction, targets: Any) -> Tensor:
        """`Σ w log p` over the positions of an example, `[n]`; see the base class."""
        targets, weight = _pair(targets)
        if weight.ndim == 1:
            return _weighed(weight, self.base.log_predictive_density(prediction, targets))
        return sum_per_example(self.log_predictive_densities(prediction, (targets, weight)))

    def log_predictive_densities(self, prediction: Prediction, targets: Any) -> Tensor:
        """`w log p` of every position; see the base class."""
        targets, weight = _pair(targets)
        return _weighed(weight, self.base.log_predictive_densities(prediction, targets))

    def log_density_from_draws(self, outputs: Tensor, targets: Any, noise_factor: float = 1.0) -> Tensor:
        """That of the base times w; where it is a mean over draws of all positions, `log 1/S Σ_s Π p_s^w` over them."""
        labels, weight = _pair(targets)
        if weight.ndim == 1:
            return _weighed(weight, self.base.log_density_from_draws(outputs, labels, noise_factor))
        if self.base.averages_over_draws and noise_factor == 1:
            return log_mean_exp(torch.stack([self.log_prob(promote(draw), targets) for draw in outputs]))
        return self.log_predictive_density(self.predict_from_draws(outputs, noise_factor), targets)

    def positions(self, outputs: Tensor, targets: Any = None) -> Tensor | None:
        """Bool `[N, P]`, False where the weight is zero or the base says so; see the base class."""
        targets, weight = _pair(targets)
        joint = self.base.joint_dim(outputs, targets)
        places = [size for d, size in enumerate(outputs.shape) if d != (outputs.ndim - 1 if joint is None else joint)]
        counts = weight > 0
        if weight.ndim == 1 or weight.ndim > len(places):  # of examples; or of entries, which are no positions
            counts = counts.unsqueeze(-1).flatten(1).any(1, keepdim=True)
        else:
            counts = counts.reshape(*weight.shape, *[1] * (len(places) - weight.ndim)).expand(places).flatten(1)
        return masked_positions(counts, self.base.positions(outputs, targets), "targets")

    def columns(self, outputs: Tensor, targets: Any = None) -> int:
        """Those of the base."""
        return self.base.columns(outputs, _pair(targets)[0])

    def exact(self, outputs: Tensor, targets: Any = None) -> Iterator[Tensor]:
        """Yields the columns of the base times `√w`; see the base class."""
        targets, weight = _pair(targets)
        for vector in self.base.exact(outputs, targets):
            yield self._times(vector, weight.sqrt(), outputs, targets)

    def hessian_product(self, outputs: Tensor, vector: Tensor, targets: Any = None) -> Tensor:
        """That of the base times w; see the base class."""
        targets, weight = _pair(targets)
        return self._times(self.base.hessian_product(outputs, vector, targets), weight, outputs, targets)

    def sampled(self, outputs: Tensor, targets: Any, draws: Draws) -> Tensor:
        """The vector of the base times `√w`; see the base class."""
        targets, weight = _pair(targets)
        return self._times(self.base.sampled(outputs, targets, draws), weight.sqrt(), outputs, targets)

    def observed(self, outputs: Tensor, targets: Any) -> Tensor:
        """The gradient of the base times w; see the base class."""
        targets, weight = _pair(targets)
        return self._times(self.base.observed(outputs, targets), weight, outputs, targets)

    def check(self, outputs: Tensor, targets: Any, where: str = "batch 0", labels: str = "sampled") -> None:
        """As the base's; in addition weights that are there, fit the outputs, and are finite and not negative."""
        labelled, weight = _pair(targets, where)
        self.base.check(outputs, labelled, where, labels)
        joint = self.base.joint_dim(outputs, labelled)
        places = [size for d, size in enumerate(outputs.shape) if d != joint]
        if not 1 <= weight.ndim <= len(places) or list(weight.shape) != places[: weight.ndim]:
            fail(
                where,
                f"weights {list(weight.shape)} do not fit outputs {list(outputs.shape)}",
                f"give [N], or leading dimensions of the positions {places}",
            )
        if weight.device != outputs.device:
            fail(
                where,
                f"weights are on {weight.device}, outputs on {outputs.device}",
                f'move them with weight.to("{outputs.device}")',
            )
        remedy = "drop such examples, or give them the weight zero"
        error = refusal(where, "weights must be non-negative and finite", remedy)
        if weight.is_complex():
            raise error
        require(((weight >= 0) & torch.isfinite(weight)).all(), lambda: error)

    def _times(self, vector: Tensor, weight: Tensor, outputs: Tensor, targets: Any) -> Tensor:
        weight = spread(weight, outputs, self.base.joint_dim(outputs, targets))
        return (promote(vector) * weight).to(vector.dtype)


def _weighed(weight: Tensor, terms: Tensor) -> Tensor:
    """Terms times weights of leading dimensions; what weighs nothing is nothing, even minus infinity."""
    weight = weight.reshape(*weight.shape, *[1] * (terms.ndim - weight.ndim)).to(terms.dtype)
    return torch.where(weight > 0, weight * terms, 0)


def _pair(targets: Any, where: str = "targets") -> tuple[Any, Tensor]:
    """Targets and weights, the latter in floating point."""
    if not isinstance(targets, tuple | list) or len(targets) != 2 or not isinstance(targets[1], Tensor):
        given = type(targets).__name__ + (f" of {len(targets)}" if isinstance(targets, tuple | list) else "")
        fail(
            where,
            f"Weighted needs targets (targets, weight) with a tensor of weights, found {given}",
            "give (inputs, (targets, weight)) batches, or do not wrap the likelihood in Weighted",
        )
    weight = targets[1].detach()
    return targets[0], weight if weight.is_floating_point() or weight.is_complex() else weight.float()
