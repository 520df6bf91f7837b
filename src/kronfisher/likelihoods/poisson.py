"""Counts: the likelihood of Poisson regression."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kronfisher.errors import require
from kronfisher.likelihoods.checks import (
    refusal,
    refuse_booleans,
    require_exponentials,
    require_shape,
    sum_per_example,
)
from kronfisher.likelihoods.draws import Draws
from kronfisher.likelihoods.likelihood import Likelihood
from kronfisher.likelihoods.registry import register
from kronfisher.linalg import promote


@dataclass(frozen=True, eq=False)
class Poisson(Likelihood):
    """Independent counts with rates `r = exp(outputs)`, summed over the entries of an example.

    Outputs `[N, ...]` of any shape are logarithms of rates (`torch.nn.PoissonNLLLoss(log_input=True)`), targets of the
    same shape are counts; add the logarithm of an exposure to the outputs. The Hessian is `diag(r)`, so that the exact
    square root has one column `e_c √r_c` per output entry.

    Examples:
        >>> poisson = Poisson()
        >>> poisson.observed(torch.zeros(1, 2), torch.tensor([[3.0, 0.0]]))
        tensor([[-2.,  1.]])
        >>> [v.tolist() for v in poisson.exact(torch.zeros(1, 2))]
        [[[1.0, 0.0]], [[0.0, 1.0]]]
    """

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`Σ y f - exp f - log y!` over the entries of an example, `[N]`; see the base class."""
        return sum_per_example(self.log_probs(outputs, targets))

    def log_probs(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`y f - exp f - log y!` of every entry; see the base class."""
        outputs = promote(outputs)
        targets = require_shape(targets, outputs.shape, "Poisson").to(outputs.dtype)
        return targets * outputs - outputs.exp() - torch.lgamma(targets + 1)

    def excess(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`Σ exp f - y f - y + y log y`, half of the deviance, `[N]`; see the base class."""
        f = promote(outputs.detach())
        y = targets.to(f.dtype)
        return sum_per_example(f.exp() - y * f - y + torch.xlogy(y, y)).clamp_min(0)

    def sample(self, outputs: Tensor, draws: Draws) -> Tensor:
        """Counts like the outputs, in float32 or better: half precisions do not hold them; see the base class."""
        rate = promote(outputs.detach()).double().exp()
        uniform = draws.uniform(rate.shape, device=rate.device)
        return _quantile(rate, uniform).to(torch.promote_types(outputs.dtype, torch.float32))

    def mean(self, outputs: Tensor) -> Tensor:
        """`r`; see the base class."""
        return promote(outputs).exp()

    def noise_variance(self, outputs: Tensor) -> Tensor:
        """`r`; see the base class."""
        return promote(outputs).exp()

    def root(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """`√r` for every entry of the outputs; see the base class."""
        return (promote(outputs.detach()) / 2).exp()

    def observed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`r - y`; see the base class."""
        rate = promote(outputs.detach()).exp()
        return (rate - require_shape(targets, outputs.shape, "Poisson").detach()).to(outputs.dtype)

    def check(self, outputs: Tensor, targets: Tensor | None, where: str = "batch 0", labels: str = "sampled") -> None:
        """As the base class; in addition rates that are finite, and targets of the outputs' shape that are counts."""
        super().check(outputs, targets, where, labels)
        require_exponentials(outputs, "Poisson", "logarithms of rates", where)
        if targets is None:
            return
        require_shape(targets, outputs.shape, "Poisson", where)
        refuse_booleans(targets, "Poisson", where)
        what = "Poisson needs targets that are counts, found negative, NaN, infinite or complex ones"
        error = refusal(where, what, "remove or impute them")
        if targets.is_complex():
            raise error
        require(((targets >= 0) & torch.isfinite(targets)).all(), lambda: error)


def _quantile(rate: Tensor, uniform: Tensor) -> Tensor:
    """The smallest count whose distribution function reaches `uniform`: one number each, whatever the batch size.

    Bisection between bounds that hold all but 1e-16 of the mass; `P(y ≤ k)` is the incomplete gamma function Q(k+1, r).
    """
    reach = 12 * rate.sqrt() + 40
    low = (rate - reach).floor().clamp_min(-1)  # P(y ≤ low) < uniform, and P(y ≤ high) ≥ uniform
    high = (rate + reach).ceil()
    steps = int((high - low).max().log2().ceil()) + 1 if rate.numel() else 0
    for _ in range(steps):
        middle = ((low + high + 1) / 2).floor()  # of neighbours: the upper one
        enough = torch.special.gammaincc(middle + 1, rate) >= uniform
        high, low = high.where(~enough, middle), low.where(enough, middle)
    return high


def _example(*shape: int):
    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        outputs = torch.randn(shape, generator=generator, dtype=torch.float64)
        targets = torch.randint(5, shape, generator=generator)
        return outputs.to(dtype), targets.to(dtype)

    return make


register("poisson", Poisson, _example(4, 3))
