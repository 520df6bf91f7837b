import torch
from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
from torch import Tensor, nn
from workloads import Batch

from peers import ClassesSecond

LOSSES = {"bernoulli": nn.BCEWithLogitsLoss, "categorical": nn.CrossEntropyLoss}


class Adaptor:
    def setup(self, model: nn.Module, likelihood: str) -> None:
        self.likelihood = likelihood
        self.model = ClassesSecond(model) if likelihood == "categorical" else model
        self.loss = LOSSES[likelihood](reduction="sum")
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def run(self, batches: list[Batch]) -> KFACLinearOperator:
        terms = batches[0][1].shape if self.likelihood == "categorical" else batches[0][1].shape[:-1]
        operator = KFACLinearOperator(
            self.model,
            self.loss,
            self.parameters,
            batches,
            fisher_type="mc",
            mc_samples=1,
            separate_weight_and_bias=False,
            check_deterministic=False,
            num_data=sum(len(x) for x, _ in batches),  # what it is told it need not traverse the data for
            num_per_example_loss_terms=terms[1:].numel(),
        )
        operator.compute_kronecker_factors()
        return operator

    def solve(
        self, factors: KFACLinearOperator, vector: dict[str, Tensor], damping: float, exact: bool
    ) -> list[Tensor]:
        inverse = KFACInverseLinearOperator(
            factors, damping=damping, use_exact_damping=exact, use_heuristic_damping=not exact
        )
        with torch.no_grad():
            return inverse @ list(vector.values())
