"""Parameters in pieces: sums over units and steps are those of whole parameters."""

import pytest
import torch

import kronfisher as kf
from kronfisher.optim.layerwise import pieces
from kronfisher.optim.layerwise.pieces import Pieces
from kronfisher.optim.layerwise.units import Unit

SHAPES = {"a": (3, 7), "b": (5,), "v": (4,), "t": (6, 5), "e": (0,)}
UNITS = [Unit(("v",), False, 4), Unit(("a", "b"), True, 26), Unit(("t",), False, 30, True), Unit(("e",), False, 0)]
MEMBERS = [(1, "a"), (1, "b"), (0, "v"), (2, "t"), (3, "e")]


@pytest.fixture(params=[4, 6, 8, 100], ids=str)
def cut(request, monkeypatch):
    monkeypatch.setattr(pieces, "MOST", request.param)
    return Pieces(MEMBERS, UNITS, [torch.Size(SHAPES[name]).numel() for _, name in MEMBERS], torch.device("cpu"))


def tensors():
    return [torch.randn(SHAPES[name], dtype=torch.float64) for _, name in MEMBERS]


def test_turns_cover_all_pieces_once_and_mix_no_kinds(cut):
    values = cut.cut(tensors())
    assert [k for some in cut.turns for k in range(some.start, some.stop)] == list(range(len(values)))
    for some in cut.turns:
        assert len({k < cut.border for k in range(some.start, some.stop)}) == 1
        assert sum(value.numel() for value in values[some]) <= pieces.MOST
    assert sum(value.numel() for value in values[: cut.border]) == 26


def test_sums_are_those_of_units(cut):
    given, momenta, directions = tensors(), tensors(), tensors()
    found = cut.measure(*map(cut.cut, (given, momenta, directions)))
    for place in range(len(UNITS)):
        own = [k for k, (unit, _) in enumerate(MEMBERS) if unit == place]
        for values, x, y in zip(found, (given, given, directions), (momenta, directions, directions), strict=True):
            expected = sum((x[k] * y[k]).sum() for k in own)
            torch.testing.assert_close(values[place].double(), expected, rtol=1e-5, atol=1e-5)  # sums are float32


def test_steps_reach_parameters_in_any_layout(cut):
    parameters, updates, factors = tensors(), tensors(), torch.randn(len(UNITS))
    parameters[3] = parameters[3].t().contiguous().t()
    assert not parameters[3].is_contiguous()
    before = [parameter.clone() for parameter in parameters]
    shares = [1.0, 0.5, 0.25, 1.0, 1.0]
    cut.share_rates(shares)
    cut.add_to(parameters, cut.cut(updates), factors)
    for (place, _), share, new, old, update in zip(MEMBERS, shares, parameters, before, updates, strict=True):
        torch.testing.assert_close(new, old + factors[place] * share * update)


def test_views_that_last_are_made_again_when_memory_is_another(cut):
    values = tensors()
    first = cut.lasting("values", values)
    assert cut.lasting("values", [value.detach() for value in values]) is first  # other objects, the same memory
    values[0].data = torch.randn(SHAPES["a"], dtype=torch.float64)
    values[1].mul_(2)
    for piece, expected in zip(cut.lasting("values", values), cut.cut(values), strict=True):
        assert piece.data_ptr() == expected.data_ptr() and torch.equal(piece, expected)


def test_weights_whose_memory_is_swapped_in_training_go_on_moving():
    """As `module.to` or a load of other weights does."""
    model, x, y = torch.nn.Linear(3, 2), torch.randn(16, 3), torch.randint(2, (16,))
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    for step in range(4):
        if step == 2:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        before = model.weight.detach().clone()
        optimizer.step(lambda: model(x), y)
        assert not torch.equal(model.weight, before)
