"""K-FOC of large layers in little memory: what is accepted is kept to, what is refused names the number."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import kronfisher as kf

ROOT = Path(__file__).parents[2]


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def layer(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 4)), torch.randn(40, 300)
    if kind == "embedding":
        return nn.Sequential(nn.Embedding(5000, 16), Mean(), nn.Linear(16, 4)), torch.randint(5000, (40, 7))
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4)
    return nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.Tanh(), *pooled), torch.randn(20, 24, 6, 6)


@pytest.mark.parametrize("kind", ["linear", "embedding", "convolution"])
def test_one_byte_too_little_is_refused_with_the_number_and_enough_gives_the_same(kind):
    model, x = layer(kind)
    options = {"likelihood": kf.Categorical(), "labels": "exact"}
    with pytest.raises(kf.MemoryBudgetError, match="matrices and one example") as refusal:
        kf.estimate(model, x, **options, memory_budget=1)
    found = re.search(r"needs ([\d,]+) bytes", str(refusal.value))
    needed = int(found[1].replace(",", ""))
    with pytest.raises(kf.MemoryBudgetError, match=f"memory_budget of {needed - 1:,} bytes"):
        kf.estimate(model, x, **options, memory_budget=needed - 1)
    free = kf.estimate(model, x, **options)
    for budget in (needed, 2 * needed):
        tight = kf.estimate(model, x, **options, memory_budget=budget)
        assert free.bytes < needed
        assert abs(tight.trace() / free.trace() - 1) < 0.05
        error, least = (fisher.error(x).relative for fisher in (tight, free))
        assert error < least + 0.01, (budget, error, least)  # pieces of data may be smaller, and the rest of it is kept


def test_a_budget_that_cannot_hold_the_samples_of_a_piece_makes_the_pieces_smaller():
    torch.manual_seed(0)
    model, x = nn.Linear(20, 300), torch.randn(400, 20)
    with pytest.raises(kf.MemoryBudgetError) as refusal:
        kf.estimate(model, x, kf.Gaussian(), memory_budget=1)
    needed = int(re.search(r"needs ([\d,]+) bytes", str(refusal.value))[1].replace(",", ""))
    tight = kf.estimate(model, x, kf.Gaussian(), memory_budget=needed)
    free = kf.estimate(model, x, kf.Gaussian())
    pieces = [re.search(r"(\d+) pieces", str(fisher.report())) for fisher in (tight, free)]
    assert pieces[0] and int(pieces[0][1]) > 1 and pieces[1] is None
    assert tight.error(x).relative < free.error(x).relative + 0.01


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_the_resident_memory_stays_within_the_budget():
    """A table of 50,000 rows in a fresh process, with twice the least budget that is accepted."""
    command = [sys.executable, str(ROOT / "benchmarks" / "budgets.py"), "embedding", "--times", "2"]
    environment = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'benchmarks'}", "PATH": "/usr/bin:/bin"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] <= found["budget"] + found["floor"], found
