"""Networks for tables: one that embeds categories, and a perceptron of residual blocks with layer norm."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from kronfisher.experiments.networks.building import with_seed

__all__ = ["embedded", "residual"]


class Embedded(nn.Module):
    """A perceptron on the embeddings of categorical columns, each with a table of its own."""

    def __init__(self, columns: int, categories: int, width: int, hidden: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(categories, width) for _ in range(columns))
        widths = (columns * width, *hidden)
        layers = OrderedDict[str, nn.Module]()
        for k in range(len(hidden)):
            layers |= {f"linear{k}": nn.Linear(widths[k], widths[k + 1]), f"relu{k}": nn.ReLU()}
        self.body = nn.Sequential(layers | {"head": nn.Linear(widths[-1], outputs)})

    def forward(self, x: Tensor) -> Tensor:
        """``[n, outputs]`` from categories ``[n, columns]`` (int64)."""
        return self.body(torch.cat([table(x[:, k]) for k, table in enumerate(self.tables)], dim=1))


@with_seed
def embedded(columns: int, categories: int, outputs: int) -> Embedded:
    """Tables of width 8 and two hidden layers of 128 units; `seed` decides the initial weights."""
    return Embedded(columns, categories, 8, (128, 128), outputs)


class Block(nn.Module):
    """``x + W₂ gelu(W₁ norm(x))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """``[n, width]`` to the same."""
        return x + self.second(self.act(self.first(self.norm(x))))


@with_seed
def residual(inputs: int, outputs: int, *, width: int = 96, depth: int = 6) -> nn.Sequential:
    """A linear layer, residual blocks, a layer norm and a linear layer; `seed` decides the initial weights."""
    return nn.Sequential(
        nn.Linear(inputs, width), *(Block(width) for _ in range(depth)), nn.LayerNorm(width), nn.Linear(width, outputs)
    )
