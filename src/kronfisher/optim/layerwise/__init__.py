"""The default step: each layer's natural gradient at a size of its own, which evidence from later batches adapts."""

from kronfisher.optim.layerwise.step import LayerwiseStep

__all__ = ["LayerwiseStep"]
