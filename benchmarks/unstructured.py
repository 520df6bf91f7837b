"""Small networks whose parameters meet the data in ways that no layer has: ``[N, 3, 4]`` to ``[N, 2]``."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["UNSTRUCTURED", "Written"]


class Written(nn.Module):
    """What a function makes of parameters, modules and data, averaged over positions, under a linear layer.

    Args:
        function: called with this module and the data, returns ``[N, *, 4]``.
        members: parameters, given as tensors, and modules.
    """

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **members: Tensor | nn.Module) -> None:
        super().__init__()
        self.function, self.head = function, nn.Linear(4, 2)
        for name, member in members.items():
            setattr(self, name, nn.Parameter(member) if isinstance(member, Tensor) else member)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self, x).tanh().reshape(len(x), -1, 4).mean(1))


def _scores(m: nn.Module, x: Tensor) -> Tensor:
    """Attention with a number for each distance, looked up and added to the scores."""
    distance = torch.arange(3)[:, None] - torch.arange(3) + 2
    return (m.query(x) @ x.mT + m.distances[distance]).softmax(-1) @ x


def _steps(m: nn.Module, x: Tensor) -> Tensor:
    """A recurrence written out: one matrix at every step."""
    state = x[:, 0]
    for each in x.unbind(1):
        state = (each + F.linear(state, m.w)).tanh()
    return state


def _expert(x: Tensor) -> Tensor:
    return (x[:, 0, 0] > 0).long()


UNSTRUCTURED: dict[str, Callable[[], nn.Module]] = {
    "norms of rows": lambda: Written(
        lambda m, x: F.linear(x, m.scales * F.normalize(m.w, dim=1)), w=torch.randn(4, 4), scales=torch.randn(4, 1)
    ),
    "scale 1 + w": lambda: Written(lambda m, x: x * (1 + m.w), w=torch.randn(4)),
    "adapter of rank one": lambda: Written(
        lambda m, x: x @ (torch.eye(4) + m.a @ m.b), a=torch.randn(4, 1), b=torch.randn(1, 4)
    ),
    "einsum of heads": lambda: Written(
        lambda m, x: torch.einsum("ntd,hde->nthe", x, m.w).flatten(2), w=torch.randn(2, 4, 2)
    ),
    "bilinear": lambda: Written(
        lambda m, x: F.bilinear(x, x.sin(), m.w, m.b), w=torch.randn(4, 4, 4), b=torch.randn(4)
    ),
    "distances in scores": lambda: Written(_scores, query=nn.Linear(4, 4), distances=torch.randn(5)),
    "learned queries": lambda: Written(
        lambda m, x: (m.queries.expand(len(x), -1, -1) @ x.mT).softmax(-1) @ x, queries=torch.randn(2, 4)
    ),
    "expanded, columns first": lambda: Written(
        lambda m, x: m.table.t().expand(len(x), 3, 4).sin().transpose(1, 2).reshape(x.shape) * x,
        table=torch.randn(4, 3),
    ),
    "matrix and transpose": lambda: Written(
        lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.t()), w=torch.randn(3, 4)
    ),
    "pieces joined": lambda: Written(lambda m, x: x * torch.cat([m.w[:1].sin(), m.w[1:]]), w=torch.randn(3, 4)),
    "expert's matrix and shift": lambda: Written(
        lambda m, x: torch.baddbmm(m.b[_expert(x)], x, m.w[_expert(x)]), w=torch.randn(2, 4, 4), b=torch.randn(2, 1, 4)
    ),
    "recurrence written out": lambda: Written(_steps, w=torch.randn(4, 4)),
}
"""What is special → makes the network."""
