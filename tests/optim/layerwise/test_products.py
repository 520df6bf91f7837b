"""Natural gradients of narrow layers of one kind, made together, are those that each has alone."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.optim.layerwise import product as products
from kronfisher.optim.layerwise.product import Products


class Packed(nn.Module):
    """Layers of one shape with and without biases, two of them rows of one parameter, and one of another."""

    def __init__(self):
        super().__init__()
        self.packed = nn.Parameter(torch.randn(12, 6) / 3)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.plain = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        self.skipped = nn.Linear(6, 6)
        self.last = nn.Linear(6, 9)

    def forward(self, x, skip=False):
        one, two = self.packed.chunk(2)
        x = nn.functional.linear(torch.tanh(nn.functional.linear(x, one)), two)
        for layer in (*self.layers, *self.plain, *(() if skip else (self.skipped,))):
            x = torch.tanh(layer(x))
        return self.last(x)


def trained(dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = Packed().to(dtype)
    optimizer = kf.NaturalGradient(model, kf.Gaussian(), **options)
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        x = torch.randn(32, 6, generator=generator).to(dtype)
        optimizer.step(lambda x=x, step=step: model(x, skip=step == 5), x.repeat(1, 2)[:, :9].sin())
    return model, optimizer


def test_together_they_are_what_each_is_alone(monkeypatch):
    sizes = set()

    def apply(self, gradients, out, known=Products.apply):
        done = known(self, gradients, out)
        sizes.add((len(self._products), done))
        return done

    monkeypatch.setattr(Products, "apply", apply)
    together, _ = trained()
    assert sizes == {(4, True)}  # with biases and without, and where one has no gradient
    monkeypatch.setattr(products, "NARROW", 0)
    sizes.clear()
    alone, _ = trained()
    assert not sizes
    for mine, other in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_outputs", [None, 5])
def test_natural_gradients_are_the_inverses_of_their_layers(dtype, max_outputs):
    model, optimizer = trained(dtype=dtype, fit=kf.KFAC(max_outputs=max_outputs))
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    direction = optimizer.parts.direction
    for _ in range(2):
        natural = direction.apply(gradients)
        for one in direction.inverses:
            (block,) = one.blocks
            expected = {name: torch.zeros_like(gradients[name])[None] for name in block.parameters}
            one.apply({name: gradients[name][None] for name in block.parameters}, expected)
            for view in block.views:
                found, own = (view.gather(t) for t in (natural[view.parameter][None], expected[view.parameter]))
                torch.testing.assert_close(found, own, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-5)


def test_a_layer_of_which_one_gradient_is_missing_has_what_it_has_alone(monkeypatch):
    model, optimizer = trained()
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters() if name != "layers.1.bias"}
    direction = optimizer.parts.direction
    found = direction.apply(gradients)
    monkeypatch.setattr(products, "NARROW", 0)
    direction._applied = []
    alone = direction.apply(gradients)
    assert found.keys() == alone.keys()
    for name, each in found.items():
        torch.testing.assert_close(each, alone[name])


class Turned(nn.Module):
    """Weights whose outputs are not their first axis, with a bias and without."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 8) / 3)
        self.wider = nn.ConvTranspose2d(2, 3, 2)
        self.plain = nn.ConvTranspose2d(3, 2, 2, bias=False)

    def forward(self, x):
        images = torch.tanh(x @ self.matrix).view(-1, 2, 2, 2)
        return self.plain(torch.tanh(self.wider(images))).flatten(1)


def test_weights_in_another_order_have_the_inverses_of_their_layers():
    torch.manual_seed(0)
    model = Turned().double()
    optimizer = kf.NaturalGradient(model, kf.Gaussian())
    x = torch.randn(16, 6, dtype=torch.float64)
    for _ in range(3):
        optimizer.step(lambda: model(x), x.repeat(1, 6)[:, :32].sin())
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    direction = optimizer.parts.direction
    assert not direction._apply_directly(direction.inverses, gradients, {})  # none is left
    natural = direction.apply(gradients)
    for one in direction.inverses:
        expected = {name: torch.zeros_like(gradients[name])[None] for name in one.blocks[0].parameters}
        one.apply({name: gradients[name][None] for name in expected}, expected)
        for name, own in expected.items():
            torch.testing.assert_close(natural[name], own[0])
