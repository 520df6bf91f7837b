"""Networks for text beside the GPT: a decoder of Llama's kind with an untied last layer, and an LSTM."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronfisher.experiments.networks.building import with_seed

__all__ = ["decoder", "lstm"]


class Block(nn.Module):
    """Causal attention from four projections and a gated perceptron, each behind an RMS norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, T, width]`` to the same."""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A decoder of text with learned positions and a last layer of its own."""

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[n, T, vocabulary]`` of the next token at every position of ``[n, T]``."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.words(tokens) + self.places(places))))


@with_seed
def decoder(vocabulary: int, context: int, *, width: int = 64, heads: int = 4, depth: int = 2) -> Decoder:
    """A small decoder of Llama's kind; `seed` decides the initial weights."""
    return Decoder(vocabulary, context, width, heads, depth)


class LSTM(nn.Module):
    """An embedding, an LSTM and a linear layer."""

    def __init__(self, vocabulary: int, embedded: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, embedded)
        self.recurrent = nn.LSTM(embedded, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[n, T, vocabulary]`` of the next token at every position of ``[n, T]``."""
        return self.head(self.recurrent(self.words(tokens))[0])


@with_seed
def lstm(vocabulary: int, *, embedded: int = 32, width: int = 128) -> LSTM:
    """A small LSTM; `seed` decides the initial weights."""
    return LSTM(vocabulary, embedded, width)
