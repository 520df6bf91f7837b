"""How operators of torch use trainable weights, one file per kind; importing registers them all."""

from kronfisher.layers import attention, convolution, elementwise, embedding, linear, norm, transposed
from kronfisher.layers.row_order import Probe, RowOrder
from kronfisher.layers.use import OPERATORS, REWRITES, Use, Windows

__all__ = [
    "OPERATORS",
    "REWRITES",
    "Probe",
    "RowOrder",
    "Use",
    "Windows",
    "attention",
    "convolution",
    "elementwise",
    "embedding",
    "linear",
    "norm",
    "transposed",
]  # fmt: skip
