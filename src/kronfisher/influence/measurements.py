"""Measurements of a network's outputs, and their gradients in the form in which likelihoods send theirs backwards."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from math import inf
from typing import Any

import torch
from torch import Tensor

from kronfisher.errors import DataError, UnsupportedError, require_integer
from kronfisher.likelihoods import Bernoulli, Categorical, Draws, Likelihood, Weighted
from kronfisher.likelihoods.checks import check_outputs, sum_per_example
from kronfisher.linalg import promote

__all__ = ["Measured", "Measurement", "measured"]

Function = Callable[[Tensor, Any], Tensor]
Measurement = str | tuple[str, int] | Function
"""``"loss"``, ``"margin"``, ``"logit"`` of the target, ``("logit", class)``, or a function of (outputs, targets)."""


@dataclass(frozen=True, eq=False)
class Measured(Likelihood):
    """A likelihood by name only: what it sends backwards is the gradient of a measurement, one number an example.

    Attributes:
        base: whose positions count.
        function: ``function(outputs, targets) -> [n]``, differentiable with respect to the outputs.
        name: of the measurement, for messages.
        targeted: whether the measurement cannot be taken without targets.
    """

    base: Likelihood
    function: Function
    name: str
    targeted: bool

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError("a measurement is no probability")

    def sample(self, outputs: Tensor, draws: Draws) -> Tensor:
        raise NotImplementedError("a measurement is no probability")

    def positions(self, outputs: Tensor, targets: Any = None) -> Tensor | None:
        """None: what counts in a measurement is the measurement's own affair."""
        return None

    def joint_dim(self, outputs: Tensor, targets: Any = None) -> int | None:
        """That of the base."""
        return self.base.joint_dim(outputs, targets)

    def observed(self, outputs: Tensor, targets: Any) -> Tensor:
        """The gradient of every example's measurement with respect to its own outputs.

        Raises:
            DataError: the function does not give one number for each example, or mixes examples.
        """
        with torch.enable_grad():
            leaf = promote(outputs.detach()).requires_grad_()
            values = self.function(leaf.clone(), targets)  # what it does in place is its own affair
            if not isinstance(values, Tensor) or values.shape != leaf.shape[:1]:
                found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise DataError(
                    f"measurement={self.name}: it must give one number for each of the {len(leaf)} queries, "
                    f"[{len(leaf)}]; found {found}."
                )
            gradient = self._gradient(values, leaf, torch.ones_like(values))
            if len(leaf) > 1:
                self._require_apart(values, leaf, gradient)
        return gradient.to(outputs.dtype)

    def _gradient(self, values: Tensor, leaf: Tensor, weights: Tensor) -> Tensor:
        """That of a weighted sum of the values; DataError if there is none."""
        found = None
        if values.requires_grad:
            (found,) = torch.autograd.grad(values, leaf, weights, retain_graph=True, allow_unused=True)
        if found is None:
            raise DataError(
                f"measurement={self.name}: it does not depend on the outputs of the model, or not by operators that "
                "have a derivative."
            )
        return found

    def _require_apart(self, values: Tensor, leaf: Tensor, gradient: Tensor) -> None:
        """DataError if the value of a query depends on other queries, whose weights then reach its gradient."""
        weights = 2.0 ** (torch.arange(len(values), device=values.device) % 7)
        weighted = self._gradient(values, leaf, weights.to(values.dtype))
        expected = gradient * weights.to(gradient.dtype).reshape(-1, *[1] * (gradient.dim() - 1))
        if bool(((weighted - expected).abs() > 1e-3 * expected.abs().max()).any()):
            raise DataError(
                f"measurement={self.name}: it mixes the queries of a batch, so that scores would depend on which are "
                "together. Give each query a value of its own outputs alone."
            )

    def check(self, outputs: Tensor, targets: Any, where: str = "batch 0", labels: str = "sampled") -> None:
        """Outputs as always; targets as the base checks them, where the measurement needs them."""
        if self.targeted and targets is None:
            raise DataError(
                f"{where}: measurement={self.name} needs the targets of the queries, found none; give "
                "(inputs, targets), or a measurement of the outputs alone, such as ('logit', 0)."
            )
        if self.targeted:
            self.base.check(outputs, targets, where, "observed")
        else:
            check_outputs(outputs, f"measurement={self.name}", where)


