"""What the scatter of iterates costs, and how much room it leaves to rates."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.optim.layerwise.scatter import DEAR, SETTLING, Scatter
from kronfisher.optim.misfit import UNKNOWN


def test_the_room_falls_from_its_most_to_nothing_as_the_scatter_becomes_dear():
    excess = torch.tensor(2.0)
    for cost, share in ((-1.0, 1.0), (0.0, 1.0), (DEAR, 0.5), (2 * DEAR, 0.0), (9.0, 0.0)):
        assert float(Scatter(torch.tensor(cost)).room(excess)) == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("excess", [UNKNOWN, 0.0, -1.0, torch.inf])
def test_there_is_no_room_where_it_is_not_known_how_far_the_loss_can_fall(excess):
    assert float(Scatter(torch.tensor(-1.0)).room(torch.tensor(excess))) == 0


def test_a_leap_takes_the_room_away_until_training_has_settled():
    scatter, excess = Scatter(torch.tensor(-1.0)), torch.tensor(2.0)
    scatter.settle(torch.tensor(False))
    assert float(scatter.room(excess)) == pytest.approx(1)
    scatter.settle(torch.tensor(True))
    assert float(scatter.room(excess)) == 0
    for _ in range(SETTLING // 2):
        scatter.settle(torch.tensor(False))
    assert float(scatter.room(excess)) == pytest.approx(0.5, rel=1e-3)
    for _ in range(SETTLING):
        scatter.settle(torch.tensor(False))
    assert float(scatter.room(excess)) == pytest.approx(1)


def test_a_gradient_that_is_not_finite_leaves_the_cost_alone():
    scatter = Scatter(torch.tensor(1.0))
    scatter.update(torch.tensor(torch.nan), torch.tensor(True))
    scatter.update(torch.tensor(5.0), torch.tensor(False))
    assert float(scatter.cost) == 1
    scatter.update(torch.tensor(5.0), torch.tensor(True))
    assert float(scatter.cost) == pytest.approx(1.4)


def test_the_cost_is_that_of_weights_away_from_their_average():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 300), nn.Tanh(), nn.Linear(300, 250), nn.LayerNorm(250))  # more than one piece
    x, y = torch.randn(64, 5), torch.randint(250, (64,))
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    scatter, cost = optimizer.parts.motion.scatter, 0.0
    natural = [n for n, _ in model.named_parameters() if not n.startswith("3.")]
    for step in range(5):
        averages = {n: a.clone() for n, a in optimizer.parts.average.averages.items()}
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step(lambda: model(x), y)
        if step:
            found = sum(float((model.get_parameter(n).grad * (before[n] - averages[n])).sum()) for n in natural)
            cost += 0.1 * (found - cost)
            assert float(scatter.cost) == pytest.approx(cost, rel=1e-4, abs=1e-7)
    assert cost != 0


def test_without_an_average_nothing_is_measured_and_states_of_earlier_versions_load():
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(64, 5), torch.randint(3, (64,))
    optimizer = kf.NaturalGradient(model, kf.Categorical(), step=kf.LayerwiseStep(average=False))
    for _ in range(3):
        optimizer.step(lambda: model(x), y)
    assert float(optimizer.parts.motion.scatter.cost) == 0
    state = optimizer.parts.motion.state_dict()
    del state["scatter"]
    optimizer.parts.motion.load_state_dict(state, torch.device("cpu"))
    optimizer.step(lambda: model(x), y)


def test_overshooting_is_cheap_up_to_a_fifth_of_the_excess_and_not_just_after_a_leap():
    excess, left = torch.tensor(10.0), torch.tensor(1.0)
    for cost, cheap in ((-1.0, 1.0), (2.0, 1.0), (3.0, 0.5), (4.0, 0.0), (9.0, 0.0)):
        assert float(Scatter(torch.tensor(cost)).cheap(excess, left)) == pytest.approx(cheap)
        assert float(Scatter(torch.tensor(cost / 2)).cheap(excess, left / 4)) == pytest.approx(cheap)
    scatter = Scatter(torch.tensor(0.0))
    scatter.settle(torch.tensor(True))
    assert float(scatter.cheap(excess, left)) == 0


@pytest.mark.parametrize("excess", [0.0, -1.0, 1e30])
def test_where_it_is_not_known_how_far_the_loss_can_fall_nothing_is_cheap(excess):
    assert float(Scatter(torch.tensor(0.0)).cheap(torch.tensor(excess), torch.ones(()))) == 0
