"""Gaussian noise whose variance the network predicts along with the mean."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kronfisher.likelihoods.checks import (
    fail,
    refuse_booleans,
    require_exponentials,
    require_finite,
    require_shape,
    sum_per_example,
)
from kronfisher.likelihoods.draws import Draws
from kronfisher.likelihoods.likelihood import Likelihood
from kronfisher.likelihoods.registry import register
from kronfisher.linalg import promote


@dataclass(frozen=True, eq=False)
class HeteroscedasticGaussian(Likelihood):
    """Independent normal targets with predicted means μ and predicted logarithms of variances `s = log σ²`.

    The outputs hold C means and then C log-variances along one dimension, as `mean, log_variance = outputs.chunk(2,
    dim)` takes them apart; targets have C entries there. With C = 1 that dimension of the targets may be missing.

    The negative log-likelihood `½ ((y - μ)² exp(-s) + s)` is not convex in s, and its Hessian depends on the label. The
    matrix meant is its average over labels drawn from the model, the Fisher matrix `diag(1/σ²)` of μ and `½` of s,
    without cross terms: the exact square root has one column `e_c/σ_c` or `e_c √½` per output entry.

    Args:
        dim: The dimension of the outputs that holds means and log-variances; 1 or -1.

    Raises:
        ValueError: `dim` is another one.

    Examples:
        >>> gaussian, outputs = HeteroscedasticGaussian(), torch.tensor([[1.0, 0.0]])
        >>> gaussian.observed(outputs, torch.tensor([[3.0]]))
        tensor([[-2.0000, -1.5000]])
        >>> [[round(x, 4) for x in v[0].tolist()] for v in gaussian.exact(outputs)]
        [[1.0, 0.0], [0.0, 0.7071]]
    """

    dim: int = -1

    def __post_init__(self) -> None:
        """Checks the dimension."""
        if isinstance(self.dim, bool) or self.dim not in (1, -1):
            raise ValueError(f"dim={self.dim} must be 1 for outputs [N, 2C, ...] or -1 for [N, ..., 2C]")

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`Σ -½((y - μ)² exp(-s) + s + log 2π)` over the targets of an example, `[N]`; see the base class."""
        return sum_per_example(self.log_probs(outputs, targets))

    def log_probs(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`-½((y - μ)² exp(-s) + s + log 2π)`, summed over the C targets of a position; see the base class."""
        mean, log_variance = self._split(promote(outputs))
        residual = self._targets(targets, mean) - mean
        each = residual.square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi)
        return -0.5 * each.sum(self.joint_dim(outputs))

    def joint_dim(self, outputs: Tensor, targets: Tensor | None = None) -> int:
        """The dimension of means and log-variances; see the base class."""
        return self.dim % outputs.ndim

    def sample(self, outputs: Tensor, draws: Draws) -> Tensor:
        """`μ + σε`, like the means; see the base class."""
        mean, log_variance = self._split(promote(outputs.detach()))
        return (mean + (log_variance / 2).exp() * self._noise(mean, draws)).to(outputs.dtype)

    def mean(self, outputs: Tensor) -> Tensor:
        """μ; see the base class."""
        return self._split(promote(outputs))[0]

    def noise_variance(self, outputs: Tensor) -> Tensor:
        """`exp(s)`; see the base class."""
        return self._split(promote(outputs))[1].exp()

    def root(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """`1/σ` for every mean, `√½` for every log-variance; see the base class."""
        _, log_variance = self._split(promote(outputs.detach()))
        return self._join((-log_variance / 2).exp(), torch.full_like(log_variance, 0.5**0.5))

    def sampled(self, outputs: Tensor, targets: Tensor | None, draws: Draws) -> Tensor:
        """`(-ε/σ, ½(1 - ε²))`, the gradient at `μ + σε` without the cancellation; see the base class."""
        mean, log_variance = self._split(promote(outputs.detach()))
        noise = self._noise(mean, draws)
        return self._join(-noise * (-log_variance / 2).exp(), 0.5 * (1 - noise.square())).to(outputs.dtype)

    def observed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`((μ - y)/σ², ½(1 - (y - μ)²/σ²))`; see the base class."""
        mean, log_variance = self._split(promote(outputs.detach()))
        residual = mean - self._targets(targets, mean).detach()
        slope = residual * (-log_variance).exp()
        return self._join(slope, 0.5 * (1 - residual * slope)).to(outputs.dtype)

    def check(self, outputs: Tensor, targets: Tensor | None, where: str = "batch 0", labels: str = "sampled") -> None:
        """As the base class; in addition an even number of outputs, variances that are finite, and finite targets."""
        super().check(outputs, targets, where, labels)
        mean, log_variance = self._split(outputs, where)
        require_exponentials(log_variance.abs(), "HeteroscedasticGaussian", "log-variances of a size", where)
        if targets is not None:
            self._targets(targets, mean, where)
            refuse_booleans(targets, "HeteroscedasticGaussian", where)
            require_finite(targets, "HeteroscedasticGaussian", where)

    def _split(self, outputs: Tensor, where: str = "outputs") -> tuple[Tensor, Tensor]:
        if outputs.ndim < 2 or outputs.shape[self.dim] % 2:
            fail(
                where,
                "HeteroscedasticGaussian needs C means and then C log-variances along dimension "
                f"{self.dim} of the outputs, found {list(outputs.shape)}",
                "let the last layer have 2C outputs, or say dim=1",
            )
        mean, log_variance = outputs.chunk(2, self.dim)
        return mean, log_variance

    def _join(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        return torch.cat([mean, log_variance], self.dim)

    def _targets(self, targets: Tensor, mean: Tensor, where: str = "targets") -> Tensor:
        """Targets in the shape of the means."""
        if mean.shape[self.dim] == 1 and targets is not None and targets.ndim == mean.ndim - 1:
            targets = targets.unsqueeze(self.dim)
        return require_shape(targets, mean.shape, "HeteroscedasticGaussian", where)

    def _noise(self, mean: Tensor, draws: Draws) -> Tensor:
        return draws.normal(mean.shape, device=mean.device, dtype=mean.dtype)


def _register(name: str, dim: int, *shape: int) -> None:
    gaussian = HeteroscedasticGaussian(dim)

    def example(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        outputs, targets = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
        return outputs, targets.chunk(2, dim)[0]

    def labels(outputs: Tensor) -> tuple[Tensor, Tensor]:  # the Hessian is quadratic in y: two points suffice
        mean, deviation = gaussian.mean(outputs), gaussian.noise_variance(outputs).sqrt()
        return mean - deviation, mean + deviation

    register(name, lambda: gaussian, example, labels)


_register("heteroscedastic", -1, 4, 4)
_register("heteroscedastic-series", 1, 3, 2, 2)
