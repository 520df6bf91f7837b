import torch
import torch.nn.functional as F
from kronfluence.analyzer import prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.factor.config import FactorConfig
from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
from kronfluence.factor.eigen import perform_eigendecomposition
from kronfluence.task import Task
from kronfluence.utils.state import State
from torch import Tensor, nn
from workloads import Batch

from peers import Skip, join


class SampledLoss(Task):
    def __init__(self, likelihood: str) -> None:
        self.likelihood = likelihood

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
        outputs = model(batch[0])
        if self.likelihood == "bernoulli":
            labels = torch.bernoulli(outputs.detach().sigmoid())
            return F.binary_cross_entropy_with_logits(outputs, labels, reduction="sum")
        logits = outputs.flatten(end_dim=-2)
        labels = logits.detach().softmax(dim=-1).multinomial(1).flatten()
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


class Adaptor:
    def setup(self, model: nn.Module, likelihood: str) -> None:
        self.likelihood, self.task, self.state = likelihood, SampledLoss(likelihood), State(cpu=True)
        self.arguments = FactorArguments(strategy="kfac")
        self.model = prepare_model(model, self.task)

    def run(self, batches: list[Batch]) -> dict[str, dict[str, Tensor]]:
        _, factors = fit_covariance_matrices_with_loader(
            self.model, self.state, self.task, batches, self.arguments, disable_tqdm=True
        )
        return factors

    def solve(
        self, factors: dict[str, dict[str, Tensor]], vector: dict[str, Tensor], damping: float, exact: bool
    ) -> list[Tensor]:
        if not exact:
            raise Skip("only exact damping")
        eigen = perform_eigendecomposition(factors, self.model, self.state, self.arguments, disable_tqdm=True)
        kfac, arguments, solved = FactorConfig.CONFIGS["kfac"], ScoreArguments(damping_factor=damping), []
        for name in eigen["activation_eigenvectors"]:
            storage = {key: values[name] for key, values in eigen.items()}
            kfac.prepare(storage, arguments, torch.device("cpu"))
            solved.append(kfac.precondition_gradient(join(vector, name)[None], storage))
        return solved
