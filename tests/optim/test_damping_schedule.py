"""Rules for λ."""

import copy
import math

import pytest
import torch

import kronfisher as kf
from kronfisher.optim.damping_schedule import ScheduledDamping


def test_damping_falls_when_the_model_is_right_and_rises_when_it_is_wrong():
    trust = kf.LevenbergMarquardt(warmup=0)
    assert trust.adapted(1.0, 0.9, 10) == pytest.approx((19 / 20) ** 10)
    assert trust.adapted(1.0, 0.5, 10) == 1.0
    assert trust.adapted(1.0, 0.1, 10) == trust.adapted(1.0, math.nan, 10) == pytest.approx((20 / 19) ** 10)
    assert trust.refused(1.0) > trust.adapted(1.0, -1.0, 10)


def test_damping_stays_between_floor_and_ceiling():
    trust = kf.LevenbergMarquardt(floor=1e-3, ceiling=10.0)
    assert (trust.bounded(1e-9, 2.0), trust.bounded(0.1, 2.0), trust.bounded(1e9, 2.0)) == (2e-3, 0.1, 20.0)


def test_the_start_follows_the_scale_of_the_matrix():
    assert kf.LevenbergMarquardt().start(300.0) == pytest.approx(100 * kf.LevenbergMarquardt().start(3.0))
    assert kf.LevenbergMarquardt(initial=7.0).start(300.0) == 7.0


def test_damping_rises_tenfold_where_the_exact_model_takes_next_to_nothing_of_the_direction():
    damping = ScheduledDamping(kf.LevenbergMarquardt(least=1e-3, ceiling=50.0), value=1.0, first_mean=1.0)
    for step_size, expected in ((0.5, 1.0), (1e-3, 1.0), (1e-4, 10.0), (1e-6, 50.0)):
        damping.check_step_size(step_size)
        assert damping.value == expected
    for schedule in (kf.Constant(1.0), kf.LevenbergMarquardt(least=0.0)):
        still = ScheduledDamping(schedule, value=1.0)
        still.check_step_size(1e-9)
        assert still.value == 1.0


def test_noise_where_the_matrix_is_nearly_zero_is_damped_away():
    """Seen: an AlexNet whose first λ, a share of its mean eigenvalue, was far too small, and so was every step."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(1000, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3))
    x = torch.randn(64, 1000) * torch.logspace(0, -6, 1000)  # few inputs matter, the others are noise
    y = (x[:, :1] > 0).long().squeeze(1)
    sizes = {}
    for least in (0.0, 1e-3):
        model = copy.deepcopy(network)
        trust = kf.LevenbergMarquardt(1e-12, floor=1e-12, least=least)
        optimizer = kf.NaturalGradient(model, kf.Categorical(), trust=trust)
        for _ in range(12):
            optimizer.step(lambda model=model: model(x), y)
        report = optimizer.report()
        sizes[least] = report.step_size, report.damping
        assert min(report.seconds.values()) >= 0
    assert sizes[1e-3][0] > 2 * sizes[0.0][0] and sizes[1e-3][1] > 1000 * sizes[0.0][1]


@pytest.mark.parametrize("make", [
    lambda: kf.LevenbergMarquardt(least=-1.0),
    lambda: kf.Constant(0.0), lambda: kf.Constant(math.nan), lambda: kf.LevenbergMarquardt(initial=-1.0),
    lambda: kf.LevenbergMarquardt(decay=1.0), lambda: kf.LevenbergMarquardt(floor=1.0, relative=0.1),
    lambda: kf.Schedule(lambda step: -1.0).start(1.0), lambda: kf.Refresh(statistics=0),
    lambda: kf.Refresh(average=1.0),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError):
        make()
