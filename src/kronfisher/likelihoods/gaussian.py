"""Gaussian noise of known variance: the likelihood of squared error."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kronfisher.likelihoods.checks import fail, refuse_booleans, require_finite, require_shape, sum_per_example
from kronfisher.likelihoods.draws import Draws
from kronfisher.likelihoods.likelihood import Likelihood
from kronfisher.likelihoods.prediction import Prediction, Predictors
from kronfisher.likelihoods.registry import register
from kronfisher.linalg import promote


@dataclass(frozen=True, eq=False)
class Gaussian(Likelihood):
    """Independent normal targets with mean `outputs` and a given variance; `½ (f - y)²/σ²` up to a constant.

    Outputs `[N, ...]` of any shape, targets of the same shape. The Hessian is `diag(1/σ²)`, so that the exact square
    root has one column `e_c/σ_c` per output entry. A *mean* squared error over C entries is `variance = C/2`.

    Args:
        variance: σ², positive: a number, or a tensor that broadcasts to the output of one example.

    Raises:
        ValueError: The variance is not positive and finite.

    Examples:
        >>> gaussian = Gaussian(variance=0.25)
        >>> gaussian.observed(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 2.5]]))
        tensor([[ 4., -2.]])
        >>> [v.tolist() for v in gaussian.exact(torch.zeros(1, 2))]
        [[[2.0, 0.0]], [[0.0, 2.0]]]
    """

    predictors: ClassVar[Predictors] = {"linearized": "variances", "mc": "draws", "sampled": "networks"}

    variance: float | Tensor = 1.0

    def __post_init__(self) -> None:
        """Checks the variance once, so that no later step has to."""
        fine = torch.as_tensor(self.variance, device=None if isinstance(self.variance, Tensor) else "cpu")
        if not bool(((fine > 0) & torch.isfinite(fine)).all()):
            raise ValueError(f"variance={self.variance} must be positive and finite; it is σ², not its logarithm")

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`Σ -½((y - f)²/σ² + log 2πσ²)` over the entries of an example, `[N]`; see the base class."""
        return sum_per_example(self.log_probs(outputs, targets))

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See the base class; in float64, so that `log 2πσ²` does not swallow residuals far smaller than σ."""
        return super().log_likelihood(outputs.double(), targets)

    def excess(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`Σ ½ (y - f)²/σ²`, `[N]`; see the base class."""
        outputs, variance = promote(outputs.detach()), self._variance(outputs)
        return sum_per_example(0.5 * (targets.to(outputs.dtype) - outputs).square() / variance)

    def log_probs(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`-½((y - f)²/σ² + log 2πσ²)` of every entry; see the base class."""
        outputs, variance = promote(outputs), self._variance(outputs)
        residual = require_shape(targets, outputs.shape, "Gaussian") - outputs
        return -0.5 * (residual.square() / variance + (2 * math.pi * variance).log())

    def sample(self, outputs: Tensor, draws: Draws) -> Tensor:
        """`f + σε`, like the outputs; see the base class."""
        mean = promote(outputs.detach())
        return (mean + self._variance(outputs).sqrt() * self._noise(mean, draws)).to(outputs.dtype)

    def mean(self, outputs: Tensor) -> Tensor:
        """The outputs; see the base class."""
        return promote(outputs)

    def noise_variance(self, outputs: Tensor) -> Tensor:
        """`σ²`; see the base class."""
        return self._variance(outputs).expand(outputs.shape)

    @property
    def single_noise(self) -> float | None:
        """σ² where it is one number; see the base class."""
        return float(self.variance) if torch.as_tensor(self.variance).numel() == 1 else None

    def predict_from_variances(self, outputs: Tensor, variances: Tensor, noise_factor: float = 1.0) -> Prediction:
        """The normal distribution of mean f and of the variance of f plus σ², exact; see the base class."""
        outputs = promote(outputs)
        noise = self.noise_variance(outputs).to(outputs.dtype) * noise_factor
        return Prediction(outputs, variances + noise, variances, noise)

    def log_predictive_density(self, prediction: Prediction, targets: Tensor) -> Tensor:
        """The log density of independent normal targets, `[n]`; see the base class."""
        return sum_per_example(self.log_predictive_densities(prediction, targets))

    def log_predictive_densities(self, prediction: Prediction, targets: Tensor) -> Tensor:
        """The log density of every entry; see the base class."""
        residual = require_shape(targets, prediction.mean.shape, "Gaussian") - prediction.mean
        variance = prediction.variance.reshape(prediction.mean.shape)
        return -0.5 * (residual.square() / variance + (2 * math.pi * variance).log())

    def root(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """`1/σ` for every entry of the outputs; see the base class."""
        return self._variance(outputs).rsqrt().expand(outputs.shape)

    def sampled(self, outputs: Tensor, targets: Tensor | None, draws: Draws) -> Tensor:
        """`-ε/σ`, the gradient at `f + σε` without the cancellation; see the base class."""
        return (-self._noise(promote(outputs), draws) * self._variance(outputs).rsqrt()).to(outputs.dtype)

    def observed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`(f - y)/σ²`; see the base class."""
        residual = promote(outputs.detach()) - require_shape(targets, outputs.shape, "Gaussian").detach()
        return (residual / self._variance(outputs)).to(outputs.dtype)

    def check(self, outputs: Tensor, targets: Tensor | None, where: str = "batch 0", labels: str = "sampled") -> None:
        """As the base class; in addition the shapes of targets and variance, and finite targets."""
        super().check(outputs, targets, where, labels)
        variance = torch.as_tensor(self.variance)
        shape, each = list(variance.shape), list(outputs.shape[1:])
        if len(shape) > len(each) or any(v not in (1, d) for v, d in zip(shape[::-1], each[::-1], strict=False)):
            fail(
                where,
                f"Gaussian has a variance of shape {shape}, the output of one example has shape {each}",
                "give one number or a tensor that broadcasts to it",
            )
        if targets is not None:
            require_shape(targets, outputs.shape, "Gaussian", where)
            refuse_booleans(targets, "Gaussian", where)
            require_finite(targets, "Gaussian", where)

    def _variance(self, outputs: Tensor) -> Tensor:
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        if isinstance(self.variance, Tensor):
            return self.variance.detach().to(outputs.device, dtype, non_blocking=True)
        return torch.full((), self.variance, device=outputs.device, dtype=dtype)  # a copy of a number would wait

    def _noise(self, mean: Tensor, draws: Draws) -> Tensor:
        return draws.normal(mean.shape, device=mean.device, dtype=mean.dtype)


def _example(*shape: int):
    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        outputs, targets = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
        return outputs, targets

    return make


register("gaussian", Gaussian, _example(4, 3))
register("gaussian-variances", lambda: Gaussian(torch.tensor([0.5, 1.0, 4.0])), _example(3, 2, 3))
