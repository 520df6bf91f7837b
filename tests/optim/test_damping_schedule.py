"""Damping schedules: rules for λ, ours and a user's own."""

import copy
import math

import pytest
import torch

import kronfisher as kf
from kronfisher.optim.damping_schedule import DampingSchedule, ScheduledDamping
from tests.helpers.training import batches, network


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


def test_damping_rises_tenfold_where_the_exact_model_chooses_a_tiny_step_size():
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
    initial = torch.nn.Sequential(torch.nn.Linear(1000, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3))
    x = torch.randn(64, 1000) * torch.logspace(0, -6, 1000)  # few inputs matter, the others are noise
    y = (x[:, :1] > 0).long().squeeze(1)
    sizes = {}
    for least in (0.0, 1e-3):
        model = copy.deepcopy(initial)
        trust = kf.LevenbergMarquardt(1e-12, floor=1e-12, least=least)
        optimizer = kf.NaturalGradient(model, kf.Categorical(), trust=trust)
        for _ in range(12):
            optimizer.step(lambda model=model: model(x), y)
        report = optimizer.report()
        sizes[least] = report.step_size, report.damping
        assert min(report.seconds.values()) >= 0
    assert sizes[1e-3][0] > 2 * sizes[0.0][0] and sizes[1e-3][1] > 1000 * sizes[0.0][1]


class Own(DampingSchedule):
    """A user's own rule, which notes when it is called."""

    def __init__(self):
        self.called = set()

    def start(self, mean):
        return 1.0

    def compares(self, step):
        return step % 2 == 0

    def adapted(self, value, ratio, step):
        self.called.add("raised" if ratio < 1.1 else "lowered")
        return 3 * value if ratio < 1.1 else value / 2

    def rejects(self, change, predicted):
        self.called.add("rejects")
        return change > 0

    def refused(self, value):
        self.called.add("refused")
        return 7 * value

    def after_solving(self, value, step_size):
        self.called.add("after_solving")
        return value

    def bounded(self, value, mean):
        return min(max(value, 0.2), 5.0)

    def longest(self, step):
        return 0.3

    def warnings(self, value, mean):
        return [f"λ is {value} of at most 5"]


def test_a_schedule_of_ones_own_is_asked_for_every_decision():
    torch.manual_seed(0)
    model, schedule, expected = network(), Own(), 1.0
    optimizer = kf.NaturalGradient(model, kf.Categorical(), trust=schedule)
    for step, (x, y) in enumerate(batches(24)):
        rejected = optimizer.report().rejected
        optimizer.param_groups[0]["lr"] = 1000.0 if step == 20 else 1.0
        optimizer.step(lambda x=x: model(x), y)
        report = optimizer.report()
        if report.rejected > rejected:
            expected *= 7
        elif step % 2 == 0:
            expected = expected * 3 if report.ratio < 1.1 else expected / 2
        expected = min(max(expected, 0.2), 5.0)
        assert report.damping == expected
        assert f"λ is {expected} of at most 5" in report.warnings
    assert schedule.called == {"raised", "lowered", "rejects", "refused", "after_solving"}


def test_a_schedule_that_compares_is_refused_where_losses_cannot_be_evaluated_again():
    model, ((x, y), *_) = network(), batches(1)
    with pytest.raises(kf.UnsupportedError, match="Own compares the loss"):
        kf.Preconditioner(model, kf.Categorical(), trust=Own())
    optimizer = kf.NaturalGradient(model, kf.Categorical(), trust=Own())
    outputs = optimizer.forward(x)
    with pytest.raises(kf.UnsupportedError, match="Own compares the loss"):
        optimizer.backward(outputs, y, optimizer.loss(outputs, y) + 1)


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
