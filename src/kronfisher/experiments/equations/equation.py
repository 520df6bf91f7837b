"""An equation with a known solution on the unit cube, and a network that learns it from residuals at random points."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from kronfisher.capture.derivatives import Derivatives
from kronfisher.likelihoods import Residuals

__all__ = ["Equation", "by_autograd", "slopes", "tanh_network"]


@dataclass(frozen=True)
class Equation:
    """A problem; one example is one point.

    Attributes:
        name: in the command.
        title: for pictures.
        sizes: of the tanh network.
        points: numbers of points inside and on the boundary (and at the start) at every step.
        residuals: of (network, points inside, points on the boundary), by name; and, if the equation `propagates`, of
            what makes derivatives: `by_autograd`, or ``kf.derivatives``.
        solution: of points ``[n, d]``: ``[n]``.
        seconds: of CPU time that a run takes unless it is told otherwise.
        start: whether the last coordinate is a time, so that its upper face is no boundary.
        propagates: whether derivatives can be propagated forward.
    """

    name: str
    title: str
    sizes: tuple[int, ...]
    points: tuple[int, int]
    residuals: Callable[..., dict[str, Tensor]]
    solution: Callable[[Tensor], Tensor]
    seconds: float
    start: bool = False
    propagates: bool = True

    def network(self, seed: int) -> nn.Module:
        """In float64."""
        torch.manual_seed(seed)
        return tanh_network(self.sizes)

    def likelihood(self) -> Residuals:
        """All residuals weigh one."""
        return Residuals(dict.fromkeys(self.residuals(self.network(0), *self.draw()), 1.0))

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
        x, truth = _judged(self)
        with torch.no_grad():
            return float((network(x)[:, 0] - truth).norm() / truth.norm())


@cache
def _judged(equation: Equation) -> tuple[Tensor, Tensor]:
    """Points and the solution there."""
    x = torch.rand(9000, equation.sizes[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, equation.solution(x)


def tanh_network(sizes: tuple[int, ...]) -> nn.Sequential:
    """In float64, from torch's random numbers."""
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def by_autograd(
    network: nn.Module, x: Tensor, *, second: Sequence[tuple[int, int]] = (), laplacian: bool = False
) -> Derivatives:
    """As ``kf.derivatives``, of any network whose rows are its points, with one output."""
    x = x.requires_grad_()
    u = network(x)
    first = slopes(u, x)
    axes = {i for i, _ in second} | (set(range(x.shape[1])) if laplacian else set())
    bent = {i: slopes(first[:, i], x) for i in sorted(axes)}
    total = torch.stack([bent[i][:, i] for i in range(x.shape[1])]).sum(0)[:, None] if laplacian else None
    return Derivatives(u, first[..., None], {(i, j): bent[i][:, j, None] for i, j in second}, total)


def slopes(u: Tensor, x: Tensor) -> Tensor:
    """The derivatives of each of u by its own point ``[n, d]``, with their graph."""
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]
