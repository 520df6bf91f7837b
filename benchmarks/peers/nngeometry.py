import torch
import torch.nn.functional as F
from nngeometry.backend import TorchHooksJacobianBackend
from nngeometry.layercollection import LayerCollection
from nngeometry.object.pspace import PMatKFAC
from nngeometry.object.vector import PVector
from torch import Tensor, nn
from torch.utils.data import DataLoader
from workloads import Batch

from peers import Skip


class Adaptor:
    def setup(self, model: nn.Module, likelihood: str) -> None:
        self.likelihood, self.layers = likelihood, LayerCollection.from_model(model)

        def log_likelihood(inputs: Tensor, _: Tensor) -> Tensor:  # of labels drawn from the model, one value an example
            outputs = model(inputs)
            if likelihood == "bernoulli":
                labels = torch.bernoulli(outputs.detach().sigmoid())
                return F.logsigmoid(outputs.where(labels > 0, -outputs)).sum(dim=1, keepdim=True)
            log_probabilities = outputs.log_softmax(dim=1)
            return log_probabilities.gather(1, log_probabilities.detach().exp().multinomial(1))

        self.backend = TorchHooksJacobianBackend(model, log_likelihood, layer_collection=self.layers)

    def run(self, batches: list[Batch]) -> PMatKFAC:
        if not batches[0][0].is_floating_point():
            raise Skip("needs inputs that can have a gradient, and 2-D inputs to linear layers")
        return PMatKFAC(self.backend, examples=DataLoader(batches, batch_size=None))

    def solve(self, factors: PMatKFAC, vector: dict[str, Tensor], damping: float, exact: bool) -> PVector:
        if exact:
            raise Skip("K-FAC has no exact damping")
        grouped = {name: (vector[f"{name}.weight"], vector[f"{name}.bias"]) for name in self.layers.layers}
        return factors.inverse(damping).mv(PVector(self.layers, dict_repr=grouped))
