"""The input factor of a transposed convolution, by phases, is that of its patches written out."""

import torch

from kronfisher.layers.activations import Activations
from kronfisher.layers.convolution import Geometry
from kronfisher.layers.transposed import FlippedPatches
from tests.helpers.close import close


def patches(generator):
    """Of a random transposed convolution, if it has any outputs."""

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    axes = range(draw(1, 3))
    kernel, step, size = ([draw(1, most) for _ in axes] for most in (5, 4, 5))
    cut, extra = [draw(0, k + 1) for k in kernel], [draw(0, s - 1) for s in step]
    sizes = zip(size, step, cut, kernel, extra, strict=True)
    if any((n - 1) * s - 2 * p + k + more < 1 for n, s, p, k, more in sizes):
        return None
    groups = draw(1, 2)
    whole = [(n - 1) * s + 1 for n, s in zip(size, step, strict=True)]
    spread = torch.zeros(3, 2 * groups, *whole, dtype=torch.float64)
    pixels = torch.randn(3, 2 * groups, *size, generator=generator, dtype=torch.float64)
    spread[(..., *(slice(None, None, s) for s in step))] = pixels
    pads = tuple((k - 1 - p, k - 1 - p + more) for k, p, more in zip(kernel, cut, extra, strict=True))
    ones = (1,) * len(axes)
    window = Geometry(tuple(kernel), ones, pads, ones)
    return FlippedPatches(spread, window, groups, 3, bool(draw(0, 1)), tuple(step))


def test_phases_give_the_covariance_of_patches():
    generator, seen = torch.Generator().manual_seed(0), 0
    for _ in range(120):
        if (inputs := patches(generator)) is None:
            continue
        groups, _, _, width = inputs.shape
        found, expected = torch.zeros(2, groups, width, width, dtype=torch.float64)
        inputs.add_covariance_(found)
        Activations.add_covariance_(inputs, expected)
        close(found.triu(), expected.triu(), 1e-12)
        seen += max(inputs.steps) > 1
    assert seen > 30
