"""Networks by name: a function that builds one for a data set is registered, and everything else finds it there."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt, prod
from typing import TypeVar

from torch import nn

from kronfisher.experiments.data.dataset import Dataset
from kronfisher.experiments.networks.building import prepend

__all__ = ["for_data", "names", "register", "register_for_images", "task_for"]

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class Network:
    """A network of the registry.

    Attributes:
        build: called with a data set, the keyword `seed`, and `activation` if it has such a parameter.
        text: whether it takes text, and nothing else.
        reconstruction: whether it learns its inputs.
    """

    build: Callable[..., nn.Module]
    text: bool = False
    reconstruction: bool = False


NETWORKS: dict[str, Network] = {}


def register(name: str, *, text: bool = False, reconstruction: bool = False) -> Callable[[Builder], Builder]:
    """Make a function known that builds a network for a data set; its name is then known to the command line too.

    The function is called with a `Dataset` and the keyword `seed`, and with `activation` where one is asked for and it
    has such a parameter.

    Args:
        name: what the network is called.
        text: the network takes text, and nothing else.
        reconstruction: the network learns its inputs, see `task_for`.

    Raises:
        ValueError: there is a network of that name.

    Example:
        >>> from kronfisher.experiments import data
        >>> @register("linear")
        ... def linear(dataset, seed=0):
        ...     return nn.Sequential(nn.Flatten(), nn.Linear(64, dataset.outputs))
        >>> for_data("linear", data.load("digits"))[1]
        Linear(in_features=64, out_features=10, bias=True)
        >>> del NETWORKS["linear"]
    """

    def add(build: Builder) -> Builder:
        if name in NETWORKS:
            raise ValueError(f"there is already a network {name!r}")
        NETWORKS[name] = Network(build, text, reconstruction)
        return build

    return add


def register_for_images(name: str, build: Callable[..., nn.Module], *, least: int, multiple: int = 1) -> None:
    """Register a network for images ``[C, S, S]``, or vectors of S² pixels.

    Args:
        name: what the network is called.
        build: called with the channels C, the side S, the number of outputs, and `seed`.
        least: the smallest side.
        multiple: every side is a multiple of it.
    """

    @register(name)
    def for_images(dataset: Dataset, seed: int) -> nn.Module:
        shape, pixels = dataset.input_shape, prod(dataset.input_shape)
        channels, side = (shape[0], shape[-1]) if len(shape) == 3 else (1, isqrt(pixels))
        if len(shape) not in (1, 3) or channels * side * side != pixels or side < least or side % multiple:
            of = f", a multiple of {multiple}" if multiple > 1 else ""
            raise ValueError(
                f"{name} takes square images of at least {least}×{least} pixels{of}; {dataset.name} has {list(shape)}"
            )
        model = build(channels, side, dataset.outputs, seed=seed)
        return prepend(nn.Unflatten(1, (1, side, side)), model) if len(shape) == 1 else model


def names() -> tuple[str, ...]:
    """The names of all networks, in the order in which they were registered."""
    return tuple(NETWORKS)


def task_for(name: str, dataset: Dataset) -> Dataset:
    """The data set as the network called `name` learns it: an auto-encoder learns the inputs.

    Example:
        >>> from kronfisher.experiments import data
        >>> task_for("autoencoder", data.load("digits")).task, task_for("mlp", data.load("digits")).task
        ('probabilities', 'classes')
    """
    return dataset.reconstruction() if _find(name).reconstruction else dataset


def for_data(name: str, dataset: Dataset, *, activation: str | None = None, seed: int = 0) -> nn.Module:
    """The network called `name` with the inputs and outputs of `dataset`.

    An "mlp" has one hidden layer of 50 units on a table and two of 32 on images. An "autoencoder" has the published
    widths of CURVES, MNIST and FACES, and its data set should be a `Dataset.reconstruction`. A "gpt" takes text.
    The others take images ``[C, S, S]``, or vectors of S² pixels.

    Args:
        name: one of `names`.
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
    network = _find(name)
    if dataset.text != network.text:
        takes, has = ("text", "no text") if network.text else ("no text", "text")
        raise ValueError(f"{name} and {dataset.name} do not go together: the network takes {takes}, the data are {has}")
    if activation is None:
        return network.build(dataset, seed=seed)
    if "activation" not in inspect.signature(network.build).parameters:
        choice = [each for each, it in NETWORKS.items() if "activation" in inspect.signature(it.build).parameters]
        raise ValueError(f"{name} has its own units; activation is an option of {' and '.join(choice)}")
    return network.build(dataset, seed=seed, activation=activation)


def _find(name: str) -> Network:
    if name not in NETWORKS:
        raise ValueError(f"there is no network {name!r}; there are {', '.join(NETWORKS)}")
    return NETWORKS[name]
