"""Regression on small tables: what is compared, and how it is written down."""

import json
import math

import pytest
import torch

from kronfisher.experiments.data import Dataset
from kronfisher.experiments.race import small_data
from kronfisher.experiments.race.small_data import Contest, Run, contest
from kronfisher.experiments.schemas import schema
from tests.helpers.optional import require


@pytest.fixture
def tables(monkeypatch):
    """Thirty rows in place of files."""

    def load(name, data_dir=None):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(30, 3, generator=generator)
        y = x.sin().sum(1, keepdim=True)
        return Dataset(name, x[:20], y[:20], x[20:], y[20:], "values", 1, 1.0)

    monkeypatch.setattr(small_data.data, "load", load)


def test_a_contest_is_written_down(tables, tmp_path):
    result = contest(("yacht", "wine"), seeds=(0,), seconds=0.2)
    assert {(run.problem, run.optimizer) for run in result.runs} == {
        (problem, name) for problem in ("yacht", "wine") for name in ("gram", "lbfgs", "adamw")
    }
    for run in result.runs:
        assert run.seconds[0] == 0 and run.seconds[-1] >= 0.2 and run.losses[-1] < run.losses[0]
        first = next(other for other in result.runs if other.problem == run.problem).losses[0]
        assert math.isclose(run.losses[0], first, rel_tol=1e-9)  # the same weights, and the same loss
    written = json.loads(result.to_json())
    assert "of 2" in str(result) and len(written["runs"]) == 6
    require("jsonschema").validate(written, schema("race uci"))
    assert all(path.exists() for path in result.draw(tmp_path))


def test_shares_are_of_the_better_baselines_own_time():
    """It was within a hundredth of its last loss after 4 s, and ours was there after 1 s; the other never matters."""
    ours = Run("yacht", "gram", 0, [0.0, 1.0, 10.0], [9.0, 0.5, 0.1])
    better = Run("yacht", "lbfgs", 0, [0.0, 2.0, 4.0, 10.0], [9.0, 3.0, 1.005, 1.0])
    other = Run("yacht", "adamw", 0, [0.0, 10.0], [9.0, 2.0])
    result = Contest(10.0, [ours, better, other])
    assert result.shares("yacht")[0] == (ours, better, 0.25)
    assert result.notes() == ["At most a third of the better baseline's time on 1 of 1."]
    assert "0.250" in str(result)
    assert [run["test"] for run in json.loads(result.to_json())["runs"]] == [None] * 3  # JSON has no NaN
    ours.losses[:] = [9.0, 8.0, 7.0]
    assert "not reached" in str(result) and "on 0 of 1" in str(result)


def test_what_is_not_there_is_refused():
    for options, message in (({"sets": ("protein",)}, "no set 'protein'"),
                             ({"optimizers": ("sgd",)}, "no optimizer 'sgd'"),
                             ({"optimizers": ("gram",)}, "at least one baseline")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            contest(**options)
