"""Layers tied to their neighbours: a matrix whose inverse is block-tridiagonal (Martens & Grosse 2015, section 4.3).

Blocks ``X_ii = B_i ⊗ A_i`` and ``X_{i,i+1} = B_{i,i+1} ⊗ A_{i,i+1}`` are given; all others follow as in a Markov
chain, ``X_ij = Ψ_i X_{i+1,j}`` for j > i + 1 with ``Ψ_i = X_{i,i+1} X_{i+1,i+1}⁻¹ = Ψᴮ_i ⊗ Ψᴬ_i``. So ``X = U S Uᵀ``
with a unit upper triangular ``U⁻¹ = 1 − Ψ`` and a block-diagonal ``S_i = X_ii − Ψ_i X_{i+1,i+1} Ψ_iᵀ``, a difference of
two products that is diagonal in the coordinates where the first of them is the identity.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.linalg import full_precision, stable_norm
from kronfisher.operators.algebra import nonnegative
from kronfisher.operators.conditionals import Chain, Conditionals, Root, by_cholesky, by_eigenvectors
from kronfisher.operators.inverse import Inverse
from kronfisher.operators.kronecker import Kronecker
from kronfisher.operators.operator import Operator

__all__ = ["Tridiagonal"]


@dataclass(frozen=True, eq=False, repr=False)
class Tridiagonal(Operator, kind="tridiagonal"):
    """The Markov completion of Kronecker products on the diagonal and beside it, for layers ``V_i [O_i, I_i]``.

    Products, solutions, determinant and draws cost a few products of factors a layer. Where a factor is singular, ``Ψ``
    is the limit of vanishing damping, and only what needs an inverse of X raises. ``X + λ·1`` has no such structure,
    nor have its roots and eigenvalues: they are those of the matrix itself, up to 4096 rows.
    `FactoredTikhonov` keeps it.

    Attributes:
        layers: ``B_i ⊗ A_i``, one group each, with dense factors.
        A: ``A_{i,i+1} [I_i, I_{i+1}]``, one fewer.
        B: ``B_{i,i+1} [O_i, O_{i+1}]``. With the factors of its layers each pair makes a positive semidefinite matrix.
        name: what the matrix belongs to, for messages.

    Raises:
        DataError: the factors do not fit each other.

    Example:
        >>> one = torch.ones(1, 1, 1)
        >>> half, all = torch.tensor([[0.5]]), torch.tensor([[1.0]])
        >>> X = Tridiagonal((Kronecker(one, one), Kronecker(one, one), Kronecker(one, one)), (half, half), (all, all))
        >>> X.to_dense()
        tensor([[1.0000, 0.5000, 0.2500],
                [0.5000, 1.0000, 0.5000],
                [0.2500, 0.5000, 1.0000]])
        >>> (X.inverse().to_dense() * 3).round(decimals=4) + 0.0
        tensor([[ 4., -2.,  0.],
                [-2.,  5., -2.],
                [ 0., -2.,  4.]])
    """

    spans_layers = True
    remedy = (
        "damp it by fisher + kf.FactoredTikhonov(λ), which keeps the structure that X + λ·1 has not: its solve, "
        "inverse, logdet and sample are exact; or choose fit='kfac'."
    )
    layers: tuple[Kronecker, ...]
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    name: str = ""

    def __post_init__(self) -> None:
        label = self.name or "Tridiagonal"
        if len(self.layers) < 2 or not len(self.A) == len(self.B) == len(self.layers) - 1:
            raise DataError(
                f"{label}: {len(self.layers)} layers with {len(self.A)} and {len(self.B)} links; n take n - 1"
            )
        for layer in self.layers:
            if layer.has_diagonal or len(layer.A) > 1:
                raise DataError(f"{label}: {layer!r} must have one group and dense factors")
        for k, (x, y) in enumerate(pairwise(self.layers)):
            for key, cross, left, right in (("A", self.A[k], x.A, y.A), ("B", self.B[k], x.B, y.B)):
                expected = (left.shape[1], right.shape[1])
                if tuple(cross.shape) != expected or {cross.dtype, right.dtype, left.dtype} != {left.dtype}:
                    raise DataError(
                        f"{label}: {key} between {x!r} and {y!r} must be {list(expected)}, {left.dtype}, not "
                        f"{list(cross.shape)}, {cross.dtype}"
                    )

    @property
    def dim(self) -> int:
        """D, over all layers."""
        return sum(layer.dim for layer in self.layers)

    @property
    def structure(self) -> str:
        """The number of layers."""
        return f"block-tridiagonal of {len(self.layers)} layers"

    @property
    def definite(self) -> bool:
        """Whether it is positive definite by construction: its layers are damped."""
        return all(layer.definite for layer in self.layers)

    # Products ---------------------------------------------------------------------------------------------------------

    def matvecs(self, rows: Tensor) -> Tensor:
        """By two sweeps along the chain, for K rows ``[K, D]``."""
        with full_precision(rows.device.type):
            parts = self._split(rows)
            gains = (self._whitened if self.definite else self._spread).gains
            out = [layer.B[0] @ V @ layer.A[0] for layer, V in zip(self.layers, parts, strict=True)]
            above, below = torch.zeros_like(parts[-1]), torch.zeros_like(parts[0])
            for k in reversed(range(len(gains))):  # Σ_{j>k} X_kj V_j
                above = self.B[k] @ parts[k + 1] @ self.A[k].mT + gains[k][0] @ above @ gains[k][1].mT
                out[k] = out[k] + above
            for k in range(len(gains)):  # Σ_{j≤k} X_{k+1,j} V_j
                below = parts[k] + below
                out[k + 1] = out[k + 1] + self.B[k].mT @ below @ self.A[k]
                below = gains[k][0].mT @ below @ gains[k][1]
            return _joined(out)

    def solves(self, rows: Tensor) -> Tensor:
        """The paper's three steps, for K rows ``[K, D]``."""
        with full_precision(rows.device.type):
            parts, chain = self._split(rows), self._conditioned
            first = [V if k + 1 == len(parts) else V - chain.gain(k, parts[k + 1]) for k, V in enumerate(parts)]
            second = [chain.divided(k, V) for k, V in enumerate(first)]
            return _joined([V - chain.pull(k, second[k - 1]) if k else V for k, V in enumerate(second)])

    def colour(self, noise: Tensor, *, inverse: bool = True) -> Tensor:
        """One layer given the next, from the last to the first; of the inverse the other way."""
        with full_precision(noise.device.type):
            parts = self._split(noise)
            if inverse:
                chain = self._conditioned
                drawn = [chain.divided(k, V, root=True) for k, V in enumerate(parts)]
                return _joined([V - chain.pull(k, drawn[k - 1]) if k else V for k, V in enumerate(drawn)])
            chain = self._drawing
            drawn = [chain.coloured(k, V) for k, V in enumerate(parts)]
            for k in reversed(range(len(drawn) - 1)):
                drawn[k] = drawn[k] + chain.gain(k, drawn[k + 1])
            return _joined(drawn)

    def inverse(self) -> Inverse:
        """Block-tridiagonal; factorised now, so that it is only applied later; SingularError as in `solve`."""
        _ = self._conditioned
        return Inverse(self)

    def inverse_diagonal(self) -> Tensor:
        """``S_i⁻¹ + Ψ_{i−1}ᵀ S_{i−1}⁻¹ Ψ_{i−1}``, its diagonal ``[D]``."""
        with full_precision(self.device.type):
            return self._conditioned.inverse_diagonal()

    def inverse_trace(self) -> Tensor:
        """The sum of that diagonal."""
        return self.inverse_diagonal().sum()

    # Numbers ----------------------------------------------------------------------------------------------------------

    def trace(self) -> Tensor:
        """The sum of those of the layers."""
        return torch.stack([layer.trace() for layer in self.layers]).sum()

    def diagonal(self) -> Tensor:
        """Those of the layers, ``[D]``."""
        return torch.cat([layer.diagonal() for layer in self.layers])

    def logdet(self) -> Tensor:
        """Of every layer, given the next."""
        return self._conditioned.logdet() + torch.stack([layer.logdet() for layer in self.layers]).sum()

    def frobenius_norm(self) -> Tensor:
        """From the blocks, all of which are Kronecker products."""
        gains = (self._whitened if self.definite else self._spread).gains
        norms = [layer.frobenius_norm() for layer in self.layers]
        with full_precision(self.device.type):
            for k in range(len(self.A)):
                B, A = self.B[k], self.A[k]
                for j in reversed(range(k + 1)):
                    norms += [stable_norm(B.flatten()) * stable_norm(A.flatten())] * 2
                    if j:
                        B, A = gains[j - 1][0] @ B, gains[j - 1][1] @ A
        return stable_norm(torch.stack(norms))

    # Others -----------------------------------------------------------------------------------------------------------

    def scaled(self, factor: float) -> "Tridiagonal":
        """The factor goes into B."""
        layers = tuple(layer.scaled(factor) for layer in self.layers)
        return replace(self, layers=layers, B=tuple(cross * nonnegative(factor, "the factor") for cross in self.B))

    def factored_damping(self, damping: float) -> "Tridiagonal":
        """Each layer is damped so, the links stay as they are."""
        return self.with_layers(tuple(layer.factored_damping(damping) for layer in self.layers))

    def normalized(self, inputs: float | Tensor, outputs: float | Tensor) -> "Tridiagonal":
        """Each layer is damped by shares of its own factors' mean eigenvalues; the scale of the whole is kept."""
        return self.with_layers(tuple(layer.damped_by_shares(inputs, outputs) for layer in self.layers))

    def with_layers(self, layers: tuple[Kronecker, ...]) -> "Tridiagonal":
        """The same links between other layers, each of which exceeds the old by a positive semidefinite matrix."""
        return replace(self, layers=layers)

    def tensors(self) -> dict[str, Tensor]:
        """Factors and links, numbered."""
        parts = {}
        for k, layer in enumerate(self.layers):
            parts |= {f"A{k}": layer.A, f"B{k}": layer.B}
        for k, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            parts |= {f"A{k},{k + 1}": A, f"B{k},{k + 1}": B}
        return parts

    def settings(self) -> dict[str, Any]:
        """The name, and those of the layers."""
        return {"name": self.name, "layers": [layer.settings() for layer in self.layers]}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], **settings: Any) -> Self:
        """From factors and links."""
        layers = tuple(Kronecker(tensors[f"A{k}"], tensors[f"B{k}"], **own) for k, own in enumerate(settings["layers"]))
        A, B = (tuple(tensors[f"{key}{k},{k + 1}"] for k in range(len(layers) - 1)) for key in "AB")
        return cls(layers, A, B, settings["name"])

    def _split(self, rows: Tensor) -> list[Tensor]:
        parts = rows.split([layer.dim for layer in self.layers], dim=1)
        return [
            part.reshape(len(part), layer.B.shape[1], layer.A.shape[1])
            for part, layer in zip(parts, self.layers, strict=True)
        ]

    @cached_property
    def _whitened(self) -> Chain:
        """By Cholesky factors; SingularError as in `solve`."""
        return self._chain(by_cholesky)

    @cached_property
    def _spread(self) -> Chain:
        """By eigenvectors, those of numerically zero eigenvalues left out."""
        return self._chain(by_eigenvectors)

    def _chain(self, root: Root) -> Chain:
        labels = [layer.name or self.structure for layer in self.layers]
        with full_precision(self.device.type):
            roots = [
                (
                    root(layer.output_factor, f"{label} (output factor)", layer.definite),
                    root(layer.input_factor, f"{label} (input factor)", layer.definite),
                )
                for layer, label in zip(self.layers, labels, strict=True)
            ]
            return Chain.of(roots, list(zip(self.B, self.A, strict=True)))

    @cached_property
    def _conditioned(self) -> Conditionals:
        with full_precision(self.device.type):
            return Conditionals(self._whitened, self.name or self.structure, definite=self.definite)

    @cached_property
    def _drawing(self) -> Conditionals:
        return self._conditioned if self.definite else Conditionals(self._spread, self.name, singular=True)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts], dim=1)
