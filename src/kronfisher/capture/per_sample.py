"""The fallback: per-example gradients, one backward pass each, for parameters used in ways that are not understood.

Unless examples are coupled, the gradient of one example's own outputs is that example's gradient, whatever the model
does in between: functions written by the user, weights computed from other weights.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Block, Window
from kronfisher.layers.activations import Ones
from kronfisher.layers.onehot import Indices
from kronfisher.layers.samples import Samples
from kronfisher.linalg import promote

__all__ = ["FALLBACK", "per_sample_block", "per_sample_gradients", "samples_of_gradients"]

FALLBACK = "per-sample gradients"


def per_sample_block(name: str, parameter: Tensor) -> Block:
    """The whole parameter as one matrix, first axis by all others; a vector is a bias, with an input of one."""
    view = Window.of(name, parameter).reshaped(1, *(parameter.shape or (1,)))
    return Block(name, FALLBACK, *((view, None) if parameter.dim() > 1 else (None, view)))


def samples_of_gradients(gradients: Tensor) -> Samples:
    """Gradients ``G_k [n, *shape]`` as samples of the block: one position per input, where that input is one."""
    count, outputs = len(gradients), gradients.shape[1] if gradients.dim() > 1 else 1
    if gradients.dim() < 3:
        return Samples(Ones(gradients, (1, count, 1)), gradients.reshape(1, count, 1, outputs))
    rows = gradients.flatten(2).mT[None]
    inputs = rows.shape[2]
    each = torch.arange(inputs, device=rows.device)[None, :, None].expand(count, -1, 1)
    return Samples(Indices(each, torch.ones_like(each, dtype=rows.dtype), inputs), rows)


def per_sample_gradients(
    outputs: Tensor, vector: Tensor, parameters: Mapping[str, Tensor], workspace: int | None
) -> Iterator[dict[str, Tensor]]:
    """The gradient of ``⟨outputs_k, vector_k⟩`` for every example k, a few at a time: ``{name: [n', *shape]}``.

    Args:
        outputs: of a forward pass whose graph still exists; it is retained.
        vector: shaped like the outputs.
        parameters: name → leaf.
        workspace: bytes for the gradients yielded at a time; None: all at once.
    """
    leaves = list(parameters.values())
    size = sum(p.numel() * promote(p.detach().new_empty(0)).element_size() for p in leaves)
    step = len(outputs) if workspace is None else max(1, min(len(outputs), workspace // max(size, 1)))
    for low in range(0, len(outputs), step):
        count = min(step, len(outputs) - low)
        rows = {name: promote(p.detach().new_zeros(0)).new_zeros(count, *p.shape) for name, p in parameters.items()}
        for k in range(count):
            own = (outputs[low + k] * vector[low + k]).sum()
            gradients = torch.autograd.grad(own, leaves, retain_graph=True, allow_unused=True)
            for row, gradient in zip(rows.values(), gradients, strict=True):
                if gradient is not None:
                    row[k] = gradient.to_dense() if gradient.layout is not torch.strided else gradient
        yield rows
