"""Batches with the same graph and blocks are assigned once; whatever may differ is looked at."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.estimation import accumulator
from tests.helpers.truth import dense_fisher

X, Y = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)).double(), torch.arange(12) % 3


class Either(nn.Module):
    """Two layers of one shape, of which the batch says which one it uses: their graphs are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.first if x[0, 0] > 0 else self.second
        return self.last(layer(x).tanh())


@pytest.fixture
def assigned(monkeypatch) -> list[str]:
    """Grows with every batch that is assigned anew."""
    batches: list[str] = []
    real = accumulator.assign

    def assign(observation, *args, **settings):
        batches.append(observation.where)
        return real(observation, *args, **settings)

    monkeypatch.setattr(accumulator, "assign", assign)
    return batches


def test_equal_batches_are_assigned_once(assigned):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batches = [(X[k : k + 3], Y[k : k + 3]) for k in range(0, 12, 3)]
    fisher = kf.estimate(model, batches, kf.Categorical(), fit=kf.Full(across_layers=True), labels="exact")
    assert len(assigned) == 1
    torch.testing.assert_close(fisher.to_dense(), dense_fisher(model, X, Y, kf.Categorical()))


def test_batches_of_another_size_or_with_other_masks_are_assigned_anew(assigned):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    ignored = Y.clone()
    ignored[10] = -100
    batches = [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[:3], Y[:3]), (X[3:6], Y[3:6]), (X[9:], ignored[9:]), (X[:3], Y[:3])]
    kf.estimate(model, batches, kf.Categorical(), fit="kfac")
    assert assigned == ["batch 0", "batch 2", "batch 4", "batch 5"]


def test_the_same_graph_of_other_weights_is_no_repetition(assigned):
    model = Either().double()
    shown = [x[x[:, :1].sign().flatten() == sign] for x in (X[:6], X[6:]) for sign in (1, -1)]
    fit = kf.Full(across_layers=True)
    fisher = kf.estimate(model, [(x,) for x in shown], kf.Categorical(), fit=fit, labels="exact")
    truth = sum(len(x) * dense_fisher(model, x, Y[: len(x)], kf.Categorical()) for x in shown) / len(X)
    torch.testing.assert_close(fisher.to_dense(), truth)
    assert assigned == ["batch 0", "batch 1", *(f"batch {k}" for k in range(4))]  # begun again with both layers known
