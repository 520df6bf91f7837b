"""What a loss rises by when weights are removed, and where the others move to make up for it."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.fisher.penalty import Matrix, Parameters, values
from kronfisher.fisher.vectors import Shapes, flatten, read
from kronfisher.operators.cg import conjugate_gradients

__all__ = ["pruned", "saliencies"]


class Solvable(Matrix, Protocol):
    """What is needed of a Fisher matrix."""

    def diagonal(self) -> dict[str, Tensor]: ...
    def inverse(self) -> "Solvable": ...
    def solve(self, v: Tensor) -> Tensor: ...


def saliencies(
    matrix: Solvable, parameters: Parameters, device: torch.device, estimated: str, *, adjusted: bool
) -> dict[str, Tensor]:
    """``½ θ_i² F_ii``, or ``½ θ_i² / (F⁻¹)_ii`` where the other weights adjust; see `Fisher.saliencies`."""
    found = {name: value[0] for name, value in values(matrix.shapes, parameters, device, estimated).items()}
    curvature = matrix.inverse().diagonal() if adjusted else matrix.diagonal()
    return {
        name: value.square() / 2 / curvature[name] if adjusted else value.square() / 2 * curvature[name]
        for name, value in found.items()
    }


def pruned(
    matrix: Solvable, parameters: Parameters, kept: Mapping[str, Tensor], device: torch.device, estimated: str
) -> dict[str, Tensor]:
    """The minimiser of ``½ δᵀ F δ`` among ``θ + δ`` that are zero where weights are not kept; see `Fisher.pruned`."""
    theta = values(matrix.shapes, parameters, device, estimated)
    mask = flatten(read(_masks(kept, matrix.shapes), matrix.shapes)[0])
    start = flatten(theta)
    removed = -start * ~mask
    image = (matrix @ removed[0])[None]
    wide = mask.to(image.dtype)

    # Only the rest moves: F_KK δ_K = −F_KR δ_R, by products with the whole matrix.
    step, _ = conjugate_gradients(
        lambda rows: wide * _rows(matrix.__matmul__, wide * rows),
        lambda rows: wide * _rows(matrix.solve, wide * rows),
        -wide * image,
        scale=max(float(value.max()) for value in matrix.diagonal().values()),
        floor=0.0,
        name="the Fisher matrix of the weights that are kept",
    )
    moved, _ = read((start * mask + step.to(start.dtype))[0], matrix.shapes)
    return {name: tensor[0].to(theta[name].dtype) for name, tensor in moved.items()}


def _masks(kept: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """One for each covered parameter; those that are not named are kept."""
    if unknown := [name for name in kept if name not in shapes]:
        raise DataError(f"kept names {', '.join(unknown)}, which the Fisher does not cover")
    if odd := [name for name, mask in kept.items() if mask.dtype != torch.bool]:
        raise DataError(f"kept holds True or False for every weight; {', '.join(odd)} holds other numbers")
    some = next(iter(kept.values()), torch.ones(()))
    return {n: kept[n] if n in kept else torch.ones(s, dtype=torch.bool, device=some.device) for n, s in shapes.items()}


def _rows(product: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    return product(rows.mT).mT
