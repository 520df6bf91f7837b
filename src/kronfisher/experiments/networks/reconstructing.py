"""Networks that reconstruct or label whole images: a convolutional and a variational auto-encoder, and a U-Net."""

import torch
from torch import Tensor, nn

from kronfisher.experiments.data.dataset import generator
from kronfisher.experiments.networks.building import with_seed

__all__ = ["VAE", "convolutional_autoencoder", "unet", "vae"]


@with_seed
def convolutional_autoencoder(code: int = 16) -> nn.Sequential:
    """For images ``[1, 28, 28]``: convolutions of stride 2, a linear code, transposed convolutions."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, code), nn.Linear(code, 32 * 49), nn.ReLU(), nn.Unflatten(1, (32, 7, 7))),
        *(nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.ReLU()),
        nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
    )


class VAE(nn.Module):
    """A variational auto-encoder; its divergence from the prior is a term of the loss beside the likelihood's.

    Attributes:
        penalty: KL divergence of the codes of the last batch from a standard normal, in nats per example; 0-dim.
    """

    def __init__(self, pixels: int, hidden: int, code: int) -> None:
        super().__init__()
        self.code = code
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * code))
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, pixels))
        self.penalty = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[n, pixels]`` from a drawn code; in eval mode the draws are the same at every call."""
        mean, logarithm = self.encoder(x).chunk(2, dim=1)
        random = None if self.training else generator(0, len(x))
        noise = torch.randn(mean.shape, generator=random)
        self.penalty = 0.5 * (mean.square() + logarithm.exp() - 1 - logarithm).sum() / len(x)
        return self.decoder(mean + noise * (0.5 * logarithm).exp())


@with_seed
def vae(pixels: int, *, hidden: int = 256, code: int = 16) -> VAE:
    """A variational auto-encoder of images in [0, 1], flattened; `seed` decides the initial weights."""
    return VAE(pixels, hidden, code)


class UNet(nn.Module):
    """Two levels of convolutions with batch normalisation, each joined to its mirror image (1505.04597)."""

    def __init__(self, channels: int, outputs: int, width: int) -> None:
        super().__init__()

        def twice(before: int, after: int) -> nn.Sequential:
            return nn.Sequential(
                *(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)),
                *(nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)),
            )

        self.down1, self.down2, self.bottom = (
            twice(channels, width),
            twice(width, 2 * width),
            twice(2 * width, 4 * width),
        )
        self.up2, self.up1 = (nn.ConvTranspose2d(2 * k * width, k * width, 2, stride=2) for k in (2, 1))
        self.join2, self.join1 = twice(4 * width, 2 * width), twice(2 * width, width)
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(width, outputs, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[n, outputs, S, S]`` of every pixel of ``[n, channels, S, S]``."""
        first = self.down1(images)
        second = self.down2(self.pool(first))
        x = self.up2(self.bottom(self.pool(second)))
        x = self.up1(self.join2(torch.cat([x, second], dim=1)))
        return self.head(self.join1(torch.cat([x, first], dim=1)))


@with_seed
def unet(channels: int, outputs: int, *, width: int = 8) -> UNet:
    """A small U-Net; `seed` decides the initial weights."""
    return UNet(channels, outputs, width)
