"""The networks of the experiments, fitted to the shapes of a data set; every module of this package is imported."""

from importlib import import_module
from pkgutil import iter_modules

from kronfisher.experiments.networks.attention import gpt, vit
from kronfisher.experiments.networks.convolutional import alexnet, convnet, lenet5, resnet
from kronfisher.experiments.networks.feedforward import WIDTHS, autoencoder, mlp, sparse_
from kronfisher.experiments.networks.registry import for_data, names, register, register_for_images, task_for

__all__ = [
    "WIDTHS",
    "alexnet",
    "autoencoder",
    "convnet",
    "for_data",
    "gpt",
    "lenet5",
    "mlp",
    "names",
    "register",
    "register_for_images",
    "resnet",
    "sparse_",
    "task_for",
    "vit",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
