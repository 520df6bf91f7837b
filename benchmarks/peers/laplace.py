import torch
from laplace.curvature import CurvlinopsGGN
from laplace.utils import Kron
from torch import Tensor, nn
from workloads import Batch

from peers import ClassesSecond, Skip


class Adaptor:
    def setup(self, model: nn.Module, likelihood: str) -> None:
        self.likelihood = "gaussian" if likelihood == "bernoulli" else likelihood
        if likelihood == "categorical":
            model = ClassesSecond(model)
        kind = "regression" if self.likelihood == "gaussian" else "classification"
        self.backend = CurvlinopsGGN(model, kind, stochastic=True)

    def run(self, batches: list[Batch]) -> Kron:
        total, count = None, sum(len(x) for x, _ in batches)
        for inputs, targets in batches:  # as Laplace.fit does, without its eigendecompositions
            _, kron = self.backend.kron(inputs, targets, N=count)
            total = kron if total is None else total + kron
        return total

    def solve(self, factors: Kron, vector: dict[str, Tensor], damping: float, exact: bool) -> Tensor:
        if not exact:
            raise Skip("no factored damping in proportion to the factors")
        flat = torch.cat([v.flatten() for v in vector.values()])
        return (factors.decompose() + torch.tensor(damping)).bmm(flat[None, None], exponent=-1)
