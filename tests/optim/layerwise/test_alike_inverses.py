"""Narrow layers of one shape have the inverses that each has alone, and say the same where there is none."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.optim.layerwise import direction as directions
from kronfisher.optim.layerwise.alike_inverses import NARROW, Turn, gather_alike


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)
    ).double()


def train(model, steps=12):
    generator = torch.Generator().manual_seed(1)
    optimizer = kf.NaturalGradient(model, kf.Gaussian())
    for _ in range(steps):
        x = torch.randn(32, 7, generator=generator).double()
        optimizer.step(lambda x=x: model(x), x[:, :6].sin())
    return optimizer


def test_inverses_that_are_made_together_are_those_made_alone(monkeypatch):
    together, alone = network(), network()
    sizes = []

    def gather(chosen):
        for group in gather_alike(chosen):
            sizes.append(len(group))
            yield group

    monkeypatch.setattr(directions, "gather_alike", gather)
    own = train(together).parts.direction.inverses
    assert max(sizes) == 3  # the layer that reads data has another damping and shape
    monkeypatch.setattr(directions, "gather_alike", lambda chosen: ([turn] for turn in chosen))
    others = train(alone).parts.direction.inverses
    for mine, other in zip(own, others, strict=True):
        torch.testing.assert_close(mine.inverse.A, other.inverse.A, rtol=1e-10, atol=0)
        torch.testing.assert_close(mine.inverse.B, other.inverse.B, rtol=1e-10, atol=0)
        assert (mine.due, mine.made, mine.value, mine.name) == (other.due, other.made, other.value, other.name)
        assert mine.inverse.A.untyped_storage().nbytes() == mine.inverse.A.nbytes  # none holds on to the others'
    for mine, other in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_layer_that_needs_more_damping_does_not_take_the_others_along(monkeypatch):
    optimizer = train(network())
    inverses = optimizer.parts.direction.inverses
    spoilt = inverses[2].layer
    operator = type(spoilt).operator

    def indefinite(self):
        found = operator(self)
        return (
            replace(found, A=torch.diag(torch.tensor([9.0, 9, 9, 9, 9, 9, -1]).double())[None])
            if self is spoilt
            else found
        )

    monkeypatch.setattr(type(spoilt), "operator", indefinite)
    for one in inverses:
        one.due = 0
    optimizer.parts.direction.renew(100, 1e9)
    assert [one.made for one in inverses] == [100] * 4
    assert [one.trouble[:8] for one in inverses] == ["", "", "singular", ""]


@pytest.mark.parametrize(("width", "together"), [(NARROW, [3]), (NARROW + 1, [1, 1, 1])])
def test_wide_layers_are_made_one_by_one(width, together):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    layers = nn.ModuleList(nn.Linear(3, width) for _ in range(3))
    optimizer = kf.NaturalGradient(nn.ModuleList([model, layers]), kf.Gaussian())
    x = torch.randn(16, 3)
    optimizer.step(lambda: sum(layer(model(x)) for layer in layers), torch.randn(16, width))
    wide = [one for one in optimizer.parts.direction.inverses if one.blocks[0].shape[1] == width]
    assert sorted(len(group) for group in gather_alike(Turn(one, None) for one in wide)) == together
    assert [len(group) for group in gather_alike(Turn(one, True) for one in wide)] == [1, 1, 1]  # halves have none


def test_layers_of_several_dtypes_keep_their_own():
    x, wide = torch.randn(32, 6), nn.Linear(6, 6).double()
    model = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), wide])
    optimizer = kf.NaturalGradient(model, kf.Gaussian())
    for _ in range(3):
        optimizer.step(lambda: model[1](model[0](x).tanh()) + wide(x.double()).float(), x.sin())
    kinds = {one.name: one.inverse.dtype for one in optimizer.parts.direction.inverses}
    assert kinds["2.weight"] == torch.float64 and kinds["0.weight"] == kinds["1.weight"] == torch.float32
