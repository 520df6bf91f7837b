"""Transformers and a network of separable convolutions, small: what coverage and conformance are shown on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronfisher.experiments.data.dataset import Dataset
from kronfisher.experiments.networks.building import with_seed
from kronfisher.experiments.networks.registry import register, register_for_images

__all__ = ["GPT", "ViT", "gpt", "separable", "vit"]


class ViT(nn.Module):
    """A vision transformer: patches, a class token, a table of positions, pre-normalised layers (2010.11929)."""

    def __init__(self, channels: int, side: int, outputs: int, patch: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[n, outputs]`` of images ``[n, channels, side, side]``."""
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 0]))


@with_seed
def vit(
    channels: int, side: int, outputs: int, *, patch: int = 4, width: int = 16, heads: int = 2, depth: int = 2
) -> ViT:
    """A small vision transformer; `side` is a multiple of `patch`.

    Example:
        >>> vit(1, 8, 10)(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """
    return ViT(channels, side, outputs, patch, width, heads, depth)


class Attention(nn.Module):
    """Causal self-attention from one packed projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.packed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, T, width]`` to the same."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.packed(x).chunk(3, dim=-1))
        answer = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(answer.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and a perceptron, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.feed = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.back = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, T, width]`` to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.back(F.gelu(self.feed(self.norm2(x))))


class GPT(nn.Module):
    """A decoder of text: learned positions, pre-normalised layers, a last layer tied to the embedding (GPT-2)."""

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[n, T, vocabulary]`` of the next token at every position of ``[n, T]``."""
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@with_seed
def gpt(vocabulary: int, context: int, *, width: int = 16, heads: int = 2, depth: int = 2) -> GPT:
    """A small GPT.

    Example:
        >>> gpt(65, 32)(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 65])
    """
    return GPT(vocabulary, context, width, heads, depth)


class Separable(nn.Module):
    """A residual block of a depthwise and a pointwise convolution, with batch normalisation and a scale (ConvNeXt)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False), nn.BatchNorm2d(channels)),
            *(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)),
        )
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, S, S]`` to the same."""
        return x + self.scale * self.body(x)


@with_seed
def separable(channels: int, side: int, outputs: int, *, width: int = 8, depth: int = 2) -> nn.Sequential:
    """A ResNet of depthwise convolutions; put it in eval mode before its Fisher is estimated.

    Example:
        >>> separable(1, 8, 10).eval()(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """
    return nn.Sequential(
        *(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
        *(Separable(width) for _ in range(depth)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs)),
    )


register_for_images("vit", vit, least=4, multiple=4)


@register("gpt", text=True)
def gpt_for(dataset: Dataset, seed: int) -> GPT:
    """The GPT for a vocabulary and a length of text."""
    return gpt(dataset.outputs, dataset.input_shape[0], width=32, seed=seed)
