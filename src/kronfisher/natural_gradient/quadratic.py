"""The exact quadratic model of the loss: products with the Fisher matrix of a batch by forward-mode differentiation."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from kronfisher.errors import DataError, UnsupportedError
from kronfisher.isolation import replaced
from kronfisher.likelihoods import Likelihood
from kronfisher.natural_gradient.replay import Pass

__all__ = ["gram", "minimum", "model_change"]

Direction = Mapping[str, Tensor]


def gram(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    done: Pass,
    directions: Sequence[Direction],
    likelihood: Likelihood,
) -> Tensor:
    """``dᵢᵀ F dⱼ`` for the exact Fisher matrix F of one batch, a mean over its data.

    Each direction takes one forward pass in which every tensor carries its derivative along it.

    Args:
        model: unwrapped; its modules hold the parameters.
        parameters: name → parameter.
        done: the forward pass; it is run again.
        directions: K vectors ``{name: [*shape]}``; a missing name means zero.
        likelihood: whose Hessian of the outputs is taken.

    Returns:
        ``[K, K]``, float64, on the outputs' device.

    Raises:
        DataError: the pass gives other outputs, or depends on the parameters otherwise, when it is run again.
        UnsupportedError: an operator of the model has neither a forward-mode nor a second derivative.
    """
    columns = []
    outputs = None
    for direction in directions:
        outputs, tangent = _tangent(model, parameters, done, direction)
        columns.append(tangent)
    assert outputs is not None
    _require_same(outputs, done, likelihood)
    rows = [likelihood.hessian_product(outputs, column, done.targets) for column in columns]
    products = [torch.stack([(left * right).sum(dtype=torch.float64) for right in rows]) for left in columns]
    matrix = torch.stack(products) / done.count
    return (matrix + matrix.mT) / 2


def _require_same(outputs: Tensor, done: Pass, likelihood: Likelihood) -> None:
    """DataError if the loss of the second run is not that of the first."""
    assert done.loss is not None
    again = -likelihood.log_prob(outputs, done.targets).sum(dtype=torch.float64) / done.count
    tolerance = 1e-3 if outputs.dtype in (torch.float32, torch.float64) and not done.narrow else 0.1
    if not bool((again - done.loss).abs() <= tolerance * (1 + done.loss.abs())):
        raise DataError(
            f"The model gave another loss when it was run again on the same batch ({float(done.loss):.6g}, then "
            f"{float(again):.6g}). The function given to step must not draw a new batch, and randomness must come from "
            "torch's, NumPy's or Python's global generators; otherwise use momentum=0.9 with trust=kf.Constant(λ)."
        )


def minimum(matrix: Tensor, slopes: Tensor, most: float = 1.0) -> Tensor:
    """The coefficients c ``[K]`` at which ``slopesᵀ c + ½ cᵀ matrix c`` is least, the second in ``[0, most]``.

    The second direction is the last step: going back along it, or further than it went, only follows the noise of one
    batch.

    Example:
        >>> minimum(torch.tensor([[2.0]]), torch.tensor([-4.0]))
        tensor([2.])
        >>> minimum(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([-4.0, 5.0]))
        tensor([2., 0.])
    """
    if len(slopes) == 1:
        return -slopes / matrix[0]
    scale = matrix.diagonal().clamp_min(torch.finfo(matrix.dtype).tiny).rsqrt()
    unit = matrix * scale[:, None] * scale[None, :]
    second = torch.zeros_like(slopes[1])
    if float(1 - unit[0, 1].abs()) > 1e-7:  # else the two are as good as parallel
        second = (-(scale * torch.linalg.solve(unit, scale * slopes))[1]).clamp(0, most)
    return torch.stack([-(slopes[0] + matrix[0, 1] * second) / matrix[0, 0], second])


def model_change(matrix: Tensor, slopes: Tensor, coefficients: Tensor) -> Tensor:
    """``slopesᵀ c + ½ cᵀ matrix c``: what the model promises."""
    return slopes @ coefficients + coefficients @ matrix @ coefficients / 2


def _tangent(
    model: nn.Module, parameters: Mapping[str, Tensor], done: Pass, direction: Direction
) -> tuple[Tensor, Tensor]:
    """Outputs and their derivative along a direction."""
    try:
        return _forward_mode(model, parameters, done, direction)
    except (NotImplementedError, RuntimeError):
        pass
    try:
        return _double_backward(parameters, done, direction)
    except (NotImplementedError, RuntimeError) as error:
        raise UnsupportedError(
            f"The exact quadratic model needs the derivative of the outputs along a direction, and an operator of the "
            f"model has neither a forward-mode nor a second derivative ({error}). Use momentum=0.9 (a fixed rate) and "
            "trust=Constant(λ)."
        ) from error


def _forward_mode(
    model: nn.Module, parameters: Mapping[str, Tensor], done: Pass, direction: Direction
) -> tuple[Tensor, Tensor]:
    _warm_up()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(done.again())
        stack.enter_context(forward_ad.dual_level())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no forward mode
        duals = {
            id(parameters[name]): forward_ad.make_dual(parameters[name].detach(), tangent.to(parameters[name].dtype))
            for name, tangent in direction.items()
        }
        for module in model.modules():
            if module._parameters:
                own = {name: duals.get(id(p), p) for name, p in module._parameters.items()}
                stack.enter_context(replaced([module._parameters], own))  # pyright: ignore[reportArgumentType]
        primal, tangent = forward_ad.unpack_dual(done.forward())
        return primal, torch.zeros_like(primal) if tangent is None else tangent


def _double_backward(parameters: Mapping[str, Tensor], done: Pass, direction: Direction) -> tuple[Tensor, Tensor]:
    """``J d`` as the derivative of ``Jᵀ u`` with respect to u."""
    with torch.enable_grad(), done.again(), sdpa_kernel(SDPBackend.MATH):
        outputs = done.forward()
        dummy = torch.zeros_like(outputs, requires_grad=True)
        wanted = [parameters[name] for name in direction]
        slopes = torch.autograd.grad(outputs, wanted, dummy, create_graph=True, allow_unused=True)
        pairs = [(slope, d) for slope, d in zip(slopes, direction.values(), strict=True) if slope is not None]
        (tangent,) = torch.autograd.grad(
            [slope for slope, _ in pairs], dummy, [d.to(slope.dtype) for slope, d in pairs], allow_unused=True
        )
    return outputs.detach(), torch.zeros_like(outputs) if tangent is None else tangent.detach()


def _once() -> Callable[[], None]:
    warm = False

    def warm_up() -> None:
        # At the first dual tensor of a process torch compiles its decompositions, with warnings about itself.
        nonlocal warm
        if not warm:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
                with forward_ad.dual_level():
                    forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
            warm = True

    return warm_up


_warm_up = _once()
