"""K-FAC with one Kronecker product for each term of the residuals, as Dangel, Müller & Zeinhofer (2024) train with it.

Their K-FAC*: factors are averaged over steps and damped one by one, the two products of a layer are solved together,
and step size and momentum minimise the quadratic model of the batch with its exact Gauss-Newton matrix; here steps are
halved besides while they increase the loss at the same points, without which small λ diverge. Points are new at every
step. Nothing here is part of the library: it is what ours is compared with.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.capture.derivatives import derivatives
from kronfisher.estimation.estimate import estimate
from kronfisher.experiments.equations.equation import Equation
from kronfisher.fisher import Fisher
from kronfisher.likelihoods import Residuals
from kronfisher.operators import Kronecker

__all__ = ["kfac_by_terms"]

_KEPT = 0.9  # of the factors, from one step to the next
_HALVINGS = 8  # of a step that increases the loss


def kfac_by_terms(equation: Equation, network: nn.Module, likelihood: Residuals, damping: float) -> Callable:
    """A step, as a function of the share of the time that is over.

    Args:
        equation: whose points and residuals.
        network: a chain of layers.
        likelihood: with a weight for each term.
        damping: λ; each factor gets its root.
    """
    weights = likelihood.weights
    assert weights is not None
    parameters = dict(network.named_parameters())
    averages: dict[str, Fisher] = {}
    before = {name: torch.zeros_like(p.detach()) for name, p in parameters.items()}

    def step(share: float) -> float:
        points = equation.draw()
        for name, weight in weights.items():
            fisher = _product(equation, network, points, name, weight)
            averages[name] = _averaged(averages[name], fisher) if name in averages else fisher
        residuals = likelihood.joined(equation.residuals(network, *points, derivatives))
        first, *others = (each.mapped(lambda x: _damped(x, damping**0.5), "damped") for each in averages.values())
        u = residuals.detach().clone().requires_grad_()
        gradient = torch.autograd.grad(residuals, list(parameters.values()), u, create_graph=True)
        slope = {name: g.detach() for name, g in zip(parameters, gradient, strict=True)}
        direction = sum(others, first).solve({name: -g for name, g in slope.items()})
        with torch.no_grad():
            change = _best(gradient, slope, u, [direction, before], damping)
            start = [p.clone() for p in parameters.values()]
            loss = 0.5 * u.square().sum()
            for halvings in range(_HALVINGS + 1):
                for (name, p), old in zip(parameters.items(), start, strict=True):
                    before[name] = change[name] * 0.5**halvings
                    p.copy_(old + before[name])
                found = equation.residuals(network, *points, derivatives)
                if 0.5 * sum(weight * float(found[name].square().mean()) for name, weight in weights.items()) <= loss:
                    break
        return float(loss)

    return step


def _product(equation: Equation, network: nn.Module, points: tuple[Tensor, Tensor], name: str, weight: float) -> Fisher:
    """One Kronecker product a layer, of one term."""

    def forward(model: nn.Module, batch: Any) -> tuple[Any, None]:
        return {name: equation.residuals(model, *points, derivatives)[name]}, None

    return estimate(network, [points[0]], Residuals({name: weight}), fit="kfac", labels="exact", forward=forward)


def _averaged(kept: Fisher, new: Fisher) -> Fisher:
    """The factors' moving average."""
    own = dict(new.blocks)

    def mean(old: Any) -> Kronecker:
        other = own[old.name]
        assert isinstance(other, Kronecker)
        A, B = (_KEPT * x + (1 - _KEPT) * y for x, y in ((old.A, other.A), (old.B, other.B)))
        return Kronecker(A, B, name=old.name)

    return kept.mapped(mean, "averaged")


def _damped(product: Any, amount: float) -> Kronecker:
    A, B = (x + amount * torch.eye(x.shape[-1], dtype=x.dtype) for x in (product.A, product.B))
    return Kronecker(A, B, name=product.name)


def _best(
    gradient: Sequence[Tensor],
    slope: Mapping[str, Tensor],
    u: Tensor,
    directions: Sequence[Mapping[str, Tensor]],
    damping: float,
) -> dict[str, Tensor]:
    """The combination of the directions that minimises the quadratic model of the batch.

    Args:
        gradient: ``Jᵀu``, with its graph.
        slope: the same by name.
        u: the residuals.
        directions: two.
        damping: λ, beside ``JᵀJ``.
    """
    moved = []
    for direction in directions:
        with torch.enable_grad():
            product = sum((g * direction[name]).sum() for g, name in zip(gradient, slope, strict=True))
            assert isinstance(product, Tensor)
            moved.append(torch.autograd.grad(product, u, retain_graph=True)[0])
    rows, vectors = torch.stack(moved), torch.stack([_flat(d) for d in directions])
    system = rows @ rows.mT + damping * vectors @ vectors.mT
    share = torch.linalg.lstsq(system, -(vectors @ _flat(slope))[:, None], driver="gelsd").solution[:, 0]
    return {name: sum(a * d[name] for a, d in zip(share, directions, strict=True)) for name in slope}  # pyright: ignore


def _flat(vectors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([v.flatten() for v in vectors.values()])
