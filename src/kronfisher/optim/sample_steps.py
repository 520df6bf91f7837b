"""Directions in the space of samples, and the λ that they are made with."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from kronfisher.errors import NumericalError
from kronfisher.linalg import add_symmetric_product_, full_precision

__all__ = ["Follower", "Rows", "Thinned"]

_LEAST = 0.1  # of a weight's curvature in the metric, over the mean: constants of equations run away sooner with less


@dataclass
class Follower:
    """λ that follows the size of what is left: ``λ = f √(½‖u‖²/N · tr F/P)``, f by the success of the last steps.

    Attributes:
        factor: f; grows where steps fail, and shrinks towards `least` where the quadratic model was right.
        least: of f.
        most: of f.
    """

    factor: float = 0.1
    least: float = 1e-6
    most: float = 1e4

    def damping(self, left: float, mean_eigenvalue: float) -> float:
        """λ, in the units of F."""
        return self.factor * math.sqrt(max(left * mean_eigenvalue, 0.0))

    def told(self, ratio: float) -> None:
        """Take notice of a step's change of the loss over the predicted one; negative: it failed."""
        if ratio < 0.25:
            self.factor = min(self.factor * 2, self.most)
        elif ratio > 0.75:
            self.factor = max(self.factor / 1.5, self.least)


@dataclass(frozen=True)
class Thinned:
    """Which numbers of a batch have rows in the matrix of a step, scaled so that their squares add up right on average.

    The error of such a matrix is about the root of weights over rows, relative to itself, so that with four times as
    many rows as weights the step is nearly that of all. What is saved grows with the batch.

    Attributes:
        most: numbers of one term, or one column of outputs, that have rows.
        seed: of the draw.
    """

    most: int
    seed: int

    def places(self, number: int) -> Tensor | None:
        """Of those that have rows among `number`; None: all."""
        return None if number <= self.most else _drawn(number, self.most, self.seed)

    def scale(self, number: int) -> float:
        """Of those that are left."""
        return max(1.0, number / self.most) ** 0.5

    def of(self, part: Tensor) -> Tensor:
        """What is left of a term's or column's numbers ``[n]``, scaled."""
        places = self.places(len(part))
        return part if places is None else part[places.to(part.device)] * self.scale(len(part))


