"""Scores against training again: of a convex problem at its minimum they are the derivative of what is measured."""

import torch

import kronfisher as kf
from tests.helpers.close import close

DECAY = 0.05


def _matrix(model):
    return torch.cat([model.weight, model.bias[:, None]], dim=1).detach()


def trained(x, y, weights, start=None):
    """The minimum of ``(1/N) Σ w ℓ + λ/2 ‖θ‖²``, by Newton's method in float64; N stays that of all data."""
    model = torch.nn.Linear(x.shape[1], 3).double()
    inputs = torch.cat([x, torch.ones(len(x), 1)], dim=1)

    def loss(matrix):
        each = torch.nn.functional.cross_entropy(inputs @ matrix.T, y, reduction="none")
        return (weights * each).mean() + DECAY / 2 * matrix.square().sum()

    matrix = torch.zeros(3, inputs.shape[1], dtype=torch.float64) if start is None else _matrix(start)
    for _ in range(12 if start is None else 6):
        gradient = torch.autograd.functional.jacobian(loss, matrix).flatten()
        hessian = torch.autograd.functional.hessian(loss, matrix).reshape(len(gradient), -1)
        matrix = matrix - torch.linalg.solve(hessian, gradient).view_as(matrix)
    assert gradient.norm() < 1e-12
    with torch.no_grad():
        model.weight.copy_(matrix[:, :-1])
        model.bias.copy_(matrix[:, -1])
    return model


def margins(model, x, y):
    logits = model(x).detach()
    own = logits.gather(1, y[:, None])[:, 0]
    return own - logits.scatter(1, y[:, None], -torch.inf).logsumexp(1)


def losses(model, x, y):
    return -kf.Categorical().log_prob(model(x).detach(), y)


def test_scores_predict_what_leaving_out_an_example_does():
    x, y = torch.randn(60, 4).double(), torch.randint(3, (60,))
    queries = torch.randn(8, 4).double(), torch.randint(3, (8,))
    model = trained(x, y, torch.ones(60))
    fisher = kf.estimate(model, (x, y), kf.Categorical(), fit="full", labels="exact")
    influence = kf.Influence(model, fisher, kf.Categorical(), damping=DECAY)
    nearly, without = [], []
    for k in range(10):
        weights = torch.ones(60, dtype=torch.float64)
        weights[k] -= 1e-5
        nearly.append(trained(x, y, weights, model))
        weights[k] = 0
        without.append(trained(x, y, weights, model))
    for name, measured in (("loss", losses), ("margin", margins)):
        scores = influence.scores((x, y), queries, measurement=name).values[:, :10]
        before = measured(model, *queries)
        slopes, changes = (
            torch.stack([measured(one, *queries) - before for one in each], 1) for each in (nearly, without)
        )
        close(slopes / 1e-5, scores, 1e-4)
        assert float((changes - scores).norm() / changes.norm()) < 0.15, name  # to first order
        assert float(torch.corrcoef(torch.stack([changes.flatten(), scores.flatten()]))[0, 1]) > 0.99, name
