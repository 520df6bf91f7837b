"""Dense truth for any model: gradients by ``torch.autograd.grad``, one datum and one column at a time; no capture."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.fisher.layout import gather
from kronfisher.fisher.vectors import read
from kronfisher.fits import FITS

# `auto` makes six fits of every layer and ends as one of the others. What is its own is tested with it, and in the
# conformance tests; elsewhere it would take as long as all others together.
SETTLED = tuple(name for name in FITS if name != "auto")


class Written(nn.Module):
    """A model from its forward function, its parameters and its submodules."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, nn.Module):
                self.add_module(name, member)
            else:
                self.register_parameter(name, nn.Parameter(member))

    def forward(self, *inputs):
        return self.function(self, *inputs)


def linears(function, *sizes, bias=True):
    """A model of linear layers `l0`, `l1`, ... of these sizes and its forward function."""
    layers = {f"l{k}": nn.Linear(i, o, bias=bias) for k, (i, o) in enumerate(sizes)}
    return Written(function, **layers)


def exact_fisher(model, batches, likelihood=None, targets=None):
    """``[P, P]`` in float64: mean over data of ``Jᵀ H J``, a sum over columns of each datum's output Hessian root."""
    likelihood = likelihood or kf.Gaussian()
    parameters = [p for p in model.parameters() if p.requires_grad]
    total, count = 0.0, 0
    for inputs in batches if isinstance(batches, list) else [batches]:
        outputs = model(inputs)
        count += len(outputs)
        for column in likelihood.exact(outputs.detach(), targets):
            for k in range(len(outputs)):
                alone = torch.zeros_like(column)
                alone[k] = column[k]
                found = torch.autograd.grad(outputs, parameters, alone, retain_graph=True, allow_unused=True)
                parts = [
                    p.new_zeros(p.numel()) if g is None else g.to_dense().flatten()
                    for p, g in zip(parameters, found, strict=True)
                ]
                row = torch.cat(parts).double()
                total = total + torch.outer(row, row)
    return total / count


def completed(diagonal, links):
    """The matrix of given diagonal and neighbouring blocks whose inverse is zero elsewhere, built block by block."""
    blocks = {(k, k): block for k, block in enumerate(diagonal)}
    for j in range(1, len(diagonal)):
        for i in reversed(range(j)):
            between = torch.linalg.inv(diagonal[i + 1])
            blocks[i, j] = links[i] if j == i + 1 else links[i] @ between @ blocks[i + 1, j]
            blocks[j, i] = blocks[i, j].T
    size = range(len(diagonal))
    return torch.cat([torch.cat([blocks[i, j] for j in size], dim=1) for i in size])


def kept(fisher):
    """``[P, P]``: 1 where the structure keeps an element of the exact matrix, for fits that are exact there."""
    positions, _ = read(torch.arange(fisher.dim), fisher.shapes)
    mask = torch.zeros(fisher.dim, fisher.dim, dtype=torch.float64)
    for blocks, operator in fisher.entries:
        index = gather((blocks,) if not isinstance(blocks, tuple) else blocks, positions)[0]
        mask[index[:, None], index] = torch.eye(len(index), dtype=torch.float64) if operator.kind == "diagonal" else 1.0
    return mask


def assert_fallback(model, batches, message):
    """Refused by name under ``strict=True``; else a diagonal that is exact, and with `Full` all of the exact matrix."""
    with pytest.raises(kf.UnsupportedError, match=message):
        kf.estimate(model, batches, kf.Gaussian(), strict=True)
    fisher = kf.estimate(model, batches, kf.Gaussian(), labels="exact")
    alone = [name for name, block in fisher.info.blocks.items() if block.method.startswith("fallback: ")]
    assert alone and all(fisher[name].kind == "diagonal" for name in alone)
    truth, size = exact_fisher(model, batches).diagonal(), max(1e-12, float(exact_fisher(model, batches).norm()))
    found = torch.cat([value.flatten() for value in fisher.diagonal().values()])
    for name in alone:  # what the fallback says of a parameter, number by number
        index = read(torch.arange(fisher.dim), fisher.shapes)[0][name].flatten()
        assert float((found[index] - truth[index]).norm()) < 1e-5 * size, name
    assert all(f"{name}: fallback: " in str(fisher.report()) for name in alone)
    assert_exact(model, batches)
    assert_exact(model, batches, fit="diagonal")
    assert_exact(model, batches, fit=kf.Full(across_layers=True))
    coverage = kf.coverage(model, batches)
    assert {row.parameter for row in coverage.rows if row.reason} == set(alone) and not coverage.complete
    return fisher


def assert_exact(model, batches, fit="full", tolerance=1e-5, likelihood=None, targets=None, truth=None):
    """An estimate with exact labels agrees with the dense truth wherever its structure keeps an element."""
    likelihood = likelihood or kf.Gaussian()
    data = (batches, targets) if targets is not None else batches
    fisher = kf.estimate(model, data, likelihood, fit=fit, labels="exact")
    truth = exact_fisher(model, batches, likelihood, targets) if truth is None else truth
    truth = truth * kept(fisher)
    assert truth.norm() > 1e-3, "nothing to compare"
    distance = float((fisher.to_dense().double() - truth).norm() / truth.norm())
    assert distance < tolerance, f"relative distance {distance:.1e}"
    return fisher
