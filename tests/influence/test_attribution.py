"""Attribution against problems whose answer is known: a query's measurement is linear in what is kept."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import kronfisher as kf
from kronfisher import attribution
from kronfisher.influence.statistics import mean_interval, share_interval, spearman
from tests.helpers.close import close
from tests.helpers.layout import ROOT
from tests.helpers.optional import require

N, Q = 30, 4


def effects():
    torch.manual_seed(3)
    return torch.randn(Q, N, dtype=torch.float64)


class Linear:
    """Measurements of which every kept example takes its effect; counts its trainings."""

    def __init__(self, noise=0.0):
        self.effects, self.noise, self.calls = effects(), noise, 0

    def __call__(self, kept, seed):
        self.calls += 1
        noise = torch.randn(Q, generator=torch.Generator().manual_seed(seed + 7 * int(kept.sum())))
        return 5 - self.effects[:, kept].sum(1) + self.noise * noise


def test_scores_of_a_linear_problem_are_perfect_and_their_negatives_the_opposite():
    for sign in (1, -1):
        found = attribution.lds(sign * effects(), Linear(), subsets=12)
        assert found.value == pytest.approx(sign) and found.by_query.shape == (Q,)
        alone = attribution.leave_one_out(sign * effects(), Linear(), examples=6)
        assert alone.value == pytest.approx(sign)
    close(alone.actual, -alone.predicted)


def test_noise_of_the_training_lowers_the_score_and_seeds_average_it():
    one, many = (attribution.lds(effects(), Linear(noise=4.0), subsets=30, seeds=seeds) for seeds in (1, 9))
    assert 0.1 < one.value < many.value < 1
    assert one.interval.low < one.value < one.interval.high


def test_the_interval_covers_the_truth_as_often_as_it_says():
    covered = 0
    for seed in range(40):
        torch.manual_seed(seed)
        covered += (lambda i: i.low <= 1.0 <= i.high)(mean_interval(1 + torch.randn(60)))
    assert covered >= 34
    assert share_interval(0, 20).low == pytest.approx(0, abs=1e-12) and share_interval(0, 20).high < 0.2


def test_ranks_of_ties_are_shared():
    x = torch.tensor([[1.0], [2.0], [2.0], [3.0]])
    assert float(spearman(x, torch.tensor([[1.0], [3.0], [2.0], [4.0]]))) == pytest.approx(0.9486833)
    assert float(spearman(x, torch.ones(4, 1))) == 0.0


def test_ranks_and_intervals_of_shares_are_those_of_scipy():
    stats = require("scipy.stats")
    x, y = torch.randint(6, (40, 3)).double(), torch.randint(6, (40, 3)).double()
    known = [stats.spearmanr(x[:, k].numpy(), y[:, k].numpy()).statistic for k in range(3)]
    close(spearman(x, y), torch.tensor(known, dtype=torch.float64))
    for found, of in ((0, 20), (3, 7), (10, 10)):
        interval, expected = share_interval(found, of), stats.binomtest(found, of).proportion_ci(method="wilson")
        assert [interval.low, interval.high] == pytest.approx([expected.low, expected.high], abs=1e-6)


def test_removing_the_highest_raises_what_is_measured_by_their_sum():
    curve = attribution.removal(effects(), Linear(), counts=(2, 5))
    expected = torch.stack([effects().topk(count, dim=1).values.sum(1) for count in (2, 5)])
    close(curve.by_query, expected)
    assert [i.value for i in curve.intervals] == pytest.approx(expected.mean(1).tolist())
    lowest = attribution.removal(effects(), Linear(), counts=(2,), lowest=True)
    assert lowest.intervals[0].value < 0
    with pytest.raises(ValueError, match="between 1 and 29"):
        attribution.removal(effects(), Linear(), counts=(30,))


def test_one_query_and_several_together_have_an_interval_over_seeds():
    together = attribution.removal(
        effects().sum(0, keepdim=True),
        lambda kept, seed: Linear(noise=1.0)(kept, seed).mean(0, keepdim=True),
        counts=(3,),
        seeds=20,
    )
    top = effects().sum(0).topk(3).indices
    expected = float(effects()[:, top].sum(1).mean())
    (interval,) = together.intervals
    assert together.by_query.shape == (1, 1) and interval.low < expected < interval.high
    assert 0.1 < interval.high - interval.low < 2  # four noises of one, twice, in twenty seeds: ±.3
    first = attribution.lds(effects()[:1], lambda kept, seed: Linear(noise=4.0)(kept, seed)[:1], subsets=40)
    assert first.interval.high - first.interval.low < 1.2


def test_predictions_flip_once_enough_is_removed():
    margins = Linear()
    start = margins(torch.arange(N), 0)
    right = start > 0
    curve = attribution.brittleness(effects(), margins, counts=(1, 4, 29))
    lowest = effects().sort(dim=1).values.cumsum(1)
    expected = torch.stack([(start + lowest[:, c - 1] < 0)[right] for c in (1, 4, 29)]).long().cummax(0).values
    assert curve.by_query.equal(expected) and expected[0].sum() < expected[-1].sum()


def test_wrong_labels_are_found_in_the_order_of_the_scores():
    wrong = torch.arange(100) < 10
    scores = torch.where(wrong, 2.0, 1.0) + torch.arange(100) / 1000
    curve = attribution.mislabelled(scores, wrong, shares=(0.05, 0.1, 0.2))
    assert [i.value for i in curve.intervals] == [0.5, 1.0, 1.0]
    with pytest.raises(kf.DataError, match="some of them true"):
        attribution.mislabelled(scores, torch.zeros(100, dtype=torch.bool))


def test_trainings_that_were_done_are_not_done_again(tmp_path):
    path, first = tmp_path / "runs.jsonl", Linear()
    whole = attribution.lds(effects(), first, subsets=6, path=path)
    assert first.calls == 6
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:3]) + b"\n" + lines[3][:20])  # killed while it wrote the fourth
    second = Linear()
    again = attribution.lds(effects(), second, subsets=6, path=path)
    assert second.calls == 3
    assert torch.equal(again.actual, whole.actual)
    assert len(path.read_text().splitlines()) == 6 and all(map(json.loads, path.read_text().splitlines()))
    third = Linear()
    attribution.lds(-effects(), third, subsets=6, path=path)
    assert third.calls == 0
    path.write_text("not a line of results\n")
    with pytest.raises(kf.DataError, match="line 1 is damaged"):
        attribution.lds(effects(), first, subsets=6, path=path)


def test_scores_without_an_order_are_refused_before_any_training():
    scores, first = effects(), Linear()
    scores[1, 2] = torch.nan
    wrong = torch.arange(N) < 3
    for ask in (
        lambda: attribution.lds(scores, first),
        lambda: attribution.leave_one_out(scores, first),
        lambda: attribution.removal(scores, first),
        lambda: attribution.brittleness(scores, first),
        lambda: attribution.mislabelled(scores[1], wrong),
    ):
        with pytest.raises(kf.DataError, match="scores hold NaN"):
            ask()
    assert not first.calls


def test_trainings_that_give_no_numbers_are_refused():
    with pytest.raises(kf.DataError, match=r"one finite number for each of the 4 queries, \[4\]; found \[3\]"):
        attribution.lds(effects(), lambda kept, seed: torch.zeros(3), subsets=2)
    with pytest.raises(kf.DataError, match="NaN or Inf"):
        attribution.lds(effects(), lambda kept, seed: torch.full((Q,), torch.nan), subsets=2)


WAITING = """
import os, sys, time
import torch
from kronfisher import attribution

