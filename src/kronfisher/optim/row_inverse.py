"""Inverses applied to the rows that a gradient is made of: cheaper than to the gradient where a batch has few of them.

``B⁻¹ V A⁻¹ = (B⁻¹ gᵀ)(a A⁻¹)`` for ``V = gᵀ a`` with R rows (examples times positions), where that takes
fewer multiplications.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from kronfisher.capture.capture import Capture
from kronfisher.capture.graph import Call
from kronfisher.layers import RowOrder
from kronfisher.layers.convolution import ConvolutionUse
from kronfisher.layers.linear import RowUse
from kronfisher.optim.layer_inverse import LayerInverse

__all__ = ["RowInverse", "pays"]


CAPTURING = 4e6  # multiplications that take as long as capturing and receiving one call


def saved(rows: int, outputs: int, inputs: int, *, diagonal: bool = False) -> int:
    """Multiplications that both factors applied to rows, and the product of these, save over those to the matrix.

    Where the output factor is a diagonal its own do not count.
    """
    dense = 0 if diagonal else outputs
    return outputs * inputs * (dense + inputs) - rows * (outputs * (dense + inputs) + inputs**2)


def pays(rows: int, outputs: int, inputs: int, *, diagonal: bool = False) -> bool:
    """Whether both factors applied to rows, and the product of these, take fewer multiplications than to the matrix.

    One of the factors alone never belongs on rows: where that is cheaper than the matrix, both are cheaper still.

    Example:
        >>> pays(128, 1000, 785), pays(4096, 1000, 785), pays(128, 1000, 51)
        (True, False, False)
    """
    return saved(rows, outputs, inputs, diagonal=diagonal) > 0


@dataclass
class RowInverse:
    """Rows of inputs and output gradients of linear layers, from the loss's own backward pass, and inverses of them.

    Attributes:
        layers: block's key → inverse, for layers where rows may pay.
        rows: layer's name → inputs ``[R, I]`` with the bias coordinate, and output gradients ``[R, O]``.
        slopes: layer's name → ``⟨V, B⁻¹ V A⁻¹⟩`` for layers whose V was never formed, filled by `apply`.
        edges: where the gradients of the outputs of those layers arrive.
        spared: parameters of those layers.
        saved: multiplications that the rows save.
    """

    layers: dict[tuple, LayerInverse]
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)
    edges: list[GradientEdge] = field(default_factory=list)
    spared: set[str] = field(default_factory=set)
    saved: int = 0

    @classmethod
    def of(cls, inverses: Iterable[LayerInverse], rates: Mapping[str, float], capture: Capture) -> "RowInverse":
        """For layers with a separable inverse, one learning rate and a single use, without hooks of the user's."""
        chosen = (one for one in inverses if one.separable)
        alike = (one for one in chosen if len({rates.get(name) for name in one.blocks[0].parameters}) == 1)
        layers = {one.blocks[0].key: one for one in alike}
        counts: dict[tuple, int] = {}
        hooked: set[tuple] = set()
        for call in capture.calls:
            for use in call.uses:
                keys = {(use.weight, use.bias), (use.weight, None), (None, use.bias)}
                hooked |= keys if len(call.hooks) > 1 else set()  # one is ours
                for key in keys:
                    counts[key] = counts.get(key, 0) + 1
        return cls({key: one for key, one in layers.items() if counts.get(key) == 1 and key not in hooked})

    def pay(self, capture: Capture) -> bool:
        """Whether these rows are worth capturing a pass that brings nothing else."""
        return self.saved > CAPTURING * len(capture.calls)

    def holds(self, one: LayerInverse) -> bool:
        """Whether rows of this layer are here and its inverse can be applied to them."""
        return one.name in self.rows and one.separable

    def spare(self, capture: Capture) -> set[str]:
        """Parameters whose gradient need not be formed, because factors go to rows; their calls are kept."""
        for call in capture.calls:
            for use in call.uses:
                layer = self.layers.get((use.weight, use.bias))
                rows = prod(use.lead(call.shape)) if isinstance(use, RowUse) else 0
                if layer is None or not rows:
                    continue
                if pays(rows, *layer.blocks[0].shape[1:], diagonal=layer.has_diagonal):
                    self.spared.update(layer.blocks[0].parameters)
                    self.edges.append(call.edge)
        return self.spared

    def receive(self, call: Call, gradient: Tensor) -> None:
        """Keep one call's rows if that pays; those of a convolution are its patches."""
        for use in call.uses:
            layer = self.layers.get((use.weight, use.bias))
            if layer is None or not isinstance(use, RowUse | ConvolutionUse):
                continue
            _, width, inputs = layer.blocks[0].shape
            less = saved(gradient.numel() // width, width, inputs, diagonal=layer.has_diagonal)
            if less > 0:
                self.saved += less
                order = RowOrder(prod(use.lead(call.shape)))
                outputs = use.gradients(order, gradient.to(use.dtype)).flatten(0, 2)
                activations = use.activations(order, gradient, use.weight is not None, use.bias is not None)
                self.rows[layer.name] = activations.dense().flatten(0, 2), outputs

    def form_missing(self, gradients: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Add gradients that were not formed, for layers whose inverse has another form by now."""
        for layer in self.layers.values():
            (block,) = layer.blocks
            if layer.name in self.rows and not layer.separable and block.parameters[0] not in gradients:
                inputs, outputs = self.rows[layer.name]
                out = {name: torch.empty_like(parameters[name]).unsqueeze(0) for name in block.parameters}
                block.scatter((outputs.mT @ inputs).reshape(1, -1), out)
                gradients.update({name: gradient[0] for name, gradient in out.items()})

    def apply(self, layer: LayerInverse, out: dict[str, Tensor]) -> None:
        """Write ``B⁻¹ gᵀ a A⁻¹`` into `out`, ``{name: [1, *shape]}``; and keep its slope where no gradient gives it."""
        (block,) = layer.blocks
        inputs, outputs = self.rows[layer.name]
        factors = layer.inverse.product if layer.inverse is not None else None
        assert factors is not None
        right, left = (factor.tensor[0] for factor in factors)
        left = left[:, None] * outputs.mT if layer.has_diagonal else left @ outputs.mT
        right = inputs @ right
        if self.spared.intersection(block.parameters):
            # ⟨gᵀa, LR⟩ = Σ (R aᵀ)∘(g L)ᵀ, from matrices of rows alone
            self.slopes[layer.name] = ((right @ inputs.mT) * (outputs @ left).mT).sum(dtype=torch.float64)
        own = all(out[name].dtype == left.dtype for name in block.parameters)  # not those of weights in half precision
        if own and block.weight is not None and block.bias is not None and block.weight.whole and block.bias.whole:
            weight, bias = out[block.weight.parameter], out[block.bias.parameter]  # without a copy of the joint matrix
            torch.mm(left, right[:, :-1], out=weight.view(len(left), -1))
            torch.mv(left, right[:, -1], out=bias.view(-1))
        else:
            block.scatter((left @ right).reshape(1, -1), out)
