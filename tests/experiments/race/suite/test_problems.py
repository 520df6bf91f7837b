"""Every problem of the suite, on small data in the place of the files."""

import math

import pytest
import torch

from kronfisher.experiments.data import Dataset, variants
from kronfisher.experiments.race.suite import PROBLEMS, problems
from kronfisher.experiments.race.suite.contestants import CONTESTANTS
from kronfisher.experiments.race.suite.plan import Plan


def fake(name, data_dir=None):
    if name in ("mnist", "fashion-mnist"):
        images, labels = torch.rand(40, 1, 28, 28), torch.arange(40) % 10
        return Dataset(name, images, labels, images[:20], labels[:20], "classes", 10)
    width = {"naval-propulsion-plant": 16, "protein-tertiary-structure": 9, "curves": 784}[name]
    inputs = torch.rand(300, width)
    targets, task = (inputs, "probabilities") if name == "curves" else (inputs[:, :1], "values")
    return Dataset(name, inputs, targets, inputs[:20], targets[:20], task, targets.shape[1])


@pytest.fixture
def files(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(problems.data, "load", fake)
    monkeypatch.setattr(variants, "mnist", fake)
    monkeypatch.setattr(variants, "uci", fake)
    monkeypatch.setattr(variants, "shakespeare_text", lambda data_dir: "to be, or not\nto be " * 400)
    monkeypatch.setattr(variants, "photographs", lambda data_dir: torch.rand(2, 64, 64))
    monkeypatch.setattr(problems, "STEPS", 2)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_can_be_learnt(name, files):
    loaded = PROBLEMS[name].load()
    model, dataset = loaded.model(0), loaded.dataset
    same, other = loaded.model(0).state_dict(), loaded.model(1).state_dict()
    assert all(torch.equal(value, same[key]) for key, value in model.state_dict().items())
    assert any(not torch.equal(value, other[key]) for key, value in model.state_dict().items())
    x, y = dataset.train_inputs[:8], dataset.train_targets[:8]
    contestant = CONTESTANTS["adamw"](model, loaded, Plan(name, "adamw", "adamw", {"lr": 1e-3}, 8, 0, 1.0))
    losses = [float(contestant.step(x, y, 1.0)) for _ in range(10)]
    assert losses[-1] < losses[0] < math.inf
    log_prob = loaded.likelihood.log_prob(model(x), y)  # the likelihood takes what the network gives
    assert log_prob.shape == (8,) and log_prob.isfinite().all()


def test_the_class_token_starts_near_zero(files):
    token = PROBLEMS["vit"].load().model(0).token
    assert 0 < token.abs().max() < 1e-5


def test_a_tied_embedding_is_the_last_layer_and_an_untied_is_not(files):
    tied, untied = (PROBLEMS[name].load().model(0) for name in ("gpt-tied", "gpt-untied"))
    assert tied.head.weight is tied.words.weight and untied.head.weight is not untied.words.weight
