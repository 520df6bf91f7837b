"""What is raced on: losses, evaluations and the order of the data."""

import math
from dataclasses import replace
from itertools import chain

import pytest
import torch
from torch import nn

from kronfisher.experiments import data
from kronfisher.experiments.race import PROBLEMS, Task
from kronfisher.experiments.race.order import Order
from tests.experiments.race.racing import CLASSES, TINY, race, rows


@pytest.mark.parametrize(
    ("problem", "scale"), [(TINY, 1.0), (replace(TINY, mean=True, activation="relu"), 1 / 64), (CLASSES, 1.0)]
)
def test_the_loss_is_the_likelihoods(problem, scale):
    task = problem.load()
    model, (x, y) = task.model(0), (task.dataset.train_inputs[:50], task.dataset.train_targets[:50])
    outputs = model(x)
    torch.testing.assert_close(task.loss(outputs, y), scale * -task.likelihood.log_prob(outputs, y).mean())
    assert task.scale == scale


def test_squared_errors_lose_their_constant():
    task = TINY.load()
    task = replace(task, dataset=replace(task.dataset, task="values"))
    outputs, targets = torch.randn(7, 64), torch.randn(7, 64)
    constant = 32 * math.log(2 * math.pi)
    expected = -task.likelihood.log_prob(outputs, targets).mean() - constant
    torch.testing.assert_close(task.loss(outputs, targets), expected, rtol=1e-4, atol=1e-4)


def test_evaluations_are_of_the_whole_part_and_leave_the_model_alone(task):
    model = task.model(1)
    model.append(nn.Dropout(0.5)).train()
    before = torch.get_rng_state()
    found = task.evaluate(model)
    assert model.training and model[-1].training and torch.equal(before, torch.get_rng_state())
    model.eval()
    x, y = task.dataset.train_inputs[:100], task.dataset.test_targets[:100]
    assert found["train_loss"] == pytest.approx(task.loss(model(x), x).item(), rel=1e-5)
    assert found["train_error"] == pytest.approx((model(x).sigmoid() - x).square().sum(1).mean().item(), rel=1e-5)
    assert found["test_loss"] == pytest.approx(task.loss(model(y), y).item(), rel=1e-5)
    everything = task.evaluate(model, all_test=True)
    assert set(everything) == {"test_loss", "test_error"} and everything["test_loss"] != found["test_loss"]


def test_accuracy_for_classes():
    task = CLASSES.load()
    model = task.model(0).eval()
    x, y = task.dataset.test_inputs[:100], task.dataset.test_targets[:100]
    assert task.evaluate(model)["test_accuracy"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())


def test_all_problems_know_their_network():
    assert {"curves", "mnist", "faces", "alexnet"} <= set(PROBLEMS)
    curves = Task(PROBLEMS["curves"], data.load("curves", train_size=10, test_size=10))
    widths = [layer.out_features for layer in curves.model(0) if isinstance(layer, nn.Linear)]
    assert widths == [400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784]


def test_the_order_is_the_seeds_and_every_pass_has_its_own():
    def batches(seed, size, number):
        order = Order(10, seed)
        return [order.take(size).tolist() for _ in range(number)]

    assert batches(0, 5, 4) == batches(0, 5, 4) != batches(1, 5, 4)
    first, second = (sorted(chain(*part)) for part in (batches(0, 5, 4)[:2], batches(0, 5, 4)[2:]))
    assert first == second == list(range(10)) and batches(0, 5, 4)[:2] != batches(0, 5, 4)[2:]
    # A batch of another size is cut from the same order; a rest that is too small is left out.
    assert list(chain(*batches(0, 3, 3))) == list(chain(*batches(0, 5, 2)))[:9]
    assert batches(0, 3, 4)[3] == batches(0, 5, 3)[2][:3]


def test_all_start_from_the_same_weights(tmp_path, task):
    race(tmp_path, "sgd", "adamw", "muon").go(task)
    starts = [found["points"][0]["train_loss"] for found in rows(tmp_path).values()]
    assert len(starts) == 3 and len(set(starts)) == 1
    other = race(tmp_path, "sgd", seeds=(1,)).go(task)[0]
    assert other.points[0]["train_loss"] != starts[0]
