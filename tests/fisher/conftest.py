"""A model whose parameters are stored in many ways, and a Fisher over it with operators of many kinds."""

import pytest
import torch

from kronfisher.fisher import BlockInfo, Fisher, Info
from kronfisher.fisher.blocks import Block, Window
from kronfisher.operators import Diagonal
from tests.helpers.operators import dense, kronecker, positive


class Model(torch.nn.Module):
    """Parameters stored in every way a canonical weight may have to be read from."""

    def __init__(self):
        super().__init__()
        self.transposed = torch.nn.Parameter(torch.randn(3, 2))  # [I, O], used as W = transposed.t()
        self.bias = torch.nn.Parameter(torch.randn(2))
        self.conv = torch.nn.Conv2d(4, 4, (2, 1), groups=2).to(memory_format=torch.channels_last)
        self.frozen = torch.nn.Parameter(torch.randn(2), requires_grad=False)
        self.alone = torch.nn.Parameter(torch.randn(5))
        self.scale = torch.nn.Parameter(torch.randn(3))
        self.first = torch.nn.Linear(2, 2, bias=False)
        self.second = torch.nn.Linear(3, 1)


@pytest.fixture
def model():
    return Model()


def blocks_of(model):
    def whole(name, *size):
        return Window.of(name, model.get_parameter(name)).reshaped(*size)

    transposed = Window.of("transposed", model.transposed, model.transposed.t()[None])
    return {
        "fc": Block("transposed", "linear", transposed, whole("bias", 1, 2)),
        "conv": Block("conv.weight", "conv2d", whole("conv.weight", 2, 2, 2, 2, 1), whole("conv.bias", 2, 2)),
        "alone": Block("alone", "add", None, whole("alone", 1, 5)),
        "scale": Block("scale", "layer_norm", whole("scale", 1, 3, 1)),
        "first": Block("first.weight", "linear", whole("first.weight", 1, 2, 2)),
        "second": Block("second.weight", "linear", whole("second.weight", 1, 1, 3), whole("second.bias", 1, 1)),
    }


def positions_of(model):
    """Where each canonical coordinate lies in a flat vector, by plain operations on the parameters' own shapes."""
    at, start = {}, 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            at[name] = torch.arange(start, start + parameter.numel()).view(parameter.shape)
            start += parameter.numel()
    return {
        "fc": torch.cat([at["transposed"].t(), at["bias"][:, None]], 1).flatten(),
        "conv": torch.cat([at["conv.weight"].reshape(2, 2, -1), at["conv.bias"].view(2, 2, 1)], 2).flatten(),
        "alone": at["alone"],
        "scale": at["scale"],
        "first": at["first.weight"].flatten(),
        "second": torch.cat([at["second.weight"].flatten(), at["second.bias"]]),
    }, start


def fisher_of(model, seed=0):
    """A Fisher with an operator of every kind, one of them across two layers, and its dense twin."""
    blocks, (positions, size) = blocks_of(model), positions_of(model)
    fc, fc_dense = kronecker(1, inputs=4, outputs=2, seed=seed)
    conv, conv_dense = kronecker(2, inputs=5, outputs=2, seed=seed + 10)
    values = positive(20, seed=seed)
    scale, scale_dense = dense(3)
    both, both_dense = kronecker(1, inputs=8, outputs=1, seed=seed + 30)
    other, other_dense = kronecker(1, inputs=2, outputs=4, seed=seed + 40)
    parts = [
        (("fc",), fc, fc_dense),
        (("conv",), (conv + 0.1), conv_dense + 0.1 * torch.eye(20).double()),
        (("alone",), Diagonal(values[:5]), values[:5].diag()),
        (("scale",), scale, scale_dense),
        (("first", "second"), both + other, both_dense + other_dense),
    ]
    matrix = torch.zeros(size, size, dtype=torch.float64)
    entries = []
    for names, operator, block_dense in parts:
        index = torch.cat([positions[name] for name in names])
        matrix[index[:, None], index] = block_dense
        entries.append((blocks[names[0]] if len(names) == 1 else tuple(blocks[n] for n in names), operator))
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    made = {"transposed": BlockInfo("KFAC()", rows=40.0, seconds=0.5, error=0.25)}
    return Fisher(
        tuple(entries), shapes, Info(count=20.0, likelihood="Categorical()", trainable=size, blocks=made)
    ), matrix


@pytest.fixture
def fisher(model):
    """A float64 Fisher and its dense twin."""
    return fisher_of(model)


@pytest.fixture
def another_fisher():
    """A maker of Fishers over the same blocks with other numbers."""
    return fisher_of
