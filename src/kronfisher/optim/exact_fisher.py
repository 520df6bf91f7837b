"""Products with the exact Fisher matrix of a batch, by derivatives of the model's outputs along directions."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from kronfisher.capture.isolation import replace_contents
from kronfisher.errors import DataError, UnsupportedError
from kronfisher.likelihoods import Likelihood
from kronfisher.optim.replay import ForwardPass

__all__ = ["WAYS", "FisherProducts"]

Vector = Mapping[str, Tensor]

WAYS = ("together", "apart", "backward")


@dataclass
class FisherProducts:
    """Products with the exact Fisher matrix of a batch, by the fastest way that is right for the model.

    Attributes:
        way: "together": one forward pass in which every tensor carries its derivatives along all directions; "apart":
            one such pass for each; "backward": the derivative of a backward pass. The first that works is kept.
    """

    way: str = WAYS[0]

    def gram(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        record: ForwardPass,
        directions: Sequence[Vector],
        likelihood: Likelihood,
        slopes: Sequence[float] | None = None,
    ) -> Tensor:
        """``dᵢᵀ F dⱼ`` for the exact Fisher matrix F of one batch, a mean over its examples.

        Args:
            model: unwrapped; its modules hold the parameters.
            parameters: name → parameter.
            record: the forward pass; it is run again.
            directions: K vectors ``{name: [*shape]}``; a missing name means zero.
            likelihood: whose Hessian of the outputs is taken.
            slopes: ``∇hᵀ dᵢ`` with the gradient of this pass's loss, where that is known, to check derivatives with:
                forward mode continues through ``torch.no_grad``, and misses weights that are not read from a module.

        Returns:
            ``[K, K]``, float64, on the outputs' device.

        Raises:
            DataError: the pass gives another loss when it is run again.
            UnsupportedError: an operator of the model has neither a forward-mode nor a second derivative.
        """
        for way in WAYS[WAYS.index(self.way) :]:
            if way == "together" and len(directions) == 1:
                continue
            try:
                outputs, columns = _FUNCTIONS[way](model, parameters, record, directions)
            except (NotImplementedError, RuntimeError) as error:
                if way != WAYS[-1]:
                    continue
                raise UnsupportedError(
                    "The exact quadratic model needs the derivative of the outputs along a direction, and an operator "
                    f"of the model has neither a forward-mode nor a second derivative ({error}). Use momentum=0.9 (a "
                    "fixed rate) and trust=Constant(λ)."
                ) from error
            except Exception:  # the model may refuse tensors that are no parameters; its own errors are raised below
                if way == WAYS[-1]:
                    raise
                continue
            if way == WAYS[-1]:
                _require_same(outputs, record, likelihood)
            elif not (_same(outputs, record) and _consistent(outputs, columns, record, likelihood, slopes)):
                continue
            if len(directions) > 1:
                self.way = way
            rows = [likelihood.hessian_product(outputs, column, record.targets) for column in columns]
            products = [torch.stack([(left * right).sum(dtype=torch.float64) for right in rows]) for left in columns]
            matrix = torch.stack(products) / record.count
            return (matrix + matrix.mT) / 2
        raise AssertionError("the last way returns or raises")


def _same(outputs: Tensor, record: ForwardPass) -> bool:
    """Whether the outputs are those of the first run, number by number; other dropout masks are noticed."""
    assert record.values is not None
    scale = record.values.abs().max()
    return bool((outputs - record.values).abs().max() <= _tolerance(outputs, record) * scale)


def _consistent(
    outputs: Tensor,
    columns: Sequence[Tensor],
    record: ForwardPass,
    likelihood: Likelihood,
    slopes: Sequence[float] | None,
) -> bool:
    """Whether the outputs' derivatives make the loss change as its gradient says."""
    if slopes is None:
        return True
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        loss = -likelihood.log_prob(leaf, record.targets).sum(dtype=torch.float64) / record.count
        (gradient,) = torch.autograd.grad(loss, leaf)
    tolerance = _tolerance(outputs, record)
    for column, slope in zip(columns, slopes, strict=True):
        derivative = (gradient.double() * column).sum()
        most = tolerance * (10 * abs(slope) + gradient.norm().double() * column.norm())
        if not bool((derivative - slope).abs() <= most):
            return False
    return True


def _tolerance(outputs: Tensor, record: ForwardPass) -> float:
    """Of accumulated rounding, generously, relative to the largest number or to the norms."""
    if record.low_precision or outputs.dtype not in (torch.float32, torch.float64):
        return 0.05
    return 1e-3 if outputs.dtype == torch.float32 else 1e-6


