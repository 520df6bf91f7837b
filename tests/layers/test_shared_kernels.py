"""A kernel that all groups of a convolution share: exact, and a layer that meets each group as an image."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from tests.helpers.checks import assert_by_layers
from tests.helpers.networks import Written

pytestmark = pytest.mark.usefixtures("double")


def written(forward, **shapes):
    generator = torch.Generator().manual_seed(0)
    return lambda: Written(forward, **{n: torch.randn(*shape, generator=generator) for n, shape in shapes.items()})


def folded(m, x):
    """All examples in one image, as where each has a kernel of its own."""
    return F.conv1d(x.reshape(1, -1, 3), m.w.expand(x.shape[0] * 4, 1, 2), groups=x.shape[0] * 4).view(len(x), 4, 2)


# x [5, 4, 3] → outputs
CASES = {
    "each channel": written(lambda m, x: F.conv1d(x, m.w.expand(4, 1, 2), groups=4), w=(1, 1, 2)),
    "with shifts": written(
        lambda m, x: F.conv1d(x, m.w.expand(4, 1, 2), m.b, padding=1, groups=4), w=(1, 1, 2), b=(4,)
    ),
    "groups of two": written(lambda m, x: F.conv1d(x, m.w.expand(2, 2, 2), stride=2, groups=2), w=(1, 2, 2)),
    "images": written(
        lambda m, x: F.conv2d(x.unflatten(1, (2, 2)), m.w.expand(2, 1, 2, 2), groups=2), w=(1, 1, 2, 2)
    ),
    "shifts alone": written(
        lambda m, x: F.conv1d(x, m.w.detach().expand(4, 1, 2), m.b, groups=4), w=(1, 1, 2), b=(4,)
    ),
    "a row of a table": written(lambda m, x: F.conv1d(x, m.w[1:].expand(4, 1, 2), groups=4), w=(2, 1, 2)),
    "turned": written(lambda m, x: F.conv_transpose1d(x, m.w.expand(4, 3, 2), stride=2, groups=4), w=(1, 3, 2)),
    "turned, with shifts": written(
        lambda m, x: F.conv_transpose1d(x, m.w.expand(4, 1, 2), m.b, groups=4), w=(1, 1, 2), b=(4,)
    ),
    "examples as channels": written(folded, w=(1, 1, 2)),
}  # fmt: skip


def network(build):
    return nn.Sequential(build(), nn.Tanh(), nn.Flatten(1)).double()


@pytest.mark.parametrize("case", CASES)
def test_shared_kernels_are_exact_and_by_layers(case):
    x = torch.randn(5, 4, 3)
    assert_by_layers(network(CASES[case]), [x[:3], x[3:]])


def test_factors_are_those_of_the_kernel_on_each_channel_as_an_image():
    x = torch.randn(5, 4, 3)
    model = network(CASES["each channel"])
    each = network(
        lambda: Written(lambda m, x: F.conv1d(x.flatten(0, 1).unsqueeze(1), m.w).view(5, 4, 2), w=model[0].w)
    )
    for fit in ("kfac", "ekfac", "kfoc"):
        one, two = (kf.estimate(m, x, kf.Gaussian(), labels="exact", fit=fit) for m in (model, each))
        torch.testing.assert_close(one.to_dense(), two.to_dense(), rtol=1e-8, atol=1e-10)


def test_training_treats_shared_kernels_by_layers():
    torch.manual_seed(0)
    model, x = nn.Sequential(network(CASES["with shifts"]), nn.LazyLinear(4)).double(), torch.randn(20, 4, 3)
    y = torch.randn(*model(x).shape)
    optimizer = kf.NaturalGradient(model, kf.Gaussian())
    losses = [float(optimizer.step(lambda: model(x), y)) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert "fallback" not in str(optimizer.report()) and "Adam" not in str(optimizer.report())
