from torch import Tensor, nn
from workloads import Batch

import kronfisher as kf


class Adaptor:
    fit = "kfac"

    def setup(self, model: nn.Module, likelihood: str) -> None:
        self.model, self.likelihood = model, likelihood
        self.distribution = kf.Bernoulli() if likelihood == "bernoulli" else kf.Categorical()

    def run(self, batches: list[Batch]) -> kf.Fisher:
        return kf.estimate(self.model, batches, self.distribution, fit=self.fit, labels="sampled", samples=1)

    def solve(self, factors: kf.Fisher, vector: dict[str, Tensor], damping: float, exact: bool) -> dict[str, Tensor]:
        fresh = factors * 1.0  # a Fisher keeps its eigenvectors for the next damping
        return (fresh + (damping if exact else kf.FactoredTikhonov(damping))).solve(vector)
