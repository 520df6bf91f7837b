"""Races: the clock, the order, what is searched, what is measured, and that an interruption leaves no trace."""

import json
import math
import time
from dataclasses import replace
from itertools import chain

import pytest
import torch
from torch import nn

from kronfisher import cli
from kronfisher.errors import NumericalError
from kronfisher.experiments.race import COMPETITORS, PROBLEMS, Competitor, Problem, Race
from kronfisher.experiments.race import run as running
from kronfisher.experiments.race.competitors import named
from kronfisher.experiments.race.entry import enter
from kronfisher.experiments.race.order import Order
from kronfisher.experiments.race.pictures import draw
from kronfisher.experiments.race.result import Plan, Result, read
from kronfisher.experiments.race.search import walk
from kronfisher.experiments.race.standings import Standings, collect

BASELINES = ("sgd", "adam", "adamw", "muon", "soap", "shampoo")
TINY = Problem("digits", "digits", "autoencoder", seconds=1, train_size=200, evaluated=100, evaluations=4)
CLASSES = Problem(
    "lenet", "digits", "lenet5", seconds=1, train_size=200, evaluated=100, evaluations=4, weight_decay=0.1
)


@pytest.fixture(scope="module")
def task():
    return TINY.load()


def race(folder, *names, problem=TINY, options=None, **settings):
    settings = {"seeds": (0,), "search": "none", "steps": 8} | settings
    small = {
        name: {"batch_size": 32, **({} if name not in ("soap", "shampoo") else {"frequency": 3})} for name in names
    }
    return Race(problem, named(names, small | (options or {})), folder, **settings)


def rows(folder):
    return {path.name.split("-seed")[0]: json.loads(path.read_text()) for path in (folder / "runs").glob("*.json")}


class Interrupted:
    """A competitor that is stopped before one of its steps."""

    def __init__(self, inner, at):
        self.inner, self.left = inner, at

    def step(self, *arguments):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inner.step(*arguments)

    def __getattr__(self, name):
        return getattr(self.inner, name)


# What is raced on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "scale"), [(TINY, 1.0), (replace(TINY, mean=True, activation="relu"), 1 / 64), (CLASSES, 1.0)]
)
def test_the_loss_is_the_likelihoods(problem, scale):
    task = problem.load()
    model, (x, y) = task.model(0), (task.dataset.train_inputs[:50], task.dataset.train_targets[:50])
    outputs = model(x)
    torch.testing.assert_close(task.loss(outputs, y), scale * -task.likelihood.log_prob(outputs, y).mean())
    assert task.scale == scale


def test_squared_errors_lose_their_constant():
    task = TINY.load()
    task = replace(task, dataset=replace(task.dataset, task="values"))
    outputs, targets = torch.randn(7, 64), torch.randn(7, 64)
    constant = 32 * math.log(2 * math.pi)
    expected = -task.likelihood.log_prob(outputs, targets).mean() - constant
    torch.testing.assert_close(task.loss(outputs, targets), expected, rtol=1e-4, atol=1e-4)


def test_evaluations_are_of_the_whole_part_and_leave_the_model_alone(task):
    model = task.model(1)
    model.append(nn.Dropout(0.5)).train()
    before = torch.get_rng_state()
    found = task.evaluate(model)
    assert model.training and model[-1].training and torch.equal(before, torch.get_rng_state())
    model.eval()
    x, y = task.dataset.train_inputs[:100], task.dataset.test_targets[:100]
    assert found["train_loss"] == pytest.approx(task.loss(model(x), x).item(), rel=1e-5)
    assert found["train_error"] == pytest.approx((model(x).sigmoid() - x).square().sum(1).mean().item(), rel=1e-5)
    assert found["test_loss"] == pytest.approx(task.loss(model(y), y).item(), rel=1e-5)
    everything = task.evaluate(model, all_test=True)
    assert set(everything) == {"test_loss", "test_error"} and everything["test_loss"] != found["test_loss"]


def test_accuracy_for_classes():
    task = CLASSES.load()
    model = task.model(0).eval()
    x, y = task.dataset.test_inputs[:100], task.dataset.test_targets[:100]
    assert task.evaluate(model)["test_accuracy"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())


def test_all_problems_know_their_network():
    assert {"curves", "mnist", "faces", "alexnet"} <= set(PROBLEMS)
    curves = replace(PROBLEMS["curves"], train_size=10).load()
    widths = [layer.out_features for layer in curves.model(0) if isinstance(layer, nn.Linear)]
    assert widths == [400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784]


# The order ------------------------------------------------------------------------------------------------------------


