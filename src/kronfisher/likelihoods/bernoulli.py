"""Independent binary targets: the likelihood of binary cross-entropy."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kronfisher.errors import DataError, require
from kronfisher.likelihoods.checks import fail, refusal, require_shape, sum_per_example
from kronfisher.likelihoods.draws import Draws
from kronfisher.likelihoods.likelihood import Likelihood
from kronfisher.likelihoods.prediction import Prediction, Predictors, log_mean_exp, mixture
from kronfisher.likelihoods.probit import probit
from kronfisher.likelihoods.registry import register
from kronfisher.linalg import promote


@dataclass(frozen=True, eq=False)
class Bernoulli(Likelihood):
    """Independent binary targets with probabilities `p = sigmoid(outputs)`, summed over the entries of an example.

    Outputs `[N, ...]` of any shape are logits, targets of the same shape lie in [0, 1]; fractions are soft labels. The
    Hessian is `diag(p(1-p))`, so that the exact square root has one column `e_c √(p_c(1-p_c))` per output entry.

    Examples:
        >>> bernoulli = Bernoulli()
        >>> bernoulli.observed(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        tensor([[-0.5000,  0.5000]])
        >>> [v.tolist() for v in bernoulli.exact(torch.zeros(1, 2))]
        [[[0.5, 0.0]], [[0.0, 0.5]]]
    """

    predictors: ClassVar[Predictors] = {"probit": "variances", "mc": "draws", "sampled": "networks"}

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`Σ y log p + (1 - y) log(1 - p)` over the entries of an example, `[N]`; see the base class."""
        return sum_per_example(self.log_probs(outputs, targets))

    def log_probs(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`y log p + (1 - y) log(1 - p)` of every entry; see the base class."""
        outputs = promote(outputs)
        targets = require_shape(targets, outputs.shape, "Bernoulli").to(outputs.dtype)
        return -functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none")

    def excess(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss less the entropy of the targets, `[N]`; see the base class."""
        own = -self.log_probs(outputs.detach(), targets)
        y = targets.to(own.dtype)
        return sum_per_example(own + torch.xlogy(y, y) + torch.xlogy(1 - y, 1 - y)).clamp_min(0)

    def sample(self, outputs: Tensor, draws: Draws) -> Tensor:
        """Zeros and ones like the outputs; see the base class."""
        probability = torch.sigmoid(promote(outputs.detach()))
        uniform = draws.uniform(outputs.shape, device=outputs.device, dtype=probability.dtype)
        return (uniform < probability).to(outputs.dtype)

    def mean(self, outputs: Tensor) -> Tensor:
        """`p`; see the base class."""
        return torch.sigmoid(promote(outputs))

    def noise_variance(self, outputs: Tensor) -> Tensor:
        """`p(1-p)`; see the base class."""
        return torch.sigmoid(promote(outputs)) * torch.sigmoid(-promote(outputs))

    def predict_from_variances(self, outputs: Tensor, variances: Tensor, noise_factor: float = 1.0) -> Prediction:
        """Probabilities by the probit link; see the base class."""
        return probit(self.mean, outputs, variances, lambda p: (p * (1 - p)).square() * variances)

    def predict_from_draws(self, outputs: Tensor, noise_factor: float = 1.0) -> Prediction:
        """The mean probabilities, with their logits from log space; see the base class."""
        wide = promote(outputs)
        logits = log_mean_exp(functional.logsigmoid(wide)) - log_mean_exp(functional.logsigmoid(-wide))
        return mixture(self.mean, self.noise_variance, outputs, noise_factor, logits)

    def log_predictive_density(self, prediction: Prediction, targets: Tensor) -> Tensor:
        """`Σ y log p + (1 - y) log(1 - p)` with the predicted p, `[n]`; see the base class."""
        return sum_per_example(self.log_predictive_densities(prediction, targets))

    def log_predictive_densities(self, prediction: Prediction, targets: Tensor) -> Tensor:
        """`y log p + (1 - y) log(1 - p)` of every entry; see the base class."""
        mean, logits = prediction.mean, prediction.logits
        if logits is not None:
            return self.log_probs(logits, targets)
        targets = require_shape(targets, mean.shape, "Bernoulli").to(mean.dtype)
        return torch.xlogy(targets, mean) + torch.special.xlog1py(1 - targets, -mean)

    def root(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """`√(p(1-p))` for every entry of the outputs; see the base class."""
        logits = promote(outputs.detach())
        return (torch.sigmoid(logits) * torch.sigmoid(-logits)).sqrt()

    def sampled(self, outputs: Tensor, targets: Tensor | None, draws: Draws) -> Tensor:
        """`p - y` for drawn y; see the base class."""
        logits = promote(outputs.detach())
        uniform = draws.uniform(outputs.shape, device=outputs.device, dtype=logits.dtype)
        # s σ(s f) with s = 1 - 2y is p for y = 0 and p - 1 for y = 1, with all its digits and without branches.
        sign = (uniform < torch.sigmoid(logits)).to(logits.dtype).mul_(-2).add_(1)
        return (sign * logits).sigmoid_().mul_(sign).to(outputs.dtype)

    def observed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`p - y`; see the base class."""
        logits = promote(outputs.detach())
        targets = require_shape(targets, outputs.shape, "Bernoulli").detach().to(logits.dtype)
        # (1 - y) p - y (1 - p): a confident prediction keeps its digits, which p - 1 would lose.
        return ((1 - targets) * torch.sigmoid(logits) - targets * torch.sigmoid(-logits)).to(outputs.dtype)

    def check(self, outputs: Tensor, targets: Tensor | None, where: str = "batch 0", labels: str = "sampled") -> None:
        """As the base class; in addition targets of the outputs' shape with values in [0, 1]."""
        super().check(outputs, targets, where, labels)
        if targets is None:
            return
        require_shape(targets, outputs.shape, "Bernoulli", where)
        if targets.is_complex():
            fail(where, f"Bernoulli needs real targets, found {targets.dtype}", "give zeros and ones")
        low, high = targets.aminmax()  # one pass where all is well; NaN fails both comparisons

        def error() -> DataError:
            outside = ~((targets >= 0) & (targets <= 1))
            return refusal(
                where,
                f"Bernoulli needs targets in [0, 1], found {targets[outside][0].item()}",
                "give zeros and ones, or probabilities; labels -1/+1 become (targets + 1) / 2",
            )

        require((low >= 0) & (high <= 1), error)


def _example(*shape: int):
    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        outputs = torch.randn(shape, generator=generator, dtype=torch.float64)
        targets = torch.randint(2, shape, generator=generator)
        return outputs.to(dtype), targets.to(dtype)

    return make


register("bernoulli", Bernoulli, _example(4, 3))
register("bernoulli-images", Bernoulli, _example(3, 1, 2, 2))
