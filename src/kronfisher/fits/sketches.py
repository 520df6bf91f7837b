"""Sketches of rows of J that are too many to keep: a random sample of them, or their products with a few vectors."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from kronfisher.fits.state import Fixed, State, Total
from kronfisher.linalg import full_precision
from kronfisher.operators.rows import PlainRows, Rows, join

__all__ = ["Drawn", "Projected", "split"]


@dataclass(kw_only=True)
class Drawn(State):
    """At most `most` rows, drawn by priority (Duffield, Lund & Thorup 2007): ``w/u`` with ``w = ‖J_k‖²`` and u uniform.

    Those of the largest priorities are kept, and τ is the largest priority of the others. A row that is kept stands for
    ``max(w, τ)/w`` rows, which makes the sum unbiased; estimates of different rows are uncorrelated, so that the
    expected squared error is the sum of their variances, of which ``Σ τ max(0, τ − w)`` is an unbiased estimate.

    Attributes:
        most: rows.
        rows_kept: at most one entry.
        inputs: of every block, what its next columns share with its last; None: nothing.
        weights: w of the rows kept, float64.
        priorities: of the rows kept.
        threshold: τ; zero while no row was left out.
        seen: rows so far.
        seed: of u, from the first rows, so that other data have other numbers.
    """

    adds: ClassVar[bool] = False

    most: int
    rows_kept: list[Rows] = field(default_factory=list)
    inputs: list[Tensor | None] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    priorities: list[Tensor] = field(default_factory=list)
    threshold: float = 0.0
    seen: int = 0
    seed: int = 0

    @property
    def like(self) -> Tensor:
        return next(iter(self.rows_kept[0].tensors().values()))

    def add_(self, rows: Rows) -> None:
        """Draw anew from what is kept and these rows."""
        weights = rows.lengths().double()
        if not self.seen:
            self.seed = hash(float(weights.sum())) % 2**31
        generator = torch.Generator("cpu").manual_seed(self.seed + self.seen)
        uniform = 1 - torch.rand(len(rows), generator=generator, dtype=torch.float64, device="cpu")
        self.seen += len(rows)
        self._keep(rows, weights, weights / uniform.to(weights))

    def joined(self, other: "Drawn", wx: float, wy: float) -> "Drawn":
        """``wx · self + wy · other``."""
        both = Drawn(self.blocks, self.plan, most=min(self.most, other.most), inputs=[None] * len(self.blocks))
        both.seed, both.seen = self.seed, self.seen + other.seen
        for state, w in ((self, wx), (other, wy)):
            both.threshold = max(both.threshold, w * state.threshold)
            if w and state.rows_kept:
                rows = state.rows_kept[0].scaled_rows(torch.full_like(state.weights[0], w**0.5))
                both._keep(rows, w * state.weights[0], w * state.priorities[0])
        return both

    def rows_for_all(self) -> Rows:
        """Those that are kept, each as long as the rows that it stands for."""
        weights = self.weights[0]
        factor = (weights.clamp_min(self.threshold) / weights.clamp_min(torch.finfo(weights.dtype).tiny)).sqrt()
        return self.rows_kept[0].scaled_rows(torch.where(weights > 0, factor, 0.0))

    def squared_error(self) -> float:
        """Of the sum over rows, as it is to be expected, in the Frobenius norm."""
        return float((self.threshold * (self.threshold - self.weights[0]).clamp_min(0)).sum())

    def release(self) -> None:
        self.rows_kept, self.inputs = [], [None] * len(self.blocks)

    def _keep(self, rows: Rows, weights: Tensor, priorities: Tensor) -> None:
        rows = join([*self.rows_kept, rows])
        weights, priorities = torch.cat([*self.weights, weights]), torch.cat([*self.priorities, priorities])
        if len(rows) > self.most:
            order = priorities.argsort(descending=True, stable=True)
            self.threshold = max(self.threshold, float(priorities[order[self.most]]))
            chosen = order[: self.most].sort().values
            rows, weights, priorities = rows.select(chosen), weights[chosen], priorities[chosen]
        self.rows_kept, self.weights, self.priorities = [rows], [weights], [priorities]


@dataclass(kw_only=True)
class Projected(State):
    """``Y = JᵀJ Ω`` for a few orthonormal random vectors Ω, of which Nyström's approximation is made.

    Attributes:
        test: Ω ``[P, r]``.
        products: Y.
        squares: ``tr JᵀJ``.
    """

    test: Fixed
    products: Total
    squares: Total

    def add_(self, rows: Rows) -> None:
        """Add ``Jᵀ(J Ω)`` of these rows."""
        self.products += rows.back(rows.along(self.test.mT)).mT
        self.squares += rows.lengths().sum()

    def low_rank(self) -> Tensor:
        """B ``[r, P]`` with ``BᵀB = Y (ΩᵀY)⁻¹ Yᵀ``, stable by a shift (Frangella, Tropp & Udell 2023)."""
        Y, test = self.products.double(), self.test.double()
        shift = float(Y.norm()) * torch.finfo(self.products.dtype).eps or torch.finfo(torch.float64).tiny
        with full_precision(Y.device.type):
            while True:
                shifted = Y + shift * test
                core = test.mT @ shifted
                factor, info = torch.linalg.cholesky_ex((core + core.mT) / 2)
                if not int(info):
                    break
                shift *= 10
            B = torch.linalg.solve_triangular(factor, shifted.mT, upper=False)
            values, vectors = torch.linalg.svd(B, full_matrices=False)[1:]
            rows = (values.square() - shift).clamp_min(0).sqrt()[:, None] * vectors
        return rows.to(self.products.dtype)

    def missing(self, rows: Rows) -> float:
        """``tr(JᵀJ − BᵀB)``, the nuclear norm of what is left out: nothing of it is negative."""
        return max(0.0, float(self.squares) - float(rows.lengths().sum()))

    @staticmethod
    def vectors(dim: int, rank: int, like: Tensor) -> Tensor:
        """Ω, the same in every process."""
        drawn = torch.randn(dim, min(rank, dim), generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float64,
                            device="cpu")  # fmt: skip
        return torch.linalg.qr(drawn)[0].to(like)


def split(rows: Tensor, sizes: list[int]) -> Rows:
    """``[r, P]`` by blocks."""
    return Rows(tuple(PlainRows(part.contiguous()) for part in rows.split(sizes, dim=1)))
