"""How operators of torch use trainable weights, one file per kind; importing registers them all."""

from kronfisher.uses import convolution, elementwise, linear, norm
from kronfisher.uses.ownership import Ownership, Probe
from kronfisher.uses.use import EXAMPLES, OPERATORS, Use

__all__ = ["EXAMPLES", "OPERATORS", "Ownership", "Probe", "Use", "convolution", "elementwise", "linear", "norm"]