def test_the_order_is_the_seeds_and_every_pass_has_its_own():
    def batches(seed, size, number):
        order = Order(10, seed)
        return [order.take(size).tolist() for _ in range(number)]

    assert batches(0, 5, 4) == batches(0, 5, 4) != batches(1, 5, 4)
    first, second = (sorted(chain(*part)) for part in (batches(0, 5, 4)[:2], batches(0, 5, 4)[2:]))
    assert first == second == list(range(10)) and batches(0, 5, 4)[:2] != batches(0, 5, 4)[2:]
    # A batch of another size is cut from the same order; a rest that is too small is left out.
    assert list(chain(*batches(0, 3, 3))) == list(chain(*batches(0, 5, 2)))[:9]
    assert batches(0, 3, 4)[3] == batches(0, 5, 3)[2][:3]


def test_all_start_from_the_same_weights(tmp_path, task):
    race(tmp_path, "sgd", "adamw", "muon").go(task)
    starts = [found["points"][0]["train_loss"] for found in rows(tmp_path).values()]
    assert len(starts) == 3 and len(set(starts)) == 1
    other = race(tmp_path, "sgd", seeds=(1,)).go(task)[0]
    assert other.points[0]["train_loss"] != starts[0]


# The run --------------------------------------------------------------------------------------------------------------


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


def test_progress_is_told(tmp_path, task, monkeypatch):
    monkeypatch.setattr(running, "LOOK", 0.0)
    seen = []
    race(tmp_path, "sgd").go(task, progress=lambda plan, share, loss: seen.append((plan.competitor, share, loss)))
    assert [share for _, share, _ in seen] == [k / 8 for k in range(1, 9)]
    assert all(name == "sgd" and loss > 0 for name, _, loss in seen)


def test_a_batch_larger_than_the_data_is_refused(tmp_path, task):
    with pytest.raises(ValueError, match="batch_size is 500, there are 200 data"):
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

    from kronfisher.experiments.race.baselines import orthogonalized

    for shape in ((12, 30), (30, 12)):
        gradient, arguments = torch.randn(shape), ((3.4445, -4.775, 2.0315), 5, 1e-7)
        theirs = _muon._zeropower_via_newtonschulz(gradient, *arguments).float()
        assert (orthogonalized(gradient, *arguments) - theirs).norm() < 0.03 * theirs.norm()  # theirs is bfloat16


# Our own --------------------------------------------------------------------------------------------------------------

