"""What ordinary models and loops do to training: obstacles that once stopped it, or bent it in silence."""

import copy

import pytest
import torch
from torch import nn

import kronfisher as kf
from tests.optim.test_optimizer import FIXED, batches, network, train, weights


def test_batches_without_a_gradient_are_no_obstacle():
    model, data = network(), batches(6)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    ignored = torch.full((16,), -100)
    before = weights(model)
    optimizer.step(lambda: model(data[0][0]), ignored)  # the first batch: nothing is known yet
    assert torch.equal(weights(model), before) and optimizer.report().skipped == 1
    train(optimizer, model, data)
    optimizer.step(lambda: model(data[0][0]), ignored)
    assert torch.isfinite(weights(model)).all()


def test_autocast_around_a_step_compares_with_the_new_weights():
    model, (x, y) = network(), batches(1, n=64)[0]
    optimizer = kf.NaturalGradient(model, kf.Categorical(), lr=300.0, trust=kf.LevenbergMarquardt(stride=float("inf")))
    before = weights(model)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(lambda: model(x), y)
    assert optimizer.report().rejected == 1 and torch.equal(weights(model), before)


def wide():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))


def test_other_optimisers_find_their_gradients():
    # Batches so small that steps of wide layers are made from rows, and their gradients never formed.
    model, data = wide(), batches(12, n=6)
    mine = [p for place in (0, 3, 5) for p in model[place].parameters()]
    optimizer = kf.NaturalGradient(model, kf.Categorical(), params=mine)
    for x, y in data:
        model.zero_grad()
        optimizer.step(lambda x=x: model(x), y)
        assert model[1].weight.grad is not None
    assert model[3].weight.grad is None


def test_steps_from_rows_heed_hooks_and_rates_of_groups():
    data = batches(12, n=6)

    def trained(rate, hooked, manual):
        model = wide()
        if hooked:

            def halved(layer, inputs, out):
                if out.requires_grad:
                    out.register_hook(lambda g: g / 2)

            model[3].register_forward_hook(halved)
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        others = [p for name, p in model.named_parameters() if not name.endswith("bias")]
        groups = [{"params": others}, {"params": biases, "lr": rate}]
        optimizer = kf.NaturalGradient(model, kf.Categorical(), params=groups, **FIXED)
        for x, y in data:
            if manual:
                optimizer.zero_grad()
                optimizer.backward(optimizer.forward(x), y)
                optimizer.step()
            else:
                optimizer.step(lambda x=x: model(x), y)
        return weights(model)

    for rate, hooked in ((0.3, False), (1.0, True)):
        torch.testing.assert_close(trained(rate, hooked, False), trained(rate, hooked, True), rtol=1e-4, atol=1e-5)


def test_a_resumed_training_from_rows_gives_the_same_bits():
    data, model = batches(40, n=6), wide()
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    train(optimizer, model, data[:22])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(optimizer, model, data[22:])
    other = wide()
    resumed = kf.NaturalGradient(other, kf.Categorical())
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(resumed, other, data[22:])
    assert torch.equal(weights(model), weights(other))


@pytest.mark.parametrize("training", ["optimizer", "preconditioner"])
def test_an_error_amid_statistics_leaves_that_batch_out(training, monkeypatch):
    def run(interrupted):
        model, data = network(), batches(4)
        if training == "optimizer":
            optimizer = kf.NaturalGradient(model, kf.Categorical())
            curvature, step = optimizer.curvature, lambda x, y: optimizer.step(lambda: model(x), y)
        else:
            preconditioner = kf.Preconditioner(model, kf.Categorical())
            curvature = preconditioner.curvature

            def step(x, y):
                model.zero_grad()
                nn.functional.cross_entropy(preconditioner(x), y).backward()
                preconditioner.step()

        step(*data[0])
        if interrupted:
            layer = curvature.layers[0].fit
            update, count = type(layer).update, [0]

            def failing(self, state, samples):
                count[0] += 1
                if count[0] > 1:
                    raise MemoryError("simulated")
                return update(self, state, samples)

            with monkeypatch.context() as patch:
                patch.setattr(type(layer), "update", failing)
                with pytest.raises(MemoryError):
                    step(100 * data[1][0], data[1][1])
            if training == "optimizer":
                optimizer.zero_grad()
        step(*data[2])
        return [layer.average.states[0].sums["inputs"].clone() for layer in curvature.layers]

    found, expected = run(True), run(False)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_models_without_an_exact_model_go_on_at_a_fixed_rate():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.last = nn.EmbeddingBag(10, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(self.bag(x))

    torch.manual_seed(0)
    model, x = Bag(), torch.randint(10, (64, 5))
    y = x[:, 0] % 3
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    with pytest.warns(kf.NumericalWarning, match="fixed rate"):
        losses = [optimizer.step(lambda: model(x), y).item() for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]
    assert any("fixed rate" in text for text in optimizer.report().warnings)
    with pytest.raises(kf.UnsupportedError, match="fixed rate"):
        explicit = kf.NaturalGradient(model, kf.Categorical(), momentum=0.9, trust=kf.LevenbergMarquardt())
        for _ in range(3):
            explicit.step(lambda: model(x), y)


def test_sparse_gradients_count_and_a_preconditioner_refuses_them():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Embedding(10, 6), nn.Flatten(), nn.Linear(12, 3))
    sparse = copy.deepcopy(dense)
    sparse[0].sparse = True
    x = torch.randint(10, (16, 2))
    y = x[:, 0] % 3
    for model in (dense, sparse):
        optimizer = kf.NaturalGradient(model, kf.Categorical())
        for _ in range(3):
            optimizer.step(lambda model=model: model(x), y)
    torch.testing.assert_close(weights(dense), weights(sparse))
    preconditioner = kf.Preconditioner(sparse, kf.Categorical())
    nn.functional.cross_entropy(preconditioner(x), y).backward()
    with pytest.raises(kf.UnsupportedError, match=r"0\.weight: a sparse gradient"):
        preconditioner.step()


def test_first_errors_say_what_is_wrong():
    x, y = batches(1)[0]
    lstm = nn.LSTM(4, 3, batch_first=True)
    optimizer = kf.NaturalGradient(lstm, kf.Categorical())
    with pytest.raises(kf.UnsupportedError, match="No block covers any of the parameters"):
        optimizer.step(lambda: lstm(x[:, None])[0][:, 0], y)
    model = network()
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    with pytest.raises(kf.DataError, match="label 7 is out of range"):
        optimizer.step(lambda: model(x), torch.full_like(y, 7))
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)


def test_groups_that_are_added_later_get_curvature():
    model, data = network(), batches(8)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), params=model[0].parameters())
    train(optimizer, model, data[:3])
    layer = optimizer.curvature.layers[0]
    optimizer.add_param_group({"params": list(model[2].parameters())})
    old = model[2].weight.clone()
    train(optimizer, model, data[3:])
    assert {layer.name for layer in optimizer.curvature.layers} == {"0.weight", "2.weight"}
    assert any(one is layer for one in optimizer.curvature.layers)  # what was known of it stays
    assert not optimizer.report().uncovered and not torch.equal(model[2].weight, old)
