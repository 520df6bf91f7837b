"""What parameters are (dtype, place, shape): statistics, momentum and averages are of the same kind, and stay it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kronfisher.errors import DataError, UnsupportedError

__all__ = ["Kinds"]


class Kinds:
    """The dtype, device and shape that each parameter had when it was first trained."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[torch.dtype, torch.device, torch.Size]] = {}

    def require(self, parameters: Mapping[str, Tensor]) -> None:
        """UnsupportedError if one was converted or moved since; those that are new are taken in."""
        for name, parameter in parameters.items():
            now = parameter.dtype, parameter.device, parameter.shape
            before = self._known.setdefault(name, now)
            if before[2] != now[2]:
                raise UnsupportedError(
                    f"{name} has shape {list(now[2])}, and had {list(before[2])} in the first step: curvature, "
                    "momentum and averages do not follow. Make a new optimiser for the model as it is now."
                )
            if before != now:
                raise UnsupportedError(
                    f"{name} is {now[0]} on {now[1]}, and was {before[0]} on {before[1]} in the first step: curvature, "
                    "momentum and averages do not follow. Convert and move a model before it is trained, or make a new "
                    "optimiser for it as it is now."
                )

    def state_dict(self) -> dict[str, str]:
        """Name → dtype."""
        return {name: str(dtype) for name, (dtype, _, _) in self._known.items()}

    def shapes(self) -> dict[str, list[int]]:
        """Name → shape."""
        return {name: list(shape) for name, (_, _, shape) in self._known.items()}

    def load_state_dict(
        self, state: Mapping[str, str], parameters: Mapping[str, Tensor], shapes: Mapping[str, list[int]] | None = None
    ) -> None:
        """Take the parameters as they are now.

        Raises:
            DataError: the state is of other dtypes or shapes.
        """
        for name, shape in (shapes or {}).items():
            if name in parameters and list(parameters[name].shape) != list(shape):
                raise DataError(
                    f"the state was saved for {name} of shape {list(shape)}, which has {list(parameters[name].shape)} "
                    "now: load it for the model that it was saved with, or begin with a new optimiser."
                )
        for name, dtype in state.items():
            if name in parameters and str(parameters[name].dtype) != dtype:
                raise DataError(
                    f"the state was saved for {name} in {dtype}, which is {parameters[name].dtype} now: convert the "
                    "model to what it was, or begin with a new optimiser."
                )
        self._known = {name: (p.dtype, p.device, p.shape) for name, p in parameters.items() if name in state}
