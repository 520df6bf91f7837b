"""Training: it learns, repeats itself, reports its progress and stops on nonsense."""

import pytest
import torch

from kronfisher.errors import NumericalError
from kronfisher.experiments import data, networks
from kronfisher.experiments.training import evaluate, train


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", train_size=300, test_size=100)


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet"])
def test_it_learns(name, digits):
    model = networks.for_data(name, digits)
    before = evaluate(model.eval(), digits)
    history = train(model, digits, epochs=6, batch_size=32, lr=5e-3)
    after = evaluate(model, digits)
    assert len(history) == 6 and history[-1] < history[0]
    assert after["loss"] < 0.6 * before["loss"] and after["accuracy"] > 0.7
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_autoencoders_learn(digits):
    pairs = digits.reconstruction()
    model = networks.for_data("autoencoder", pairs)
    history = train(model, pairs, epochs=6, batch_size=32, lr=5e-3)
    assert history[-1] < 0.8 * history[0] and set(evaluate(model, pairs)) == {"loss"}


def test_the_loss_is_the_negative_log_likelihood_per_datum(digits):
    model = networks.for_data("mlp", digits)
    expected = torch.nn.functional.cross_entropy(model(digits.test_inputs), digits.test_targets).item()
    assert evaluate(model, digits, batch_size=33)["loss"] == pytest.approx(expected, rel=1e-5)
    first = train(model, digits, epochs=1, batch_size=300, lr=0.0)[0]
    expected = torch.nn.functional.cross_entropy(model(digits.train_inputs), digits.train_targets).item()
    assert first == pytest.approx(expected, rel=1e-5)


def test_the_seed_decides_and_the_global_generator_is_left_alone(digits):
    def run(seed):
        model = networks.for_data("mlp", digits)
        return train(model, digits, epochs=2, seed=seed)

    before = torch.get_rng_state()
    assert run(0) == run(0) != run(1)
    assert torch.equal(before, torch.get_rng_state())


def test_progress_is_reported_after_every_step(digits):
    seen = []
    train(networks.for_data("mlp", digits), digits, epochs=2, batch_size=128, on_step=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(k, 6) for k in range(1, 7)]
    assert all(loss > 0 for *_, loss in seen)


def test_a_diverging_loss_stops_with_the_remedy(digits):
    with pytest.raises(NumericalError, match=r"after \d+ steps: lower lr \(now 1e\+30\)"):
        train(networks.for_data("mlp", digits), digits, epochs=5, lr=1e30)


def test_patience_ends_the_training_at_the_best_weights(digits):
    model = networks.for_data("mlp", digits)
    history = train(model, digits, epochs=200, lr=0.05, patience=3)
    assert 3 < len(history) < 200
    best = evaluate(model, digits)["loss"]
    longer = networks.for_data("mlp", digits)
    losses = []
    for epochs in range(1, len(history) + 1):
        longer = networks.for_data("mlp", digits)
        train(longer, digits, epochs=epochs, lr=0.05)
        losses.append(evaluate(longer, digits)["loss"])
    assert best == pytest.approx(min(losses)) and losses.index(min(losses)) == len(losses) - 4


def test_weight_decay_shrinks_the_weights(digits):
    def norm(weight_decay):
        model = networks.for_data("mlp", digits)
        train(model, digits, epochs=3, weight_decay=weight_decay)
        return sum(float(p.detach().norm()) for p in model.parameters())

    assert norm(0.1) < 0.9 * norm(0.0)
