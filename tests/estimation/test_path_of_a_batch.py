"""A batch takes a short way from the loader to a finished operator: few rooms, few stays, hardly any way back up."""

import sys
from itertools import groupby, pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.capture.observation import Observation
from kronfisher.estimation.assignment import Assignment
from kronfisher.fits import State
from kronfisher.layers.samples import Samples
from tests.helpers.layout import FLOOR, SOURCE

STEPS = (Observation, Assignment, Samples, State)  # the forms that a batch takes, one after the other


def path_of(batch, run):
    """The functions, in the order of their calls, that take the batch or what it has become, as (room, name)."""
    tensors, calls = [batch, *batch], []

    def carried(value):
        own = any(value is tensor for tensor in tensors) or isinstance(value, STEPS)
        return own or (isinstance(value, tuple | list) and any(map(carried, value)))

    def note(frame, event, arg):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(SOURCE)) or code.co_name.startswith(("__", "<")):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = [frame.f_locals[name] for name in names]
        if any(map(carried, values)) and code.co_name not in PROPERTIES:
            calls.append((Path(code.co_filename).relative_to(SOURCE).parts[0].removesuffix(".py"), code.co_qualname))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


PROPERTIES = {name for kind in STEPS for name, value in vars(kind).items() if isinstance(value, property)}


@pytest.mark.parametrize("labels", ["sampled", "observed"])
def test_a_batch_takes_a_short_way(labels):
    model = nn.Linear(3, 2)
    batch = torch.randn(6, 3), torch.randint(2, (6,))
    kf.estimate(model, batch, kf.Categorical(), fit="kfac", labels=labels)  # row orders are known from now on
    calls = path_of(batch, lambda: kf.estimate(model, batch, kf.Categorical(), fit="kfac", labels=labels))
    stays = [room for room, _ in groupby(room for room, _ in calls)]
    climbs = [pair for pair in pairwise(stays) if FLOOR[pair[1]] > FLOOR[pair[0]]]
    assert stays[0] == "estimation" and "fits" in stays and ("fits", "KFAC.finish") in calls
    assert len(set(stays)) <= 10, stays
    assert len(stays) <= 25, stays
    assert len(climbs) <= 7, stays  # one of them is once an estimate: whether the loader's sampler repeats examples