def retrain(kept, seed):
    open(os.path.join(sys.argv[1], f"{os.getpid()}.started"), "w").close()
    time.sleep(2)
    return torch.zeros(4)

if __name__ == "__main__":
    attribution.lds(torch.zeros(4, 30), retrain, subsets=2, workers=2)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are listed in /proc")
def test_workers_end_with_a_run_that_is_killed(tmp_path):
    (script := tmp_path / "study.py").write_text(WAITING)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    run = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    while len(workers := [int(path.stem) for path in tmp_path.glob("*.started")]) < 2 and run.poll() is None:
        time.sleep(0.05)
    run.kill()
    run.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 30

    def running(pid):
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"

    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(running, workers))


@pytest.mark.parametrize("examples", [[-1], [N], [0.5], [True], torch.ones(N, dtype=torch.bool), torch.ones(2), []])
def test_examples_that_are_no_indices_are_refused_before_anything_is_trained(examples):
    """A negative index would be left in, and compared with the score of another example."""
    retrain = Linear()
    with pytest.raises(ValueError, match="give indices from 0 to 29"):
        attribution.leave_one_out(effects(), retrain, examples=examples)
    assert not retrain.calls
    for given in ([3, 1], torch.tensor([3, 1]), range(3)):
        assert attribution.leave_one_out(effects(), retrain, examples=given).value == pytest.approx(1)


@pytest.mark.parametrize("counts", [(5, 3), (5, 5), (N,), (0,), (2.5,), ()])
def test_counts_that_cannot_be_removed_or_do_not_rise_are_refused(counts):
    retrain = Linear()
    for judge in (attribution.removal, attribution.brittleness):
        with pytest.raises(ValueError, match="between 1 and 29 of the 30 examples can be removed"):
            judge(effects(), retrain, counts=counts)
    assert not retrain.calls


@pytest.mark.parametrize("share", [20, -0.1, float("nan")])
def test_shares_to_inspect_are_between_nothing_and_everything(share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        attribution.mislabelled(torch.rand(5), torch.ones(5, dtype=torch.bool), shares=(share,))
