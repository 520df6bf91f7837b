"""Operators of torch that use trainable weights, one file per kind; importing registers every file of the package."""

from importlib import import_module
from pkgutil import iter_modules

from kronfisher.layers.row_order import Probe, RowOrder
from kronfisher.layers.use import OPERATORS, REWRITES, Use, Windows

__all__ = ["OPERATORS", "REWRITES", "Probe", "RowOrder", "Use", "Windows"]

for module in iter_modules(__path__):
    import_module(f"{__name__}.{module.name}")
