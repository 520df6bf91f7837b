"""What a value is: the same in every run, and another one where anything that it does is."""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property, partial

import pytest
import torch

from kronfisher.influence.identity import identity
from tests.helpers.layout import ROOT

CHOSEN = 0


def of_class(outputs, targets, chosen=0):
    return outputs[:, chosen]


def globally(outputs, targets):
    return outputs[:, CHOSEN]


def through(outputs, targets):
    return globally(outputs, targets)


def around(chosen):
    return lambda outputs, targets: outputs[:, chosen]


class Called:
    def __init__(self, chosen):
        self.chosen = chosen

    def __call__(self, outputs, targets):
        return outputs[:, self.chosen]


@dataclass(frozen=True)
class Slotted:
    __slots__ = ("chosen",)
    chosen: int


class Remembers:
    @cached_property
    def twice(self):
        return 2


def large(k):
    values = torch.zeros(5000)
    values[2500] = k
    return {"values": values}


PAIRS = {
    "closures": around,
    "defaults": (lambda k: eval("lambda outputs, targets, k=k: outputs[:, k]", {"k": k})),
    "partial": (lambda k: partial(of_class, chosen=k)),
    "objects": Called,
    "methods": (lambda k: Called(k).__call__),
    "slots": Slotted,
    "nested code": (lambda k: eval(f"lambda outputs, targets: (lambda: outputs[:, {k}])()")),
    "large tensors": large,
    "sets": (lambda k: {"a", "b", k}),
    "modules": (lambda k: torch.nn.Linear(2, 2, bias=bool(k))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_made_alike_is_the_same_and_what_differs_another(name):
    def made(k):
        torch.manual_seed(0)
        return PAIRS[name](k)

    assert identity(made(0)) == identity(made(0)) != identity(made(1))


def test_globals_count_those_of_functions_that_are_called_included(monkeypatch):
    before = identity(globally), identity(through)
    monkeypatch.setattr(sys.modules[__name__], "CHOSEN", 1)
    assert all(now != old for now, old in zip((identity(globally), identity(through)), before, strict=True))


def test_what_a_property_keeps_does_not_count():
    one = Remembers()
    before = identity(one)
    assert one.twice == 2 and identity(one) == before


def test_a_value_that_contains_itself_ends():
    values = [1]
    values.append(values)
    assert identity(values) == identity(values) != identity([1])


SCRIPT = """
import torch
import kronfisher as kf
from functools import partial
from kronfisher.influence.identity import identity
from tests.influence.test_identity import Called, around, of_class, through

class Own(kf.likelihoods.Likelihood):
    def log_prob(self, outputs, targets):
        return sum(outputs[:, k] for k in {"a": 0, "b": 1}.values())
    def sample(self, outputs, draws):
        return (lambda: outputs)()

some = {"a", "b", "c", "d", "e", "f"}
values = [around(1), partial(of_class, chosen=2), Called(1), through, Own(), Own().sample, kf.Categorical(), some]
print(*map(identity, values))
"""


def test_another_run_finds_the_same(capsys):
    """One in which hashes of texts are others, so that sets are in another order."""
    exec(SCRIPT, {"__name__": "__main__"})
    here = capsys.readouterr().out.split()
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PYTHONHASHSEED": seed}
    there = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert there.returncode == 0, there.stderr
    assert len(set(here)) == 8 and there.stdout.split() == here
