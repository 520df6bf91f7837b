"""How operators of torch use trainable weights, one file per kind; importing registers them all."""

from kronfisher.uses import convolution, elementwise, embedding, linear, norm, transposed
from kronfisher.uses.ownership import Ownership, Probe
from kronfisher.uses.use import EXAMPLES, OPERATORS, Use, Viewer

__all__ = [
    "EXAMPLES", "OPERATORS", "Ownership", "Probe", "Use", "Viewer", "convolution", "elementwise", "embedding", "linear",
    "norm", "transposed",
]  # fmt: skip
