"""The small networks of the tests. Float64 unless said otherwise; `seed` fixes the initial weights."""

from itertools import pairwise

import torch
from torch import nn


class Written(nn.Module):
    """A model from its forward function, its parameters and its submodules."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, nn.Module):
                self.add_module(name, member)
            else:
                self.register_parameter(name, nn.Parameter(member))

    def forward(self, *inputs):
        return self.function(self, *inputs)


def linears(function, *sizes, bias=True):
    """A model of linear layers `l0`, `l1`, ... of these sizes and its forward function."""
    layers = {f"l{k}": nn.Linear(i, o, bias=bias) for k, (i, o) in enumerate(sizes)}
    return Written(function, **layers)


def shake(module):
    """Nothing may be an identity: no zero shift, unit scale or unit variance."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return module


def begun(seed):
    """Fix the weights that are drawn next."""
    if seed is not None:
        torch.manual_seed(seed)


def perceptron(*widths, activation=nn.Tanh, after=(), last=(), bias=True, seed=None, shaken=False, dtype=torch.float64):
    """Linear layers of these widths, an activation and the modules `after` it between them, `last` at the end."""
    begun(seed)
    layers = [nn.Linear(widths[0], widths[1], bias=bias)]
    for inputs, outputs in pairwise(widths[1:]):
        layers += [activation(), *after, nn.Linear(inputs, outputs, bias=bias)]
    model = nn.Sequential(*layers, *last)
    return (shake(model) if shaken else model).to(dtype)


def images(dtype=torch.float64):
    """A convolution and two linear layers on images ``[2, 4, 4]``, three outputs."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3))
    return model.to(dtype)


def grouped_images(seed=None, dtype=torch.float64):
    """Two grouped convolutions, one of them depthwise, on images ``[2, 6, 6]``, and a linear layer; three outputs."""
    begun(seed)
    first, second = nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, groups=4)
    return nn.Sequential(first, nn.Tanh(), second, nn.Flatten(), nn.Linear(64, 3)).to(dtype)


def sequences(seed=None):
    """A convolution along sequences ``[2, 4]`` and a linear layer, three outputs."""
    begun(seed)
    return nn.Sequential(nn.Conv1d(2, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)).double()


def grouped_sequences(groups, seed=None):
    """A grouped convolution along sequences, 2 inputs and 3 outputs for each group, off its initial values."""
    begun(seed)
    return shake(nn.Sequential(nn.Conv1d(2 * groups, 3 * groups, 2, groups=groups), nn.Tanh())).double()


def convolutions(seed=None):
    """Two convolutions along sequences ``[2, 4]``, the second one of two groups, off their initial values."""
    begun(seed)
    layers = nn.Conv1d(2, 4, 2, padding=1), nn.Tanh(), nn.Conv1d(4, 6, 2, groups=2), nn.Tanh()
    return shake(nn.Sequential(*layers)).double()


def with_inputs(shared, widths=(4, 5, 3), size=(12, 2, 4)):
    """A network and its inputs: a perceptron, or convolutions whose weights are shared by several positions."""
    if shared:
        return convolutions(seed=5), torch.randn(size).double()
    model = perceptron(*widths, last=[nn.Sigmoid()], seed=5, shaken=True)
    return model, torch.randn(25, widths[0]).double() * torch.tensor([0.3, 0.6, 1.0, 2.0])


class Gain(nn.Module):
    """A scale and a shift of the features, as normalisation layers have."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x)


def normalised(outputs=3):
    """Linear layers with and without bias and a normalisation on inputs ``[4]``."""
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), Gain(6), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, outputs)
    )


def convnet(outputs=3):
    """A grouped and a strided convolution on images ``[2, 7, 7]``, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, outputs),
    )


class Transposed(nn.Module):
    """A table of embeddings that is the last layer too."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden = nn.Embedding(6, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.hidden(self.table(x)).tanh() @ self.table.weight.T


class Tied(nn.Module):
    """One layer applied twice, and positions at the output."""

    def __init__(self, outputs=3):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, outputs)

    def forward(self, x):
        return self.head(self.layer(self.layer(x).tanh()).tanh())
