"""Rows of natural gradients: half of the way to one length, along the outputs of whatever shows the weight."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.fisher.blocks import Block, Window
from kronfisher.optim.layerwise.weight_rows import WeightRows


def evened(matrix):
    """``[R, I]``, every row divided by the root of its length over the root mean square of all, or by a half."""
    lengths = matrix.norm(dim=1, keepdim=True)
    return matrix * (lengths / lengths.square().mean().sqrt()).clamp_min(0.25) ** -0.5


def seen(parameter, view):
    """A block of this view of the parameter, as of one matrix."""
    return Block("w", "test", Window.of("w", parameter, view).grouped, None)


CASES = {
    "linear": (lambda: torch.randn(5, 4), lambda w: w, lambda w: w),
    "convolution": (lambda: torch.randn(5, 2, 3, 3), lambda w: w, lambda w: w),
    "transposed convolution": (
        lambda: torch.randn(2, 5, 3, 3),
        lambda w: w.transpose(0, 1),
        lambda w: w.transpose(0, 1),
    ),
    "matrix with inputs first": (lambda: torch.randn(4, 5), lambda w: w.t(), lambda w: w.t()),
    "channels last": (
        lambda: torch.randn(5, 2, 3, 3).to(memory_format=torch.channels_last),
        lambda w: w,
        lambda w: w,
    ),
    "transposed, channels last": (
        lambda: torch.randn(2, 5, 3, 3).to(memory_format=torch.channels_last),
        lambda w: w.transpose(0, 1),
        lambda w: w.transpose(0, 1),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_along_outputs(case, dtype):
    make, view, matrix = CASES[case]
    parameter = make().to(dtype)
    natural = {"w": torch.randn_like(parameter, memory_format=torch.contiguous_format), "other": torch.ones(2)}
    before = natural["w"].clone()
    rows = WeightRows()
    for _ in range(2):  # what is known of the first call serves the second
        natural["w"].copy_(before)
        rows.even([seen(parameter, view(parameter))], natural)
        expected = evened(matrix(before).flatten(1))
        torch.testing.assert_close(matrix(natural["w"]).flatten(1), expected)
    assert (natural["other"] == 1).all()


def test_packed_matrices_have_means_of_their_own():
    parameter, natural = torch.randn(6, 4), {"w": torch.randn(6, 4) * torch.arange(1, 7)[:, None]}
    before = natural["w"].clone()
    WeightRows().even([seen(parameter, part) for part in parameter.chunk(2)], natural)
    torch.testing.assert_close(natural["w"], torch.cat([evened(part) for part in before.chunk(2)]))


def test_groups_have_one_mean():
    parameter, natural = torch.randn(6, 2, 3, 3), {"w": torch.randn(6, 2, 3, 3)}
    before = natural["w"].clone()
    window = Window.of("w", parameter).reshaped(3, 2, 2, 3, 3)  # [H, O, *]
    WeightRows().even([Block("w", "test", window, None)], natural)
    torch.testing.assert_close(natural["w"].flatten(1), evened(before.flatten(1)))


def test_short_rows_are_lengthened_no_more_than_twice():
    parameter, natural = torch.randn(4, 5), {"w": torch.randn(4, 5)}
    natural["w"][2] *= 1e-4
    before = natural["w"].clone()
    WeightRows().even([seen(parameter, parameter)], natural)
    torch.testing.assert_close(natural["w"][2], 2 * before[2])


def test_rows_of_zeros_stay_and_a_single_row_too():
    parameter, natural = torch.randn(3, 4), {"w": torch.randn(3, 4)}
    natural["w"][1] = 0
    WeightRows().even([seen(parameter, parameter)], natural)
    assert (natural["w"][1] == 0).all() and natural["w"].isfinite().all()
    natural = {"w": torch.zeros(3, 4)}
    WeightRows().even([seen(parameter, parameter)], natural)
    assert (natural["w"] == 0).all()
    one, natural = torch.randn(1, 4), {"w": torch.randn(1, 4)}
    before = natural["w"].clone()
    WeightRows().even([seen(one, one)], natural)
    torch.testing.assert_close(natural["w"], before)


def test_the_first_step_is_along_evened_rows():
    model, x = nn.Linear(6, 4), torch.randn(50, 6)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    before = model.weight.detach().clone()
    optimizer.step(lambda: model(x), torch.arange(50) % 4)
    step = before - model.weight.detach()
    natural = optimizer.parts.direction.apply({"weight": model.weight.grad, "bias": model.bias.grad})["weight"]
    expected = evened(natural)
    torch.testing.assert_close(step / step.norm(), expected / expected.norm())
    assert not torch.allclose(step / step.norm(), natural / natural.norm(), rtol=1e-3)
