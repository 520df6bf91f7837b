"""The comparison tells the truth: errors and traces are those of dense matrices, refusals come with their reasons."""

import json
import math
import sys

import pytest
import torch
from torch import nn

from kronfisher import KFAC, Categorical, DataError, Fisher, Gaussian, MemoryBudgetError, UnsupportedError, estimate
from kronfisher.estimation.compare import compare, measure
from kronfisher.estimation.comparison import Comparison, Row
from kronfisher.experiments.figures import draw
from kronfisher.fits import FITS
from tests.helpers.checks import SETTLED

module = sys.modules["kronfisher.estimation.compare"]  # the package hands on a function of this name

torch.set_num_threads(1)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double()
    data = [(torch.randn(6, 1, 4, 4, dtype=torch.double), torch.randint(4, (6,))) for _ in range(2)]
    return model, data


@pytest.mark.parametrize("labels", ["sampled", "exact", "observed"])
def test_errors_and_traces_are_those_of_the_dense_matrices(problem, labels):
    model, data = problem
    options = {"labels": labels, "seed": 3}
    truth = estimate(model, data, Categorical(), fit="full", **options)
    blocked = [name for name in SETTLED if name != "gram"]  # one matrix over all layers is compared if it is asked for
    fits = {} if labels == "sampled" else {"fits": blocked}  # all others that are registered, unless told
    rows = {row.fit: row for row in compare(model, data, Categorical(), **fits, **options).rows}
    assert set(rows) == set(fits.get("fits", FITS)) - {"gram"}
    for name, row in rows.items():
        fisher = estimate(model, data, Categorical(), fit=name, **options)
        missed = total = 0.0
        for block in truth.blocks:
            dense = truth.blocks[block].to_dense()
            off = (fisher.blocks[block].to_dense() - dense).norm()
            assert row.blocks[block] == pytest.approx((off / dense.norm()).item(), abs=1e-10)
            missed, total = missed + off**2, total + dense.norm() ** 2
        assert row.error == pytest.approx((missed / total).sqrt().item(), abs=1e-10)
        assert row.trace == pytest.approx((fisher.trace() / truth.trace()).item(), abs=1e-10)
        assert row.bytes == fisher.bytes and row.count == 12 and row.seconds > 0
        assert torch.equal(row.shown[1], fisher.blocks[row.shown[0]].to_dense())
    assert rows["full"].error < 1e-10 < rows["kfac"].error and rows["diagonal"].trace == pytest.approx(1)


def test_fit_objects_are_named_by_their_settings(problem):
    model, data = problem
    result = compare(model, data, Categorical(), fits=[KFAC(mode="reduce"), "kfac-reduce"])
    assert [row.fit for row in result.rows] == ["KFAC(mode='reduce')", "kfac-reduce"]
    assert result.rows[0].error == result.rows[1].error


def test_a_refused_fit_has_its_reason_and_the_others_their_numbers(problem):
    model, data = problem
    result = compare(model, data, Categorical(), fits=["full", "diagonal"], memory_budget=12_000)
    full, diagonal = result.rows
    assert math.isnan(full.error) and "bytes" in full.failure and full.bytes == 0
    assert f"full: {full.failure}" in str(result)
    assert json.loads(result.to_json())["rows"][0]["relative_error"] is None
    assert not diagonal.failure and 0 < diagonal.error < 1 and diagonal.bytes == 82 * 8


def test_a_fit_whose_error_cannot_be_measured_keeps_its_other_numbers(problem, monkeypatch):
    def refuse(*_, **__):
        raise MemoryBudgetError("too many bytes")

    model, data = problem
    monkeypatch.setattr(Fisher, "error", refuse)
    (row,) = compare(model, data, Categorical(), fits=["diagonal"]).rows
    assert row.trace == pytest.approx(1) and row.bytes == 82 * 8 and row.count == 12 and math.isnan(row.error)
    assert row.failure == "its error could not be measured: too many bytes"


