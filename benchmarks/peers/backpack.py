from backpack import backpack, extend
from backpack.extensions import KFAC
from torch import Tensor, nn
from workloads import Batch

from peers import Skip


class Adaptor:
    def setup(self, model: nn.Module, likelihood: str) -> None:
        if not isinstance(model, nn.Sequential):
            raise Skip("K-FAC only of sequential networks with 2-D inputs to linear layers")
        self.likelihood = "gaussian" if likelihood == "bernoulli" else likelihood  # its Bernoulli takes one output
        self.model = extend(model)
        self.loss = extend(nn.MSELoss() if self.likelihood == "gaussian" else nn.CrossEntropyLoss())

    def run(self, batches: list[Batch]) -> dict[str, list[Tensor]]:
        factors: dict[str, list[Tensor]] = {}
        for inputs, targets in batches:
            self.model.zero_grad(set_to_none=True)
            with backpack(KFAC(mc_samples=1)):
                self.loss(self.model(inputs), targets).backward()
            for name, parameter in self.model.named_parameters():
                if name not in factors:
                    factors[name] = parameter.kfac
                else:
                    for total, factor in zip(factors[name], parameter.kfac, strict=True):
                        total += factor
                del parameter.kfac
        return factors

    def solve(self, factors: dict[str, list[Tensor]], vector: dict[str, Tensor], damping: float, exact: bool) -> None:
        raise Skip("has no inverse")
