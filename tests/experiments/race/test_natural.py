"""Our own optimiser in a race."""

from dataclasses import replace

import pytest

from kronfisher.experiments.race.order import Order
from tests.experiments.race.racing import TINY, Interrupted, race

OURS = {
    "natural": {},
    "layerwise": {},
    "natural-ekfac": {"base": "natural", "fit": "ekfac"},
    "fixed": {
        "base": "natural",
        "fit": ["KFAC", {"mode": "reduce"}],
        "damping": ["exact", 0.1],
        "momentum": 0.9,
        "lr": 0.1,
        "kl_limit": 0.5,
        "weight_decay": 1e-3,
        "refresh": {"statistics": 2, "inverse": 4},
    },
}


def test_averages_and_growing_batches(tmp_path, task, monkeypatch):
    sizes, real = [], Order.take

    def take(self, size):
        sizes.append(size)
        return real(self, size)

    monkeypatch.setattr(Order, "take", take)
    options = {"sgd": {"lr": 0.05, "batch_size": [16, 64, 4], "average": 0.8}, "plain": {"base": "sgd"}}
    options["plain"] |= {key: value for key, value in options["sgd"].items() if key != "average"}
    averaged, plain = race(tmp_path, "sgd", "plain", options=options, steps=24).go(task)
    assert sizes[:6] == [16, 23, 32, 45, 64, 64] == sizes[24:30]
    pairs = list(zip(averaged.points, plain.points, strict=True))
    assert all(a["train_loss"] <= b["train_loss"] for a, b in pairs) and pairs[-1][0] != pairs[-1][1]
    # The average is evaluated, not trained: what it is averaged from goes its own way, and goes on after a stop.
    competitor = race(tmp_path, "sgd", options=options, steps=24).competitors["sgd"]
    stopped = replace(competitor, build=lambda *a: Interrupted(competitor.build(*a), at=15))
    cut = race(tmp_path / "cut", "sgd", options=options, steps=24)
    with pytest.raises(KeyboardInterrupt):
        replace(cut, competitors={"sgd": stopped}).go(task)
    (found,) = cut.go(task)
    assert [p["train_loss"] for p in found.points] == [p["train_loss"] for p in averaged.points]
    assert found.test == averaged.test


@pytest.mark.parametrize("name", OURS)
def test_natural_gradient_goes_on_with_the_same_bits(name, tmp_path, task):
    options = {name: {**OURS[name], "batch_size": 32}}
    whole = race(tmp_path / "whole", name, options=options, steps=12)
    (expected,) = whole.go(task)
    assert not expected.failure and expected.report
    share = 1.0 if name == "layerwise" else 0.9  # whose first dozen steps are short
    assert expected.best("train_loss") < share * expected.points[0]["train_loss"]
    competitor = whole.competitors[name]
    stopped = replace(competitor, build=lambda *a: Interrupted(competitor.build(*a), at=8))
    with pytest.raises(KeyboardInterrupt):
        replace(whole, folder=tmp_path / "cut", competitors={name: stopped}).go(task)
    (found,) = replace(whole, folder=tmp_path / "cut").go(task)
    losses = [[point["train_loss"] for point in r.points] for r in (expected, found)]
    assert losses[0] == losses[1] and len(losses[0]) == 5


def test_natural_gradient_does_not_care_whether_the_loss_is_a_mean_over_outputs(tmp_path, task):
    mean = replace(TINY, mean=True)
    settings = {**OURS["fixed"], "batch_size": 32}
    scaled = settings | {"damping": ["exact", 0.1 / 64], "kl_limit": 0.5 / 64, "weight_decay": 1e-3 / 64}
    (one,) = race(tmp_path / "sum", "x", options={"x": settings}).go(task)
    (other,) = race(tmp_path / "mean", "x", options={"x": scaled}, problem=mean).go(mean.load())
    assert len(one.points) == 5
    for a, b in zip(one.points, other.points, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"] / 64, rel=1e-3)
