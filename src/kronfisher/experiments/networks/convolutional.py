"""Convolutional networks for small images: a tiny one, LeNet-5, an AlexNet for 28×28 pixels and a small ResNet."""

from torch import Tensor, nn

from kronfisher.experiments.networks.building import stack, with_seed
from kronfisher.experiments.networks.registry import register_for_images


@with_seed
def convnet(channels: int, side: int, outputs: int) -> nn.Sequential:
    """Two convolutions and a linear layer, small enough that every block's dense matrix is cheap.

    Example:
        >>> sum(p.numel() for p in convnet(1, 8, 10).parameters())
        1898
    """
    return stack(
        conv1=[nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        conv2=[nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()],
        linear=[nn.Linear(16 * (side // 4) ** 2, outputs)],
    )


@with_seed
def lenet5(channels: int, side: int, outputs: int) -> nn.Sequential:
    """LeNet-5 with rectified units and max pooling: convolutions →6 and →16 of 5×5, then 120, 84 and `outputs` units.

    The second convolution has no padding, as in the original, unless the image is too small for that (below 12 pixels).

    Example:
        >>> sum(p.numel() for p in lenet5(1, 28, 10).parameters())
        61706
    """
    padding = 0 if side // 2 >= 6 else 2
    last = (side // 2 - 4 + 2 * padding) // 2
    return stack(
        conv1=[nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)],
        conv2=[nn.Conv2d(6, 16, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()],
        linear1=[nn.Linear(16 * last**2, 120), nn.ReLU()],
        linear2=[nn.Linear(120, 84), nn.ReLU()],
        linear3=[nn.Linear(84, outputs)],
    )


@with_seed
def alexnet(channels: int, side: int, outputs: int) -> nn.Sequential:
    """AlexNet for small images: five convolutions (64, 192, 384, 256, 256 channels) and three linear layers.

    There are neither strides nor dropout. Kernels are 5×5 and then 3×3, and pooling halves the image three times, so
    that 28×28 pixels end as 3×3.

    Example:
        >>> sum(p.numel() for p in alexnet(1, 28, 10).parameters())
        5141706
    """
    return stack(
        conv1=[nn.Conv2d(channels, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)],
        conv2=[nn.Conv2d(64, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        conv3=[nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()],
        conv4=[nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()],
        conv5=[nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()],
        linear1=[nn.Linear(256 * (side // 8) ** 2, 1024), nn.ReLU()],
        linear2=[nn.Linear(1024, 512), nn.ReLU()],
        linear3=[nn.Linear(512, outputs)],
    )


class Residual(nn.Module):
    """``relu(x' + BN(conv(relu(BN(conv(x))))))``; x' is x, or its projection if the shape changes (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)),
            *(nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """The block's outputs ``[n, after, S', S']`` for inputs ``[n, before, S, S]``."""
        return (self.body(x) + self.shortcut(x)).relu_()


@with_seed
def resnet(channels: int, side: int, outputs: int) -> nn.Sequential:
    """A ResNet of three residual blocks (16, 32, 64 channels) with batch normalisation; `side` may be 4 or more.

    Batch normalisation in train mode couples the data, so put the network in eval mode before its Fisher is estimated.

    Example:
        >>> sum(p.numel() for p in resnet(1, 28, 10).parameters())
        77754
    """
    return stack(
        conv=[nn.Conv2d(channels, 16, 3, padding=1, bias=False)],
        norm=[nn.BatchNorm2d(16), nn.ReLU(inplace=True)],
        stage1=[Residual(16, 16, 1)],
        stage2=[Residual(16, 32, 2)],
        stage3=[Residual(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
        linear=[nn.Linear(64, outputs)],
    )


register_for_images("convnet", convnet, least=4)
register_for_images("lenet5", lenet5, least=4)
register_for_images("alexnet", alexnet, least=8)
register_for_images("resnet", resnet, least=4)
