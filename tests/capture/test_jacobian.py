"""Gradients of every residual, read off the graph, against one backward pass each."""

import pytest
import torch
from torch import nn

from kronfisher.capture.jacobian import Jacobian
from tests.helpers.close import close
from tests.helpers.residuals import laplacian, network, rows


def check(jacobian, numbers, model):
    truth, chosen = rows(numbers, model), torch.tensor([len(numbers) - 1, 0])
    close(jacobian.rows(numbers), truth, 1e-12)
    close(jacobian.rows(numbers, chosen), truth[chosen], 1e-12)


def points(n, d, seed=0):
    return torch.rand(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Physical(nn.Module):
    """A network, a constant of nature, a skewed output and a hard constraint."""

    def __init__(self):
        super().__init__()
        self.net = network(2, 4, 3, 1)
        self.kappa = nn.Parameter(torch.tensor(0.7).double())

    def forward(self, x):
        return x[:, :1] * (1 - x[:, :1]) * self.net(x)


def mixed(model, x):
    """A mixed third derivative times the constant, and the value."""
    x = x.detach().requires_grad_()
    u = model(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second[:, 1].sum(), x, create_graph=True)
    return model.kappa * third[:, 1] + u[:, 0] ** 2


def joint(model, x):
    """One forward pass for two kinds of points."""
    return model(torch.cat([points(3, 2, 8), x]))[3:, 0] ** 2


def shuffled(model, x):
    return model(x)[torch.randperm(len(x)), 0]


def stacked(model, x):
    """Differences of neighbours: two rows of a batch of twice the size for every number."""
    u = model(torch.cat([x, x + 0.1]))[:, 0]
    return u[len(x) :] - u[: len(x)]


def tied(model, x):
    return model[2](model[0](x).tanh() @ model[2].weight[:, :4].T @ model[2].weight[:, :4])[:, 0]


class Twice(torch.autograd.Function):
    """A function whose gradient shows no graph."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy(2 * gradient.detach().numpy())


CASES = {
    "laplacian": (lambda: network(2, 4, 1), laplacian),
    "laplacian, deep": (lambda: network(3, 4, 3, 1), laplacian),
    "mixed and constrained": (Physical, mixed),
    "one forward pass for two terms": (lambda: network(2, 4, 1), joint),
    "shuffled rows": (lambda: network(2, 4, 1), shuffled),
    "several rows a number": (lambda: network(2, 4, 1), stacked),
    "sequences": (lambda: network(2, 4, 1), lambda model, x: model(x[:, None].expand(-1, 3, -1)).sum((1, 2))),
    "a weight that meets itself": (lambda: network(2, 4, 2), tied),
    "coupled rows": (lambda: network(2, 4, 1), lambda model, x: model(x)[:, 0] - model(x).mean()),
    "coupled rows beside others": (
        lambda: network(2, 4, 1),
        lambda model, x: (
            model[2](model[0](x[:, None].expand(-1, 3, -1)).tanh()).sum((1, 2)) - model[2](x @ x.new_ones(2, 4)).mean()
        ),
    ),
    "a number that is not used": (Physical, lambda model, x: model(x)[:, 0]),
    "numbers of a constant sum": (lambda: network(2, 4, 1), lambda model, x: model(x).softmax(0)[:, 0]),
    "a gradient made of cases": (Physical, lambda model, x: torch.sinc(model.kappa * x.round())[:, 0] + model(x)[:, 0]),
    "a gradient made of logarithms": (Physical, lambda model, x: (model.kappa * model(x)).logcumsumexp(0)[:, 0]),
    "a gradient made out of sight": (Physical, lambda model, x: Twice.apply(model.kappa * x[:, 0]) + model(x)[:, 0]),
    "a normalised weight": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)).double(),
        lambda model, x: model(x).square().sum(1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_one_pass_each(case):
    torch.manual_seed(1)
    make, residuals = CASES[case]
    model = make()
    jacobian = Jacobian(dict(model.named_parameters()))
    for n, seed in ((7, 0), (7, 1), (40, 2)):  # the same graph again, and another size
        numbers = residuals(model, points(n, 3 if case == "laplacian, deep" else 2, seed))
        check(jacobian, numbers, model)


SIZES = [[2, 2], [1, 3], [3, 1]]
SHIFTS = torch.tensor([[-9.0, 9.0], [9.0, 9.0], [9.0, -9.0]]).double()
# Ways of one form in which the batch says which rows belong to a number; units that were dead may live later.
DECIDED = {
    "split": lambda model, x, k: torch.stack([part.sum() for part in model(x).split(SIZES[k])]),
    "mask": lambda model, x, k: model(x)[:, 0] + (k != 0) * model(x).flip(0)[:, 0],
    "matrix": lambda model, x, k: ((torch.eye(4) if k == 1 else torch.ones(4, 4)).to(x) @ model(x).square())[:, 0],
    "dead units": lambda model, x, k: (model(x)[:, 0].unflatten(0, (2, 2)) + SHIFTS[k, :, None]).relu().sum(0),
}


@pytest.mark.parametrize("way", DECIDED)
def test_nothing_is_kept_for_graphs_of_the_same_form(way):
    torch.manual_seed(1)
    model = network(2, 4, 1)
    jacobian = Jacobian(dict(model.named_parameters()))
    for k in range(3):
        numbers = DECIDED[way](model, points(4, 2, k), k)
        check(jacobian, numbers, model)


def test_a_graph_of_the_same_form_that_moves_rows_is_looked_at_again():
    torch.manual_seed(1)
    model, orders = network(2, 4, 1), iter([torch.arange(9), torch.arange(9).flip(0)])
    jacobian = Jacobian(dict(model.named_parameters()))
    for _ in range(2):
        numbers = model(points(9, 2))[next(orders), 0]
        check(jacobian, numbers, model)
