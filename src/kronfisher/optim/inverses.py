"""Damped inverses of all layers: kept in their order, applied to gradients, saved."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.capture.capture import Capture
from kronfisher.linalg import plain_arithmetic
from kronfisher.optim.intervals import Refresh
from kronfisher.optim.layer_inverse import LayerInverse
from kronfisher.optim.layer_statistics import LayerStatistics
from kronfisher.optim.row_inverse import RowInverse

__all__ = ["Inverses"]


class Inverses:
    """One damped inverse for each layer; a subclass decides when they are made, and how they are damped.

    Args:
        parameters: name → parameter, all that may be trained.
        refresh: periods.

    Attributes:
        inverses: one for each layer, in the order of the layers.
        seconds: spent on making inverses.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], refresh: Refresh) -> None:
        self.refresh = refresh
        self.inverses: list[LayerInverse] = []
        self.seconds = 0.0
        self.extend(parameters)

    def extend(self, parameters: dict[str, nn.Parameter]) -> None:
        """Treat these parameters from now on."""
        self._parameters = parameters

    def follow(self, layers: Sequence[LayerStatistics], step: int) -> None:
        """Keep one inverse for each layer; those of new layers are due at once."""
        if [one.layer for one in self.inverses] != list(layers):
            known = {one.layer: one for one in self.inverses}
            self.inverses = [known.get(layer) or LayerInverse(layer, due=step) for layer in layers]

    @property
    def due(self) -> dict[LayerStatistics, int]:
        """Layer → the step at which its inverse is to be made again."""
        return {one.layer: one.due for one in self.inverses}

    # Application ------------------------------------------------------------------------------------------------------

    def row_inverse(self, capture: Capture, rates: Mapping[str, float]) -> RowInverse | None:
        """To be given rows of a step's backward pass; None where others may read or change gradients."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return None
        for parameter in self._parameters.values():
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                return None
        return RowInverse.of(self.inverses, rates, capture)

    def apply(self, gradients: Mapping[str, Tensor], rows: RowInverse | None = None) -> dict[str, Tensor]:
        """The inverses times a vector ``{name: [*shape]}``, of all parameters that one covers.

        Layers with `rows` take them in place of the gradient.
        """
        rows = rows or RowInverse({})
        with self._arithmetic():
            vectors: dict[str, Tensor] = {}
            out: dict[str, Tensor] = {}
            for one in self.inverses:
                if one.inverse is None:
                    continue
                by_rows = rows.holds(one)
                if not by_rows and self._apply_directly(one, gradients, out):
                    continue
                vectors = vectors or {name: tensor[None] for name, tensor in gradients.items()}
                for name in (name for block in one.blocks for name in block.parameters):
                    if name not in out and (by_rows or name in vectors):
                        whole = all(view.whole for block in one.blocks for view in block.views)  # and all is written
                        make = torch.empty_like if whole else torch.zeros_like
                        out[name] = make(self._parameters[name], memory_format=torch.contiguous_format)
                own = {name: out[name][None] for block in one.blocks for name in block.parameters if name in out}
                if by_rows:
                    rows.apply(one, own)
                else:
                    one.apply(vectors, own)
            return out

    def _apply_directly(self, one: LayerInverse, gradients: Mapping[str, Tensor], out: dict[str, Tensor]) -> bool:
        """Write the same of one layer into `out`, in fewer copies; False where that is not possible."""
        return False

    def _arithmetic(self) -> AbstractContextManager[None]:
        return plain_arithmetic(next(iter(self._parameters.values())).device)

    # Reports and state ------------------------------------------------------------------------------------------------

    def overdue(self, step: int) -> dict[str, int]:
        """Layer's name → steps by which its inverse is overdue."""
        return {one.name: step - one.due for one in self.inverses if one.due < step}

    @property
    def troubles(self) -> dict[str, str]:
        """Layer's name → what went wrong with its last inverse."""
        return {one.name: one.trouble for one in self.inverses if one.trouble}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs, as tensors, numbers and strings."""
        return {"layers": [one.state_dict() for one in self.inverses]}

    def load_state_dict(self, state: Mapping[str, Any], layers: Sequence[LayerStatistics]) -> None:
        """Take over what `state_dict` gave, for these layers."""
        device = next(iter(self._parameters.values())).device
        self.inverses = [LayerInverse(layer) for layer in layers]
        for one, saved in zip(self.inverses, state["layers"], strict=True):
            one.load_state_dict(saved, device)
