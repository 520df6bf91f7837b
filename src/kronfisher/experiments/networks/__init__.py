"""The networks of the experiments, fitted to the shapes of a data set."""

from collections import OrderedDict
from math import isqrt, prod

from torch import nn

from kronfisher.experiments.data.dataset import Dataset
from kronfisher.experiments.networks.attention import gpt, vit
from kronfisher.experiments.networks.convolutional import alexnet, convnet, lenet5, resnet
from kronfisher.experiments.networks.feedforward import WIDTHS, autoencoder, mlp, sparse_

__all__ = [
    "NAMES",
    "WIDTHS",
    "alexnet",
    "autoencoder",
    "convnet",
    "for_data",
    "gpt",
    "lenet5",
    "mlp",
    "resnet",
    "sparse_",
    "vit",
]

# Networks for images, the least side that they take, and what that is a multiple of.
IMAGES = {
    **{"convnet": (convnet, 4, 1), "lenet5": (lenet5, 4, 1), "alexnet": (alexnet, 8, 1), "resnet": (resnet, 4, 1)},
    "vit": (vit, 4, 4),
}
NAMES = ("mlp", "autoencoder", *IMAGES, "gpt")


def for_data(name: str, dataset: Dataset, *, activation: str | None = None, seed: int = 0) -> nn.Module:
    """The network called `name` with the inputs and outputs of `dataset`.

    An "mlp" has one hidden layer of 50 units on a table and two of 32 on images. An "autoencoder" has the published
    widths of CURVES, MNIST and FACES, and its data set should be a `Dataset.reconstruction`. A "gpt" takes text.
    The others take images ``[C, S, S]``, or vectors of S² pixels.

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
    if dataset.text != (name == "gpt") and name in NAMES:
        raise ValueError(f"text is for the gpt, and the gpt is for text; {dataset.name} and {name} do not go together")
    if name == "gpt":
        _only_rectified(name, activation)
        return gpt(dataset.outputs, shape[0], width=32, seed=seed)
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
    if name not in IMAGES:
        raise ValueError(f"there is no network {name!r}; there are {', '.join(NAMES)}")
    _only_rectified(name, activation)
    build, least, multiple = IMAGES[name]
    channels, side = (shape[0], shape[-1]) if len(shape) == 3 else (1, isqrt(inputs))
    if len(shape) not in (1, 3) or channels * side * side != inputs or side < least or side % multiple:
        of = f", a multiple of {multiple}" if multiple > 1 else ""
        raise ValueError(
            f"{name} takes square images of at least {least}×{least} pixels{of}; {dataset.name} has {list(shape)}"
        )
    model = build(channels, side, dataset.outputs, seed=seed)
    return _reshaped(model, nn.Unflatten(1, (1, side, side)) if len(shape) == 1 else None)


def _only_rectified(name: str, activation: str | None) -> None:
    if activation is not None:
        raise ValueError(f"{name} has its own units; activation is an option of the mlp and the autoencoder")


def _reshaped(model: nn.Module, reshape: nn.Module | None) -> nn.Module:
    """The model behind `reshape`; the names of a sequence's layers stay as they are."""
    if reshape is None:
        return model
    layers = model.named_children() if isinstance(model, nn.Sequential) else [("model", model)]
    return nn.Sequential(OrderedDict([("reshape", reshape), *layers]))