def measured(measurement: Measurement, likelihood: Likelihood) -> Likelihood:
    """What sends the gradient of a measurement backwards.

    Raises:
        ValueError: there is no such measurement.
        UnsupportedError: the likelihood has none of that name.
    """
    if measurement == "loss":
        return likelihood
    if callable(measurement):
        _require_two_arguments(measurement)
        return Measured(likelihood, measurement, getattr(measurement, "__name__", "function"), False)
    if measurement == "margin":
        return Measured(likelihood, _margin(likelihood), "'margin'", True)
    if measurement == "logit":
        return Measured(likelihood, _target_logit(likelihood), "'logit'", True)
    if isinstance(measurement, tuple) and len(measurement) == 2 and measurement[0] == "logit":
        chosen = require_integer(
            "measurement=('logit', class) with class",
            measurement[1],
            -inf,
            "give the place of a logit, an integer",
        )
        return Measured(likelihood, _logit(likelihood, chosen), repr(measurement), False)
    raise ValueError(
        f"measurement={measurement!r}: use 'loss', 'margin', 'logit', ('logit', class), or a function of "
        "(outputs, targets) that gives one number for each example."
    )


def _require_two_arguments(function: Function) -> None:
    """ValueError if a function cannot be called with outputs and targets."""
    try:
        call = signature(function)
    except (TypeError, ValueError):  # of some built-in functions nothing is known
        return
    try:
        call.bind(None, None)
    except TypeError as error:
        name = getattr(function, "__name__", "function")
        raise ValueError(
            f"measurement={name}{call}: it is called with (outputs, targets), whether it needs the targets or not "
            f"({error})."
        ) from None


def _plain(likelihood: Likelihood, name: str) -> Categorical | Bernoulli:
    """The likelihood of classes inside."""
    inner = likelihood.base if isinstance(likelihood, Weighted) else likelihood
    if not isinstance(inner, Categorical | Bernoulli):
        raise UnsupportedError(
            f"measurement={name}: {type(inner).__name__} has no classes. Use 'loss', or a function of "
            "(outputs, targets) that gives one number for each example."
        )
    return inner


def _labels(likelihood: Likelihood, targets: Any) -> Tensor:
    return targets[0] if isinstance(likelihood, Weighted) else targets


def _of_classes(likelihood: Categorical, outputs: Tensor, targets: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with the classes last, the target's class, and whether the position counts."""
    if targets.is_floating_point():
        raise DataError(f"measurement={name}: it needs class indices as targets, found {targets.dtype}.")
    index = targets.long()
    counts = index != likelihood.ignore_index
    logits = promote(outputs).movedim(likelihood.joint_dim(outputs, targets), -1)
    return logits, index.where(counts, 0).unsqueeze(-1), counts


def _margin(likelihood: Likelihood) -> Function:
    """``log p / (1 − p)`` of the target, summed over the positions of an example that count."""
    inner = _plain(likelihood, "'margin'")

    def margin(outputs: Tensor, targets: Any) -> Tensor:
        targets = _labels(likelihood, targets)
        if isinstance(inner, Bernoulli):
            return sum_per_example(promote(outputs) * (2 * targets.to(promote(outputs).dtype) - 1))
        logits, index, counts = _of_classes(inner, outputs, targets, "'margin'")
        own = logits.gather(-1, index).squeeze(-1)
        others = logits.scatter(-1, index, -torch.inf).logsumexp(-1)
        return sum_per_example((own - others).where(counts, 0))

    return margin


def _target_logit(likelihood: Likelihood) -> Function:
    """The logit of the target, summed over the positions of an example that count."""
    inner = _plain(likelihood, "'logit'")

    def logit(outputs: Tensor, targets: Any) -> Tensor:
        targets = _labels(likelihood, targets)
        if isinstance(inner, Bernoulli):
            return sum_per_example(promote(outputs) * targets.to(promote(outputs).dtype))
        logits, index, counts = _of_classes(inner, outputs, targets, "'logit'")
        return sum_per_example(logits.gather(-1, index).squeeze(-1).where(counts, 0))

    return logit


def _logit(likelihood: Likelihood, chosen: int) -> Function:
    """The logit of one class, summed over all positions of an example."""
    inner = _plain(likelihood, f"('logit', {chosen})")

    def logit(outputs: Tensor, targets: Any) -> Tensor:
        outputs = promote(outputs)
        if isinstance(inner, Bernoulli):
            outputs, axis = outputs.unsqueeze(-1).flatten(1), 1
        else:
            axis = inner.joint_dim(outputs, _labels(likelihood, targets) if targets is not None else None)
        size = outputs.shape[axis]
        if not -size <= chosen < size:
            raise DataError(f"measurement=('logit', {chosen}): the model has {size} of them.")
        return sum_per_example(outputs.select(axis, chosen))

    return logit