def test_every_fit_sees_the_same_labels(problem):
    model, data = problem
    result = compare(model, data, Categorical(), fits=["diagonal", "full"], seed=5)
    assert result.rows[0].trace == pytest.approx(1, abs=1e-12) and result.rows[1].trace == pytest.approx(1, abs=1e-12)


def test_data_that_can_be_read_only_once_are_refused(problem):
    model, data = problem
    with pytest.raises(DataError, match="reads the data once for every fit"):
        compare(model, iter(data), Categorical())
    with pytest.raises(DataError, match="no batches"):
        compare(model, [], Categorical())


def test_a_model_that_no_fit_can_treat_raises():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))  # in train mode
    with pytest.raises(UnsupportedError):
        compare(model, torch.randn(5, 3), Gaussian())


def test_one_batch_and_one_tensor_are_data_too():
    model, x = nn.Linear(3, 2), torch.randn(8, 3)
    (whole,) = compare(model, x, Gaussian(), fits=["kfac"], labels="exact").rows
    (pair,) = compare(model, (x, torch.zeros(8, 2)), Gaussian(), fits=["kfac"], labels="exact").rows
    assert whole.count == 8 and whole.error == pytest.approx(pair.error, abs=1e-6)


def test_rows_come_one_by_one(problem, monkeypatch):
    model, data = problem
    rows = measure(model, data, Categorical(), ["kfac", "full"])
    assert next(rows).fit == "kfac"
    monkeypatch.setattr(module, "estimate", lambda *a, **k: pytest.fail("estimated before it was asked for"))
    rows.close()


def test_json_holds_everything_and_no_number_that_json_lacks(problem):
    model, data = problem
    result = compare(model, data, Categorical(), fits=["kfac"], samples=2)
    found = json.loads(result.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert found["finished"] is True and found["settings"]["samples"] == 2 and found["settings"]["parameters"] == 82
    assert found["rows"][0]["relative_error"] == result.rows[0].error
    assert found["rows"][0]["blocks"] == result.rows[0].blocks
    assert {"kronfisher", "torch", "threads"} <= set(found["versions"])


def test_progress_prints_a_line_for_every_fit(problem, capsys):
    model, data = problem
    compare(model, data, Categorical(), fits=["kfac", "diagonal"], progress=True)
    captured = capsys.readouterr()
    assert [line.split(":")[0] for line in captured.err.splitlines()] == ["kfac", "diagonal"] and not captured.out


def test_a_zero_fisher_has_zero_error():
    model = nn.Linear(3, 2)
    (row,) = compare(model, torch.zeros(4, 3), Gaussian(), fits=["full"], labels="exact").rows
    assert row.error == 0


def test_the_model_is_as_before(problem):
    model, data = problem
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    compare(model, data, Categorical())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(state, torch.get_rng_state())


def test_figures_are_written_and_are_pictures(problem, tmp_path):
    from matplotlib.image import imread

    model, data = problem
    result = compare(model, data, Categorical())
    paths = draw(result, tmp_path / "new" / "folder", "name")
    assert [path.name for path in paths] == ["name.png", "name-block.png"]
    for path in paths:
        pixels = imread(path)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 600 and pixels[..., :3].std() > 0.05


def test_a_block_is_drawn_only_with_fits_that_have_it(tmp_path):
    small, other = ("a", torch.eye(3)), ("b", torch.eye(2))
    rows = (Row("x", 5, 1.0, 10, 0.5, {"a": 0.5}, 1.0, small), Row("y", 5, 2.0, 10, 0.4, {"b": 0.4}, 1.0, other))
    assert len(draw(Comparison(rows, {}), tmp_path)) == 2
    rows = (Row("x", 5, 1.0, 10, 0.5, {"a": 0.5}, 1.0, None),)
    assert len(draw(Comparison(rows, {}), tmp_path)) == 1


def test_nothing_is_drawn_where_there_are_no_numbers(tmp_path):
    assert draw(Comparison((Row("full", failure="too large"),), {}), tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
