"""The data sets of the experiments, found by name; every module of this package that registers one is imported."""

from importlib import import_module
from pkgutil import iter_modules

from kronfisher.experiments.data.dataset import Dataset
from kronfisher.experiments.data.registry import load, names, register

__all__ = ["Dataset", "load", "names", "register"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
