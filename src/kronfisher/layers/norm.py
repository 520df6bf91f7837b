"""Normalisation layers: a scale of the normalised input and a shift, exact vectors per sample."""

from collections.abc import Callable, Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

from kronfisher.errors import UnsupportedError
from kronfisher.layers.elementwise import ElementwiseUse
from kronfisher.layers.use import Use, Windows, handles

__all__: list[str] = []


def _uses(
    view: Windows,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    aligned: tuple[int, ...],
    normalise: Callable[[Tensor], Tensor],
) -> Iterator[Use]:
    scale, shift = view(weight), view(bias)
    if scale:
        yield ElementwiseUse(None, scale.reshaped(1, *scale.size), input, aligned, normalise)
    if shift:
        yield ElementwiseUse(None, shift.reshaped(1, *shift.size), None, aligned)


def _channels(input: Tensor) -> tuple[int, ...]:
    return (input.shape[1], *[1] * (input.dim() - 2))


@handles(F.layer_norm)
def layer_norm(
    view: Windows,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Iterator[Use]:
    """Normalised over the last axes, scaled and shifted elementwise."""
    shape = tuple(normalized_shape)
    return _uses(view, input, weight, bias, shape, lambda x: F.layer_norm(x, shape, None, None, eps))


@handles(F.rms_norm)
def rms_norm(
    view: Windows,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Iterator[Use]:
    """Divided by the root mean square over the last axes, scaled elementwise."""
    shape = tuple(normalized_shape)
    return _uses(view, input, weight, None, shape, lambda x: F.rms_norm(x, shape, None, eps))


@handles(F.group_norm)
def group_norm(
    view: Windows,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Iterator[Use]:
    """Normalised over groups of channels, scaled and shifted by channel."""
    return _uses(view, input, weight, bias, _channels(input), lambda x: F.group_norm(x, num_groups, None, None, eps))


@handles(F.instance_norm)
def instance_norm(
    view: Windows,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterator[Use]:
    """Normalised over the pixels of each channel, scaled and shifted by channel."""
    if use_input_stats:
        yield from _uses(view, input, weight, bias, _channels(input), lambda x: F.instance_norm(x, eps=eps))
    else:
        yield from batch_norm(view, input, running_mean, running_var, weight, bias, False, momentum, eps)


@handles(F.batch_norm)
def batch_norm(
    view: Windows,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterator[Use]:
    """In eval mode an affine map by channel; in train mode per-example gradients do not exist, except in training."""
    if training and not view.coupled:
        where = next((f" of {view.parameter}" for view in map(view, (weight, bias)) if view), "")
        raise UnsupportedError(
            f"BatchNorm{where} is in train mode, or keeps no running statistics: it couples the examples of a batch, "
            "so that per-example gradients do not exist and the Fisher matrix is not defined. Call model.eval() (or "
            ".eval() on the BatchNorm layers) first."
        )

    def normalise(x: Tensor) -> Tensor:  # x may be wider than the statistics
        if training:
            return F.batch_norm(x, None, None, training=True, eps=eps)
        mean, variance = (None if s is None else s.to(x.dtype) for s in (running_mean, running_var))
        return F.batch_norm(x, mean, variance, eps=eps)

    return _uses(view, input, weight, bias, _channels(input), normalise)
