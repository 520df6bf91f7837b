"""Scores against training again: of a convex problem at its minimum they are the derivative of what is measured."""

import pytest
import torch

import kronfisher as kf
from tests.helpers.close import close

DECAY = 0.05


def trained(x, y, weights):
    """The minimum of ``(1/N) Σ w ℓ + λ/2 ‖θ‖²``, by Newton's method in float64; N stays that of all data."""
    model = torch.nn.Linear(x.shape[1], 3).double()
    inputs = torch.cat([x, torch.ones(len(x), 1)], dim=1)

    def loss(matrix):
        each = torch.nn.functional.cross_entropy(inputs @ matrix.T, y, reduction="none")
        return (weights * each).mean() + DECAY / 2 * matrix.square().sum()

    matrix = torch.zeros(3, inputs.shape[1], dtype=torch.float64)
    for _ in range(12):
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


@pytest.mark.parametrize("measurement", ["loss", "margin"])
def test_scores_predict_what_leaving_out_an_example_does(measurement):
    x, y = torch.randn(60, 4).double(), torch.randint(3, (60,))
    queries = torch.randn(8, 4).double(), torch.randint(3, (8,))
    model = trained(x, y, torch.ones(60))
    fisher = kf.estimate(model, (x, y), kf.Categorical(), fit="full", labels="exact")
    influence = kf.Influence(model, fisher, kf.Categorical(), damping=DECAY)
    scores = influence.scores((x, y), queries, measurement=measurement).values

    def measured(model):
        if measurement == "margin":
            return margins(model, *queries)
        return -kf.Categorical().log_prob(model(queries[0]).detach(), queries[1])

    before = measured(model)
    changes = []
    for k in range(10):
        weights = torch.ones(60, dtype=torch.float64)
        weights[k] -= 1e-5
        close((measured(trained(x, y, weights)) - before) / 1e-5, scores[:, k], 1e-4)
        weights[k] = 0
        changes.append(measured(trained(x, y, weights)) - before)
    change = torch.stack(changes, dim=1)
    assert float((change - scores[:, :10]).norm() / change.norm()) < 0.15  # to first order
    assert float(torch.corrcoef(torch.stack([change.flatten(), scores[:, :10].flatten()]))[0, 1]) > 0.99
