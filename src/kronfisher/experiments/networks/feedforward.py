"""Fully connected networks: the multilayer perceptron and the three classic auto-encoders."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import nn

from kronfisher.experiments.data.dataset import Dataset, generator
from kronfisher.experiments.networks.building import prepend, stack, with_seed
from kronfisher.experiments.networks.registry import register

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh}

# Encoder widths by the number of pixels, input first; the decoder mirrors them (Martens & Grosse 2015).
# Those for the 64 pixels of the digits are our own.
WIDTHS = {
    784: {"curves": (784, 400, 200, 100, 50, 25, 6), "mnist": (784, 1000, 500, 250, 30)},
    625: {"faces": (625, 2000, 1000, 500, 30)},
    64: {"digits": (64, 48, 24, 6)},
}


@with_seed
def mlp(inputs: int, hidden: Sequence[int], outputs: int, activation: str = "relu") -> nn.Sequential:
    """A multilayer perceptron on flattened inputs ``[N, inputs]``; torch's own initialisation.

    Example:
        >>> mlp(13, (50,), 1, seed=0)
        Sequential(
          (linear1): Linear(in_features=13, out_features=50, bias=True)
          (relu1): ReLU()
          (linear2): Linear(in_features=50, out_features=1, bias=True)
        )
    """
    widths = (inputs, *hidden, outputs)
    layers: dict[str, list[nn.Module]] = {}
    for k, (before, after) in enumerate(pairwise(widths), start=1):
        layers[f"linear{k}"] = [nn.Linear(before, after)]
        if k < len(widths) - 1:
            layers[f"linear{k}"].append(ACTIVATIONS[activation]())
    return stack(**layers)


@with_seed
def autoencoder(widths: Sequence[int], activation: str = "sigmoid") -> nn.Sequential:
    """The auto-encoder with encoder `widths` (input first, code last) and the mirrored decoder; no last activation.

    With sigmoid units the code is linear and the initialisation sparse, as in Martens & Grosse (2015); with "relu" the
    code is rectified too, as in Koroko et al. (2022), and the sparse weights are scaled by √(2/15) so that signals keep
    their size.

    Args:
        widths: such as ``WIDTHS[784]["curves"]``.
        activation: "sigmoid" or "relu".
        seed: of the initialisation.

    Example:
        >>> [m.out_features for m in autoencoder((784, 400, 6), seed=0) if isinstance(m, nn.Linear)]
        [400, 6, 400, 784]
    """
    if activation not in ("sigmoid", "relu"):
        raise ValueError(f'an auto-encoder has activation "sigmoid" or "relu", not {activation!r}')
    steps, half = list(pairwise((*widths, *reversed(widths[:-1])))), len(widths) - 1
    layers: dict[str, list[nn.Module]] = {}
    for k, (before, after) in enumerate(steps, start=1):
        name = f"encoder{k}" if k <= half else f"decoder{k - half}"
        layers[name] = [nn.Linear(before, after)]
        linear_code = k == half and activation == "sigmoid"
        if k < len(steps) and not linear_code:
            layers[name].append(ACTIVATIONS[activation]())
    model = stack(**layers)
    sparse_(model, scale=1.0 if activation == "sigmoid" else (2 / 15) ** 0.5)
    return model


@torch.no_grad()
def sparse_(model: nn.Module, incoming: int = 15, scale: float = 1.0, seed: int | None = None) -> None:
    """Sparse initialisation, in place (Martens 2010): `incoming` weights ``N(0, scale²)`` a unit, all else zero.

    Args:
        model: every `nn.Linear` in it is treated.
        incoming: nonzero weights of one unit, drawn without replacement; all if the layer has fewer inputs.
        scale: their standard deviation.
        seed: of the draw; None takes torch's global generator.
    """
    random = None if seed is None else generator(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            o, i = layer.weight.shape
            chosen = torch.rand(o, i, generator=random).topk(min(incoming, i), dim=1).indices
            values = torch.randn(chosen.shape, generator=random) * scale
            layer.weight.zero_().scatter_(1, chosen.to(layer.weight.device), values.to(layer.weight))
            if layer.bias is not None:
                layer.bias.zero_()


@register("mlp")
def mlp_for(dataset: Dataset, seed: int, activation: str = "relu") -> nn.Sequential:
    """One hidden layer of 50 units for a table, two of 32 for images."""
    shape, inputs = dataset.input_shape, prod(dataset.input_shape)
    hidden = (50,) if len(shape) == 1 and dataset.outputs != inputs else (32, 32)
    model = mlp(inputs, hidden, dataset.outputs, seed=seed, activation=activation)
    return prepend(nn.Flatten(), model) if len(shape) > 1 else model


@register("autoencoder", reconstruction=True)
def autoencoder_for(dataset: Dataset, seed: int, activation: str = "sigmoid") -> nn.Sequential:
    """The auto-encoder with the published widths for images of that size."""
    inputs = prod(dataset.input_shape)
    widths = WIDTHS.get(inputs, {})
    if not widths or dataset.outputs != inputs:
        raise ValueError(
            f"there is an auto-encoder for the reconstruction of images of {', '.join(map(str, WIDTHS))} pixels; "
            f"{dataset.name} has {inputs} inputs and {dataset.outputs} outputs"
        )
    model = autoencoder(widths.get(dataset.name, list(widths.values())[-1]), seed=seed, activation=activation)
    return prepend(nn.Flatten(), model) if len(dataset.input_shape) > 1 else model
