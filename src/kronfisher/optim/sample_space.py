"""Natural gradient in the space of samples: ``δ = M⁻¹Jᵀ(J M⁻¹ Jᵀ + Nλ)⁻¹ u`` with the exact matrix of the batch."""

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kronfisher.capture.jacobian import Jacobian
from kronfisher.distributed import ProcessGroup, ranks_of
from kronfisher.errors import DataError, NumericalError, NumericalWarning, UnsupportedError
from kronfisher.fisher.parameters import fingerprint, trainable, unwrapped
from kronfisher.likelihoods import Likelihood, Residuals
from kronfisher.likelihoods.checks import sum_per_example
from kronfisher.linalg import promote
from kronfisher.optim.forward_backward import require_outputs
from kronfisher.optim.kinds import Kinds
from kronfisher.optim.replay import Snapshot
from kronfisher.optim.sample_ranks import RowsOfRanks
from kronfisher.optim.sample_steps import Follower, Rows, Thinned
from kronfisher.optim.watch import require_one_process, require_rate

__all__ = ["SampleSpaceGradient"]

_MISSING: Any = object()
ROWS_A_WEIGHT = 4  # of a term or column, beyond which rows are drawn
_OPTIMISM = 0.5  # curvature along a step by its own rows over that by all, below which they are too few
_HALVINGS = 12
_FIELDS = 16  # residuals of one term at every point that are read one column after the other; each passes the graph
_PROBED, _BENT = 0.1, 0.375  # share of a step at which its curvature is probed; the longest second-order part


