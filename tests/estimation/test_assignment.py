"""Assigning a batch to fits is a pure function: it changes neither what is known nor the fits."""

from copy import copy
from dataclasses import fields

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.capture.observation import observe
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.estimation.assignment import Assignment, Refusals, assign
from kronfisher.estimation.recipe import Recipe
from tests.helpers.networks import Written

MODELS = {
    "chain": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "a parameter for the fallback": lambda: Written(
        lambda m, x: m.l(torch.addcmul(x, x, m.s)), s=torch.randn(3), l=nn.Linear(3, 2)
    ),
    "coupled examples": lambda: Written(lambda m, x: m.l(x) - m.l(x).mean(0), l=nn.Linear(3, 2)),
}


def contents(record):
    """The fields of a record; mappings and sets are copied, so that later changes in place show."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: copy(value) if isinstance(value, dict | set | list) else value for name, value in values.items()}


def answer(assignment):
    """An assignment in terms that can be compared; the uses in its parts are those of the observation itself."""
    if isinstance(assignment, Refusals):
        return dict(assignment.problems)
    parts = {i: [(id(p.use), p.block, p.weight, p.bias) for p in own] for i, own in assignment.parts.items()}
    new = [(id(entry.fit), entry.blocks, entry.plan) for entry in assignment.new]
    return parts, assignment.orders, assignment.singles, new, contents(assignment.known)


@pytest.mark.parametrize("fit", ["kfac", "full", "block-tridiagonal"])
@pytest.mark.parametrize("later", [False, True], ids=["first batch", "later batch"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_observation_has_the_same_assignment(name, fit, later):
    torch.manual_seed(0)
    model = MODELS[name]()
    run = Accumulator(Recipe(model, kf.Gaussian()), fit)
    if later and name != "coupled examples":
        run.add(torch.randn(5, 3), "batch 0")
    observation = observe(model, run.parameters, torch.randn(5, 3), None, "batch 1")
    known, fits = contents(run.known), contents(run.fits)
    states = [group.state for group in run.groups]
    first = assign(observation, run.fits, run.known)
    assert isinstance(first, Refusals if name == "coupled examples" else Assignment)
    assert contents(run.known) == known and contents(run.fits) == fits
    assert all(group.state is state for group, state in zip(run.groups, states, strict=True))
    assert answer(assign(observation, run.fits, run.known)) == answer(first)
    assert contents(run.known) == known and contents(run.fits) == fits
