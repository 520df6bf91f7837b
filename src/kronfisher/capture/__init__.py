"""One forward pass, understood: which operators used which trainable weights, and which example each row belongs to."""

from kronfisher.capture.capture import Capture, Receiver

__all__ = ["Capture", "Receiver"]
