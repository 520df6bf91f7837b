"""Rules for λ."""

import math

import pytest

import kronfisher as kf


def test_damping_falls_when_the_model_is_right_and_rises_when_it_is_wrong():
    trust = kf.LevenbergMarquardt(warmup=0)
    assert trust.adapted(1.0, 0.9, 10) == pytest.approx((19 / 20) ** 5)
    assert trust.adapted(1.0, 0.5, 10) == 1.0
    assert trust.adapted(1.0, 0.1, 10) == trust.adapted(1.0, math.nan, 10) == pytest.approx((20 / 19) ** 5)
    assert trust.refused(1.0) > trust.adapted(1.0, -1.0, 10)


def test_damping_stays_between_floor_and_ceiling():
    trust = kf.LevenbergMarquardt(floor=1e-3, ceiling=10.0)
    assert (trust.bounded(1e-9, 2.0), trust.bounded(0.1, 2.0), trust.bounded(1e9, 2.0)) == (2e-3, 0.1, 20.0)


def test_the_start_follows_the_scale_of_the_matrix():
    assert kf.LevenbergMarquardt().start(300.0) == pytest.approx(100 * kf.LevenbergMarquardt().start(3.0))
    assert kf.LevenbergMarquardt(initial=7.0).start(300.0) == 7.0


@pytest.mark.parametrize("make", [
    lambda: kf.Constant(0.0), lambda: kf.Constant(math.nan), lambda: kf.LevenbergMarquardt(initial=-1.0),
    lambda: kf.LevenbergMarquardt(decay=1.0), lambda: kf.LevenbergMarquardt(floor=1.0, relative=0.1),
    lambda: kf.Schedule(lambda step: -1.0).start(1.0), lambda: kf.Refresh(statistics=0),
    lambda: kf.Refresh(average=1.0),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError):
        make()
