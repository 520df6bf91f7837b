"""Damped inverses of all layers: kept in their order, applied to gradients, saved."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.capture.capture import Capture
from kronfisher.fisher.blocks import Window
from kronfisher.fisher.windows import swapped
from kronfisher.linalg import plain_arithmetic
from kronfisher.optim.intervals import Refresh
from kronfisher.optim.layer_inverse import LayerInverse
from kronfisher.optim.layer_statistics import LayerStatistics
from kronfisher.optim.ownership import Ownership
from kronfisher.optim.row_inverse import RowInverse

__all__ = ["Inverses"]


class Inverses:
    """One damped inverse for each layer; a subclass decides when they are made, and how they are damped.

    A weight that is used as a matrix and as its transpose is two layers, with statistics each, and has one inverse.

    Args:
        parameters: name → parameter, all that may be trained.
        refresh: periods.
        ownership: says which rank makes and keeps which inverse; None: this one all of them.

    Attributes:
        inverses: in the order of the layers.
        seconds: spent on making inverses.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], refresh: Refresh, ownership: Ownership | None = None
    ) -> None:
        self.refresh, self._ownership = refresh, ownership
        self.inverses: list[LayerInverse] = []
        self._layers: list[LayerStatistics] = []
        self.seconds = 0.0
        self.extend(parameters)

    def extend(self, parameters: dict[str, nn.Parameter]) -> None:
        """Treat these parameters from now on."""
        self._parameters = parameters

    def follow(self, layers: Sequence[LayerStatistics], step: int) -> None:
        """Keep one inverse for each layer; those of new layers are due at once."""
        if self._layers != list(layers):
            known = {one.layer: one for one in self.inverses}
            self._layers, self.inverses = list(layers), []
            for layer, other in _paired(layers):
                one = known.get(layer)
                if one is None or one.other is not other:
                    one = LayerInverse(layer, due=step, other=other)
                self.inverses.append(one)

    @property
    def due(self) -> dict[LayerStatistics, int]:
        """Layer → the step at which its inverse is to be made again."""
        return {layer: one.due for one in self.inverses for layer in (one.layer, one.other) if layer is not None}

    def _assign(self) -> None:
        """Before inverses are made: find an owner for each."""
        if self._ownership is not None:
            self._ownership.assign(self.inverses)

    def _making(
        self, inverses: Sequence[LayerInverse], value: float, step: int
    ) -> AbstractContextManager[Sequence[LayerInverse]]:
        """While inverses of operators that were read are made with λ = `value`: gives those that are made here."""
        return nullcontext(inverses) if self._ownership is None else self._ownership.making(inverses, value, step)

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
            ready = [one for one in self.inverses if one.inverse is not None]
            given_rows = [one for one in ready if rows.holds(one)]
            others = [one for one in ready if not rows.holds(one)] if given_rows else ready
            for one in [*given_rows, *self._apply_directly(others, gradients, out)]:
                by_rows = rows.holds(one)
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
            if self._ownership is None:
                return out
            return self._ownership.exchange(self.inverses, out, gradients, self._parameters)

    def _apply_directly(
        self, ones: Sequence[LayerInverse], gradients: Mapping[str, Tensor], out: dict[str, Tensor]
    ) -> list[LayerInverse]:
        """Write the same of some layers into `out`, in fewer copies and calls; those where that is not possible."""
        return list(ones)

    def _arithmetic(self) -> AbstractContextManager[None]:
        return plain_arithmetic(self._device)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    # Reports and state ------------------------------------------------------------------------------------------------

    def overdue(self, step: int) -> dict[str, int]:
        """Layer's name → steps by which its inverse is overdue."""
        return {one.name: step - one.due for one in self.inverses if one.due < step}

    @property
    def troubles(self) -> dict[str, str]:
        """Layer's name → what went wrong with its last inverse."""
        return {one.name: one.trouble for one in self.inverses if one.trouble}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs, as tensors, numbers and strings; of all ranks' inverses."""
        ownership = self._ownership
        if ownership is None:
            states = [one.state_dict() for one in self.inverses]
        else:
            states = ownership.gathered(self.inverses, self._device)
        own = {one.layer: state for one, state in zip(self.inverses, states, strict=True)}
        found = {"layers": [own.get(layer) for layer in self._layers]}  # of both roles of a weight the second has None
        return found if ownership is None else {**found, "owners": ownership.state_dict(self.inverses)}

    def load_state_dict(self, state: Mapping[str, Any], layers: Sequence[LayerStatistics]) -> None:
        """Take over what `state_dict` gave, for these layers."""
        self._layers = list(layers)
        self.inverses = [LayerInverse(layer, other=other) for layer, other in _paired(layers)]
        saved = dict(zip(layers, state["layers"], strict=True))
        for one in self.inverses:
            one.load_state_dict(saved[one.layer], self._device)
        if self._ownership is not None:
            self._ownership.load_state_dict(state.get("owners", ()), self.inverses)


def _paired(layers: Sequence[LayerStatistics]) -> list[tuple[LayerStatistics, LayerStatistics | None]]:
    """Each layer, or both roles of a weight: first the one that shows the parameter as it is."""
    pairs: list[tuple[LayerStatistics, LayerStatistics | None]] = []
    for layer in layers:
        for k, (first, second) in enumerate(pairs):
            windows = [_alone(first), _alone(layer)]
            if second is None and None not in windows and swapped([w for w in windows if w is not None]):
                pairs[k] = (first, layer) if windows[0] is not None and windows[0].whole else (layer, first)
                break
        else:
            pairs.append((layer, None))
    return pairs


def _alone(layer: LayerStatistics) -> Window | None:
    """The weight of a layer that has nothing else."""
    blocks = layer.blocks
    return blocks[0].weight if len(blocks) == 1 and blocks[0].bias is None else None