OURS = {
    "natural": {},
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
    pytest.importorskip("kronfisher.natural_gradient")
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
    pytest.importorskip("kronfisher.natural_gradient")
    options = {name: {**OURS[name], "batch_size": 32}}
    whole = race(tmp_path / "whole", name, options=options, steps=12)
    (expected,) = whole.go(task)
    assert not expected.failure and expected.report
    assert expected.best("train_loss") < 0.9 * expected.points[0]["train_loss"]
    competitor = whole.competitors[name]
    stopped = replace(competitor, build=lambda *a: Interrupted(competitor.build(*a), at=8))
    with pytest.raises(KeyboardInterrupt):
        replace(whole, folder=tmp_path / "cut", competitors={name: stopped}).go(task)
    (found,) = replace(whole, folder=tmp_path / "cut").go(task)
    losses = [[point["train_loss"] for point in r.points] for r in (expected, found)]
    assert losses[0] == losses[1] and len(losses[0]) == 5


def test_natural_gradient_does_not_care_whether_the_loss_is_a_mean_over_outputs(tmp_path, task):
    pytest.importorskip("kronfisher.natural_gradient")
    mean = replace(TINY, mean=True)
    settings = {**OURS["fixed"], "batch_size": 32}
    scaled = settings | {"damping": ["exact", 0.1 / 64], "kl_limit": 0.5 / 64, "weight_decay": 1e-3 / 64}
    (one,) = race(tmp_path / "sum", "x", options={"x": settings}).go(task)
    (other,) = race(tmp_path / "mean", "x", options={"x": scaled}, problem=mean).go(mean.load())
    for a, b in zip(one.points, other.points, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"] / 64, rel=1e-3)


# The search -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", range(6))
@pytest.mark.parametrize("start", range(6))
def test_the_walk_finds_the_bottom_of_a_valley(start, best):
    found = walk({"lr": start}, {"lr": tuple(range(6))}, lambda settings: abs(settings["lr"] - best))
    assert found == {"lr": best}


def test_the_walk_goes_down_from_where_everything_diverges():
    assert walk({"lr": 5}, {"lr": tuple(range(6))}, lambda s: math.inf if s["lr"] > 2 else -s["lr"]) == {"lr": 2}


def test_later_axes_are_searched_at_the_best_of_the_earlier():
    tried = []

    def score(settings):
        tried.append((settings["lr"], settings["size"]))
        return abs(settings["lr"] - 3) + settings["size"]

    assert walk({"lr": 2, "size": 2}, {"lr": (1, 2, 3, 4), "size": (1, 2)}, score) == {"lr": 3, "size": 1}
    assert tried == [(2, 2), (1, 2), (3, 2), (4, 2), (3, 1)]
    with pytest.raises(ValueError, match=r"lr begins at 7, which is none of 1, 2"):
        walk({"lr": 7}, {"lr": (1, 2)}, score)


def test_the_search_is_written_down_and_taken_up_again(tmp_path, task):
    axes = {"lr": (1e-6, 1e-3, 1e3), "schedule": ("cosine", "constant")}
    sgd = replace(named(("sgd",), {"sgd": {"batch_size": 32}})["sgd"], axes=axes)
    one = Race(TINY, {"sgd": sgd}, tmp_path, seeds=(0, 1), steps=40)
    results = one.go(task)
    found = json.loads((tmp_path / "search" / "sgd.json").read_text())
    tried = {(e["settings"]["lr"], e["settings"]["schedule"]): e["score"] for e in found["tried"]}
    assert set(tried) >= {(1e-3, "cosine"), (1e-6, "cosine"), (1e3, "cosine"), (1e-3, "constant")}
    scores = {key: math.inf if score is None else score for key, score in tried.items()}
    lr, schedule = min(scores, key=lambda key: scores[key])
    assert (found["winner"]["lr"], found["winner"]["schedule"]) == (lr, schedule) and lr == 1e-3
    assert [dict(r.plan.settings) for r in results] == [found["winner"]] * 2 and [r.plan.steps for r in results] == [
        40
    ] * 2
    for entry in found["tried"]:  # every number is that of a run, at a quarter of the budget, on the first seed
        run = read(tmp_path / "search" / "sgd" / f"{entry['run']}.json")
        assert run.plan.steps == 10 and run.plan.seed == 0 and run.plan.horizon == 10
        assert run.failure or run.best("train_loss") == entry["score"]

    def never(*arguments):
        pytest.fail("searched again")

    (tmp_path / "search" / "sgd.json").write_text(json.dumps({key: found[key] for key in found if key != "winner"}))
    again = replace(one, competitors={"sgd": replace(sgd, build=never)}).go(task)  # from the files of the runs
    assert [r.points for r in again] == [r.points for r in results]


def test_rates_alone_can_be_searched(tmp_path, task):
    axes = {"lr": (1e-6, 1e-3), "momentum": (0.9, 0.99)}
    sgd = replace(named(("sgd",), {"sgd": {"batch_size": 32}})["sgd"], axes=axes)
    Race(TINY, {"sgd": sgd}, tmp_path, seeds=(0,), steps=8, search="rates").go(task)
    found = json.loads((tmp_path / "search" / "sgd.json").read_text())
    assert [(e["settings"]["lr"], e["settings"]["momentum"]) for e in found["tried"]] == [(1e-3, 0.9), (1e-6, 0.9)]


def test_schedules_end_with_the_budget_of_seconds(tmp_path, task):
    (result,) = race(tmp_path, "sgd", seconds=0.4, steps=None, options={"sgd": {"batch_size": 32}}).go(task)
    horizon, made = result.plan.horizon, result.points[-1]["step"]
    assert 0.2 < horizon / made < 5  # it was measured over a fiftieth of the budget, perhaps on a busy machine
    found = json.loads((tmp_path / "search" / "sgd.json").read_text())
    (speed,) = found["seconds_per_step"].values()
    assert horizon == round(0.4 / speed)


def test_who_follows_takes_the_others_settings(tmp_path, task):
    sgd = replace(named(("sgd",), {"sgd": {"batch_size": 32}})["sgd"], axes={"lr": (1e-6, 1e-3)})
    follower = replace(sgd, name="same", axes={}, settings={**sgd.settings, "lr": 7.0}, follows="sgd")
    one = Race(TINY, {"same": follower, "sgd": sgd}, tmp_path, seeds=(0,), steps=8)
    assert [dict(r.plan.settings)["lr"] for r in one.go(task)] == [1e-3, 1e-3]
    with pytest.raises(ValueError, match="same takes its settings from sgd"):
        replace(one, competitors={"same": follower})


# The standings --------------------------------------------------------------------------------------------------------


def made(name, losses, seed=0, step=10, accuracy=None):
    points = [
        {
            "step": step * k,
            "epoch": k,
            "seconds": float(k),
            "cpu_seconds": 0.5 * k,
            "train_loss": loss,
            "test_loss": loss,
        }
        | ({"train_error": loss, "test_error": loss} if accuracy is None else {"train_accuracy": a, "test_accuracy": a})
        for k, (loss, a) in enumerate(zip(losses, accuracy or losses, strict=True))
    ]
    plan = Plan({"name": "p"}, name, {"batch_size": 2}, seed, 1.0, None, 1, 1, "cpu")
    return Result(plan, points, finished=True, test={"test_loss": losses[-1]})


def test_standings_are_medians_and_times_to_the_best_baseline():
    slow = tuple(made("sgd", [10.0, 8.0, x], seed) for seed, x in enumerate((6.0, 4.0, 5.0)))
    fast = tuple(made("natural", [10.0, x, 1.0], seed, step=1) for seed, x in enumerate((2.0, 4.0, 6.0)))
    standings = Standings("p", {"sgd": slow, "natural": fast}, ("sgd",))
    assert standings.goal == 5.0 and standings.last("sgd", "train_loss") == 5.0
    assert standings.reach("sgd", "train_loss", 5.0, "seconds") == 2.0
    # 10 → 2, 4, 6 within a second: 5 after 5/8, 5/6 and 1 + 1/5 seconds
    assert standings.reach("natural", "train_loss", 5.0, "seconds") == pytest.approx(5 / 6)
    (duel,) = standings.duels()
    assert duel["train_loss"]["seconds"]["ratio"] == pytest.approx(5 / 12)
    assert duel["train_loss"]["step"]["ratio"] == pytest.approx(5 / 6 / 20)
    assert (
        Standings("p", standings.results, ("sgd",), target=0.5).reach("natural", "train_loss", 0.5, "step") is not None
    )
    text = str(standings)
    assert "0.42" in text and "to loss 5" in text and "batch_size 2" in text


def test_a_target_that_most_runs_miss_has_no_time():
    runs = (made("a", [3.0, 1.0], 0), made("a", [3.0, 2.0], 1), made("a", [3.0, 2.0], 2))
    assert math.isnan(Standings("p", {"a": runs}, ()).reach("a", "train_loss", 1.5, "seconds"))
    assert Standings("p", {"a": runs}, ()).reach("a", "train_loss", 2.0, "seconds") == 1.0


def test_a_loss_that_came_back_counts_when_it_was_first_there():
    run = made("a", [3.0, 1.0, 2.5, 0.5])
    assert run.reach("train_loss", 1.0, "seconds") == 1.0 and run.best("train_loss") == 0.5
    failed = made("a", [3.0, math.nan, 1.0])
    assert failed.reach("train_loss", 2.0, "seconds") == 2.0  # nothing is interpolated across what is not a number


def test_higher_accuracies_are_better():
    run = made("a", [3.0, 2.0, 2.0], accuracy=[0.1, 0.9, 0.8])
    assert run.best("test_accuracy") == 0.9 and run.reach("test_accuracy", 0.5, "seconds") == pytest.approx(0.5)
    standings = Standings("p", {"a": (run,), "b": (made("b", [3.0, 1.0, 1.0], accuracy=[0.1, 0.5, 0.95]),)}, ("a",))
    (duel,) = standings.duels()
    assert duel["test_accuracy"]["seconds"]["ours"] == pytest.approx(1 + 0.4 / 0.45)


def test_the_folder_holds_the_race(tmp_path, task):
    for names in (("sgd",), ("adamw",)):  # two processes, say
        race(tmp_path, *names, seeds=(0, 1)).go(task)
    standings = collect(tmp_path, "digits", ("adamw",), ("sgd",))
    assert list(standings.results) == ["adamw", "sgd"] and all(len(each) == 2 for each in standings.results.values())
    paths = draw(standings, tmp_path, ("seconds", "step", "epoch"))
    assert [path.name for path in paths] == ["digits-seconds.png", "digits-step.png", "digits-epoch.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)
    with pytest.raises(ValueError, match="no results yet"):
        collect(tmp_path / "empty", "digits", (), ())


# By name --------------------------------------------------------------------------------------------------------------


def test_competitors_by_name_with_changed_settings():
    found = named(("sgd", "slow"), {"slow": {"base": "sgd", "lr": 1e-5}, "adamw": {"lr": 1.0}})
    assert found["slow"].settings["lr"] == 1e-5 and found["sgd"].settings["lr"] != 1e-5
    assert "lr" not in found["slow"].axes and "momentum" in found["slow"].axes and found["slow"].name == "slow"
    with pytest.raises(ValueError, match="adamw has no setting 'rate'; it has batch_size"):
        named(("adamw",), {"adamw": {"rate": 1.0}})
    with pytest.raises(ValueError, match="no optimizer 'lbfgs'"):
        named(("lbfgs",), {})
    with pytest.raises(ValueError, match=r"options: 'x' needs \"base\""):
        named((), {"x": {"lr": 1}})


def test_a_missing_package_says_what_to_install(monkeypatch, task):
    import sys

    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match=r'pip install "kronfisher\[race\]"'):
        COMPETITORS["soap"].build(task.model(0), task, COMPETITORS["soap"].settings, 0)


def test_the_study_has_the_papers_settings():
    entered = enter("faces", study="kpsvd", full=True)
    assert entered.seconds is None and entered.steps == 200 * (103_500 // 1024) and entered.clocks[1] == "epoch"
    assert entered.problem.activation == "relu" and entered.problem.mean
    assert entered.competitors["sgd"].settings["batch_size"] == 1024
    kfac = entered.competitors["kfac"].settings
    assert kfac["momentum"] == 0.9 and kfac["kl_limit"] == 0.01 and kfac["refresh"]["statistics"] == 100
    assert enter("curves", study="kpsvd").seconds == 600
    assert [name for name, each in entered.competitors.items() if each.baseline] == ["kfac"]
    assert entered.competitors["lanczos@kfac"].follows == "kfac" and not entered.competitors["lanczos@kfac"].axes
    for wrong, message in (
        ({"problem": "alexnet", "study": "kpsvd"}, "auto-encoders"),
        ({"problem": "curves", "study": "kfoc"}, "no study"),
        ({"problem": "curves", "full": True}, "--full belongs"),
        ({"problem": "cifar"}, "no problem"),
        ({"problem": "curves", "seeds": (1, 1)}, "seeds"),
        ({"problem": "curves", "seconds": -1.0}, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            enter(**wrong)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def test_the_command_races_shows_and_goes_on(capsys, tmp_path, monkeypatch):
    command = ("race", "digits", "--optimizers", "sgd,adamw", "--search", "none", "--steps", 8, "--seeds", "0,1")
    command = (*command, "--train-size", 300, "--evaluations", 2, "--output", tmp_path / "out")
    real = running.Run.evaluate

    def interrupted(self):
        if self.plan.competitor == "adamw":
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(running.Run, "evaluate", interrupted)
    code, out, err = run(capsys, *command)
    assert code == 130 and "goes on from here" in err and "sgd" in out and "adamw" not in out
    monkeypatch.undo()
    code, out, err = run(capsys, *command)
    assert code == 0 and "adamw, seed 1: training loss" in err and "steps to loss" in out
    found = json.loads((tmp_path / "out" / "race.json").read_text())
    assert set(found["optimizers"]) == {"sgd", "adamw"} and len(found["runs"]) == 4
    assert found["optimizers"]["sgd"]["seeds"] == [0, 1] and found["target"] > 0
    assert {"digits-seconds.png", "digits-step.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    code, again, _ = run(capsys, *command, "--show")
    assert code == 0 and again == out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("cifar",), "no problem 'cifar'"),
        (("digits", "--optimizers", "lbfgs"), "no optimizer 'lbfgs'"),
        (("digits", "--options", "{"), "no JSON"),
        (("digits", "--options", '{"sgd": 1}'), "object of objects"),
        (("digits", "--seeds", "a"), "no whole number"),
        (("digits", "--budget", "0"), "positive"),
        (("digits", "--search", "some"), "all, rates or none"),
        (("digits", "--study", "x"), "no study 'x'"),
        (("mnist", "--data-dir", "/nonexistent", "--optimizers", "sgd"), "LeCun"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(capsys, tmp_path, options, message):
    code, out, err = run(capsys, "race", *options, "--output", tmp_path / "x")
    assert code == 2 and not out and list(tmp_path.iterdir()) == []
    assert len(err.splitlines()) == 1 and message in err


def test_a_competitor_of_ones_own(tmp_path, task):
    class Still:
        def __init__(self, model, task, settings, seed):
            self.model, self.task = model, task

        def step(self, x, y, factor):
            return self.task.loss(self.model(x), y)

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

        def report(self):
            return "nothing moved"

    still = Competitor("still", Still, {"batch_size": 10})
    (result,) = Race(TINY, {"still": still}, tmp_path, seeds=(0,), steps=4).go(task)
    assert result.report == "nothing moved" and len({point["train_loss"] for point in result.points}) == 1
