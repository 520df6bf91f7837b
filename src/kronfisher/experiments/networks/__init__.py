"""The networks of the experiments, fitted to the shapes of a data set."""

from collections import OrderedDict
from math import isqrt, prod

from torch import nn

from kronfisher.experiments.data.dataset import Dataset
from kronfisher.experiments.networks.convolutional import alexnet, convnet, lenet5, resnet
from kronfisher.experiments.networks.feedforward import WIDTHS, autoencoder, mlp, sparse_

__all__ = ["NAMES", "WIDTHS", "alexnet", "autoencoder", "convnet", "for_data", "lenet5", "mlp", "resnet", "sparse_"]

CONVOLUTIONAL = {"convnet": (convnet, 4), "lenet5": (lenet5, 4), "alexnet": (alexnet, 8), "resnet": (resnet, 4)}
NAMES = ("mlp", "autoencoder", *CONVOLUTIONAL)


def for_data(name: str, dataset: Dataset, *, activation: str | None = None, seed: int = 0) -> nn.Sequential:
    """The network called `name` with the inputs and outputs of `dataset`.

    An "mlp" has one hidden layer of 50 units on a table and two of 32 on images. An "autoencoder" has the published
    widths of CURVES, MNIST and FACES, and its data set should be a `Dataset.reconstruction`. The others take images
    ``[C, S, S]``, or vectors of S² pixels.

    Args:
        name: one of `NAMES`.
        dataset: whose shapes decide.
        activation: of the "mlp" ("relu") or the "autoencoder" ("sigmoid").
        seed: of the initial weights.

    Raises:
        ValueError: there is no such network, or it cannot take such data.

    Example:
        >>> from kronfisher.experiments import data
        >>> digits = data.load("digits")
        >>> for_data("lenet5", digits)(digits.test_inputs[:5]).shape
        torch.Size([5, 10])
    """
    shape, inputs = dataset.input_shape, prod(dataset.input_shape)
    options = {} if activation is None else {"activation": activation}
    if name == "mlp":
        table = len(shape) == 1 and dataset.outputs != inputs
        model = mlp(inputs, (50,) if table else (32, 32), dataset.outputs, seed=seed, **options)
        return _reshaped(model, nn.Flatten() if len(shape) > 1 else None)
    if name == "autoencoder":
        widths = WIDTHS.get(inputs, {})
        if not widths or dataset.outputs != inputs:
            raise ValueError(
                f"there is an auto-encoder for the reconstruction of images of {', '.join(map(str, WIDTHS))} pixels; "
                f"{dataset.name} has {inputs} inputs and {dataset.outputs} outputs"
            )
        chosen = widths.get(dataset.name, list(widths.values())[-1])
        return _reshaped(autoencoder(chosen, seed=seed, **options), nn.Flatten() if len(shape) > 1 else None)
    if name not in CONVOLUTIONAL:
        raise ValueError(f"there is no network {name!r}; there are {', '.join(NAMES)}")
    if activation is not None:
        raise ValueError(f"{name} has rectified units only; activation is an option of the mlp and the autoencoder")
    build, least = CONVOLUTIONAL[name]
    channels, side = (shape[0], shape[-1]) if len(shape) == 3 else (1, isqrt(inputs))
    if len(shape) not in (1, 3) or channels * side * side != inputs or side < least:
        raise ValueError(
            f"{name} takes square images of at least {least}×{least} pixels; {dataset.name} has {list(shape)}"
        )
    model = build(channels, side, dataset.outputs, seed=seed)
    return _reshaped(model, nn.Unflatten(1, (1, side, side)) if len(shape) == 1 else None)


def _reshaped(model: nn.Sequential, reshape: nn.Module | None) -> nn.Sequential:
    """The model behind `reshape`, with the names of its layers unchanged."""
    if reshape is None:
        return model
    return nn.Sequential(OrderedDict([("reshape", reshape), *model.named_children()]))
