"""Every route to a convolution's input factor gives the factor of the written-out patches."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronfisher.layers import shifts
from kronfisher.layers.activations import Activations
from kronfisher.layers.convolution import Geometry, Patches
from kronfisher.linalg import mirror

ROUTES = ("patches", "rows", "shifts")


@st.composite
def convolutions(draw):
    axes = draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(axes))
    padding = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(axes))
    spans = [(k - 1) * d + 1 - sum(pad) for k, d, pad in zip(kernel, dilation, padding, strict=True)]
    size = tuple(draw(st.integers(max(span, 1), max(span, 1) + 4)) for span in spans)
    groups = draw(st.sampled_from([1, 2]))
    return Geometry(kernel, (1,) * axes, padding, dilation), size, groups, draw(st.booleans()), draw(st.integers(0, 99))


def factor(window, images, groups, bias, route, monkeypatch_context):
    monkeypatch_context.setattr(shifts, "cheapest", lambda *_: route)
    patches = Patches(images, window, groups, len(images), bias)
    width = patches.shape[-1]
    total = torch.full((groups, width, width), 0.5, dtype=images.dtype)  # added to, not overwritten
    patches.add_covariance_(total)
    patches.add_covariance_(total)
    return mirror(total)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(convolutions())
def test_routes_agree(problem):
    window, size, groups, bias, seed = problem
    images = torch.randn(3, 2 * groups, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = Patches(images, window, groups, 3, bias).dense().flatten(1, 2)
    truth = 0.5 + 2 * rows.mT @ rows
    with pytest.MonkeyPatch.context() as patch:
        for route in ROUTES:
            torch.testing.assert_close(
                factor(window, images, groups, bias, route, patch), truth, rtol=1e-12, atol=1e-12
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("images", "channels", "size", "kernel", "route"),
    [(64, 6, 14, 5, "rows"), (32, 48, 9, 3, "shifts"), (4, 40, 4, 3, "patches")],
)
def test_static_choice_is_used_and_right(images, channels, size, kernel, route, dtype):
    window = Geometry((kernel,) * 2, (1, 1), ((1, 1),) * 2, (1, 1))
    steps = window.steps((size, size))
    assert shifts.cheapest(((size, size), (kernel,) * 2, (1, 1), steps, (1, 1)), images, channels) == route
    x = torch.randn(images, channels, size, size, dtype=dtype)
    patches = Patches(x, window, 1, images, True)
    total, plain = (torch.zeros(1, *[channels * kernel**2 + 1] * 2, dtype=dtype) for _ in range(2))
    patches.add_covariance_(total)
    Activations.add_covariance_(patches, plain)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    assert (mirror(total) - mirror(plain)).norm() <= tolerance * plain.norm()


def test_strides_and_three_axes_write_patches_out(monkeypatch):
    monkeypatch.setattr(shifts, "cheapest", lambda *_: pytest.fail("the shortcuts are for stride 1 and two axes"))
    strided = Patches(torch.randn(2, 1, 6, 6), Geometry((2, 2), (2, 1), ((0, 0),) * 2, (1, 1)), 1, 2, True)
    cubes = Patches(torch.randn(2, 1, 3, 3, 3), Geometry((2,) * 3, (1,) * 3, ((0, 0),) * 3, (1,) * 3), 1, 2, True)
    for patches in (strided, cubes):
        width = patches.shape[-1]
        total = torch.zeros(1, width, width)
        patches.add_covariance_(total)
        rows = patches.dense().flatten(1, 2)
        torch.testing.assert_close(mirror(total), rows.mT @ rows)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(convolutions(), st.integers(1, 2), st.integers(1, 2), st.integers(1, 2))
def test_gradients_of_samples_from_windows_on_lines(problem, high, wide, frames):
    """Patches that are written out along one axis give what whole patches give, whatever the window."""
    window, size, groups, bias, seed = problem
    window = replace(window, stride=(high, wide)[: len(size)])
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4 * frames, 2 * groups, *size, generator=generator, dtype=torch.float64)
    patches = Patches(images, window, groups, 4, bias)
    weights = torch.randn(groups, 4, 3, patches.shape[2], generator=generator, dtype=torch.float64).mT
    torch.testing.assert_close(patches.weighted_sums(weights), Activations.weighted_sums(patches, weights))
    part = weights[:, 1:3]
    torch.testing.assert_close(patches.weighted_sums(part, 1, 3), Activations.weighted_sums(patches, part, 1, 3))
