"""An estimate against the dense truth, and what has to hold where parameters are left to the fallback."""

import pytest
import torch

import kronfisher as kf
from kronfisher.fisher.vectors import read
from kronfisher.fits import FITS
from tests.helpers.truth import exact_fisher, kept

# `auto` makes six fits of every layer and ends as one of the others. What is its own is tested with it, and in the
# conformance tests; elsewhere it would take as long as all others together.
SETTLED = tuple(name for name in FITS if name != "auto")


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
    said = " ".join(str(fisher.report()).split())  # parameters with one reason share a line
    assert said.count(": fallback: ") == len(
        {info.notes for info in fisher.info.blocks.values() if "fallback: " in info.notes}
    )
    assert_exact(model, batches)
    assert_exact(model, batches, fit="diagonal")
    assert_exact(model, batches, fit=kf.Full(across_layers=True))
    coverage = kf.coverage(model, batches)
    assert {row.parameter for row in coverage.rows if row.reason} == set(alone) and not coverage.complete
    return fisher


def assert_by_layers(model, batches):
    """No parameter is left to the fallback, and the whole matrix and its diagonal are the dense truth."""
    truth = exact_fisher(model, torch.cat(batches))
    for fit in (kf.Full(across_layers=True), "diagonal"):
        assert_exact(model, batches, fit=fit, tolerance=1e-10, truth=truth)
    assert kf.coverage(model, torch.cat(batches)).complete


def assert_trained_by_layers(model, x):
    """The loss of a few steps falls, and no parameter makes Adam's steps."""
    y = torch.randn(*model(x).shape)
    optimizer = kf.NaturalGradient(model, kf.Gaussian())
    losses = [float(optimizer.step(lambda: model(x), y)) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert "fallback" not in str(optimizer.report()) and "Adam" not in str(optimizer.report())


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
