"""How operators of torch use trainable weights, one file per kind; importing registers them all."""

from kronfisher.uses import attention, convolution, elementwise, embedding, linear, norm, transposed
from kronfisher.uses.ownership import Ownership, Probe
from kronfisher.uses.use import EXAMPLES, OPERATORS, REWRITES, Use, Viewer

__all__ = [
    "EXAMPLES",
    "OPERATORS",
    "REWRITES",
    "Ownership",
    "Probe",
    "Use",
    "Viewer",
    "attention",
    "convolution",
    "elementwise",
    "embedding",
    "linear",
    "norm",
    "transposed",
]  # fmt: skip
