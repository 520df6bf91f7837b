"""Competitors and problems by name, and the command."""

import json

import pytest

from kronfisher.experiments.race import COMPETITORS, Competitor, Race
from kronfisher.experiments.race import run as running
from kronfisher.experiments.race.competitors import select
from kronfisher.experiments.race.entry import enter
from tests.experiments.race.racing import TINY
from tests.helpers.command_line import run


def test_competitors_by_name_with_changed_settings():
    found = select(("sgd", "slow"), {"slow": {"base": "sgd", "lr": 1e-5}, "adamw": {"lr": 1.0}})
    assert found["slow"].settings["lr"] == 1e-5 and found["sgd"].settings["lr"] != 1e-5
    assert "lr" not in found["slow"].axes and "momentum" in found["slow"].axes and found["slow"].name == "slow"
    with pytest.raises(ValueError, match="adamw has no setting 'rate'; it has batch_size"):
        select(("adamw",), {"adamw": {"rate": 1.0}})
    with pytest.raises(ValueError, match="no optimizer 'lbfgs'"):
        select(("lbfgs",), {})
    with pytest.raises(ValueError, match=r"options: 'x' needs \"base\""):
        select((), {"x": {"lr": 1}})


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
    assert code == 130 and "continues from here" in err and "sgd" in out and "adamw" not in out
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
        (("digits", "--options", "{"), "not valid JSON"),
        (("digits", "--options", '{"sgd": 1}'), "object of objects"),
        (("digits", "--seeds", "a"), "not a whole number"),
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
