"""The exact quadratic model of the loss: products with the Fisher matrix of a batch by forward-mode differentiation."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

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

_one_by_one: WeakSet[nn.Module] = WeakSet()  # models with an operator that derives along one direction at a time


def gram(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    done: Pass,
    directions: Sequence[Direction],
    likelihood: Likelihood,
) -> Tensor:
    """``dᵢᵀ F dⱼ`` for the exact Fisher matrix F of one batch, a mean over its data.

    All directions take one forward pass in which every tensor carries its derivatives along them, or, where an operator
    of the model cannot, one pass each.

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
    outputs, columns = _tangents(model, parameters, done, directions, likelihood)
    rows = [likelihood.hessian_product(outputs, column, done.targets) for column in columns]
    products = [torch.stack([(left * right).sum(dtype=torch.float64) for right in rows]) for left in columns]
    matrix = torch.stack(products) / done.count
    return (matrix + matrix.mT) / 2


def _same(outputs: Tensor, done: Pass, likelihood: Likelihood) -> bool:
    """Whether the loss of another run is that of the first."""
    assert done.loss is not None
    tolerance = 1e-3 if outputs.dtype in (torch.float32, torch.float64) and not done.narrow else 0.1
    change = _loss(outputs, done, likelihood) - done.loss
    return bool(change.abs() <= tolerance * (1 + done.loss.abs()))


def _loss(outputs: Tensor, done: Pass, likelihood: Likelihood) -> Tensor:
    return -likelihood.log_prob(outputs, done.targets).sum(dtype=torch.float64) / done.count


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


def _tangents(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    done: Pass,
    directions: Sequence[Direction],
    likelihood: Likelihood,
) -> tuple[Tensor, list[Tensor]]:
    """Outputs and their derivative along each direction.

    Raises:
        DataError: the outputs of the second run are not those of the first.
    """
    if len(directions) > 1 and model not in _one_by_one:
        try:
            outputs, tangents = _all_at_once(model, parameters, done, directions)
        except (NotImplementedError, RuntimeError):
            outputs = tangents = None
        if outputs is not None and tangents is not None and _same(outputs, done, likelihood):
            return outputs, list(tangents)
        _one_by_one.add(model)
    found = [_tangent(model, parameters, done, direction) for direction in directions]
    outputs = found[-1][0]
    assert done.loss is not None
    if not _same(outputs, done, likelihood):
        raise DataError(
            f"The model gave another loss when it was run again on the same batch ({float(done.loss):.6g}, then "
            f"{float(_loss(outputs, done, likelihood)):.6g}). The function given to step must not draw a new batch, "
            "and randomness must come from torch's, NumPy's or Python's global generators; otherwise use momentum=0.9 "
            "with trust=kf.Constant(λ)."
        )
    return outputs, [tangent for _, tangent in found]


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


def _all_at_once(
    model: nn.Module, parameters: Mapping[str, Tensor], done: Pass, directions: Sequence[Direction]
) -> tuple[Tensor, Tensor]:
    """Outputs, and their derivatives ``[K, ...]`` along K directions: what depends on none of them is computed once."""
    _warm_up()
    names = dict.fromkeys(name for direction in directions for name in direction)
    primals = {name: parameters[name].detach() for name in names}
    stacked = {
        name: torch.stack([d[name].to(p.dtype) if name in d else torch.zeros_like(p) for d in directions])
        for name, p in primals.items()
    }

    def outputs(given: Mapping[str, Tensor]) -> Tensor:
        with _instead(model, {id(parameters[name]): tensor for name, tensor in given.items()}):
            return done.forward()

    def along(direction: Direction) -> tuple[Tensor, Tensor]:
        primal, tangent, *_ = torch.func.jvp(outputs, (primals,), (direction,))
        return primal, tangent

    with torch.no_grad(), done.again(), sdpa_kernel(SDPBackend.MATH):
        several = torch.vmap(along, out_dims=(None, 0), randomness="same")  # pyright: ignore[reportArgumentType]
        return several(stacked)  # pyright: ignore[reportReturnType]


def _forward_mode(
    model: nn.Module, parameters: Mapping[str, Tensor], done: Pass, direction: Direction
) -> tuple[Tensor, Tensor]:
    _warm_up()
    # The fused kernels have no forward mode.
    with torch.no_grad(), done.again(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        duals = {
            id(parameters[name]): forward_ad.make_dual(parameters[name].detach(), tangent.to(parameters[name].dtype))
            for name, tangent in direction.items()
        }
        with _instead(model, duals):
            primal, tangent = forward_ad.unpack_dual(done.forward())
        return primal, torch.zeros_like(primal) if tangent is None else tangent


@contextmanager
def _instead(model: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Other tensors in place of parameters, by ``id``."""
    with ExitStack() as stack:
        for module in model.modules():
            if module._parameters:
                own = {name: tensors.get(id(p), p) for name, p in module._parameters.items()}
                stack.enter_context(replaced([module._parameters], own))  # pyright: ignore[reportArgumentType]
        yield


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
