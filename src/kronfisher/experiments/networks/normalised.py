"""Convolutional networks that differ in how they normalise: over the batch, over groups of channels, per position."""

from collections.abc import Callable

from torch import Tensor, nn

from kronfisher.experiments.networks.building import with_seed

__all__ = ["convnext", "normalised"]

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(4, channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
}


@with_seed
def normalised(norm: str, channels: int, outputs: int, widths: tuple[int, ...] = (16, 32, 32, 64)) -> nn.Sequential:
    """3×3 convolutions, each followed by a normalisation and a ReLU; every second one halves the image.

    Args:
        norm: of `NORMS`.
        channels: of the images.
        outputs: of the network.
        widths: channels of the convolutions.
        seed: of the initial weights.
    """
    layers: list[nn.Module] = []
    for k, width in enumerate(widths):
        layers += [nn.Conv2d(channels, width, 3, stride=1 + k % 2, padding=1, bias=False), NORMS[norm](width)]
        layers.append(nn.ReLU(inplace=True))
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))


class Inverted(nn.Module):
    """A block of ConvNeXt: depthwise convolution, layer norm, a perceptron at every position, a scale, a shortcut."""

    def __init__(self, width: int, kernel: int, scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act = nn.GELU()
        self.scale = nn.Parameter(nn.init.constant_(self.norm.weight.detach().clone(), scale))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, width, S, S]`` to the same."""
        y = self.norm(self.depthwise(x).movedim(1, -1))
        return x + (self.scale * self.down(self.act(self.up(y)))).movedim(-1, 1)


class ConvNeXt(nn.Module):
    """Patches, blocks of depthwise convolutions, a mean over positions and a linear layer (2201.03545)."""

    def __init__(self, channels: int, outputs: int, width: int, depth: int, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(Inverted(width, 5, 0.1) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[n, outputs]`` of images ``[n, channels, S, S]``."""
        return self.head(self.norm(self.blocks(self.patches(images)).mean((2, 3))))


@with_seed
def convnext(channels: int, outputs: int, *, width: int = 48, depth: int = 3, patch: int = 4) -> ConvNeXt:
    """A small ConvNeXt; `seed` decides the initial weights."""
    return ConvNeXt(channels, outputs, width, depth, patch)