class SampleSpaceGradient(torch.optim.Optimizer):
    """What ``kf.NaturalGradient(model, likelihood, fit="gram")`` is: steps with the exact Fisher matrix of the batch.

    ``δ = μδ₀ + M⁻¹Jᵀ(J M⁻¹ Jᵀ + Nλ)⁻¹(u − μ J δ₀)`` (SPRING: Goldshlager, Abrahamsen & Lin 2024, arXiv:2401.10190),
    with the last step δ₀, J the rows of the batch under exact columns, u the gradients at the outputs in their terms,
    and M, diagonal and of mean one, the root of each weight's own curvature. With observed labels the rows are the
    examples' own gradients, and u ones. For residuals it is a Levenberg-Marquardt step. It costs ``K P min(K, P)``
    multiplications for K rows and P parameters. Of a column of residuals, or of outputs, with more than 4 P
    numbers, so many have rows, drawn anew in every step, and twice as many from then on where these see less than half
    of the curvature along a step. The gradient is always that of all.

    λ follows what is left of the loss. The step is halved until the loss falls, which is evaluated at the same random
    numbers; where no step helps, weights stay as they were and λ grows.

    Args:
        model: any module whose examples are independent.
        likelihood: such as ``kf.Residuals(...)`` or ``kf.Gaussian()``.
        lr: multiplies the step that is tried first, of which 1.0 is the whole; schedulers may change it, also to zero.
        momentum: μ.
        damping: the factor of λ to begin with.
        labels: "exact", or "observed" for the empirical Fisher.
        params: the parameters to train, several modules' too; None: all of the model that require a gradient.
        group: the processes that train together, each on a batch of its own; they make the step of all rows.

    Raises:
        ValueError: an option is out of range, or has no meaning here.

    Example:
        >>> import torch, kronfisher as kf
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
        >>> x = torch.linspace(0, 1, 40).double()[:, None].requires_grad_()
        >>> def residuals():  # u' = -u, u(0) = 1
        ...     u = model(x)
        ...     (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        ...     return {"equation": (slope + u)[:, 0], "start": u[0] - 1}
        >>> optimizer = kf.NaturalGradient(model, kf.Residuals({"equation": 1.0, "start": 1.0}), fit="gram")
        >>> losses = [float(optimizer.step(residuals)) for _ in range(30)]
        >>> losses[-1] < 1e-6 * losses[0]
        True
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        lr: float = 1.0,
        momentum: float = 0.9,
        damping: float = 0.1,
        labels: Literal["exact", "observed"] = "exact",
        params: Iterable[nn.Parameter] | None = None,
        group: ProcessGroup = None,
    ) -> None:
        if group is None:
            require_one_process()
        require_rate(lr, stacklevel=4)
        if labels not in ("exact", "observed"):
            raise ValueError(
                f"labels={labels!r}: the gradient is not in the range of sampled rows, and what is outside would be "
                "divided by λ; use labels='exact' or 'observed'."
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum!r}: use a number in [0, 1).")
        if not 0 < damping < math.inf:
            raise ValueError(f"damping={damping!r}: the factor of λ must be positive and finite.")
        if not isinstance(likelihood, Likelihood):
            raise TypeError(f"likelihood={likelihood!r}: pass an instance such as kf.Residuals(...).")
        self.likelihood, self.momentum, self.labels = likelihood, momentum, labels
        self.model = unwrapped(model)
        chosen = list(trainable(self.model).values() if params is None else params)
        if odd := [p for p in chosen if not isinstance(p, Tensor)]:
            raise TypeError(f"params holds a {type(odd[0]).__name__}: pass parameters; groups have no meaning here.")
        chosen = list(dict.fromkeys(chosen))
        super().__init__(chosen, {"lr": lr})
        names = {id(p): name for name, p in self.model.named_parameters()}
        self._parameters = {names.get(id(p), f"parameter {k}"): p for k, p in enumerate(chosen)}
        self._jacobian = Jacobian(self._parameters)
        device = chosen[0].device if chosen else torch.device("cpu")
        self._ranks = RowsOfRanks(ranks_of(group), model, device)
        self.follower = Follower(damping)
        self.bends = True
        self.steps = 0
        self.damping: float | None = None
        self.step_length: float | None = None
        self._last: Tensor | None = None
        self._kinds = Kinds()
        self._warned = False
        self.rows_a_weight = ROWS_A_WEIGHT

    def step(self, closure: Callable[[], Any] | None = None, targets: Any = _MISSING) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step.

        Args:
            closure: returns the residuals by name, or the outputs. Within one step it is called several times, with the
                same random numbers and buffers of the model.
            targets: of other likelihoods than residuals.

        Returns:
            The loss before the step, detached.

        Raises:
            DataError, UnsupportedError: something does not fit; weights, λ and memory are as they were.
            NumericalError: outputs, residuals or their gradients are NaN or infinite, by the name of the term; likewise
                as they were, so that a loop may catch it and go on with other points.
        """
        self._ranks.begin()
        before, given = Snapshot(self.model), targets
        targets = None if targets is _MISSING else targets
        shapes: dict[str, Any] = {}

        def evaluated() -> Any:
            assert closure is not None
            with before.replayed(), torch.enable_grad(), self._ranks.passes():
                outputs = self._outputs(closure())
            for what, shape in _shapes(outputs).items():
                if shape != shapes.get(what, shape):
                    raise DataError(
                        f"step {self.steps}: {what} are {shapes[what]} and then {shape} within one step, in which the "
                        "closure is called several times; make it return the same points each time, or draw them by "
                        "torch's random numbers, which are repeated."
                    )
            return outputs

        def again() -> float:
            return self._ranks.loss(lambda: float(self._loss(evaluated(), targets)))

        def values() -> list[Tensor] | None:
            return self._ranks.values(lambda: self._values(evaluated(), columns))

        def batch() -> tuple[Tensor, Rows, list[Tensor]]:
            self._require(closure, given)
            assert closure is not None
            with torch.enable_grad(), self._ranks.passes():
                outputs = self._outputs(closure())
                shapes.update(_shapes(outputs))
                return self._rows(outputs, targets)

        (loss, rows, columns), drawn = self._ranks.checked(batch, lambda: self.rows_a_weight)
        while len(set(drawn)) > 1:  # some rank needs more of its rows
            self.rows_a_weight = max(drawn)
            with before.replayed():
                (loss, rows, columns), drawn = self._ranks.checked(batch, lambda: self.rows_a_weight)
        whole_loss, rows = self._ranks.together(self._facts(), float(loss), rows)
        old = [p.detach().clone() for p in self._parameters.values()]
        try:
            with torch.no_grad():
                self._move(whole_loss, rows, old, again, values if self.bends else None)
        except BaseException:
            self._set(old, None, 0.0)
            raise
        self.steps += 1
        return loss

    def _move(
        self,
        loss: float,
        rows: Rows,
        old: list[Tensor],
        again: Callable[[], float],
        values: Callable[[], list[Tensor] | None] | None,
    ) -> None:
        """Make the longest step that makes the loss fall; without memory if none along it does."""
        mean, rate = rows.size / rows.count / rows.matrix.shape[1], self._rate()
        left = 0.5 * float(rows.vector.square().sum()) / rows.count
        self.damping = self.follower.damping(left, mean)
        if self.damping == 0 or rate == 0:
            self.step_length = 0.0
            return
        solve, drawn = rows.solver(self.damping), self.rows_a_weight
        for momentum in (self.momentum, 0.0) if self._last is not None else (0.0,):
            last = 0.0 if self._last is None else momentum * self._last
            aim = rows.vector - (rows.matrix @ last if isinstance(last, Tensor) else 0.0)
            step = last + (solve(aim) if rows.rest is None else solve(aim, rows.rest))
            if not bool(torch.isfinite(step).all()):
                raise NumericalError(
                    f"step {self.steps}: the step is not finite though residuals and gradients are; nothing was "
                    "changed. Give a larger damping, or train in float64."
                )
            change = rows.matrix @ step
            predicted = rate * (rows.slope(step, change) - 0.5 * rate * float(change @ change)) / rows.count
            bend = self._bend(rows, step, change, old, values, solve) if values is not None else None
            length = self._length(loss, step, bend, old, again)
            if length is not None:
                scale, found = length
                self._last, self.step_length = scale / rate * step, scale  # the memory is of steps before lr
                self.follower.told((loss - found) / predicted if scale == rate and predicted > 0 else 0.0)
                return
        self._set(old, None, 0.0)
        self._last, self.step_length = None, 0.0
        if self.rows_a_weight == drawn:  # or it was the rows' fault, and not that of λ
            self.follower.told(-1.0)
            self.follower.told(-1.0)

    def _bend(
        self,
        rows: Rows,
        step: Tensor,
        change: Tensor,
        old: list[Tensor],
        values: Callable[[], list[Tensor] | None],
        solve: Callable[[Tensor], Tensor],
    ) -> Tensor | None:
        """The second-order part of a step, by which it follows a curved valley (Transtrum & Sethna 2012), or None.

        The second derivative of residuals or outputs along the step comes from one more evaluation of them.
        """
        self._set(old, step, _PROBED)
        if rows.values is None or (found := values()) is None:
            return None
        moved = [there - here for there, here in zip(found, rows.values, strict=True)]
        curvature = sum(float(part.square().sum()) for part in moved) / _PROBED**2
        if rows.rest is not None and float(change @ change) < _OPTIMISM * curvature:
            self.rows_a_weight *= 2
        second = (_together([rows.thin.of(part) for part in moved]) + _PROBED * change) * (2 / _PROBED**2)
        bend = 0.5 * solve(second)
        fine = bool(torch.isfinite(bend).all()) and float(bend.norm()) <= _BENT * float(step.norm())
        return bend if fine else None

    def _length(
        self, loss: float, step: Tensor, bend: Tensor | None, old: list[Tensor], again: Callable[[], float]
    ) -> tuple[float, float] | None:
        """The first of lr, lr/2, lr/4 … by which the loss falls, or half of it where that is better still; its loss."""

        def at(scale: float) -> float:
            self._set(old, step if bend is None else step + scale * bend, scale)
            return again()

        rate = scale = self._rate()
        for _ in range(_HALVINGS):
            if (found := at(scale)) < loss:
                if scale < rate:
                    if (shorter := at(scale / 2)) < found:
                        return scale / 2, shorter
                    at(scale)
                return scale, found
            scale /= 2
        return None

    def _rate(self) -> float:
        """What schedulers make of lr; there is one group."""
        return float(self.param_groups[0]["lr"])

    def _require(self, closure: Any, targets: Any) -> None:
        """DataError or UnsupportedError unless these and the parameters are such that a step can be made."""
        if not callable(closure):
            raise DataError('fit="gram" evaluates the loss again: call step(lambda: residuals()) or step(f, targets).')
        if isinstance(self.likelihood, Residuals) and targets is not _MISSING and targets is not None:
            raise DataError("residuals hold their own targets: call step(lambda: residuals()) without further ones.")
        self._kinds.require(self._parameters)
        if half := [n for n, p in self._parameters.items() if p.dtype not in (torch.float32, torch.float64)]:
            raise UnsupportedError(
                f"{half[0]} is {self._parameters[half[0]].dtype}: fit='gram' solves with the rows of a batch, whose "
                "squares half precision cannot hold. Keep the weights in float32 or float64."
            )

    def _facts(self) -> dict[str, Any]:
        """What has to be the same on all ranks."""
        if self._ranks.ranks is None:
            return {}
        facts = {"the number of the step": self.steps, "the likelihood": repr(self.likelihood), "labels": self.labels}
        facts |= {"momentum": self.momentum, "the factor of λ": self.follower.factor, "lr": self._rate()}
        return facts | {f"parameter {n}": fingerprint({n: p})[:12] for n, p in self._parameters.items()}

    # The batch --------------------------------------------------------------------------------------------------------

    def _outputs(self, answer: Any) -> Any:
        """Residuals by name, or the tensor of outputs."""
        return answer if isinstance(self.likelihood, Residuals) else require_outputs(answer)

    def _loss(self, outputs: Any, targets: Any) -> Tensor:
        if isinstance(self.likelihood, Residuals):
            return self.likelihood.loss(outputs).detach()
        return -self.likelihood.log_prob(promote(outputs.detach()), targets).mean()

    def _rows(self, outputs: Any, targets: Any) -> tuple[Tensor, Rows, list[Tensor]]:
        """The loss, the rows of the batch, and the exact columns of outputs."""
        likelihood = self.likelihood
        if isinstance(likelihood, Residuals):
            numbers = self._terms(outputs)
            own = [term.detach() for term in numbers.values()]
            return likelihood.loss(outputs).detach(), self._thinned(numbers, own, 1.0, own), []
        likelihood.check(outputs, targets, f"step {self.steps}", "observed")
        if not outputs.requires_grad:
            raise UnsupportedError(
                f"step {self.steps}: the outputs have no graph to the parameters; compute them with gradients enabled, "
                "and without detach() or torch.no_grad()."
            )
        count = likelihood.count(outputs)
        loss = self._loss(outputs, targets)
        if self.labels == "observed":
            each = sum_per_example(outputs * likelihood.observed(outputs.detach(), targets))
            return loss, self._thinned({"the outputs": each}, [torch.ones_like(each)], count), []
        columns = list(likelihood.exact(outputs.detach(), targets))
        numbers = {f"the outputs along column {k}": sum_per_example(outputs * c) for k, c in enumerate(columns)}
        inside, lost = _in_terms_of(columns, likelihood.observed(outputs.detach(), targets))
        if lost and not self._warned:
            self._warned = True
            warnings.warn(
                f"step {self.steps}: {lost} of {len(outputs)} examples are left out of the step. Their outputs are so "
                "far from their targets that the curvature of their loss rounds to zero; bound or rescale the outputs, "
                "or look for wrong labels.",
                NumericalWarning,
                stacklevel=4,
            )
        own = [each.detach() for each in numbers.values()]
        return loss, self._thinned(numbers, [part.to(own[0]) for part in inside], count, own), columns

    def _thinned(
        self, numbers: Mapping[str, Tensor], vector: list[Tensor], count: float, values: list[Tensor] | None = None
    ) -> Rows:
        """The rows of numbers by what they are; of a batch with many more rows than weights, some of them.

        Only where values are known, which tell of all rows along a step whether those drawn are enough.
        """
        weights = sum(p.numel() for p in self._parameters.values())
        most = max(1, self.rows_a_weight * weights // self._ranks.size)
        thin = Thinned(sys.maxsize if values is None else most, self.steps)
        matrices, rest = [], None
        for (what, each), own in zip(numbers.items(), vector, strict=True):
            places = thin.places(len(each))
            drawn = each if places is None else each * thin.scale(len(each))
            matrices.append(self._finite(drawn, what, places))
            if places is not None:
                leaves = list(self._parameters.values())
                found = torch.autograd.grad(each, leaves, own, retain_graph=True, materialize_grads=True)
                whole = torch.cat([part.flatten() for part in found])
                if not bool(torch.isfinite(whole.sum())):
                    self._finite(each, what, None)  # says which rows
                further = whole - matrices[-1].mT @ thin.of(own).to(matrices[-1].dtype)
                rest = further if rest is None else rest + further
        matrix, parts = _together(matrices), dict(zip(numbers, map(len, matrices), strict=True))
        vector_of_rows = _together([thin.of(part) for part in vector]).to(matrix.dtype)  # weights may be more precise
        rows = Rows(matrix, vector_of_rows, count, values, rest, thin, parts)
        if rows.size == 0 and rest is not None and bool(rest.any()):  # all that matters is in rows that were not drawn
            self.rows_a_weight = sys.maxsize
            return self._thinned(numbers, vector, count, values)
        if rows.size == 0 and not any(map(self._jacobian.reached, numbers.values())):
            raise UnsupportedError(
                f"step {self.steps}: no parameter that is trained has a part in {', '.join(numbers)}. Was the optimizer"
                " made for another model, or for a copy?"
            )
        return rows

    def _values(self, outputs: Any, columns: list[Tensor]) -> list[Tensor]:
        """What the rows are derivatives of, term by term or column by column."""
        if isinstance(self.likelihood, Residuals):
            parts = list(self._terms(outputs).values())
        else:
            parts = [sum_per_example(outputs.detach() * column) for column in columns]
        return [part.detach() for part in parts]

    def _terms(self, outputs: Any) -> dict[str, Tensor]:
        """Scaled residuals by what they are; several at every point, which one forward pass may have made, apart.

        Their gradients meet in the rows of the network, and could only be followed one by one together.
        """
        assert isinstance(self.likelihood, Residuals)
        found = {}
        for name, term in self.likelihood.terms(outputs).items():
            columns = term.unflatten(0, (len(outputs[name]), -1)).unbind(1)
            if 1 < len(columns) <= _FIELDS:
                found |= {f"the residuals {name!r}, column {k}": column for k, column in enumerate(columns)}
            else:
                found[f"the residuals {name!r}"] = term
        return found

    def _finite(self, numbers: Tensor, what: str, places: Tensor | None) -> Tensor:
        """Their rows of J; NumericalError names the term and the first points whose rows are not finite."""
        try:
            J = self._jacobian.rows(numbers, places)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise DataError(
                f"step {self.steps}: the graph of {what} is gone, by a backward() on it; compute what the closure "
                "returns anew in every call."
            ) from error
        if bool(torch.isfinite(J.sum())):  # so is every number
            return J
        whole = torch.isfinite(J).all(1)
        if not bool(whole.all()):
            bad = (~whole).nonzero()[:, 0] if places is None else places[(~whole).cpu()]
            some = ", ".join(map(str, bad[:3].tolist())) + (", …" if len(bad) > 3 else "")
            raise NumericalError(
                f"step {self.steps}: gradients of {what} hold NaN or Inf in {len(bad)} of {len(J)} rows ({some}), "
                "though the values are finite; nothing was changed. Look for infinite inputs, and functions without "
                "a derivative at these points (√0, |x| to a power)."
            )
        return J

    def _set(self, old: list[Tensor], step: Tensor | None, scale: float) -> None:
        with torch.no_grad():
            start = 0
            for parameter, before in zip(self._parameters.values(), old, strict=True):
                parameter.copy_(before)
                if step is not None:
                    own = step[start : start + before.numel()].view_as(before)
                    parameter.sub_(scale * own)
                start += before.numel()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once there is one: all parameters take one step together."""
        if self.param_groups:
            raise UnsupportedError(
                "fit='gram' takes one step for all its parameters and has no groups of them; make it anew with params=."
            )
        super().add_param_group(param_group)

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The memory of the last step, by parameter, and λ's factor, besides what any optimiser has."""
        own = {"steps": self.steps, "factor": self.follower.factor, "rows": self.rows_a_weight, "last": None}
        if self._last is not None:
            sizes = [p.numel() for p in self._parameters.values()]
            parts = zip(self._parameters.items(), self._last.split(sizes), strict=True)
            own["last"] = {name: part.view_as(p) for (name, p), part in parts}
        own["dtypes"] = self._kinds.state_dict()
        return {**super().state_dict(), "sample_space": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; DataError if it is another optimiser's, or another model's."""
        rest = deepcopy(dict(state_dict))  # or two optimisers would change the same tensors
        own = rest.pop("sample_space", None)
        if own is None:
            raise DataError('this is not the state of a NaturalGradient with fit="gram".')
        last = own["last"]
        if isinstance(last, Mapping):
            there, here = ({n: list(t.shape) for n, t in every.items()} for every in (last, self._parameters))
            if odd := [name for name in {**here, **there} if here.get(name) != there.get(name)]:
                raise DataError(
                    f"this is the state of another model: its last step of {odd[0]} has shape {there.get(odd[0])}, and "
                    f"the parameter that is trained here {here.get(odd[0])}."
                )
            last = torch.cat([last[name].flatten() for name in here])
        weights = sum(p.numel() for p in self._parameters.values())
        if last is not None and last.numel() != weights:  # earlier versions kept one vector
            raise DataError(
                f"this is the state of another model: its last step has {last.numel()} weights, and {weights} "
                "are trained here."
            )
        self._kinds.load_state_dict(own.get("dtypes", {}), self._parameters)
        rate = self._rate()
        super().load_state_dict(rest)
        self.param_groups[0].setdefault("lr", rate)  # earlier versions had none
        self.steps, self.follower.factor, self.rows_a_weight = own["steps"], own["factor"], own["rows"]
        self._last = None if last is None else last.to(next(iter(self._parameters.values())).device)


def _shapes(outputs: Any) -> dict[str, list[int]]:
    """Of residuals by name, or of outputs."""
    named = {"the outputs": outputs}
    if isinstance(outputs, Mapping):
        named = {f"the residuals {name!r}": term for name, term in outputs.items()}
    return {what: list(tensor.shape) for what, tensor in named.items() if isinstance(tensor, Tensor)}


def _together(parts: list[Tensor]) -> Tensor:
    """Rows one after the other; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _in_terms_of(columns: list[Tensor], gradient: Tensor) -> tuple[list[Tensor], int]:
    """What combines an example's columns to its gradient ``[N]`` each, the least of it; of how many nothing does."""
    roots = torch.stack([column.reshape(len(column), -1) for column in columns], 2)  # [N, outputs, V]
    gradient = gradient.reshape(len(gradient), -1)
    scale = roots.abs().amax(1, keepdim=True).clamp_min(torch.finfo(roots.dtype).tiny)
    units = roots / scale
    squares = units.mT @ units
    lengths = squares.diagonal(0, 1, 2)
    if not bool((squares - torch.diag_embed(lengths)).any()):  # columns at right angles, as most likelihoods have them
        along = (units.mT @ gradient[:, :, None])[:, :, 0]
        inside = (along / lengths / scale[:, 0]).where(lengths > 0, 0.0)
    else:
        inside = torch.linalg.lstsq(roots, gradient[:, :, None], driver="gelsd").solution[:, :, 0]
    outside = gradient - (roots @ inside[:, :, None])[:, :, 0]
    lost = outside.square().sum(1) > 0.25 * gradient.square().sum(1)
    return list(inside.mT), int(lost.sum())
