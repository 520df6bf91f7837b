"""Random networks of torch's own functions on pairs of batches that differ: every estimate is right, or refused.

A quick share runs by default, more of it is slow. ``pytest -m exhaustive -s tests/conformance/test_drawn_networks.py``
draws 10,000, and proves the networks themselves: every planted error is found, by the network whose number is printed.
"""

import warnings

import pytest
import torch
from torch import nn

import kronfisher as kf
from tests.helpers.drawn.networks import draw
from tests.helpers.drawn.outcome import count, faults, rows_read_off
from tests.helpers.drawn.planted import PLANTED


@pytest.fixture(autouse=True)
def quiet(double):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about the functions drawn
        yield


def some_slow(values, usual):
    """Values of which so many, the first, are tried by default."""
    return [pytest.param(value, marks=() if k < usual else pytest.mark.slow) for k, value in enumerate(values)]


@pytest.mark.parametrize("start", some_slow(range(60, 140, 20), 1))
def test_a_share_of_the_networks(start):
    outcomes, bad = count(range(start, start + 20))
    assert not bad, "\n".join(bad)
    assert outcomes["right"] >= 25, outcomes


@pytest.mark.parametrize("start", some_slow(range(60, 120, 15), 1))
def test_rows_are_read_off_a_share_of_the_networks(start):
    bad = [f"{seed}: {words}" for seed in range(start, start + 15) for words in rows_read_off(draw(seed))]
    assert not bad, "\n".join(bad)


@pytest.mark.exhaustive
@pytest.mark.parametrize("start", range(0, 10_000, 500))
def test_rows_are_read_off_ten_thousand_networks(start):
    bad = [f"{seed}: {words}" for seed in range(start, start + 500) for words in rows_read_off(draw(seed))]
    assert not bad, "\n".join(bad)


@pytest.mark.exhaustive
@pytest.mark.parametrize("start", range(0, 10_000, 500))
def test_ten_thousand_networks(start):
    outcomes, bad = count(range(start, start + 500))
    print(outcomes)
    assert not bad, "\n".join(bad)
    assert outcomes["right"] >= 900, outcomes


def first_found(words, monkeypatch, seeds):
    """How many networks it takes to find a planted error."""
    PLANTED[words](monkeypatch)
    return next((number for number, seed in enumerate(seeds, 1) if any(faults(seed))), None)


@pytest.mark.parametrize("words", PLANTED)
def test_planted_errors_are_wrong_numbers_and_no_failures_of_their_own(words, monkeypatch):
    """A planted error that raises would be found by the first network, whatever the networks are."""
    PLANTED[words](monkeypatch)
    kf.estimate(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), torch.randn(4, 3), kf.Gaussian(), fit="full")


@pytest.mark.parametrize("place", ["stands for the bias", "several uses of a weight", "offset of a window"])
def test_some_planted_errors_are_found(place, monkeypatch):
    (words,) = (words for words in PLANTED if place in words)
    assert first_found(words, monkeypatch, range(6, 66)) is not None


@pytest.mark.exhaustive
@pytest.mark.parametrize("words", PLANTED)
def test_every_planted_error_is_found(words, monkeypatch):
    found = first_found(words, monkeypatch, range(500))
    print(f"{words}: found by network {found}")
    assert found is not None
