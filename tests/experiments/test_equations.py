"""Races on residuals of equations: solutions solve them, and a race has its tables, curves and figures."""

import pytest
import torch

from kronfisher.experiments.equations import EQUATIONS, race


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_solution_solves_the_equation(name):
    equation = EQUATIONS[name]

    class Solution(torch.nn.Module):
        def forward(self, x):
            return equation.solution(x)[:, None]

    torch.manual_seed(0)
    found = equation.residuals(Solution(), *equation.draw())
    assert all(float(term.detach().abs().max()) < 1e-9 for term in found.values())
    assert equation.error(Solution()) < 1e-12


def test_a_race_is_written_down(tmp_path):
    curves = race(EQUATIONS["poisson2d"], ("gram", "adam", "lbfgs"), seeds=(0,), seconds=0.4)
    assert [run.optimizer for run in curves.runs] == ["gram", "adam", "lbfgs"]
    assert all(run.points[-1][0] >= 0.4 for run in curves.runs)
    assert "gram" in str(curves) and '"poisson2d"' in curves.to_json()
    assert all(path.exists() for path in curves.draw(tmp_path))
    with pytest.raises(ValueError, match="no optimizer 'sgd'"):
        race(EQUATIONS["poisson2d"], ("sgd",))
