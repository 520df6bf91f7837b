"""Medians, times to a target, and the folder that holds a race."""

import math

import pytest

from kronfisher.experiments.race.pictures import draw
from kronfisher.experiments.race.result import Plan, Result
from kronfisher.experiments.race.standings import Standings, collect
from tests.experiments.race.racing import race


def made(name, losses, seed=0, step=10, accuracy=None, busy=0.5):
    points = [
        {
            "step": step * k,
            "epoch": k,
            "seconds": float(k),
            "cpu_seconds": busy * k,
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


def test_cpu_time_leaves_out_what_others_did_on_the_machine():
    slow, fast = (made("sgd", [10.0, 8.0, 5.0], busy=1.0),), (made("natural", [10.0, 5.0], busy=0.25),)
    (duel,) = Standings("p", {"sgd": slow, "natural": fast}, ("sgd",)).duels()
    assert duel["train_loss"]["seconds"]["ratio"] == pytest.approx(1 / 2)
    assert duel["train_loss"]["cpu_seconds"]["ratio"] == pytest.approx(1 / 8)


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