def _require_same(outputs: Tensor, record: ForwardPass, likelihood: Likelihood) -> None:
    """DataError if the loss of the second run is not that of the first."""
    assert record.loss is not None
    again = -likelihood.log_prob(outputs, record.targets).sum(dtype=torch.float64) / record.count
    tolerance = 1e-3 if outputs.dtype in (torch.float32, torch.float64) and not record.low_precision else 0.1
    if not bool((again - record.loss).abs() <= tolerance * (1 + record.loss.abs())):
        raise DataError(
            f"The model gave another loss when it was run again on the same batch ({float(record.loss):.6g}, then "
            f"{float(again):.6g}). The function given to step must not draw a new batch, and randomness must come from "
            "torch's, NumPy's or Python's global generators; otherwise use momentum=0.9 with trust=kf.Constant(λ)."
        )


def _together(
    model: nn.Module, parameters: Mapping[str, Tensor], record: ForwardPass, directions: Sequence[Vector]
) -> tuple[Tensor, list[Tensor]]:
    """By forward mode along all directions; anything that depends on none of them is computed once."""
    _warm_up()
    names = dict.fromkeys(name for direction in directions for name in direction)
    primals = {name: parameters[name].detach() for name in names}
    stacked = {
        name: torch.stack([d[name].to(p.dtype) if name in d else torch.zeros_like(p) for d in directions])
        for name, p in primals.items()
    }

    def outputs(given: Mapping[str, Tensor]) -> Tensor:
        with _in_place_of_parameters(model, {id(parameters[name]): tensor for name, tensor in given.items()}):
            return record.forward()

    def along(direction: Vector) -> tuple[Tensor, Tensor]:
        primal, tangent, *_ = torch.func.jvp(outputs, (primals,), (direction,))
        return primal, tangent

    with torch.no_grad(), record.repeating(), sdpa_kernel(SDPBackend.MATH):
        batched = torch.vmap(along, out_dims=(None, 0), randomness="same")  # pyright: ignore[reportArgumentType]
        primal, tangents = batched(stacked)
    return primal, list(tangents)


def _apart(
    model: nn.Module, parameters: Mapping[str, Tensor], record: ForwardPass, directions: Sequence[Vector]
) -> tuple[Tensor, list[Tensor]]:
    """By forward mode along one direction after the other."""
    _warm_up()
    outputs, columns = record.values, []
    for direction in directions:
        # The fused kernels have no forward mode.
        with torch.no_grad(), record.repeating(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals = {
                id(parameters[name]): forward_ad.make_dual(parameters[name].detach(), t.to(parameters[name].dtype))
                for name, t in direction.items()
            }
            with _in_place_of_parameters(model, duals):
                outputs, tangent = forward_ad.unpack_dual(record.forward())
            columns.append(torch.zeros_like(outputs) if tangent is None else tangent)
    assert outputs is not None
    return outputs, columns


def _backward(
    model: nn.Module, parameters: Mapping[str, Tensor], record: ForwardPass, directions: Sequence[Vector]
) -> tuple[Tensor, list[Tensor]]:
    """``J d`` as the derivative of ``Jᵀ u`` with respect to u."""
    with torch.enable_grad(), record.repeating(), sdpa_kernel(SDPBackend.MATH):
        outputs = record.forward()
        dummy = torch.zeros_like(outputs, requires_grad=True)
        names = dict.fromkeys(name for direction in directions for name in direction)
        slopes = torch.autograd.grad(
            outputs, [parameters[name] for name in names], dummy, create_graph=True, allow_unused=True
        )
        columns = []
        for direction in directions:
            pairs = [
                (slope, direction[name])
                for name, slope in zip(names, slopes, strict=True)
                if slope is not None and name in direction
            ]
            tangent = None
            if pairs:
                (tangent,) = torch.autograd.grad(
                    [slope for slope, _ in pairs],
                    dummy,
                    [d.to(slope.dtype) for slope, d in pairs],
                    retain_graph=True,
                    allow_unused=True,
                )
            columns.append(torch.zeros_like(outputs) if tangent is None else tangent.detach())
    return outputs.detach(), columns


_FUNCTIONS = {"together": _together, "apart": _apart, "backward": _backward}


@contextmanager
def _in_place_of_parameters(model: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Other tensors in place of parameters, by ``id``."""
    with ExitStack() as stack:
        for module in model.modules():
            if module._parameters:
                own = {name: tensors.get(id(p), p) for name, p in module._parameters.items()}
                stack.enter_context(replace_contents([module._parameters], own))  # pyright: ignore[reportArgumentType]
        yield


def _once() -> Callable[[], None]:
    warm = False

    def warm_up() -> None:
        # At the first dual tensor of a process torch compiles its decompositions, with warnings about itself.
        nonlocal warm
        if not warm:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch.jit.*")
                with forward_ad.dual_level():
                    forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
            warm = True

    return warm_up


_warm_up = _once()
