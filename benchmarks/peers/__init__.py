"""One adaptor for each library, all with the same three methods.

A module here is named as its library and has a class `Adaptor`:

- `setup(model, likelihood)` prepares the library for a model and one of the likelihoods "bernoulli" and "categorical",
  sets `self.likelihood` to the one used ("gaussian" where the library has nothing closer), or raises `Skip`.
- `run(batches)` computes the K-FAC factors of all parameters with one Monte-Carlo sample and returns what holds them.
- `solve(factors, vector, damping, exact)` factorises from scratch and applies the damped inverse to one vector, a dict
  by parameter name. `exact` asks for (F + λ)⁻¹; otherwise either factor is damped by its share of √λ.
"""

import torch
from torch import Tensor, nn


class Skip(Exception):
    """The reason why the library cannot do something, for the table."""


def join(vector: dict[str, Tensor], name: str) -> Tensor:
    """Weight and bias of one layer as one matrix ``[O, I + 1]``."""
    return torch.cat([vector[f"{name}.weight"].flatten(1), vector[f"{name}.bias"][:, None]], dim=1)


class ClassesSecond(nn.Module):
    """Outputs as cross-entropy takes them: classes in dimension 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).movedim(-1, 1)
