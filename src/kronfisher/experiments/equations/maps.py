"""Pictures of a solution: what each network learnt, and how far that is from the truth."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.experiments.equations.equation import Equation

__all__ = ["maps"]

_SIDE = 121  # points of a map in each direction


def maps(equation: Equation, networks: Mapping[str, nn.Module]) -> Any:
    """Upper row: the solution, and what every network says; lower row: the distance of these, by powers of ten.

    Of more than two coordinates the first two are shown, at ½ of the others.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    points = _grid(equation.sizes[0])
    truth = equation.solution(points)
    with torch.no_grad():
        learnt = {name: network(points)[:, 0] for name, network in networks.items()}
    errors = {name: (own - truth).abs().clamp_min(1e-12) for name, own in learnt.items()}
    scale = {"vmin": float(truth.min()), "vmax": float(truth.max()), "cmap": "viridis"}
    largest = max(float(error.max()) for error in errors.values())
    powers = LogNorm(min(float(error.median()) for error in errors.values()) / 10, largest)
    figure = Figure(figsize=(2.6 * (1 + len(networks)) + 0.8, 5.4), layout="constrained")
    axes = figure.subplots(2, 1 + len(networks), squeeze=False)
    shown = _show(axes[0, 0], truth, "solution", equation, **scale)
    axes[1, 0].set_axis_off()
    for k, name in enumerate(networks, start=1):
        _show(axes[0, k], learnt[name], name, equation, **scale)
        distance = _show(axes[1, k], errors[name], f"|{name} − solution|", equation, norm=powers, cmap="magma")
    figure.colorbar(shown, ax=axes[0])
    figure.colorbar(distance, ax=axes[1])
    return figure


def _grid(dimensions: int) -> Tensor:
    """``[side², d]``."""
    line = torch.linspace(0, 1, _SIDE, dtype=torch.float64)
    points = torch.full((_SIDE**2, dimensions), 0.5, dtype=torch.float64)
    points[:, :2] = torch.cartesian_prod(line, line)
    return points


def _show(axes: Any, values: Tensor, title: str, equation: Equation, **options: Any) -> Any:
    shown = axes.imshow(values.view(_SIDE, _SIDE).T.numpy(), origin="lower", extent=(0, 1, 0, 1), **options)
    axes.set_title(title)
    axes.set(xlabel="x" if equation.start else "x₁", ylabel="t" if equation.start else "x₂")
    axes.grid(visible=False)
    return shown
