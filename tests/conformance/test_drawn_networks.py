"""Random networks of torch's own functions on pairs of batches that differ: every estimate is right, or refused.

A quick share runs by default; ``pytest -m exhaustive tests/conformance/test_drawn_networks.py`` draws 10,000.
"""

import warnings
from collections import Counter

import pytest
import torch

from tests.helpers.drawn_networks import draw, outcome


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about the functions drawn
        yield
    torch.set_default_dtype(torch.float32)


def count(seeds):
    """Outcomes, and what was wrong or no error of ours."""
    outcomes, bad = Counter(), []
    for seed in seeds:
        case = draw(seed)
        for kind, words in outcome(case):
            outcomes[kind] += 1
            if kind in ("wrong", "raw"):
                bad.append(f"{seed}: {kind}, {words}: {case.model} ({case.fit})")
    return outcomes, bad


@pytest.mark.parametrize("start", range(0, 40, 10))
def test_a_share_of_the_networks(start):
    outcomes, bad = count(range(start, start + 10))
    assert not bad, "\n".join(bad)
    assert outcomes["right"] >= 15, outcomes


@pytest.mark.exhaustive
@pytest.mark.parametrize("start", range(0, 10_000, 500))
def test_ten_thousand_networks(start):
    outcomes, bad = count(range(start, start + 500))
    print(outcomes)
    assert not bad, "\n".join(bad)
