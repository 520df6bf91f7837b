"""Residuals of differential equations, of data, of boundary conditions: terms of squares under their own weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from kronfisher.errors import NumericalError, UnsupportedError
from kronfisher.likelihoods.checks import fail
from kronfisher.likelihoods.draws import Draws
from kronfisher.likelihoods.likelihood import Likelihood
from kronfisher.linalg import promote

__all__ = ["Residuals"]


@dataclass(frozen=True, eq=False)
class Residuals(Likelihood):
    """Named residuals that are to vanish; the loss is ``½ Σ_terms w · mean r²``, and one evaluation counts as one.

    The model's outputs are a mapping from the names to tensors ``[n, ...]``, one row a point and as many points as each
    term likes. They may hold derivatives of networks by their inputs, several networks, physical constants that are
    trained, or data. With `noise` in place of weights they are normal with standard deviation σ around zero, and the
    log likelihood is ``−½ Σ r²/σ²``, as posteriors need it.

    Elsewhere in the library the terms are one vector of scaled residuals ``r √(w/n)`` or ``r/σ``, term by term.

    Args:
        weights: name → w, positive.
        noise: name → σ, positive; one of both is given.

    Raises:
        ValueError: there are no terms, both or neither are given, or a number is not positive and finite.

    Example:
        >>> likelihood = Residuals({"equation": 1.0, "boundary": 4.0})
        >>> first, second = (torch.tensor(r, requires_grad=True) for r in ([1.0, 3.0], [1.0]))
        >>> likelihood.loss({"equation": first, "boundary": second})  # ½ (1 · 5 + 4 · 1)
        tensor(4.5000, grad_fn=<MulBackward0>)
    """

    weights: Mapping[str, float] | None = None
    noise: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        given = self.weights if self.noise is None else self.noise
        if (self.weights is None) == (self.noise is None) or not given:
            raise ValueError("Residuals takes weights={name: w}, or noise={name: σ}, with at least one name.")
        for name, number in given.items():
            if not isinstance(number, Real | Tensor) or not (number > 0 and number < float("inf")):
                raise ValueError(f"Residuals: {name!r} has {number!r}; weights and σ must be positive and finite.")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the terms, in order."""
        given = self.weights if self.noise is None else self.noise
        assert given is not None
        return tuple(given)

    def terms(self, outputs: Any, where: str = "residuals") -> dict[str, Tensor]:
        """Name → scaled residuals ``[n·…]``, with their graphs.

        Raises:
            DataError: names are missing or unknown, or a term is empty, complex, or no tensor with one row a point.
            UnsupportedError: a term has no graph.
            NumericalError: a term is not finite.
        """
        if not isinstance(outputs, Mapping):
            fail(where, f"Residuals needs a mapping of {list(self.names)}, found {type(outputs).__name__}", _REMEDY)
        if odd := set(outputs) ^ set(self.names):
            fail(where, f"the residuals are {list(outputs)}, and Residuals was given {list(self.names)}", 
                 f"give each of them at every step (differing: {', '.join(sorted(map(str, odd)))})")  # fmt: skip
        found = {name: self._term(name, outputs[name], where) for name in self.names}
        if lost := [repr(name) for name in self.names if not outputs[name].requires_grad]:
            raise UnsupportedError(
                f"{where}: the residuals {', '.join(lost)} have no graph to the parameters; compute them with "
                "gradients enabled, derivatives with create_graph=True, and nothing with detach() or torch.no_grad(). "
                "Leave out what does not depend on anything that is trained."
            )
        return found

    def joined(self, outputs: Any, where: str = "residuals") -> Tensor:
        """All scaled residuals ``[K]``, term by term; as `terms`."""
        first, *others = self.terms(outputs, where).values()
        return torch.cat([first, *others]) if others else first  # alone, its points are seen to stay apart

    def loss(self, outputs: Any) -> Tensor:
        """``½ Σ_terms w · mean r²``, or ``½ Σ r²/σ²``; differentiable."""
        return 0.5 * self.joined(outputs).square().sum()

    def count(self, outputs: Tensor) -> float:
        """One evaluation."""
        return 1.0

    def log_prob(self, outputs: Tensor, targets: Any) -> Tensor:
        """``−½ r²`` of every scaled residual, ``[K]``."""
        return -0.5 * promote(outputs).square()

    def excess(self, outputs: Tensor, targets: Any) -> Tensor:
        """``½ r²`` of every scaled residual, ``[K]``."""
        return 0.5 * promote(outputs.detach()).square()

    def labelled(self, targets: Any) -> bool:
        """Residuals hold their own targets, which are zero."""
        return True

    def sample(self, outputs: Tensor, draws: Draws) -> Tensor:
        """Residuals of data drawn from the model: normal around zero."""
        return draws.normal(outputs.shape, device=outputs.device, dtype=promote(outputs.detach()).dtype)

    def root(self, outputs: Tensor, targets: Any = None) -> Tensor:
        """One, for scaled residuals."""
        return torch.ones_like(promote(outputs.detach()))

    def sampled(self, outputs: Tensor, targets: Any, draws: Draws) -> Tensor:
        """The gradient by the scaled residuals of data drawn from the model."""
        return self.sample(outputs, draws).to(outputs.dtype)

    def observed(self, outputs: Tensor, targets: Any) -> Tensor:
        """The scaled residuals."""
        return outputs.detach().clone()

    def check(self, outputs: Any, targets: Any, where: str = "batch 0", labels: str = "sampled") -> None:
        """Refuses outputs that `joined` did not make."""
        if not isinstance(outputs, Tensor) or outputs.dim() != 1:
            fail(where, "Residuals needs the mapping of residuals", _REMEDY)
        if not bool(torch.isfinite(outputs).all()):
            raise NumericalError(f"{where}: residuals are NaN or infinite; nothing was changed.")

    def _term(self, name: str, term: Any, where: str) -> Tensor:
        if not isinstance(term, Tensor) or term.dim() == 0 or not term.numel():
            found = f"{list(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            fail(where, f"the residuals {name!r} are {found}", "give a tensor [n, ...] with one row for every point")
        if not term.is_floating_point():
            what = "take their real and imaginary parts as two terms" if term.is_complex() else "give real numbers"
            fail(where, f"the residuals {name!r} are {term.dtype}", what)
        if term.layout is not torch.strided:
            fail(where, f"the residuals {name!r} are stored as {term.layout}", "give a dense tensor, as by to_dense()")
        if not bool(torch.isfinite(term.detach()).all()):
            bad = int((~torch.isfinite(term.detach())).sum())
            raise NumericalError(
                f"{where}: {bad} of {term.numel()} residuals {name!r} are NaN or infinite; nothing was changed. Look "
                "at the points and at the weights."
            )
        if self.noise is not None:
            return term.flatten() / self.noise[name]
        assert self.weights is not None
        return term.flatten() * (self.weights[name] / term.numel()) ** 0.5


_REMEDY = "return it from the closure, or from forward=lambda model, batch: (residuals, None)"
