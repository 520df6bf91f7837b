from asdl.fisher import FisherConfig, get_fisher_maker
from torch import Tensor, nn
from workloads import Batch

from peers import Skip


class Adaptor:
    def setup(self, model: nn.Module, likelihood: str) -> None:
        self.model = model
        self.likelihood = "gaussian" if likelihood == "bernoulli" else likelihood
        loss = "mse" if self.likelihood == "gaussian" else "cross_entropy"
        self.maker = get_fisher_maker(model, FisherConfig("fisher_mc", ["kron"], loss_type=loss))

    def run(self, batches: list[Batch]) -> dict[str, object]:
        count = sum(len(x) for x, _ in batches)
        for k, (inputs, _) in enumerate(batches):
            self.maker.setup_logits_repr(self.maker.setup_model_call(self.model, inputs))
            self.maker.forward_and_backward(data_size=count, accumulate=k > 0)
        return {name: m.fisher.kron for name, m in self.model.named_modules() if hasattr(m, "fisher")}

    def solve(self, factors: dict[str, object], vector: dict[str, Tensor], damping: float, exact: bool) -> list[Tensor]:
        if exact:
            raise Skip("no exact damping")
        solved = []
        for name, kron in factors.items():
            kron.update_inv(damping)
            solved += kron.mvp(vector[f"{name}.weight"], vector[f"{name}.bias"], use_inv=True)
        return solved
