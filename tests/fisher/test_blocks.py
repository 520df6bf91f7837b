from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronfisher.fisher.blocks import Block, Window

LAYOUTS = ("row-major", "reversed", "channels last", "inside a larger tensor")


def laid_out(shape, layout):
    """A parameter of that shape, every element different, its memory ordered in some way."""
    values = torch.arange(prod(shape), dtype=torch.float64).reshape(shape)
    if layout == "reversed":
        return values.permute(*reversed(range(len(shape)))).contiguous().permute(*reversed(range(len(shape))))
    if layout == "channels last" and len(shape) == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "inside a larger tensor":
        return torch.cat([torch.zeros(5, dtype=torch.float64), values.flatten()])[5:].view(shape)
    return values


@st.composite
def windows(draw):
    """A parameter, and a view of it by a few transpositions, slices and new axes."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    parameter = laid_out(shape, draw(st.sampled_from(LAYOUTS)))
    window = parameter
    for _ in range(draw(st.integers(0, 3))):
        axis = draw(st.integers(0, window.dim() - 1))
        step = draw(st.sampled_from(["transpose", "slice", "unsqueeze"]))
        if step == "transpose":
            window = window.transpose(axis, draw(st.integers(0, window.dim() - 1)))
        elif step == "slice":
            low = draw(st.integers(0, window.shape[axis] - 1))
            window = window.narrow(axis, low, draw(st.integers(1, window.shape[axis] - low)))
        else:
            window = window.unsqueeze(axis)
    return parameter, window


@settings(max_examples=300, derandomize=True)
@given(windows())
def test_a_view_reads_and_writes_what_the_window_shows(pair):
    parameter, window = pair
    view = Window.of("w", parameter, window)
    vectors = torch.stack([parameter, -3 * parameter])  # as a user has them: row-major, whatever the parameter's layout
    assert torch.equal(view.gather(vectors), torch.stack([window, -3 * window]))
    assert view.numel == window.numel() and not view.overlaps

    values, out = torch.rand(2, *window.shape, dtype=torch.float64), torch.full_like(vectors, 7.0)
    before = out.clone()
    view.scatter(values, out)
    assert torch.equal(view.gather(out), values)
    shown = torch.zeros(parameter.numel(), dtype=torch.bool)
    shown[window.flatten().long()] = True  # elements are their own row-major numbers
    shown = shown.reshape(parameter.shape)
    assert torch.equal(out[:, ~shown], before[:, ~shown])

    counts = view.counter()
    view.mark(counts)
    assert torch.equal(counts.bool(), shown) and counts.max() == 1


@settings(max_examples=200, derandomize=True)
@given(windows())
def test_the_label_spans_the_window(pair):
    parameter, window = pair
    label = Window.of("w", parameter, window).label
    if window.numel() == parameter.numel():
        assert label == "w"
        return
    spanned = eval(label, {"w": parameter})  # the ranges are written as one would index
    assert set(spanned.flatten().tolist()) == set(window.flatten().tolist())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_means_all_of_it_in_row_major_order(layout):
    parameter = laid_out((2, 3, 2, 2), layout)
    assert Window.of("w", parameter).whole == (layout in ("row-major", "inside a larger tensor"))
    assert not Window.of("w", parameter, parameter.transpose(0, 1)).whole
    assert not Window.of("w", parameter, parameter[:1]).whole


@settings(max_examples=100, derandomize=True)
@given(windows(), st.data())
def test_permuted_and_reshaped_views_show_the_same_elements(pair, data):
    parameter, window = pair
    view = Window.of("w", parameter, window)
    axes = data.draw(st.permutations(range(window.dim())))
    assert torch.equal(view.permuted(*axes).gather(parameter[None])[0], window.permute(axes))
    assert torch.equal(view.reshaped(1, *window.shape).gather(parameter[None])[0, 0], window)
    axis = data.draw(st.integers(0, window.dim() - 1))
    factors = [f for f in range(1, window.shape[axis] + 1) if window.shape[axis] % f == 0]
    split = window.unflatten(axis, (data.draw(st.sampled_from(factors)), -1))
    assert torch.equal(view.reshaped(*split.shape).gather(parameter[None])[0], split)


def test_windows_that_overlap():
    parameter = torch.zeros(3, 4)
    assert Window.of("w", parameter, parameter[:1].expand(2, 4)).overlaps
    assert Window.of("w", parameter, parameter.flatten().unfold(0, 3, 2)).overlaps
    assert not Window.of("w", parameter, parameter.flatten().unfold(0, 3, 3)).overlaps


def grouped():
    """A grouped convolution's block, its weight channels-last, with the bias as a last column."""
    weight, bias = laid_out((4, 3, 2, 2), "channels last"), torch.arange(4.0, dtype=torch.float64)
    views = Window.of("w", weight).reshaped(2, 2, 3, 2, 2), Window.of("b", bias).reshaped(2, 2)
    return Block("w", "conv2d", *views), {"w": weight, "b": bias}


def test_a_block_is_the_canonical_matrix():
    block, parameters = grouped()
    assert block.shape == (2, 2, 13) and block.dim == 52 and block.parameters == ("w", "b")
    (row,) = block.gather({name: p[None] for name, p in parameters.items()})
    matrix = row.reshape(2, 2, 13)
    for h in range(2):
        for o in range(2):
            assert torch.equal(matrix[h, o, :-1], parameters["w"][2 * h + o].flatten())
            assert matrix[h, o, -1] == parameters["b"][2 * h + o]


@pytest.mark.parametrize("part", ["both", "weight", "bias"])
def test_scatter_undoes_gather_and_is_its_adjoint(part):
    whole, parameters = grouped()
    block = {"both": whole, "weight": Block("w", "", whole.weight), "bias": Block("b", "", None, whole.bias)}[part]
    names = block.parameters
    assert block.shape == {"both": (2, 2, 13), "weight": (2, 2, 12), "bias": (2, 2, 1)}[part]
    vectors = {name: torch.randn(3, *parameters[name].shape, dtype=torch.float64) for name in names}
    out = {name: torch.zeros_like(v) for name, v in vectors.items()}
    block.scatter(block.gather(vectors), out)
    assert all(torch.equal(out[name], vectors[name]) for name in names)
    rows = torch.randn(3, block.dim, dtype=torch.float64)
    block.scatter(rows, out)
    inner = sum((out[name] * vectors[name]).sum() for name in names)
    assert inner == pytest.approx(float((rows * block.gather(vectors)).sum()))


def test_blocks_of_a_packed_parameter_fill_it_together():
    packed = torch.zeros(6, 3)
    blocks = [
        Block(str(k), "linear", Window.of("w", packed, part).reshaped(1, 2, 3))
        for k, part in enumerate(packed.chunk(3))
    ]
    assert len({block.key for block in blocks}) == 3
    out = {"w": torch.full((1, 6, 3), -1.0)}
    for k, block in enumerate(blocks):
        block.scatter(torch.full((1, 6), float(k)), out)
    assert out["w"][0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]
