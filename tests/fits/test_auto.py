"""The structure chosen for a layer: the cheapest that is close enough, by errors that are those of dense matrices."""

import re
from functools import cache

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.fits import auto
from tests.fits.rearranged import estimate
from tests.helpers.networks import with_inputs

CANDIDATES = {
    "Diagonal()": kf.Diagonal(),
    "KFAC()": kf.KFAC(),
    "KFOC()": kf.KFOC(),
    "EKFAC(basis=KFOC())": kf.EKFAC(kf.KFOC()),
    "KroneckerSum(method='nonnegative')": kf.KroneckerSum(2, "nonnegative"),
    "KroneckerSum(rank=4, method='nonnegative')": kf.KroneckerSum(4, "nonnegative"),
    "Full()": kf.Full(),
}


def small(shared=False):
    return with_inputs(shared, (4, 8, 5), (8, 2, 2))


def told(fisher, name):
    """Candidate → (error, bytes), as the report has them."""
    text = fisher.info.blocks[name].notes.split("samples: ")[1]
    found = re.findall(r"(\w+\((?:[^()]|\(\))*\)) ([\d.e+-]+) \(([\d,]+) bytes\)", text)
    return {candidate: (float(error), int(size.replace(",", ""))) for candidate, error, size in found}


@cache
def truths(shared):
    """Block → candidate → (error, bytes), each measured on its own, densely."""
    model, x = small(shared)
    found = {}
    full = estimate(model, x, "full")
    for text, fit in CANDIDATES.items():
        fisher = estimate(model, x, fit)
        for name, operator in fisher.blocks.items():
            truth = full[name].to_dense()
            error = float((operator.to_dense() - truth).norm() / truth.norm())
            found.setdefault(name, {})[text] = error, operator.bytes
    return found


@pytest.mark.parametrize("shared", [False, True])
def test_errors_and_bytes_are_those_of_each_candidate_by_itself(shared, monkeypatch):
    monkeypatch.setattr(auto, "_PIECE", 2**20)  # all samples are kept
    model, x = small(shared)
    fisher = estimate(model, x, kf.Auto())
    for name, expected in truths(shared).items():
        found = told(fisher, name)
        assert found.keys() == expected.keys()
        for candidate, (error, size) in found.items():
            assert size == expected[candidate][1]
            assert error == pytest.approx(expected[candidate][0], rel=6e-2, abs=1e-5), (name, candidate)


@pytest.mark.parametrize("shared", [False, True])
def test_the_choice_is_the_smallest_that_is_close_enough(shared, monkeypatch):
    monkeypatch.setattr(auto, "_PIECE", 2**20)
    model, x = small(shared)
    expected, chosen = truths(shared), set()
    for goal in (0.02, 0.1, 0.2, 0.35, 0.6, 0.95):
        fisher = estimate(model, x, kf.Auto(error=goal))
        for name, entries in expected.items():
            if any(abs(error - goal) < 1e-3 for error, _ in entries.values()):
                continue  # too close to call
            least = min(size for error, size in entries.values() if error <= goal)
            assert fisher[name].bytes == least, (name, goal)
            assert fisher.error((x, None)).blocks[name] <= goal
            chosen.add(fisher[name].structure)
    assert len(chosen) >= 4


@pytest.mark.parametrize("shared", [False, True])
def test_with_a_budget_the_choice_is_the_closest(shared, monkeypatch):
    monkeypatch.setattr(auto, "_PIECE", 2**20)
    model, x = small(shared)
    expected = truths(shared)
    for memory in (1000, 2000, 4000, 10**6):
        fisher = estimate(model, x, kf.Auto(memory=memory))
        for name, entries in expected.items():
            least = min(error for error, size in entries.values() if size <= memory)
            assert fisher[name].bytes <= memory
            assert fisher.error((x, None)).blocks[name] == pytest.approx(least, rel=1e-3, abs=1e-6), (name, memory)
    fisher = estimate(model, x, kf.Auto(error=1e-3, memory=2000))  # none reaches it
    assert "none reaches 0.001" in fisher.info.blocks["0.weight"].notes
    with pytest.raises(kf.MemoryBudgetError, match=r"0\.weight: no candidate .* less than [\d,]+ bytes"):
        estimate(model, x, kf.Auto(memory=8))


