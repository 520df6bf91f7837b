"""What numbers parameters are, and where: statistics, momentum and averages are of the same kind, and stay it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kronfisher.errors import DataError, UnsupportedError

__all__ = ["Kinds"]


class Kinds:
    """The dtype and device that each parameter had when it was first trained."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[torch.dtype, torch.device]] = {}

    def require(self, parameters: Mapping[str, Tensor]) -> None:
        """UnsupportedError if one was converted or moved since; those that are new are taken in."""
        for name, parameter in parameters.items():
            now = parameter.dtype, parameter.device
            before = self._known.setdefault(name, now)
            if before != now:
                raise UnsupportedError(
                    f"{name} is {now[0]} on {now[1]}, and was {before[0]} on {before[1]} in the first step: curvature, "
                    "momentum and averages do not follow. Convert and move a model before it is trained, or make a new "
                    "optimiser for it as it is now."
                )

    def state_dict(self) -> dict[str, str]:
        """Name → dtype."""
        return {name: str(dtype) for name, (dtype, _) in self._known.items()}

    def load_state_dict(self, state: Mapping[str, str], parameters: Mapping[str, Tensor]) -> None:
        """Take the parameters as they are now.

        Raises:
            DataError: the state is of other dtypes.
        """
        for name, dtype in state.items():
            if name in parameters and str(parameters[name].dtype) != dtype:
                raise DataError(
                    f"the state was saved for {name} in {dtype}, which is {parameters[name].dtype} now: convert the "
                    "model to what it was, or begin with a new optimiser."
                )
        self._known = {name: (p.dtype, p.device) for name, p in parameters.items() if name in state}
