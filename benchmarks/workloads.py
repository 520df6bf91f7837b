"""The networks and the data of the benchmarks: plain torch.nn, random inputs, the same for every library.

Only `nn.Linear` and `nn.Conv2d` have parameters, because several of the libraries know no others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
TOKENS = 65


@dataclass(frozen=True)
class Workload:
    """A network, its batches of (inputs, targets) and the name of its likelihood."""

    model: nn.Module
    batches: list[Batch]
    likelihood: str


class Block(nn.Module):
    """Attention and feed-forward with residuals; the norms have no parameters."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.project(attended.transpose(1, 2).reshape(n, length, width))
        return x + self.contract(F.gelu(self.expand(self.norm(x))))


class GPT(nn.Module):
    """A small character model; the embeddings are buffers, so that every parameter belongs to a linear layer."""

    def __init__(
        self, width: int = 128, depth: int = 4, heads: int = 4, length: int = 64, classes: int = TOKENS
    ) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.randn(TOKENS, width))
        self.register_buffer("positions", torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens[tokens] + self.positions)))


def dense_layers(*widths: int, activation: type[nn.Module], linear: tuple[int, ...] = ()) -> nn.Sequential:
    """Linear layers with activations between them, none after those numbered in `linear`."""
    layers: list[nn.Module] = []
    for k, (inner, outer) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(inner, outer))
        if k < len(widths) - 2 and k not in linear:
            layers.append(activation())
    return nn.Sequential(*layers)


def class_batches(shape: tuple[int, ...], batches: int, size: int, classes: int = 10) -> list[Batch]:
    return [(torch.randn(size, *shape), torch.randint(classes, (size,))) for _ in range(batches)]


def autoencoder() -> Workload:
    """784-1000-500-250-30-250-500-1000-784, sigmoid with a linear code; 4 batches of 512."""
    widths = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    images = [torch.rand(512, 784) for _ in range(4)]
    return Workload(
        dense_layers(*widths, activation=nn.Sigmoid, linear=(3,)), [(x, x.round()) for x in images], "bernoulli"
    )


def autoencoder_long() -> Workload:
    """The same network over 20,480 data: 40 batches of 512."""
    short = autoencoder()
    images = [torch.rand(512, 784) for _ in range(40)]
    return Workload(short.model, [(x, x.round()) for x in images], short.likelihood)


def mlp() -> Workload:
    """2048-2048-2048-10, ReLU; 2 batches of 1024."""
    return Workload(
        dense_layers(2048, 2048, 2048, 10, activation=nn.ReLU), class_batches((2048,), 2, 1024), "categorical"
    )


def gpt() -> Workload:
    """Four 128-wide blocks of linear layers, 65 characters; 2 batches of 32 sequences of 64."""

    def tokens() -> Tensor:
        return torch.randint(TOKENS, (32, 64))

    return Workload(GPT(), [(tokens(), tokens()) for _ in range(2)], "categorical")


def alexnet() -> Workload:
    """AlexNet at half its width (fully connected: 512) for images of 1×28×28, without dropout; 2 batches of 128."""
    layers = [
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 96, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(96, 192, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(192, 128, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(128 * 9, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)),
    ]
    return Workload(nn.Sequential(*layers), class_batches((1, 28, 28), 2, 128), "categorical")


def lenet() -> Workload:
    """LeNet-5, ReLU, images of 1×28×28; 4 batches of 256."""
    layers = [
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    ]
    return Workload(nn.Sequential(*layers), class_batches((1, 28, 28), 4, 256), "categorical")


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "autoencoder": autoencoder,
    "autoencoder-20k": autoencoder_long,
    "mlp": mlp,
    "gpt": gpt,
    "alexnet": alexnet,
    "lenet": lenet,
}
