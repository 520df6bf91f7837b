"""Equations with known solutions on the unit cube, and the residuals of a network at random points."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["EQUATIONS", "Equation"]

Residuals = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Equation:
    """A problem; one example is one point.

    Attributes:
        name: in the command.
        title: for pictures.
        sizes: of the tanh network.
        points: numbers of points inside and on the boundary (and at the start) at every step.
        residuals: of (network, points inside, points on the boundary), by name.
        solution: of points ``[n, d]``: ``[n]``.
        seconds: of CPU time that a run takes unless it is told otherwise.
        start: whether the last coordinate is a time, so that its upper face is no boundary.
    """

    name: str
    title: str
    sizes: tuple[int, ...]
    points: tuple[int, int]
    residuals: Residuals
    solution: Callable[[Tensor], Tensor]
    seconds: float
    start: bool = False

    def network(self, seed: int) -> nn.Sequential:
        """In float64."""
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i, o in pairwise(self.sizes):
            layers += [nn.Linear(i, o), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).double()

    def draw(self) -> tuple[Tensor, Tensor]:
        """Points inside and on the boundary, uniformly, from torch's random numbers."""
        inside, edge = self.points
        x, b = (torch.rand(n, self.sizes[0], dtype=torch.float64) for n in (inside, edge))
        faces = 2 * self.sizes[0] - self.start
        face = torch.arange(edge) % faces
        for axis in range(self.sizes[0]):
            b[face == 2 * axis, axis] = 0.0
            b[face == 2 * axis + 1, axis] = 1.0
        return x, b

    def error(self, network: nn.Module) -> float:
        """Relative error of the solution in L2 on 9,000 fixed points."""
        x = torch.rand(9000, self.sizes[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        truth = self.solution(x)
        with torch.no_grad():
            return float((network(x)[:, 0] - truth).norm() / truth.norm())


def _slopes(u: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def _laplacian(network: nn.Module, x: Tensor) -> Tensor:
    slopes = _slopes(network(x), x)
    return torch.stack([_slopes(slopes[:, i], x)[:, i] for i in range(x.shape[1])]).sum(0)


def _poisson(source: Callable[[Tensor], Tensor], solution: Callable[[Tensor], Tensor]) -> Residuals:
    def residuals(network: nn.Module, x: Tensor, edge: Tensor) -> dict[str, Tensor]:
        x = x.requires_grad_()
        return {
            "equation": _laplacian(network, x) + source(x.detach()),
            "boundary": network(edge)[:, 0] - solution(edge),
        }

    return residuals


def _sines(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).prod(1)


def _cosines(x: Tensor) -> Tensor:
    return torch.cos(math.pi * x).sum(1)


def _heat(x: Tensor) -> Tensor:
    """``exp(−π²t/4) sin πx`` at (x, t)."""
    return torch.exp(-(math.pi**2) / 4 * x[:, 1]) * torch.sin(math.pi * x[:, 0])


def _cooling(network: nn.Module, x: Tensor, edge: Tensor) -> dict[str, Tensor]:
    x = x.requires_grad_()
    slopes = _slopes(network(x), x)
    second = _slopes(slopes[:, 0], x)[:, 0]
    return {"equation": slopes[:, 1] - second / 4, "boundary and start": network(edge)[:, 0] - _heat(edge)}


_WAVES = _poisson(lambda x: 2 * math.pi**2 * _sines(x), _sines)
EQUATIONS = {
    equation.name: equation
    for equation in (
        Equation("poisson2d", "Poisson 2-D, 2-64-1", (2, 64, 1), (900, 120), _WAVES, _sines, 120),
        Equation("poisson2d-deep", "Poisson 2-D, deep", (2, 64, 64, 48, 48, 1), (900, 120), _WAVES, _sines, 300),
        Equation(
            "poisson5d", "Poisson 5-D, 5-64-1", (5, 64, 1), (3000, 500),
            _poisson(lambda x: math.pi**2 * _cosines(x), _cosines), _cosines, 300,
        ),
        Equation("heat1d", "Heat 1-D, 2-64-1", (2, 64, 1), (900, 240), _cooling, _heat, 120, start=True),
    )
}  # fmt: skip
"""Name → equation."""
