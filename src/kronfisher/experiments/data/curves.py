"""CURVES: synthetic 28×28 images of smooth curves through three random points, the classic auto-encoder problem."""

import torch
from torch import Tensor

from kronfisher.experiments.data.dataset import Dataset, generator
from kronfisher.experiments.data.registry import register

SIDE = 28
MARGIN = 4.0  # pixels; the parabola overshoots the range of its points by at most an eighth (below 2.4 pixels)
WIDTH = 0.8  # the pen's standard deviation, in pixels
INK = 1.5
POINTS = 40  # pen positions on one curve: at most about a pixel apart


@register("curves")
def curves(seed: int = 0, train_size: int = 20_000, test_size: int = 10_000) -> Dataset:
    """Flattened images ``[N, 784]`` in [0, 1] that are their own targets (probabilities of ones).

    Example:
        >>> curves(train_size=3, test_size=2).train_inputs.shape
        torch.Size([3, 784])
    """
    train, test = draw(train_size, generator(seed, 1)), draw(test_size, generator(seed, 2))
    return Dataset("curves", train, train, test, test, "probabilities", SIDE * SIDE)


def draw(number: int, random: torch.Generator, chunk: int = 2_000) -> Tensor:
    """`number` flattened images ``[number, 784]``.

    The curve is the parabola through three uniform points at times 0, ½ and 1. A Gaussian pen leaves ink in proportion
    to the length it travels, and a pixel darkens as ``1 − exp(−ink)``. The pen is a product of its two coordinates, so
    an image is one matrix product.
    """
    points = torch.rand(number, 3, 2, generator=random) * (SIDE - 1 - 2 * MARGIN) + MARGIN
    t = torch.linspace(0, 1, POINTS)[:, None]
    through = torch.cat([(1 - t) * (1 - 2 * t), 4 * t * (1 - t), t * (2 * t - 1)], dim=1)  # Lagrange's polynomials
    pixels = torch.arange(SIDE, dtype=torch.float32)
    images = torch.empty(number, SIDE * SIDE)
    for start in range(0, number, chunk):
        path = through @ points[start : start + chunk]  # [chunk, POINTS, 2]
        (speed,) = torch.gradient(path, dim=1)
        pen = torch.exp(-0.5 * ((path[..., None] - pixels) / WIDTH).square())  # [chunk, POINTS, 2, SIDE]
        rows, columns = pen[:, :, 1] * speed.norm(dim=2, keepdim=True), pen[:, :, 0]
        images[start : start + chunk] = -torch.expm1(-INK * (rows.mT @ columns)).flatten(1)
    # The 256 grey levels of scanned images; it also makes the empty paper exactly zero.
    return images.mul_(255).round_().div_(255)
