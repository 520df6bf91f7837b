"""A run: the clock, what is measured, and that an interruption leaves no trace."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch

from kronfisher.errors import NumericalError
from kronfisher.experiments.race import COMPETITORS
from kronfisher.experiments.race import run as running
from kronfisher.experiments.race.result import read
from tests.experiments.race.racing import BASELINES, CLASSES, TINY, Interrupted, race, rows


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_learns(name, tmp_path, task):
    lr = {"muon": 0.1, "soap": 0.03}.get(name, COMPETITORS[name].settings["lr"])
    options = {name: {"lr": lr, "batch_size": 32}}
    (result,) = race(tmp_path, name, steps=60, options=options).go(task)
    assert not result.failure and result.points[-1]["train_loss"] < 0.75 * result.points[0]["train_loss"]
    assert [point["step"] for point in result.points] == [0, 15, 30, 45, 60]
    assert result.points[-1]["epoch"] == pytest.approx(10, abs=0.2)  # six whole batches of 32 in 200 data
    assert set(result.test) == {"test_loss", "test_error"}


@pytest.mark.parametrize("problem", [TINY, CLASSES], ids=["autoencoder", "convolutions"])
@pytest.mark.parametrize("name", BASELINES)
def test_an_interrupted_race_goes_on_with_the_same_bits(name, problem, tmp_path, monkeypatch):
    task, states = problem.load(), []
    real = running.Run.evaluate

    def watched(self):
        states.append((self.step, {key: value.clone() for key, value in self.model.state_dict().items()}))
        return real(self)

    monkeypatch.setattr(running.Run, "evaluate", watched)
    whole = race(tmp_path / "whole", name, problem=problem)
    (expected,) = whole.go(task)
    wanted, states = dict(states), []
    competitor = whole.competitors[name]
    stopped = replace(competitor, build=lambda *a: Interrupted(competitor.build(*a), at=7))
    with pytest.raises(KeyboardInterrupt):
        replace(whole, folder=tmp_path / "cut", competitors={name: stopped}).go(task)
    (left,) = rows(tmp_path / "cut").values()
    assert not left["finished"] and [point["step"] for point in left["points"]] == [0, 2, 4, 6]
    (found,) = replace(whole, folder=tmp_path / "cut").go(task)
    assert found.finished and [step for step, _ in states][-1] == 8
    losses = [[point[what] for point in r.points for what in ("train_loss", "test_loss")] for r in (expected, found)]
    assert losses[0] == losses[1]
    last = dict(states)[8]
    assert all(torch.equal(wanted[8][key], last[key]) for key in last)
    assert not list((tmp_path / "cut" / "runs").glob("*.pt"))  # a finished run needs none


def test_what_is_finished_is_not_done_again(tmp_path, task):
    one = race(tmp_path, "sgd")
    (first,) = one.go(task)

    def never(*arguments):
        pytest.fail("trained again")

    (again,) = replace(one, competitors={"sgd": replace(one.competitors["sgd"], build=never)}).go(task)
    assert again.to_json() == first.to_json()
    for changed in (replace(one, steps=9), race(tmp_path, "sgd", options={"sgd": {"lr": 0.5, "batch_size": 32}})):
        assert len(changed.go(task)) == 1
    assert len(list((tmp_path / "runs").glob("*.json"))) == 3


def test_only_training_is_on_the_clock(tmp_path, task, monkeypatch):
    real = type(task).evaluate

    def slow(self, *arguments, **options):
        time.sleep(0.05)
        return real(self, *arguments, **options)

    monkeypatch.setattr(type(task), "evaluate", slow)
    began = time.perf_counter()
    (result,) = race(tmp_path, "sgd", steps=4).go(task)
    spent, last = time.perf_counter() - began, result.points[-1]
    assert spent > 6 * 0.05  # five evaluations and the last of all test data
    assert 0 < last["seconds"] < spent - 6 * 0.05 and last["cpu_seconds"] > 0
    assert [p["seconds"] for p in result.points] == sorted(p["seconds"] for p in result.points)


def test_a_budget_of_seconds_ends_the_run(tmp_path, task):
    (result,) = race(tmp_path, "sgd", seconds=0.2, steps=None).go(task)
    last = result.points[-1]
    assert last["seconds"] >= 0.2 and last["step"] > 4
    moments = [point["seconds"] for point in result.points[1:]]
    assert len(moments) <= 4 and all(m >= 0.05 * k for k, m in enumerate(moments, start=1))
    # A step that has begun is finished; on a machine with other work it may take long.
    assert last["seconds"] - 0.2 < 0.2 + 2 * last["seconds"] / last["step"]


@pytest.mark.parametrize("error", [NumericalError, torch.linalg.LinAlgError])
def test_an_optimizer_that_fails_ends_its_own_run_only(error, tmp_path, task):
    class Failing(Interrupted):
        def step(self, *arguments):
            try:
                return super().step(*arguments)
            except KeyboardInterrupt:
                raise error("singular") from None

    one = race(tmp_path, "sgd", "adamw")
    sgd = one.competitors["sgd"]
    one = replace(
        one,
        competitors={
            "sgd": replace(sgd, build=lambda *a: Failing(sgd.build(*a), at=3)),
            **dict(list(one.competitors.items())[1:]),
        },
    )
    failed, fine = one.go(task)
    assert failed.failure == "step 4: singular" and failed.finished and math.isinf(failed.score)
    assert not fine.failure and len(fine.points) == 5
    assert "step 4: singular" in str(one.standings())


def test_a_diverging_loss_is_a_failure(tmp_path, task):
    (result,) = race(tmp_path, "sgd", options={"sgd": {"lr": 1e38, "batch_size": 32}}).go(task)
    assert "not finite" in result.failure and math.isnan(result.points[-1]["train_loss"]) and math.isinf(result.score)
    path = next((tmp_path / "runs").glob("*.json"))
    assert json.loads(path.read_text())["points"][-1]["train_loss"] is None  # JSON has no NaN
    assert math.isnan(read(path).points[-1]["train_loss"])


def test_progress_is_reported(tmp_path, task, monkeypatch):
    monkeypatch.setattr(running, "REPORT_EVERY", 0.0)
    seen = []
    race(tmp_path, "sgd").go(task, progress=lambda plan, share, loss: seen.append((plan.competitor, share, loss)))
    assert [share for _, share, _ in seen] == [k / 8 for k in range(1, 9)]
    assert all(name == "sgd" and loss > 0 for name, _, loss in seen)


def test_a_batch_larger_than_the_data_is_refused(tmp_path, task):
    with pytest.raises(ValueError, match="batch_size is 500, there are 200 examples"):
        race(tmp_path, "sgd", options={"sgd": {"batch_size": 500}}).go(task)


def test_the_schedule_multiplies_the_rate_and_nothing_else(task):
    rates, competitor = [], COMPETITORS["muon"]
    racer = competitor.build(task.model(0), task, {**competitor.settings, "lr": 0.5}, 0)
    x = task.dataset.train_inputs[:10]
    for factor in (1.0, 0.1, 1.0):
        racer.step(x, x, factor)
        rates.append([group["lr"] for optimizer in racer.optimizers for group in optimizer.param_groups])
    assert rates == [[0.5, 0.5], [0.05, 0.05], [0.5, 0.5]]


def test_muon_has_the_kernels_of_convolutions():
    task = CLASSES.load()
    model = task.model(0)
    racer = COMPETITORS["muon"].build(model, task, {**COMPETITORS["muon"].settings, "weight_decay": 0.0}, 0)
    matrices = [p for group in racer.optimizers[0].param_groups for p in group["params"]]
    assert [tuple(p.shape) for p in matrices] == [(6, 25), (16, 150), (120, 64), (84, 120), (10, 84)]
    before = model.conv2.weight.detach().clone()
    racer.step(task.dataset.train_inputs[:20], task.dataset.train_targets[:20], 1.0)
    change = (model.conv2.weight - before).detach().flatten(1)
    singular = torch.linalg.svdvals(change)
    assert singular[-1] > 0.3 * singular[0] > 0  # the update is nearly orthogonal


def test_muon_in_single_precision_is_torchs_muon():
    from torch.optim import _muon

    from kronfisher.experiments.race.baselines import orthogonalize

    for shape in ((12, 30), (30, 12)):
        gradient, arguments = torch.randn(shape), ((3.4445, -4.775, 2.0315), 5, 1e-7)
        theirs = _muon._zeropower_via_newtonschulz(gradient, *arguments).float()
        assert (orthogonalize(gradient, *arguments) - theirs).norm() < 0.03 * theirs.norm()  # theirs is bfloat16


def test_numbers_that_fade_do_not_slow_a_run_down(tmp_path, task, monkeypatch):
    """Seen: Adam at six times its time a step, where the averages of dead units' gradients had become subnormal."""
    seen, small = [], torch.tensor(1e-310, dtype=torch.float64)
    step = running.Run.train

    def train(self, **limits):
        seen.append(float(small * 1))
        return step(self, **limits)

    monkeypatch.setattr(running.Run, "train", train)
    race(tmp_path, "sgd", steps=2).go(task)
    assert seen and set(seen) == {0.0} and float(small * 1) > 0
