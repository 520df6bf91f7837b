"""The neural tangent kernel against Jacobians written out."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.errors import DataError, MemoryBudgetError, NumericalError, UnsupportedError
from tests.helpers.close import close
from tests.helpers.truth import jacobian

NETWORKS = {
    "linear layers": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2)),
        (2, 4, 4),
    ),
    "attention": (lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), nn.Flatten()),
                  (2, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_are_products_of_jacobians(name):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model = make().double().eval()
    x, z = torch.randn(7, *shape).double(), torch.randn(5, *shape).double()
    names = [name for name, _ in model.named_parameters()]
    J, H = jacobian(model, x, names), jacobian(model, z, names)  # [N, C, P]
    each = torch.einsum("ncp,mdp->nmcd", J, H)
    own = torch.einsum("ncp,mdp->nmcd", J, J)
    for data, other in (((x), (z)), (list(x.split([3, 4])), [(z[:2], None), (z[2:], None)])):
        close(kf.kernel(model, data, other, outputs="each"), each)
        close(kf.kernel(model, data, other), each.diagonal(dim1=2, dim2=3).sum(2))
        close(kf.kernel(model, data, other, outputs="sum"), each.sum((2, 3)))
        close(kf.kernel(model, data, outputs="each"), own)
        close(kf.kernel(model, data), own.diagonal(dim1=2, dim2=3).sum(2))


class Branch(nn.Module):
    """A layer that small batches do not meet."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.a(x) if len(x) < 4 else self.a(x) + self.b(x).tanh()


def test_parameters_may_appear_late():
    torch.manual_seed(0)
    model, few, many = Branch().double(), torch.randn(3, 3).double(), torch.randn(5, 3).double()
    J, H = (jacobian(model, x, [name for name, _ in model.named_parameters()]) for x in (few, many))
    close(kf.kernel(model, few, many), torch.einsum("ncp,mcp->nm", J, H))
    both = torch.cat([J, H])
    close(kf.kernel(model, [(few,), (many,)]), torch.einsum("ncp,mcp->nm", both, both))
    with pytest.raises(UnsupportedError, match="uses every parameter first"):
        kf.kernel(model, (batch for batch in [few]), many)


def test_numbers_of_outputs_that_differ():
    torch.manual_seed(0)
    model, x, z = nn.Linear(3, 2).double(), torch.randn(3, 1, 3).double(), torch.randn(4, 2, 3).double()
    flat = lambda model, batch: (model(batch).flatten(1), None)  # noqa: E731
    inner = torch.einsum("nti,msi->nmts", x, z) + 1
    each = torch.einsum("nmts,cd->nmtcsd", inner, torch.eye(2).double()).reshape(3, 4, 2, 4)
    close(kf.kernel(model, x, z, outputs="each", forward=flat), each)
    close(kf.kernel(model, x, z, outputs="sum", forward=flat), each.sum((2, 3)))
    with pytest.raises(DataError, match="2 or 4 outputs"):
        kf.kernel(model, x, z, forward=flat)
    with pytest.raises(DataError, match="2 or 4 outputs"):
        kf.kernel(model, x, [z, x[:1]], outputs="each", forward=flat)
    with pytest.raises(DataError, match="2 or 4 outputs"):
        kf.kernel(model, [(x,), (z,)], outputs="each", forward=lambda model, batch: flat(model, batch[0]))


def test_products_that_overflow_are_refused():
    with pytest.raises(NumericalError, match="kernel holds NaN or Inf"):
        kf.kernel(nn.Linear(3, 2).double(), 1e300 * torch.ones(4, 3).double())


def test_what_cannot_be_is_refused():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(ValueError, match="outputs="):
        kf.kernel(model, x, outputs="all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="no batch"):
        kf.kernel(model, x, [])
    with pytest.raises(MemoryBudgetError):
        kf.kernel(model, x, memory_budget=50)
