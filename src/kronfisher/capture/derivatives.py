"""Derivatives of a chain of layers by its inputs, propagated forward, so that weights are met in one form only.

Derivatives by ``torch.autograd.grad`` meet a weight again in the backward pass, where no operator is seen; then the
gradients of single residuals are all that is known of it. Forward, a weight multiplies the value, each derivative and
the Laplacian alike, and factors of Kronecker products are those of a layer with so many positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kronfisher.errors import DataError, UnsupportedError
from kronfisher.layers.propagated import affine

__all__ = ["Derivatives", "derivatives"]

_ELEMENTWISE = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.SELU, nn.SiLU, nn.Sigmoid,
    nn.Softplus, nn.Tanh, nn.Tanhshrink,
)  # fmt: skip


@dataclass(frozen=True)
class Derivatives:
    """What a network is at n points, and how it changes there.

    Example:
        >>> chain = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> found = derivatives(chain, torch.zeros(5, 2), second=[(0, 1)])
        >>> found.value.shape, found.first.shape, found.second[0, 1].shape
        (torch.Size([5, 1]), torch.Size([5, 2, 1]), torch.Size([5, 1]))

    Attributes:
        value: u ``[n, V]``.
        first: ∂u/∂x_i ``[n, d, V]``.
        second: (i, j) → ∂²u/∂x_i∂x_j ``[n, V]``, those that were asked for.
        laplacian: ``Σ_i ∂²u/∂x_i²`` ``[n, V]``, or None.
    """

    value: Tensor
    first: Tensor
    second: Mapping[tuple[int, int], Tensor]
    laplacian: Tensor | None


def derivatives(
    network: nn.Module, x: Tensor, *, second: Sequence[tuple[int, int]] = (), laplacian: bool = False
) -> Derivatives:
    """The derivatives of a chain of linear layers and element-wise functions by its inputs, with their graph.

    They are propagated forward with the value, so that every fit treats residuals made of them layer by layer, with one
    position for each quantity; and the Laplacian takes one, not d.

    Args:
        network: ``nn.Linear`` and element-wise activations in ``nn.Sequential``, nested if need be.
        x: points ``[n, d]``.
        second: pairs of coordinates.
        laplacian: whether it is wanted.

    Raises:
        UnsupportedError: the network has a module of another kind, or with hooks.
        DataError: `x` is not ``[n, d]``, or a pair names coordinates that there are not.

    Example:
        >>> import torch, kronfisher as kf
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
        >>> x = torch.rand(50, 2).double()
        >>> def residuals(net, x):  # of −Δu = 1
        ...     return {"equation": kf.derivatives(net, x, laplacian=True).laplacian + 1}, None
        >>> fisher = kf.estimate(net, x, kf.Residuals({"equation": 1.0}), labels="exact", forward=residuals)
        >>> fisher["0.weight"].structure
        'kronecker 3x16'
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise DataError(f"derivatives needs points [n, d] of floating-point numbers, found {x.dtype} {list(x.shape)}.")
    n, d = x.shape
    if odd := [pair for pair in second if not all(0 <= axis < d for axis in pair)]:
        raise DataError(f"derivatives by {odd[0]}: the points have the coordinates 0 to {d - 1}.")
    layers = _layers(network, "")
    directions = torch.eye(d, dtype=x.dtype, device=x.device).expand(n, d, d)
    stack = torch.cat([x[:, None], directions, x.new_zeros(n, len(second) + laplacian, d)], dim=1)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            stack = affine(stack, layer.weight, layer.bias)
        else:
            stack = _through(layer, stack, d, second, laplacian)
    return Derivatives(
        stack[:, 0],
        stack[:, 1 : 1 + d],
        {pair: stack[:, 1 + d + k] for k, pair in enumerate(second)},
        stack[:, -1] if laplacian else None,
    )


def _layers(module: nn.Module, name: str) -> list[nn.Module]:
    """The modules of a chain in order, if it is one."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    if type(module) is nn.Sequential and not any(hooks):
        children = module.named_children()
        return [each for key, child in children for each in _layers(child, f"{name}.{key}" if name else key)]
    if type(module) is nn.Identity and not any(hooks):
        return []
    if (type(module) is nn.Linear or type(module) in _ELEMENTWISE) and not any(hooks):
        return [module]
    kind = f"{type(module).__name__}{' with hooks' if any(hooks) else ''}"
    raise UnsupportedError(
        f"{name or 'the network'} is {kind}, and derivatives are propagated through nn.Sequential of nn.Linear and "
        "element-wise activations only. Make them by torch.autograd.grad(..., create_graph=True): fit='gram' is exact "
        "with these, too, and K-FOC and sums take the gradients of single residuals."
    )


def _through(function: nn.Module, stack: Tensor, d: int, second: Sequence[tuple[int, int]], laplacian: bool) -> Tensor:
    """φ of the value, and the chain rule for the rest."""
    tangents = stack[:, 1 : 1 + d]
    value, slope, bend = _slopes(function, stack[:, 0])
    parts = [value[:, None], slope[:, None] * tangents]
    for k, (i, j) in enumerate(second):
        parts.append((bend * tangents[:, i] * tangents[:, j] + slope * stack[:, 1 + d + k])[:, None])
    if laplacian:
        parts.append((bend * tangents.square().sum(1) + slope * stack[:, -1])[:, None])
    return torch.cat(parts, dim=1)


def _slopes(function: nn.Module, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """φ, φ' and φ'' at z, number by number."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        own = z if z.requires_grad else z.detach().requires_grad_()
        value = function(own)
        (slope,) = torch.autograd.grad(value.sum(), own, create_graph=True)
        bend = torch.zeros_like(slope)
        if slope.requires_grad:
            (bend,) = torch.autograd.grad(slope.sum(), own, create_graph=True, materialize_grads=True)
    return (value, slope, bend) if graph else (value.detach(), slope.detach(), bend.detach())
