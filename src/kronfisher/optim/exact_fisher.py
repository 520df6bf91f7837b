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
from kronfisher.distributed import Ranks
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
        ranks: each with a batch of its own, the mean over which is meant; all of them take the same way.
    """

    way: str = WAYS[0]
    ranks: Ranks | None = None

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
            slopes: ``∇hᵀ dᵢ`` with the gradient of this pass's loss (or the mean of all ranks), where that is known, to
                check derivatives with: forward mode continues through ``torch.no_grad``, and misses weights that are
                not read from a module.

        Returns:
            ``[K, K]``, float64, on the outputs' device.

        Raises:
            DataError: the pass gives another loss when it is run again.
            UnsupportedError: an operator of the model has neither a forward-mode nor a second derivative.
        """
        for way in WAYS[WAYS.index(self.way) :]:
            if way == "together" and len(directions) == 1:
                continue
            options = model, parameters, record, directions, likelihood, slopes is not None
            trial = self._of_all_ranks(lambda way=way, options=options: _try(way, *options), len(directions))
            if trial is None or not trial.agrees(slopes):
                continue
            if len(directions) > 1:
                self.way = way
            return (trial.matrix + trial.matrix.mT) / 2
        raise AssertionError("the last way returns or raises")

    def _of_all_ranks(self, read: Callable[[], "_Trial | None"], size: int) -> "_Trial | None":
        """The mean over ranks of what each has found on its own batch; None if any of them has to try another way."""
        if self.ranks is None:
            return read()
        refusal, tolerance = None, 0.0

        def numbers() -> list[float]:
            nonlocal refusal, tolerance
            found = None
            try:
                found = read()
            except UnsupportedError as error:
                refusal = error
            if found is None:
                return [float(refusal is None), float(refusal is not None), *[0.0] * (size * size + 2 * size)]
            tolerance = found.tolerance
            return [0.0, 0.0, *(value for part in found.numbers for value in part.flatten().tolist())]

        others, refused, *sums = self.ranks.added(numbers, "solves a quadratic model")
        if refused:
            raise refusal or UnsupportedError(
                "Another rank has no exact quadratic model, of its batch or of an operator there: its warning says why."
            )
        if others:
            return None
        means = torch.tensor(sums, dtype=torch.float64) / self.ranks.size
        matrix, changes, sizes = means.split([size * size, size, size])
        return _Trial(matrix.view(size, size), changes, sizes, tolerance)


@dataclass(frozen=True)
class _Trial:
    """What one way has found, in float64.

    Attributes:
        matrix: ``dᵢᵀ F dⱼ`` ``[K, K]``, symmetric up to rounding.
        changes: the derivative of the loss along each direction ``[K]``; zero where it is not asked for.
        sizes: the numbers whose rounding is in these ``[K]``.
        tolerance: of rounding, relative to `sizes`.
    """

    matrix: Tensor
    changes: Tensor
    sizes: Tensor
    tolerance: float

    @property
    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """All but the tolerance."""
        return self.matrix, self.changes, self.sizes

    def agrees(self, slopes: Sequence[float] | None) -> bool:
        """Whether the outputs' derivatives make the loss change as its gradient says."""
        if slopes is None:
            return True
        truth = self.changes.new_tensor(slopes)
        return bool(((self.changes - truth).abs() <= self.tolerance * (10 * truth.abs() + self.sizes)).all())


def _try(
    way: str,
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    record: ForwardPass,
    directions: Sequence[Vector],
    likelihood: Likelihood,
    derive: bool,
) -> _Trial | None:
    """What one way finds; None if it is not right for the model. The last one raises. `derive`: the loss as well."""
    last = way == WAYS[-1]
    try:
        outputs, columns = _FUNCTIONS[way](model, parameters, record, directions)
    except (NotImplementedError, RuntimeError) as error:
        if not last:
            return None
        raise UnsupportedError(
            "The exact quadratic model needs the derivative of the outputs along a direction, and an operator "
            f"of the model has neither a forward-mode nor a second derivative ({error}). Use momentum=0.9 (a "
            "fixed rate) and trust=Constant(λ)."
        ) from error
    except Exception:  # the model may refuse tensors that are no parameters; its own errors are raised below
        if last:
            raise
        return None
    if last:
        _require_same(outputs, record, likelihood)
    elif not _same(outputs, record):
        return None
    rows = [likelihood.hessian_product(outputs, column, record.targets) for column in columns]
    products = [torch.stack([(left * right).sum(dtype=torch.float64) for right in rows]) for left in columns]
    matrix = torch.stack(products) / record.count
    changes = sizes = matrix.new_zeros(len(columns))
    if derive:
        changes, sizes = _changes(outputs, columns, record, likelihood)
    return _Trial(matrix, changes, sizes, _tolerance(outputs, record))


def _same(outputs: Tensor, record: ForwardPass) -> bool:
    """Whether the outputs are those of the first run, number by number; other dropout masks are noticed."""
    assert record.values is not None
    scale = record.values.abs().max()
    return bool((outputs - record.values).abs().max() <= _tolerance(outputs, record) * scale)


def _changes(
    outputs: Tensor, columns: Sequence[Tensor], record: ForwardPass, likelihood: Likelihood
) -> tuple[Tensor, Tensor]:
    """The derivatives of the loss along directions, by those of the outputs; and what rounding is relative to."""
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        loss = -likelihood.log_prob(leaf, record.targets).sum(dtype=torch.float64) / record.count
        (gradient,) = torch.autograd.grad(loss, leaf)
    changes = torch.stack([(gradient.double() * column).sum() for column in columns])
    return changes, torch.stack([gradient.norm().double() * column.norm() for column in columns])


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
