"""Rates grow with agreement, shrink with contradiction within bounds, and brake where steps overshoot."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.optim.layerwise.motion import Motion
from kronfisher.optim.layerwise.rates import LARGEST, LEAST_GAIN, Paths, Rates


def update(made, gradient, path, natural=True, left=1.0, room=0.0, settled=0.0, cheap=0.0):
    """Evidence of one unit whose inverse curvature is the identity."""
    paths = Paths(torch.full((1,), 0.9), torch.tensor([natural]))
    numbers = map(torch.tensor, (left, room, settled, cheap))
    made.update((gradient @ path)[None], (gradient @ gradient)[None], paths, torch.tensor(True), *numbers)


def rates(count=1):
    made = Rates()
    made.resize([None] * count, torch.device("cpu"))
    return made


def feed(made, gradients):
    path = torch.zeros_like(gradients[0])
    for gradient in gradients:
        update(made, gradient, path)
        path = 0.9 * path + 0.1 * gradient
    return path


def test_the_length_of_the_path_is_followed_exactly():
    made, generator = rates(), torch.Generator().manual_seed(0)
    path = feed(made, [torch.randn(7, generator=generator) for _ in range(30)])
    torch.testing.assert_close(made.path, (path @ path).reshape(1))


def test_noise_moves_rates_within_their_bounds_and_never_brakes():
    made, generator = rates(), torch.Generator().manual_seed(1)
    for step in range(400):
        feed(made, [torch.randn(1000, generator=generator)])
        assert (1 + step / 100) ** -0.5 - 1e-6 <= float(made.factors) <= 1
    assert float(made.brake) == 1


def test_noise_shortens_steps_of_natural_units_as_far_as_scatter_costs():
    found, generator = {}, torch.Generator().manual_seed(2)
    for natural, room in ((True, 0.0), (True, 0.5), (True, 1.0), (False, 1.0)):
        made, path = rates(), torch.randn(1000, generator=generator)
        for _ in range(300):
            gradient = torch.randn(1000, generator=generator) - 0.1 * path  # against the path, more than is tolerated
            made.path = (path @ path).reshape(1)
            update(made, gradient, path, natural, room=room)
        found[natural, room] = float(made.factors)
    lowest = (1 + 299 / 100) ** -0.5
    expected = {(True, 0.0): lowest, (True, 0.5): lowest**0.5, (True, 1.0): 1.0, (False, 1.0): lowest}
    assert found == pytest.approx(expected, rel=1e-5)


def test_little_contradiction_is_tolerated_where_it_is_said_to_be():
    generator = torch.Generator().manual_seed(3)
    path = torch.randn(1000, generator=generator)
    strict, tolerant, exceeded = rates(), rates(), rates()
    for _ in range(200):
        noise = torch.randn(1000, generator=generator)
        for made, against, room in ((strict, 0.03, 0.0), (tolerant, 0.03, 1.0), (exceeded, 0.07, 1.0)):
            gradient = noise - (noise @ path / (path @ path) + against * noise.norm() / path.norm()) * path
            made.path = (path @ path).reshape(1)
            update(made, gradient, path, room=room)
    assert float(strict.factors) < 0.7 and float(exceeded.factors) == 1 and float(tolerant.factors) > 1.4


@pytest.mark.parametrize(("left", "grows"), [(1.0, False), (0.5, True), (0.0, True)])
def test_more_contradiction_is_tolerated_where_little_is_left_to_fit(left, grows):
    generator = torch.Generator().manual_seed(6)
    made, path = rates(), torch.randn(1000, generator=generator)
    for _ in range(200):
        noise = torch.randn(1000, generator=generator)
        gradient = noise - (noise @ path / (path @ path) + 0.12 * noise.norm() / path.norm()) * path
        made.path = (path @ path).reshape(1)
        update(made, gradient, path, left=left, room=1.0)
    assert float(made.factors) > 1.4 if grows else float(made.factors) == 1


def test_gradients_without_noise_lengthen_steps_and_contradiction_brakes():
    made, ones = rates(), torch.ones(3)
    path = feed(made, [ones] * 200)
    assert float(made.factors) == LARGEST
    for _ in range(30):  # every step goes too far, so that the next gradient points back
        gradient = -path.sign()
        update(made, gradient, path)
        path = 0.9 * path + 0.1 * gradient
    assert float(made.factors) < 0.3 and float(made.brake) < 0.3
    braked = float(made.brake)
    feed(made, [ones] * 40)
    assert float(made.brake) > 2 * braked  # agreement releases it


def overshooting(settled, left=1.0):
    """After 60 steps each of which goes too far."""
    made, path = rates(), torch.ones(3)
    for _ in range(60):
        gradient = -path.sign()
        made.path = (path @ path).reshape(1)
        update(made, gradient, path, left=left, settled=settled)
        path = 0.9 * path + 0.1 * gradient
    return made


def test_steps_that_overshoot_grow_as_far_as_they_may():
    grown, half, none = (overshooting(settled) for settled in (1.0, 0.5, 0.0))
    assert float(grown.factors) == pytest.approx((1 + 59 / 100) ** 0.5) and float(grown.brake) == 1
    assert float(half.brake) == 0.5 >= float(half.factors) > 0.3
    assert float(none.brake) < 0.01 and float(none.factors) < 0.01


def test_steps_that_overshoot_shrink_with_the_sixth_root_of_what_is_left_to_fit():
    made = overshooting(1.0, left=1e-6)
    assert float(made.brake) == pytest.approx(0.1)
    assert 0.05 < float(made.factors) <= 0.1 + 1e-6


def test_gradients_that_oppose_the_path_whatever_the_rate_do_not_lower_it_where_scatter_costs_nothing():
    made, path = rates(), torch.ones(4)
    for step in range(500):
        made.path = (path @ path).reshape(1)
        before = float(made.factors)
        update(made, -path, path, left=1e-3, room=float(step >= 300), settled=1.0)
        if step == 300:
            lowest = before
        elif step > 300:
            assert before <= float(made.factors) < 1.021 * before
    assert lowest < 0.1 and float(made.factors) == 1


def test_rates_without_room_do_not_grow_beyond_one():
    made, path = rates(), torch.ones(1000)
    for step in range(300):
        gradient = 0.01 * path + torch.randn(1000, generator=torch.Generator().manual_seed(step))
        gradient += (0.3 - gradient @ path / (gradient.norm() * path.norm())) * gradient.norm() / path.norm() * path
        made.path = (path @ path).reshape(1)
        room = float(step < 200)
        update(made, gradient, path, room=room)
        if step == 199:
            assert float(made.factors) > 1.5
    assert float(made.factors) == 1


def test_steps_that_signal_lengthened_return_to_one_among_noise():
    made, generator = rates(), torch.Generator().manual_seed(2)
    feed(made, [torch.ones(1000)] * 30)
    longest = float(made.factors)
    feed(made, [torch.randn(1000, generator=generator) for _ in range(300)])
    assert longest > 5 and float(made.brake) <= 1 and float(made.factors) <= 1


def test_a_batch_that_is_not_finite_changes_nothing_but_the_count():
    made = rates()
    feed(made, [torch.ones(3)] * 5)
    before = {name: value.clone() for name, value in vars(made).items() if name != "steps"}
    paths, numbers = Paths(torch.full((1,), 0.9), torch.tensor([True])), torch.ones(4)
    made.update(torch.tensor([torch.nan]), torch.tensor([torch.inf]), paths, torch.tensor(False), *numbers)
    assert all(torch.equal(value, before[name]) for name, value in vars(made).items() if name != "steps")


def test_units_keep_what_is_known_of_them_when_others_join():
    made = rates(2)
    paths, numbers = Paths(torch.full((2,), 0.9), torch.tensor([True, True])), (torch.ones(()), *torch.zeros(3))
    for _ in range(20):
        made.update(torch.tensor([1.0, -1.0]), torch.ones(2), paths, torch.tensor(True), *numbers)
    old = made.factors.clone()
    made.resize([1, None, 0], torch.device("cpu"))
    assert made.factors.tolist() == [float(old[1]), 1.0, float(old[0])]


def valley(made, steps, natural=True, cheap=1.0, left=1.0):
    """A gradient that goes to and fro, and a small one along the valley; the average as `Motion` makes it."""
    path = torch.zeros(2)
    for step in range(steps):
        gradient = torch.tensor([(-1.0) ** step, 0.001])
        update(made, gradient, path, natural, left=left, settled=cheap, cheap=cheap)
        path = torch.lerp(path, gradient, 0.1 * float(made.gain))
        torch.testing.assert_close(made.path, (path @ path).reshape(1))


@pytest.mark.parametrize(("natural", "cheap", "heavier"), [(True, 1.0, True), (True, 0.0, False), (False, 1.0, False)])
def test_averages_of_natural_units_that_only_overshoot_grow_heavier_where_that_is_cheap(natural, cheap, heavier):
    made = rates()
    valley(made, 300, natural, cheap)
    assert float(made.gain) == pytest.approx(LEAST_GAIN if heavier else 1.0)


def test_heavier_averages_bear_longer_steps_and_nothing_left_to_fit_does_not_shorten_them():
    lasting, fitted = rates(), rates()
    for made, left in ((lasting, 1.0), (fitted, 0.01)):
        valley(made, 500, left=left)
        assert float(made.factors) > 2 * (1 + 500 / 100) ** 0.5
    assert float(fitted.factors) == pytest.approx(float(lasting.factors))


def test_gradients_along_the_path_make_averages_light_again():
    made = rates()
    valley(made, 300)
    for _ in range(300):
        update(made, torch.ones(2), torch.ones(2), settled=1.0, cheap=1.0)
    assert float(made.gain) == 1


def test_a_state_without_gains_loads():
    made, other = rates(2), Rates()
    state = {key: value for key, value in made.state_dict().items() if key != "gain"}
    other.load_state_dict(state, torch.device("cpu"))
    assert other.gain.tolist() == [1.0, 1.0]


def test_the_momentum_of_a_training_takes_new_directions_with_the_gain(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    for _ in range(3):
        optimizer.step(lambda: model(x), y)
    motion, advance, seen = optimizer.parts.motion, Motion._advance, []

    def watched(self, where, directions, momenta, states, clip):
        given, before = ([one.clone() for one in tensors] for tensors in (directions, momenta))
        updates, sizes = advance(self, where, directions, momenta, states, clip)
        shares = [0.1 * float(self.rates.gain[place]) for place in where.index]
        seen.append((where.border, given, before, shares, [one.clone() for one in updates], momenta))
        return updates, sizes

    monkeypatch.setattr(Motion, "_advance", watched)
    motion.rates.gain = torch.linspace(0.3, 0.9, len(motion.rates.gain))
    optimizer.step(lambda: model(x), y)
    ((border, *pieces),) = seen
    assert border == 4
    for given, before, share, update, after in list(zip(*pieces, strict=True))[:border]:
        torch.testing.assert_close(after, before.lerp(given, share))
        torch.testing.assert_close(update, given.lerp(after, 1 - share))