def test_the_answer_is_that_of_the_fit_chosen():
    model, x = small()
    batches = [(part, None) for part in x.split(7)]
    fisher = estimate(model, batches, kf.Auto(error=0.3), labels="sampled", seed=2)
    for name, operator in fisher.blocks.items():
        fit = CANDIDATES[re.match(r"chose (.*?)[;,] ", fisher.info.blocks[name].notes)[1]]
        alone = estimate(model, batches, fit, labels="sampled", seed=2)
        assert torch.equal(operator.to_dense(), alone[name].to_dense())
        assert fisher.info.blocks[name].error == alone.info.blocks[name].error
        assert fisher.info.blocks[name].rows == alone.info.blocks[name].rows and fisher.count == 25


@pytest.mark.parametrize("batch", [1, 10, 64, 1000])
def test_samples_of_many_are_spread_over_all_of_them(batch):
    """Data whose second half is another: what is kept must show both, whatever the batches' period."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    x = torch.cat([torch.randn(600, 3).double(), 5 + torch.randn(600, 3).double() * torch.tensor([3.0, 0.1, 1.0])])
    loader = [(part, None) for part in x.split(batch)]
    fisher = estimate(layer, loader, kf.Auto(candidates=[kf.KFAC(), kf.Diagonal()]), labels="exact")
    number = int(re.search(r"on (\d+) samples", fisher.info.blocks["weight"].notes)[1])
    assert 200 <= number <= 512  # of 2,400
    full = estimate(layer, x, "full")
    for candidate, fit in (("KFAC()", "kfac"), ("Diagonal()", "diagonal")):
        truth, found = full.to_dense(), estimate(layer, x, fit).to_dense()
        error = float((found - truth).norm() / truth.norm())
        assert told(fisher, "weight")[candidate][0] == pytest.approx(error, abs=0.06)


def test_what_vanishes_takes_the_smallest():
    model, x = small()
    fisher = estimate(model, 0 * x, kf.Auto(candidates=[kf.KFAC(), kf.Diagonal()]))
    assert fisher["0.weight"].structure.startswith("diagonal") or float(fisher["0.weight"].frobenius_norm()) > 0
    with torch.no_grad():
        model[2].weight.zero_()  # nothing flows back into the first layer
    fisher = estimate(model, x, "auto")
    assert float(fisher["0.weight"].frobenius_norm()) == 0 and fisher["0.weight"].structure.startswith("diagonal")


def test_large_layers_are_not_tried_densely():
    layer = nn.Linear(300, 4)
    fisher = estimate(layer, torch.randn(20, 300), "auto")
    assert "Full()" not in told(fisher, "weight") and "Full()" in told(
        estimate(nn.Linear(3, 4), torch.randn(9, 3), "auto"), "weight"
    )


def test_states_combine_after_the_same_choice_only():
    from kronfisher.capture.isolation import isolate
    from kronfisher.estimation.accumulator import Accumulator
    from kronfisher.estimation.recipe import Recipe

    model, x = small()
    runs = []
    for data in (x[:12], x[12:]):
        run = Accumulator(Recipe(model, kf.Gaussian(), labels="exact"), kf.Auto(candidates=[kf.KFAC()]))
        with isolate(model, 0):
            run.add((data, None), "batch 0")
        runs.append(run)
    one, other = (next(iter(run.groups)) for run in runs)
    with pytest.raises(ValueError, match="only after the same fit was chosen"):
        one.fit.combine(one.state, other.state, 0.9, 0.1)
    for run, data in zip(runs, (x[:12], x[12:]), strict=True):
        assert run.next_pass()
        run.start_pass()
        with isolate(model, 0):
            run.add((data, None), "batch 0")
    joined = one.fit.finish(one.fit.combine(one.state, other.state))
    torch.testing.assert_close(joined.to_dense(), estimate(model, x, "kfac")["0.weight"].to_dense())


def test_nonsense_is_refused():
    for wrong in (
        {"error": -0.1},
        {"error": float("nan")},
        {"memory": 0},
        {"candidates": []},
        {"candidates": [kf.Auto()]},
    ):
        with pytest.raises(ValueError, match="Auto"):
            kf.Auto(**wrong)
    model, x = small()
    with pytest.raises(kf.DataError, match="more than once"):
        estimate(model, ((part, None) for part in x.split(7)), "auto")
    preconditioner = kf.Preconditioner(model, kf.Gaussian(), fit="auto")
    with pytest.raises(kf.UnsupportedError, match="keeps samples"):
        preconditioner(x)
    assert repr(kf.Auto(memory=8)) == "Auto(error=0, memory=8)" and kf.Auto() == kf.Auto(error=0.1) != kf.Auto(
        error=0.2
    )
