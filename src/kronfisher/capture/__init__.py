"""One forward pass, understood: which operators used which trainable weights, and which example each row belongs to."""

from kronfisher.capture.capture import Capture, Receiver
from kronfisher.capture.observation import Observation, observe

__all__ = ["Capture", "Observation", "Receiver", "observe"]
