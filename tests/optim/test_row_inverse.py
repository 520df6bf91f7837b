"""Inverses applied to rows give the steps that inverses applied to gradients give."""

from itertools import product

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.operators import Kronecker
from kronfisher.optim.row_inverse import RowInverse, pays


def test_passes_of_small_networks_are_not_captured_for_rows_alone():
    for width, captured in ((40, False), (1000, True)):
        model = nn.Sequential(nn.Linear(300, width), nn.Tanh(), nn.Linear(width, 3))
        optimizer = kf.NaturalGradient(model, kf.Categorical())
        optimizer.step(lambda model=model: model(torch.randn(4, 300)), torch.randint(3, (4,)))
        optimizer.step(lambda model=model: model(torch.randn(4, 300)), torch.randint(3, (4,)))
        assert optimizer.parts.forward_backward.state_dict()["rows_pay"] == captured


def wide(dtype=torch.float64, bias=True):
    torch.manual_seed(5)
    layers = [nn.Linear(30, 40, bias=bias), nn.Tanh(), nn.Linear(40, 12), nn.Tanh(), nn.Linear(12, 20), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(20, 3)).to(dtype)


def batches(count, n=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(n, 30, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator))
        for _ in range(count)
    ]


def test_weights_in_half_precision_take_the_step_of_their_rows():
    def run(dtype):
        model = wide(torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        model.to(dtype)
        before = [p.detach().float().clone() for p in model.parameters()]
        optimizer = kf.NaturalGradient(model, kf.Categorical())
        for x, y in batches(2, dtype=torch.bfloat16):
            optimizer.step(lambda x=x: model(x.to(dtype)).float(), y)
        assert all(p.dtype == dtype for p in model.parameters())
        return torch.cat([(p.detach().float() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])

    half, full = run(torch.bfloat16), run(torch.float32)
    assert torch.cosine_similarity(half, full, dim=0) > 0.95
    assert 0.9 < half.norm() / full.norm() < 1.1


def spd(n):
    root = torch.randn(n, n, dtype=torch.float64)
    return root @ root.mT + torch.eye(n)


# Rows, outputs, inputs and whether there is a bias: wherever rows pay.
SHAPES = [
    (rows, outputs, inputs, bias)
    for rows, (outputs, inputs), bias in product((2, 10, 14, 40, 200), ((12, 30), (30, 12), (1, 40), (20, 20)), (0, 1))
    if pays(rows, outputs, inputs + bias)
]
assert len(SHAPES) == 12


@pytest.mark.parametrize("diagonal", [False, True], ids=["dense", "diagonal"])
@pytest.mark.parametrize(("rows", "outputs", "inputs", "bias"), SHAPES)
def test_rows_give_the_product(rows, outputs, inputs, bias, diagonal):
    model = nn.Linear(inputs, outputs, bias=bool(bias)).double()
    optimizer = kf.NaturalGradient(model, kf.Gaussian(), momentum=0.0, trust=0.1)
    x = torch.randn(rows, inputs, dtype=torch.float64)
    optimizer.step(lambda: model(x), torch.randn(rows, outputs, dtype=torch.float64))
    (layer,) = optimizer.parts.direction.inverses
    inputs += bias
    assert layer.blocks[0].shape == (1, outputs, inputs)
    B, A = spd(outputs), spd(inputs)
    B = B.diagonal().diag() if diagonal else B
    layer.inverse = Kronecker(A[None], B.diagonal()[None] if diagonal else B[None])
    assert layer.has_diagonal == diagonal and layer.separable
    a, g = torch.randn(rows, inputs, dtype=torch.float64), torch.randn(rows, outputs, dtype=torch.float64)
    out = {name: torch.empty_like(p).unsqueeze(0) for name, p in model.named_parameters()}
    kept = RowInverse({layer.blocks[0].key: layer}, {layer.name: (a, g)})
    kept.apply(layer, out)
    assert not kept.slopes  # the gradient gives it
    kept.spared = set(out)
    kept.apply(layer, out)
    expected = B @ g.mT @ a @ A
    torch.testing.assert_close(layer.blocks[0].gather(out).reshape(outputs, inputs), expected)
    torch.testing.assert_close(kept.slopes[layer.name], (expected * (g.mT @ a)).sum())


def test_one_factor_alone_never_belongs_on_rows():
    for rows, outputs, inputs in product((1, 2, 5, 13, 40, 200), (1, 2, 7, 30, 150), (1, 3, 20, 160)):
        matrix = outputs * inputs * (outputs + inputs)
        product_of_rows = rows * outputs * inputs
        left = product_of_rows + rows * outputs**2 + outputs * inputs**2
        right = product_of_rows + rows * inputs**2 + inputs * outputs**2
        both = product_of_rows + rows * (outputs**2 + inputs**2)
        assert pays(rows, outputs, inputs) == (both < matrix)
        assert min(matrix, both) <= min(left, right)
        dense = outputs**2
        assert pays(rows, outputs, inputs, diagonal=True) == (both - rows * dense < matrix - inputs * dense)


@pytest.mark.usefixtures("few_rows_pay")
@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.9, "kl_limit": 0.1, "trust": 0.1}, {"refresh": kf.Refresh(model=5), "trust": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_steps_from_rows_are_steps_from_gradients(options, bias):
    models = [wide(bias=bias), wide(bias=bias)]
    groups = [[{"params": m[:3].parameters(), "lr": 0.5}, {"params": m[3:].parameters()}] for m in models]
    whole, parts = (
        kf.NaturalGradient(model, kf.Categorical(), params=params, **options)
        for model, params in zip(models, groups, strict=True)
    )
    spared = 0
    for x, y in batches(30):
        whole.step(lambda x=x: models[0](x), y)
        spared += models[0][0].weight.grad is None
        parts.zero_grad()
        parts.backward(parts.forward(x), y)
        parts.step()
        for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
    assert spared > 5


@pytest.mark.usefixtures("few_rows_pay")
@pytest.mark.parametrize("bias", [True, False])
def test_default_steps_of_convolutions_from_patches_are_steps_from_gradients(bias, monkeypatch):
    def convolutional():
        torch.manual_seed(0)
        body = (nn.Conv2d(2, 16, 3, stride=2, bias=bias), nn.Tanh(), nn.Conv2d(16, 12, 3, 2, 1, bias=bias))
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(12, 3)).double()

    models = [convolutional(), convolutional()]
    whole, parts = (kf.NaturalGradient(model, kf.Categorical()) for model in models)
    kept = []
    apply = RowInverse.apply
    monkeypatch.setattr(RowInverse, "apply", lambda rows, one, out: (kept.append(one.name), apply(rows, one, out)))
    for x, y in [(torch.randn(2, 2, 5, 5, dtype=torch.float64), torch.randint(3, (2,))) for _ in range(12)]:
        whole.step(lambda x=x: models[0](x), y)
        parts.zero_grad()
        parts.backward(parts.forward(x), y)
        parts.step()
    assert kept.count("0.weight") > 5 and kept.count("2.weight") > 5
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("few_rows_pay")
def test_gradients_are_formed_where_hooks_decay_or_ties_may_change_them():
    for touch in ("hook", "decay", "tied"):
        model = wide()
        if touch == "hook":
            model[0].weight.register_hook(lambda g: 2 * g)
        if touch == "tied":
            model[3] = nn.Sequential(nn.Tanh(), model[2], nn.Linear(12, 40).double(), model[2])
            model[2] = nn.Linear(40, 40).double()
        optimizer = kf.NaturalGradient(
            model, kf.Categorical(), momentum=0.9, trust=0.1, weight_decay=0.1 if touch == "decay" else 0.0
        )
        data = batches(30)
        if touch == "tied":
            model = nn.Sequential(model[0], model[1], model[2], nn.Tanh(), model[3][1], nn.Linear(12, 40).double())
            twice = model[4]
            optimizer = kf.NaturalGradient(
                (tied := Tied(model, twice)), kf.Categorical(class_dim=1), momentum=0.9, trust=0.1
            )
            model = tied
        for x, y in data:
            optimizer.step(lambda x=x, model=model: model(x), y)
            weight = twice.weight if touch == "tied" else model[0].weight
            assert weight.grad is not None, touch


class Tied(nn.Module):
    def __init__(self, body, twice):
        super().__init__()
        self.body, self.twice = body, twice

    def forward(self, x):
        return self.twice(self.body(x).tanh())


@pytest.mark.usefixtures("few_rows_pay")
def test_a_spared_gradient_is_formed_when_the_inverse_has_another_form():
    model = wide()
    optimizer = kf.NaturalGradient(model, kf.Categorical(), momentum=0.0, trust=0.1)
    for x, y in batches(2):
        optimizer.step(lambda x=x: model(x), y)
    layer = optimizer.parts.direction.inverses[0]
    (block,) = layer.blocks
    _, outputs, inputs = block.shape
    a, g = torch.randn(3, inputs, dtype=torch.float64), torch.randn(3, outputs, dtype=torch.float64)
    rows = RowInverse({block.key: layer}, {layer.name: (a, g)})
    layer.solves = True
    gradients = {}
    rows.form_missing(gradients, dict(model.named_parameters()))
    assert set(gradients) == set(block.parameters)
    formed = block.gather({name: gradient[None] for name, gradient in gradients.items()})
    torch.testing.assert_close(formed.reshape(outputs, inputs), g.mT @ a)
