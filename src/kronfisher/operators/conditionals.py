"""Layers of a chain given the next, from which a block-tridiagonal inverse has its products, solutions and draws."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from kronfisher.errors import NumericalWarning, SingularError
from kronfisher.linalg import eigh, negligible
from kronfisher.operators.factors import Factor

__all__ = ["Chain", "Conditionals", "Pair", "Root", "by_cholesky", "by_eigenvectors"]

Pair = tuple[Tensor, Tensor]  # of the output factor, then of the input factor
Root = Callable[[Factor, str, bool], Pair]


def by_cholesky(factor: Factor, label: str, definite: bool) -> Pair:
    """``L`` and ``L⁻¹`` of a factor ``[1, n, n]``; SingularError where it is singular, unless damped (`definite`)."""
    lower = factor.cholesky(label, definite=definite).tensor[0]
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return lower, torch.linalg.solve_triangular(lower, identity, upper=False)


def by_eigenvectors(factor: Factor, label: str, definite: bool) -> Pair:
    """``Q √s`` and its pseudo-inverse, of a factor ``[1, n, n]``: directions of numerically zero s are left out."""
    values, vectors = eigh(factor.tensor[0], label)
    kept = values > negligible(values.dtype) * values.amax()
    roots = values.sqrt() * kept
    return vectors * roots, (vectors * torch.where(kept, 1 / roots, 0)).mT


@dataclass
class Chain:
    """Roots, links and gains of both factors, layer by layer.

    Attributes:
        roots: ``(H, P)`` of each factor, ``H Hᵀ`` the factor and ``P = H⁻¹``, or its pseudo-inverse.
        links: ``B_{i,i+1}, A_{i,i+1}``.
        gains: ``Ψᴮ_i, Ψᴬ_i``.
    """

    roots: list[tuple[Pair, Pair]]
    links: list[Pair]
    gains: list[Pair]

    @classmethod
    def of(cls, roots: list[tuple[Pair, Pair]], links: list[Pair]) -> Self:
        """With its gains ``X_{i,i+1} P_{i+1}ᵀ P_{i+1}``."""
        gains = [
            (B @ outputs.mT @ outputs, A @ inputs.mT @ inputs)
            for (B, A), ((_, outputs), (_, inputs)) in zip(links, roots[1:], strict=True)
        ]
        return cls(roots, links, gains)


class Conditionals:
    """Every layer given the next: ``S_i = (W_B ⊗ W_A) diag(1 − d_B d_Aᵀ) (W_B ⊗ W_A)ᵀ``, and ``S_L = X_LL``.

    Args:
        chain: roots and links.
        name: for messages.
        definite: X is positive definite by construction; where rounding breaks that it is repaired, with a warning.
        singular: zeros are allowed: only roots of S are needed.
    """

    def __init__(self, chain: Chain, name: str, *, definite: bool = False, singular: bool = False) -> None:
        self.gains = chain.gains
        self.roots: list[Pair] = []  # W_B, W_A
        self.inverses: list[Pair] = []  # K_B, K_A
        self.gaps: list[Tensor | None] = []  # 1 − d_B d_Aᵀ
        for k, links in enumerate(chain.links):
            rotated, shares = [], []
            for (root, inverse), link, (_, later) in zip(chain.roots[k], links, chain.roots[k + 1], strict=True):
                half = inverse @ link @ later.mT
                share, vectors = eigh(half @ half.mT, f"{name} (link {k})")
                rotated.append((root @ vectors, inverse.mT @ vectors))
                shares.append(share)
            gap = 1 - shares[0][:, None] * shares[1]
            self._add(rotated[0], rotated[1], gap.clamp_min(0) if singular else _positive(gap, name, definite))
        (root_b, inverse_b), (root_a, inverse_a) = chain.roots[-1]
        self._add((root_b, inverse_b.mT), (root_a, inverse_a.mT), None)

    def _add(self, outputs: Pair, inputs: Pair, gap: Tensor | None) -> None:
        self.roots.append((outputs[0], inputs[0]))
        self.inverses.append((outputs[1], inputs[1]))
        self.gaps.append(gap)

    @cached_property
    def _last(self) -> Pair:
        """Both factors of ``S_L⁻¹``."""
        B, A = self.inverses[-1]
        return B @ B.mT, A @ A.mT

    def gain(self, k: int, V: Tensor) -> Tensor:
        """``Ψ_k V`` for V of layer k + 1."""
        return _between(self.gains[k][0], V, self.gains[k][1].mT)

    def pull(self, k: int, V: Tensor) -> Tensor:
        """``Ψ_{k−1}ᵀ V`` for V of layer k − 1."""
        return _between(self.gains[k - 1][0].mT, V, self.gains[k - 1][1])

    def divided(self, k: int, V: Tensor, *, root: bool = False) -> Tensor:
        """``S_k⁻¹ V``; `root`: white noise to draws of that covariance."""
        (B, A), gap = self.inverses[k], self.gaps[k]
        if gap is None and not root:  # nothing comes between the roots: two products in place of four
            return self._last[0] @ V @ self._last[1]
        if not root:
            V = B.mT @ V @ A
        if gap is not None:
            V = V / (gap.sqrt() if root else gap)
        return B @ V @ A.mT

    def coloured(self, k: int, noise: Tensor) -> Tensor:
        """White noise to draws of covariance ``S_k``."""
        (B, A), gap = self.roots[k], self.gaps[k]
        return B @ (noise if gap is None else noise * gap.sqrt()) @ A.mT

    def logdet(self) -> Tensor:
        """``Σ_i log |S_i| − log |X_ii|``."""
        return torch.stack([gap.log().sum() for gap in self.gaps if gap is not None]).sum()

    def inverse_diagonal(self) -> Tensor:
        """Of ``X⁻¹``, ``[D]``."""
        parts, pulled = [], 0.0
        for k, ((B, A), gap) in enumerate(zip(self.inverses, self.gaps, strict=True)):
            weights = B.new_ones(B.shape[1], A.shape[1]) if gap is None else 1 / gap
            own = B.square() @ weights @ A.square().mT
            parts.append((own + pulled).flatten())
            if gap is not None:
                B, A = self.gains[k][0].mT @ B, self.gains[k][1].mT @ A
                pulled = B.square() @ weights @ A.square().mT
        return torch.cat(parts)


def _positive(gap: Tensor, name: str, definite: bool) -> Tensor:
    """The gap, which has to be positive; raised to the smallest number that is not rounding noise if X is definite."""
    floor = negligible(gap.dtype)
    if not bool((gap <= floor).any()):
        return gap
    what = f"{name}: to {gap.dtype} precision a layer of this chain is determined by the next"
    if not definite:
        raise SingularError(f"{what}, so there is no inverse. Add damping first: fisher + kf.FactoredTikhonov(λ).")
    warnings.warn(
        f"{what}, in spite of the damping. Use a larger λ or float64.",
        NumericalWarning,
        stacklevel=4,
    )
    return gap.clamp_min(floor)


def _between(left: Tensor, V: Tensor, right: Tensor) -> Tensor:
    """``left V right``, in the order that takes fewer multiplications; V is ``[K, O, I]``."""
    (p, o), (i, q) = left.shape, right.shape
    return left @ V @ right if p * i * (o + q) <= o * q * (i + p) else left @ (V @ right)
