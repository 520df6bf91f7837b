import torch.nn.functional as F
from nngeometry.backend import TorchHooksJacobianBackend
from nngeometry.metrics import FIM
from nngeometry.object.pspace import PMatDense, PMatDiag, PMatEKFAC, PMatKFAC
from peers import Skip
from problems import Problem
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

REPRESENTATIONS = {"kfac": PMatKFAC, "ekfac": PMatEKFAC, "diagonal": PMatDiag, "full": PMatDense}


def matrix(problem: Problem, kind: str, labels: str, reduction: str) -> tuple[Tensor, float, str]:
    if kind not in REPRESENTATIONS or reduction != "mean":
        raise Skip("means only, no reduce")
    if "sequence" in problem.name:
        raise Skip("linear layers with 2-D inputs only")
    if labels == "exact" and problem.likelihood == "bernoulli":
        raise Skip("one output only")
    size = len(problem.inputs) if kind == "full" else 4  # its dense matrix wants batches of one size
    loader = DataLoader(TensorDataset(problem.inputs.clone(), problem.targets), batch_size=size)
    if labels == "exact":
        variant = {"gaussian": "regression", "categorical": "classif_logits"}[problem.likelihood]
        found = FIM(problem.model, loader, REPRESENTATIONS[kind], variant=variant)
    else:

        def loss(inputs: Tensor, targets: Tensor) -> Tensor:
            outputs = problem.model(inputs)
            if problem.likelihood == "gaussian":
                return 0.5 * (outputs - targets).square().sum(dim=1, keepdim=True)
            if problem.likelihood == "bernoulli":
                return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(dim=1, keepdim=True)
            return F.cross_entropy(outputs, targets, reduction="none")[:, None]

        found = REPRESENTATIONS[kind](TorchHooksJacobianBackend(problem.model, loss), examples=loader)
    if kind == "ekfac":
        found.update_diag(loader)
    return found.get_diag() if kind == "diagonal" else found.to_torch(), 1.0, "same definition"