@lru_cache(maxsize=4)  # asked several times in a step
def _drawn(number: int, most: int, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(number, generator=generator, device="cpu")[:most].sort().values


@dataclass
class Rows:
    """Everything of a batch that a direction is made of.

    Attributes:
        matrix: J ``[K, P]``; of a batch whose rows are thinned, those that are left (`Thinned`).
        vector: u ``[K]`` with ``Jᵀu/N`` the gradient of the loss.
        count: N.
        values: what J is the derivative of, of all rows: the residuals by terms, or the outputs along their exact
            columns; None: not known.
        rest: of a thinned batch, what the gradient of all rows has besides ``Jᵀu`` ``[P]``; None: nothing.
        thin: which numbers have rows.
        parts: what the rows are of, in order, and how many; for messages.
    """

    matrix: Tensor
    vector: Tensor
    count: float
    values: list[Tensor] | None = None
    rest: Tensor | None = None
    thin: Thinned = field(default_factory=lambda: Thinned(sys.maxsize, 0))
    parts: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def square(self) -> Tensor:
        """``JᵀJ [P, P]``, its upper triangle."""
        side = self.matrix.new_zeros(2 * (self.matrix.shape[1],))
        with full_precision(side.device.type):
            return add_symmetric_product_(side, self.matrix)

    @cached_property
    def squares(self) -> Tensor:
        """The squared lengths of J's columns ``[P]`` in float64, the diagonal of ``JᵀJ``."""
        if len(self.matrix) > self.matrix.shape[1] and self.matrix.dtype == torch.float64:
            return self.square.diagonal().clone()
        return torch.linalg.vector_norm(self.matrix, dim=0, dtype=torch.float64).square()  # in float32 they may vanish

    @cached_property
    def size(self) -> float:
        """``‖J‖²``."""
        return float(self.squares.sum())

    @cached_property
    def metric(self) -> Tensor:
        """What λ is multiplied by ``[P]``: the root of each weight's own curvature, of mean one.

        It is half way between a sphere (Levenberg), where a weight that matters little is as dear as one that matters
        much, and F's diagonal (Marquardt), which lets go those that matter least.
        """
        squares = self.squares
        root = (squares / squares.mean() + _LEAST).sqrt()
        return (root / root.mean()).to(self.matrix.dtype)

    @property
    def longest(self) -> str:
        """Where the longest rows are, for messages."""
        largest = self.matrix.abs().amax()
        of_parts = self.matrix.split(list(self.parts.values())) if self.parts else ()
        sizes = [float(torch.linalg.vector_norm(part / largest, dtype=torch.float64)) for part in of_parts]
        return f", most of it those of {list(self.parts)[sizes.index(max(sizes))]}" if sizes else ""

    def slope(self, step: Tensor, change: Tensor) -> float:
        """What the loss falls by along a step, to first order, times N; `change` is J times the step."""
        return float(self.vector @ change) + (0.0 if self.rest is None else float(self.rest @ step))

    def solver(self, damping: float) -> Callable[..., Tensor]:
        """``u, v → (JᵀJ + Nλ diag(m))⁻¹ (Jᵀ u + v)`` ``[P]``, m the metric: by the smaller side, or by QR.

        QR where squares hide λ. There is a v only where there are more rows than columns.

        Raises:
            NumericalError: rounding hides λ even so.
        """
        J, shift = self.matrix, self.count * damping
        rows, columns = J.shape
        if not math.isfinite(self.size):
            raise NumericalError(
                f"the squares of {rows} rows{self.longest}, overflow in {J.dtype}, though the rows are finite; nothing "
                "was changed. Scale residuals or outputs."
            )
        size = float((self.squares / self.metric).sum())
        if shift <= (10 * torch.finfo(J.dtype).eps) ** 2 * size:
            raise NumericalError(
                f"λ = {damping:.1e} is hidden by rounding even in the singular values of {rows} rows whose squares add "
                f"up to {self.size:.1e}{self.longest}; nothing was changed. Give a larger damping, or train in float64."
            )
        kind = torch.finfo(J.dtype)
        hidden = shift <= kind.eps**0.6 * size or not kind.tiny < max(size, shift) < kind.max
        with full_precision(J.device.type):
            if rows > columns and not hidden:
                side = self.square.clone()
                side.diagonal().add_(self.metric, alpha=shift)
                factor, info = torch.linalg.cholesky_ex(side, upper=True)
                if int(info) == 0:
                    return lambda u, v=0.0: torch.cholesky_solve((J.mT @ u + v)[:, None], factor, upper=True)[:, 0]
            units = self.metric.rsqrt()
            solve = _spherical(J * units, shift, hidden)
        return lambda u, v=None: units * solve(u, None if v is None else units * v)


def _spherical(J: Tensor, shift: float, hidden: bool) -> Callable[[Tensor, Tensor | None], Tensor]:
    """``u, v → (JᵀJ + shift)⁻¹ (Jᵀ u + v)``, by J's rows, or by QR where squares hide the shift."""
    rows, columns = J.shape
    if rows <= columns and not hidden:
        side = J.new_zeros(2 * (rows,))
        add_symmetric_product_(side, J.mT)
        side.diagonal().add_(shift)
        factor, info = torch.linalg.cholesky_ex(side, upper=True)
        if int(info) == 0:
            return lambda u, v: J.mT @ torch.cholesky_solve(u[:, None], factor, upper=True)[:, 0]
    eye = shift**0.5 * torch.eye(min(rows, columns), dtype=J.dtype, device=J.device)
    if rows > columns:  # ‖J δ − u‖² + shift ‖δ‖²: with [J; √shift] = Q R it is R⁻¹ Q₁ᵀ u
        Q, R = torch.linalg.qr(torch.cat([J, eye]))

        def solve(u: Tensor, v: Tensor | None) -> Tensor:
            right = (Q[:rows].mT @ u)[:, None]
            if v is not None:
                right += torch.linalg.solve_triangular(R.mT, v[:, None], upper=False)
            return torch.linalg.solve_triangular(R, right, upper=True)[:, 0]

        return solve
    Q, R = torch.linalg.qr(torch.cat([J.mT, eye]))  # with [Jᵀ; √shift] = Q R it is Q₁ R⁻ᵀ u
    return lambda u, v: Q[:columns] @ torch.linalg.solve_triangular(R.mT, u[:, None], upper=False)[:, 0]
