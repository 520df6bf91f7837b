"""Distance of an approximation where it is inverted: small eigenvalues count as much as large ones.

The Frobenius norm sees the largest eigenvalues. A step of a natural gradient and a posterior use the damped inverse,
for which the Kullback-Leibler divergence of the two Gaussians is the measure, the same in every parametrisation.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.estimation.estimate import estimate
from kronfisher.fisher import Fisher
from kronfisher.likelihoods import Likelihood

__all__ = ["divergence", "divergences", "small_blocks"]

DAMPING = 1e-2  # λ as a share of the mean eigenvalue of the true block


def small_blocks(
    model: nn.Module, data: Any, likelihood: Likelihood, seed: int, largest: int = 800
) -> dict[str, Tensor]:
    """Block name → the dense true block ``[D, D]`` in float64, for blocks of at most `largest` rows."""
    cheap = estimate(model, data, likelihood, fit="diagonal", seed=seed)
    small = [name for name, block in cheap.blocks.items() if block.dim <= largest]
    layers = {f"{name.removesuffix('.weight')}.*": "full" for name in small}
    exact = estimate(model, data, likelihood, fit={**layers, "*": "diagonal"}, seed=seed)
    return {name: exact.blocks[name].to_dense().double() for name in small}


def divergences(fisher: Fisher, truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Block name → `divergence` of the fisher's block from the true one, for those that are known."""
    return {name: divergence(block, fisher.blocks[name].to_dense().double()) for name, block in truth.items()}


def divergence(truth: Tensor, other: Tensor) -> float:
    """``KL(N(0, F + λ) ‖ N(0, X + λ)) / D`` with λ a hundredth of F's mean eigenvalue; infinite if X + λ is indefinite.

    Example:
        >>> round(divergence(torch.eye(3), 2 * torch.eye(3)), 3)  # (1.01 / 2.01 − 1 − log(1.01 / 2.01)) / 2
        0.095
    """
    shift = DAMPING * truth.diagonal().mean() * torch.eye(len(truth), dtype=truth.dtype, device=truth.device)
    lower, failed = torch.linalg.cholesky_ex(other + shift)
    if failed:
        return math.inf
    ratio = torch.linalg.solve_triangular(lower, torch.linalg.cholesky(truth + shift), upper=False)
    return float((ratio.square().sum() - 2 * ratio.diagonal().log().sum() - len(truth)) / (2 * len(truth)))
