"""Races on residuals of equations: solutions solve them, and a race has its tables, curves and figures."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher import derivatives
from kronfisher.experiments.equations import EQUATIONS, intervals, race
from kronfisher.experiments.equations.by_terms import kfac_by_terms
from kronfisher.experiments.equations.inverse import NOISE, TRUTH, Conductivity
from kronfisher.experiments.schemas import schema
from tests.helpers.close import close
from tests.helpers.optional import require
from tests.helpers.residuals import rows


class Solution(nn.Module):
    def __init__(self, equation):
        super().__init__()
        self.equation = equation

    def forward(self, x):
        return self.equation.solution(x)[:, None]


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_solution_solves_the_equation(name):
    equation = EQUATIONS[name]
    network = Solution(equation)
    if name == "inverse":
        network = equation.network(0)
        network.solution = Solution(equation)
        network.constants.data = torch.tensor(TRUTH).double()
    torch.manual_seed(0)
    found = equation.residuals(network, *equation.draw())
    if name == "inverse":
        noise = found.pop("observations")
        assert 0.7 * NOISE < float(noise.std()) < 1.4 * NOISE
    assert all(float(term.detach().abs().max()) < 1e-9 for term in found.values())
    assert equation.error(network) < 1e-12


@pytest.mark.parametrize("name", [name for name in EQUATIONS if EQUATIONS[name].propagates])
def test_residuals_are_the_same_by_derivatives_propagated_forward(name):
    equation = EQUATIONS[name]
    network = equation.network(0)
    torch.manual_seed(0)
    points = equation.draw()
    found = equation.residuals(network, *points, derivatives)
    truth = equation.residuals(network, *points)
    assert found.keys() == truth.keys()
    for term, value in truth.items():
        close(found[term], value, 1e-12, term)


def test_kfac_by_terms_steps_along_the_damped_products_of_each_term():
    """Its first step is the best multiple of ``(Σ_terms (B + √λ) ⊗ (A + √λ))⁻¹ ∇L`` for the quadratic model."""
    equation = replace(EQUATIONS["heat1d"], sizes=(2, 5, 1), points=(30, 12))
    network, likelihood, damping = equation.network(0), equation.likelihood(), 1e-4
    before = nn.utils.parameters_to_vector(network.parameters()).detach()
    torch.manual_seed(1)
    points = equation.draw()
    residuals = likelihood.joined(equation.residuals(network, *points))
    J = rows(residuals, network)
    dense, at = torch.zeros(len(before), len(before)).double(), 0
    for name in ("0.weight", "2.weight"):
        total = 0.0
        for term in ("equation", "boundary and start"):
            one = kf.estimate(network, points[0], kf.Residuals({term: 1.0}), fit="kfac", labels="exact", strict=True,
                              forward=lambda m, _: ({term: equation.residuals(m, *points, derivatives)[term]}, None))  # noqa: B023 # fmt: skip
            A, B = (f[0] + damping**0.5 * torch.eye(len(f[0])) for f in (one.blocks[name].A, one.blocks[name].B))
            total = total + torch.kron(B, A)
        outputs, width = len(B), len(A)
        order = torch.arange(outputs * width).reshape(outputs, width)
        order = torch.cat([order[:, :-1].flatten(), order[:, -1]])  # the bias follows its weight
        dense[at : at + len(order), at : at + len(order)] = total[order][:, order]
        at += len(order)
    gradient = J.mT @ residuals.detach()
    direction = -torch.linalg.solve(dense, gradient)
    length = -(gradient @ direction) / ((J @ direction).square().sum() + damping * direction.square().sum())
    step = kfac_by_terms(equation, network, likelihood, damping)
    torch.manual_seed(1)
    losses = [step(0.0)]
    moved = nn.utils.parameters_to_vector(network.parameters()).detach() - before
    assert losses[0] == pytest.approx(0.5 * float(residuals.detach().square().sum()), rel=1e-12)
    halvings = torch.log2((length * direction).norm() / moved.norm()).round()
    close(moved, length * direction * 0.5**halvings, 1e-6)
    losses += [step(0.0) for _ in range(15)]
    assert losses[-1] < losses[0]


def test_burgers_steepest_slope_is_the_published_one():
    """152.00516 at t = 1.6037/π (Basdevant et al. 1986, Computers & Fluids 14), in the middle of [−1, 1]."""
    point = torch.tensor([[0.5, 1.6037 / math.pi]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(EQUATIONS["burgers"].solution(point).sum(), point)
    assert abs(float(slope[0, 0]) / 2 + 152.00516) < 1e-4


def sensitivities(places, terms=40):
    """``∂u/∂κ`` at points ``[n, 2]``: ``−∇·(κ∇w_k) = ∇·(x₁^k ∇u)`` with zero boundary, in products of sines.

    With u = sin πx sin πy only sin πy occurs along y, so that an equation along x remains.
    """
    n = torch.arange(1, terms + 1).double()
    x, weights = quadrature(400)
    s, c = torch.sin(math.pi * x[:, None] * n), math.pi * n * torch.cos(math.pi * x[:, None] * n)
    mean = lambda f, g, k: f.mT @ (g * (weights * k)[:, None])  # noqa: E731
    kappa = TRUTH[0] + TRUTH[1] * x
    stiff = mean(c, c, kappa) + math.pi**2 * mean(s, s, kappa)
    columns = []
    for power in (0, 1):
        right = -(mean(c, c[:, :1], x**power) + math.pi**2 * mean(s, s[:, :1], x**power))
        own = torch.linalg.solve(stiff, right)[:, 0]
        columns.append(torch.sin(math.pi * places[:, :1] * n) @ own * torch.sin(math.pi * places[:, 1]))
    return torch.stack(columns, 1)


def quadrature(number):
    x, weights = np.polynomial.legendre.leggauss(number)
    return torch.from_numpy(x + 1) / 2, torch.from_numpy(weights) / 2


def test_intervals_are_those_of_the_linearised_equation():
    """The network stands for every solution, so that what is left is ``(SᵀS/σ²)⁻¹`` with S the sensitivities."""
    equation = replace(EQUATIONS["inverse"], sizes=(2, 16, 1), points=(120, 40))  # enough, and quicker
    found = intervals(equation, draws=2)
    for draw in found.draws:
        network = equation.network(draw.seed)
        assert isinstance(network, Conductivity)
        S = sensitivities(network.places)
        covariance = torch.linalg.inv(S.mT @ S) * NOISE**2
        close(torch.tensor(draw.deviation).double(), covariance.diagonal().sqrt(), 0.04)
        error = torch.tensor(draw.mean).double() - torch.tensor(TRUTH).double()
        shift = covariance @ S.mT @ (network.observed - equation.solution(network.places)) / NOISE**2
        assert bool(((error - shift).abs() < 0.15 * covariance.diagonal().sqrt()).all())
    assert "of 2" in str(found.table())


def test_observations_that_were_not_fitted_are_fitted_from_other_weights(monkeypatch):
    """Seen: κ changed its sign on the way, and its interval held -225."""
    equation, ends, weights = replace(EQUATIONS["inverse"], sizes=(2, 16, 1), points=(120, 40)), [1e4, 30.0], []

    def trained(equation, network, points):
        weights.append(network.solution[0].weight.detach().clone())
        assert network.constants.tolist() == [0.5, 0.0]
        network.constants.data.fill_(-9.0 if len(weights) == 1 else 1.0)
        return [ends[len(weights) - 1]]

    monkeypatch.setattr(sys.modules[intervals.__module__], "_trained", trained)
    (draw,) = intervals(equation, draws=1).draws
    assert draw.starts == 2 and draw.mean == (1.0, 1.0) and draw.loss == 30.0
    assert not torch.equal(*weights)


def test_a_race_is_written_down(tmp_path):
    curves = race(EQUATIONS["poisson2d"], ("gram", "adam", "lbfgs", "kfac"), seeds=(0,), seconds=0.4)
    assert [run.optimizer for run in curves.runs] == ["gram", "adam", "lbfgs", "kfac"]
    assert "λ 1e-" in str(curves) and ("constant" in str(curves) or "decays to" in str(curves))
    assert all(run.points[-1][0] >= 0.4 for run in curves.runs)
    assert "gram" in str(curves) and '"poisson2d"' in curves.to_json()
    paths = curves.draw(tmp_path)
    assert [path.name for path in paths] == [f"poisson2d-{kind}.png" for kind in ("seconds", "steps", "maps")]
    assert all(path.exists() for path in paths)
    with pytest.raises(ValueError, match="kfac propagates derivatives forward, which is not done for 'inverse'"):
        race(EQUATIONS["inverse"], ("kfac",))
    with pytest.raises(ValueError, match="no optimizer 'sgd'"):
        race(EQUATIONS["poisson2d"], ("sgd",))


@pytest.mark.parametrize("name", ["burgers", "inverse", "poisson5d"])
def test_every_equation_trains_and_is_drawn(name, tmp_path):
    whole = EQUATIONS[name]  # smaller, to be quick
    equation = replace(whole, points=tuple(n // 4 for n in whole.points), sizes=(whole.sizes[0], 12, 1))
    curves = race(equation, ("gram",), seeds=(0,), seconds=0.2, draws=1)
    losses = [loss for *_, loss in curves.runs[0].points]
    assert losses[-1] < losses[0] or len(losses) == 1
    assert all(path.exists() for path in curves.draw(tmp_path))
    written = json.loads(curves.to_json())
    assert ("intervals" in written) == (name == "inverse")
    require("jsonschema").validate(written, schema(f"race {name}"))
    curves.runs[0].points[-1] = (0.2, 1, float("inf"), float("nan"))
    assert json.loads(curves.to_json())["runs"][0]["points"][-1] == [0.2, 1, None, None]
