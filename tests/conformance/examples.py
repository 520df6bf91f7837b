"""Small modules with trainable weights and the shapes of their inputs, at least one for every operator understood."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.capture.derivatives import derivatives

EXAMPLES: dict[str, Callable[[], tuple[Any, tuple[int, ...]]]] = {}
"""Name → builder of a small module and the shape of its input; the conformance tests run every one."""


class Attention(nn.Module):
    # Self-attention, or attention from x to a part of it, without the weights that it answers with.
    def __init__(self, cross: bool = False, **options: Any) -> None:
        super().__init__()
        self.cross, self.attention = cross, nn.MultiheadAttention(4, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        if not self.cross:
            return self.attention(x, x, x)[0]
        other = x[:, 1:, :3].sin()
        return self.attention(x, other, other.cos()[..., :2])[0]


class Affine(nn.Module):
    # Scales and shifts of several shapes, in place and expanded.
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 1))
        self.table, self.gain = nn.Parameter(torch.randn(1, 2, 3)), nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh() * self.scale
        x -= self.shift
        x = x + self.table.expand(len(x), -1, -1)
        x = x.sin()
        x *= self.gain
        return x


class Propagated(nn.Module):
    # A chain's value, slopes, a second derivative and the Laplacian side by side.
    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        found = derivatives(self.chain, x, second=[(0, 1)], laplacian=True)
        assert found.laplacian is not None
        return torch.cat([found.value, found.first[..., 0], found.second[0, 1], found.laplacian], dim=1)


class Tokens(nn.Module):
    # A class token and a register in front, a table of positions longer than the sequence.
    def __init__(self) -> None:
        super().__init__()
        self.token, self.register = nn.Parameter(torch.randn(1, 1, 3)), nn.Parameter(torch.randn(2, 3))
        self.positions = nn.Parameter(torch.randn(1, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        token, register = self.token.expand(len(x), -1, -1), self.register.repeat(len(x), 1, 1)
        x = torch.cat([token, x, register], dim=1)
        return x + self.positions[:, : x.shape[1]]


class Read(nn.Module):
    # Indices made of real inputs, so that tests can give it what they give all others.
    def __init__(self, module: nn.Module, positions: nn.Module | None = None) -> None:
        super().__init__()
        self.table, self.positions = module, positions

    def forward(self, x: Tensor) -> Tensor:
        y = self.table((x * 7).long().abs() % 5)
        return y if self.positions is None else y + self.positions(torch.arange(x.shape[1], device=x.device))


class Functional(nn.Module):
    # Weights used through views, from both sides and without a module of their own.
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(3, 5))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.addmm(self.bias, x.mm(self.right), self.left.t()).tanh()
        return hidden @ self.left.new_ones(4, 2)


class Contractions(nn.Module):
    # Matrices for each of two groups and a form of two inputs, one after another.
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.more = nn.Parameter(torch.randn(2, 3, 2)), nn.Parameter(torch.randn(2, 2, 3))
        self.last, self.bias = nn.Parameter(torch.randn(2, 3, 2)), nn.Parameter(torch.randn(2, 1, 2))
        self.joined = nn.Parameter(torch.randn(2, 2, 3))
        self.form = nn.Bilinear(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("nhi,hio->nho", x, self.heads).tanh()
        y = torch.bmm(y.transpose(0, 1), self.more).tanh()
        y = torch.baddbmm(self.bias, y, self.last).transpose(0, 1).tanh()
        y = torch.tensordot(y, self.joined, 2)
        return self.form(y, y.sin())


class Recurrent(nn.Module):
    # Layers of every kind and cells of every kind in a loop over the steps, side by side.
    def __init__(self) -> None:
        super().__init__()
        options = {"batch_first": True}
        layers = (
            nn.LSTM(2, 1, bidirectional=True, **options),
            nn.GRU(2, 2, **options),
            nn.RNN(2, 2, **options),
            nn.RNN(2, 2, nonlinearity="relu", **options),
        )
        cells = nn.LSTMCell(2, 2), nn.GRUCell(2, 2), nn.RNNCell(2, 2), nn.RNNCell(2, 2, nonlinearity="relu")
        self.layers, self.cells = nn.ModuleList(layers), nn.ModuleList(cells)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.stack([layer(x)[0] for layer in self.layers]).sum(0)
        for cell in self.cells:
            state, after = None, []
            for step in x.unbind(1):
                state = cell(step, state)
                after.append(state[0] if isinstance(state, tuple) else state)
            total = total + torch.stack(after, dim=1)
        return total


EXAMPLES["recurrent layers and cells"] = lambda: (Recurrent(), (3, 3, 2))
EXAMPLES["attention"] = lambda: (Attention(batch_first=True), (4, 3, 4))
EXAMPLES["attention, cross"] = lambda: (
    Attention(cross=True, batch_first=True, kdim=3, vdim=2, bias=False),
    (3, 3, 4),
)
EXAMPLES["attention, more keys"] = lambda: (
    Attention(batch_first=True, add_bias_kv=True, add_zero_attn=True),
    (3, 2, 4),
)
EXAMPLES["transformer layer"] = lambda: (
    nn.TransformerEncoderLayer(4, 2, 5, dropout=0, batch_first=True, norm_first=True),
    (3, 2, 4),
)
EXAMPLES["conv1d, stride and dilation"] = lambda: (nn.Conv1d(2, 3, 2, stride=2, padding=1, dilation=2), (4, 2, 7))
EXAMPLES["conv2d"] = lambda: (nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(1, 0)), (4, 2, 5, 4))
EXAMPLES["conv2d without bias, same"] = lambda: (
    nn.Conv2d(1, 2, 3, padding="same", dilation=2, bias=False),
    (4, 1, 5, 4),
)
EXAMPLES["conv2d, circular"] = lambda: (nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), (3, 1, 4, 4))
EXAMPLES["conv2d, reflect"] = lambda: (nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), (3, 1, 4, 4))
EXAMPLES["conv2d, groups"] = lambda: (nn.Conv2d(4, 6, 2, groups=2), (3, 4, 4, 3))
EXAMPLES["conv2d, depthwise"] = lambda: (nn.Conv2d(3, 3, 2, groups=3), (4, 3, 3, 3))
EXAMPLES["conv3d"] = lambda: (nn.Conv3d(1, 2, 2, stride=(1, 2, 1)), (3, 1, 3, 4, 3))
EXAMPLES["conv2d, channels last"] = lambda: (
    nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last),  # pyright: ignore[reportCallIssue]
    (3, 2, 4, 4),
)
EXAMPLES["class token and positions"] = lambda: (Tokens(), (4, 2, 3))
EXAMPLES["prelu"] = lambda: (nn.PReLU(3), (4, 3, 2))
EXAMPLES["scales and shifts"] = lambda: (Affine(), (5, 2, 3))
EXAMPLES["embedding"] = lambda: (Read(nn.Embedding(5, 3)), (4, 6))
EXAMPLES["embedding, padding"] = lambda: (Read(nn.Embedding(5, 3, padding_idx=1)), (4, 6))
EXAMPLES["embedding bag, mean"] = lambda: (Read(nn.EmbeddingBag(5, 3, mode="mean")), (4, 6))
EXAMPLES["embedding bag, sum"] = lambda: (Read(nn.EmbeddingBag(5, 2, mode="sum", padding_idx=0)), (4, 3))
EXAMPLES["embeddings of tokens and positions"] = lambda: (Read(nn.Embedding(5, 3), nn.Embedding(8, 3)), (4, 6))
EXAMPLES["linear"] = lambda: (nn.Linear(3, 4), (5, 3))
EXAMPLES["linear without bias, three axes"] = lambda: (nn.Linear(3, 4, bias=False), (5, 2, 3))
EXAMPLES["linear, with derivatives by the inputs"] = lambda: (Propagated(), (5, 2))
EXAMPLES["linear, four axes"] = lambda: (nn.Linear(3, 2), (4, 2, 3, 3))
EXAMPLES["matrix products with views"] = lambda: (Functional(), (5, 3))
EXAMPLES["layer norm"] = lambda: (nn.LayerNorm([2, 3]), (4, 2, 3))
EXAMPLES["rms norm"] = lambda: (nn.RMSNorm(3), (4, 2, 3))
EXAMPLES["group norm"] = lambda: (nn.GroupNorm(2, 4), (5, 4, 3))
EXAMPLES["instance norm"] = lambda: (nn.InstanceNorm1d(3, affine=True), (4, 3, 5))
EXAMPLES["batch norm, eval"] = lambda: (nn.BatchNorm2d(3).eval(), (4, 3, 2, 2))
EXAMPLES["conv_transpose1d"] = lambda: (nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (4, 2, 4))
EXAMPLES["conv_transpose2d, groups and dilation"] = lambda: (
    nn.ConvTranspose2d(4, 2, (2, 3), stride=(1, 2), padding=(0, 3), dilation=(2, 1), groups=2),
    (3, 4, 2, 3),
)
EXAMPLES["conv_transpose3d, no bias"] = lambda: (
    nn.ConvTranspose3d(2, 1, (2, 1, 2), stride=(1, 2, 1), bias=False),
    (3, 2, 2, 1, 2),
)
EXAMPLES["contractions"] = lambda: (Contractions(), (5, 2, 3))
