"""What is searched, in which order, and how it is taken up again."""

import json
import math
from dataclasses import replace

import pytest

from kronfisher.experiments.race import Race
from kronfisher.experiments.race.competitors import select
from kronfisher.experiments.race.result import read
from kronfisher.experiments.race.search import walk
from tests.experiments.race.racing import TINY, race


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
    sgd = replace(select(("sgd",), {"sgd": {"batch_size": 32}})["sgd"], axes=axes)
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
    sgd = replace(select(("sgd",), {"sgd": {"batch_size": 32}})["sgd"], axes=axes)
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
    sgd = replace(select(("sgd",), {"sgd": {"batch_size": 32}})["sgd"], axes={"lr": (1e-6, 1e-3)})
    follower = replace(sgd, name="same", axes={}, settings={**sgd.settings, "lr": 7.0}, follows="sgd")
    one = Race(TINY, {"same": follower, "sgd": sgd}, tmp_path, seeds=(0,), steps=8)
    assert [dict(r.plan.settings)["lr"] for r in one.go(task)] == [1e-3, 1e-3]
    with pytest.raises(ValueError, match="same takes its settings from sgd"):
        replace(one, competitors={"same": follower})
