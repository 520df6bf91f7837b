"""Frozen, uncovered, sparse and later added parameters, and those of other optimisers."""

import copy

import pytest
import torch
from torch import nn

import kronfisher as kf
from tests.helpers.training import FIXED, batches, network, train, weights, wide


def test_frozen_parameters_stay_and_cost_nothing():
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = kf.NaturalGradient(model, kf.Categorical(), step=kf.QuadraticModel())
    train(optimizer, model, batches(3))
    assert torch.equal(model[0].weight, before)
    assert {layer.name for layer in optimizer.parts.statistics.layers} == {"0.bias", "2.weight"}
    model[2].weight.requires_grad_(False)  # frozen on the way
    before = model[2].weight.clone()
    train(optimizer, model, batches(3))
    assert torch.equal(model[2].weight, before)
    model.requires_grad_(True)
    with pytest.warns(kf.NumericalWarning, match="0.weight: in the model, but in no group"):
        train(optimizer, model, batches(3))
    assert not torch.equal(model[2].weight, before)
    assert {layer.name for layer in optimizer.parts.statistics.layers} == {"0.bias", "2.weight"}


def test_parameters_without_a_block_make_plain_steps_and_are_reported():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.power = network(), nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return torch.addcmul(y := self.inner(x), y, self.power)

    model = Scaled()
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    train(optimizer, model, batches(3))
    assert model.power.item() != 0
    assert "power: used by addcmul" in str(optimizer.report())


def test_groups_that_are_added_later_get_curvature():
    model, data = network(), batches(8)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), params=model[0].parameters())
    train(optimizer, model, data[:3])
    layer = optimizer.parts.statistics.layers[0]
    optimizer.add_param_group({"params": list(model[2].parameters())})
    old = model[2].weight.clone()
    train(optimizer, model, data[3:])
    assert {layer.name for layer in optimizer.parts.statistics.layers} == {"0.weight", "2.weight"}
    assert any(one is layer for one in optimizer.parts.statistics.layers)  # its average is kept
    assert not optimizer.report().uncovered and not torch.equal(model[2].weight, old)


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


@pytest.mark.usefixtures("few_rows_pay")
def test_other_optimisers_find_their_gradients():
    # Batches so small that steps of wide layers are made from rows, and their gradients never formed.
    model, data = wide(), batches(12, n=6)
    mine = [p for place in (0, 3, 5) for p in model[place].parameters()]
    optimizer = kf.NaturalGradient(model, kf.Categorical(), params=mine, step=kf.QuadraticModel())
    for x, y in data:
        model.zero_grad()
        optimizer.step(lambda x=x: model(x), y)
        assert model[1].weight.grad is not None
    assert model[3].weight.grad is None


@pytest.mark.usefixtures("few_rows_pay")
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
