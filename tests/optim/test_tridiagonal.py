"""Chains of layers in training: moving averages of cross moments, damping, inverses, states, reports."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.operators import Tridiagonal
from tests.helpers.networks import perceptron
from tests.helpers.training import Curvature

CHAIN = kf.BlockTridiagonal(kf.KFAC())


def batch(seed, n=12):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, dtype=torch.float64, generator=g)
    return x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long()


def test_averages_are_weighted_sums_over_batches_of_any_size():
    model = perceptron(4, 6, 5, 3, seed=0)
    curvature = Curvature(model, CHAIN, refresh=kf.Refresh(average=0.6))
    batches = [batch(k, n)[0] for k, n in enumerate((12, 5, 30))]
    for x in batches:
        curvature.observe(x)
        curvature.merge()
    curvature.renew(1e-4)
    (layer,) = curvature.statistics.layers
    weights = [0.6**2, 0.6, 1.0]
    sums = [
        kf.estimate(model, x, kf.Categorical(), fit=CHAIN, labels="exact", reduction="sum")["0.weight"] for x in batches
    ]
    total = sum(w * len(x) for w, x in zip(weights, batches, strict=True))
    average = layer.fit.finish(layer.average)
    assert isinstance(average, Tridiagonal)
    for k in range(3):
        # a sum over examples has all of the scale in B, so that A is a mean over its own batch
        A = sum(w * len(x) * s.layers[k].A for w, x, s in zip(weights, batches, sums, strict=True)) / total
        B = sum(w * s.layers[k].B for w, s in zip(weights, sums, strict=True)) / total
        torch.testing.assert_close(average.layers[k].A, A)
        torch.testing.assert_close(average.layers[k].B, B)
    for k in range(2):
        A = sum(w * len(x) * s.A[k] for w, x, s in zip(weights, batches, sums, strict=True)) / total
        B = sum(w * s.B[k] for w, s in zip(weights, sums, strict=True)) / total
        torch.testing.assert_close(average.A[k], A)
        torch.testing.assert_close(average.B[k], B)
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    dense = (average + kf.FactoredTikhonov(1e-4)).to_dense()
    rows = torch.cat([torch.cat([v[f"{k}.weight"], v[f"{k}.bias"][:, None]], dim=1).flatten() for k in (0, 2, 4)])
    expected = torch.linalg.solve(dense, rows).split([block.dim for block in layer.blocks])
    answer = curvature.precondition(v, 1e-4)
    for k, solution in zip((0, 2, 4), expected, strict=True):
        matrix = solution.reshape(len(v[f"{k}.bias"]), -1)
        torch.testing.assert_close(answer[f"{k}.weight"], matrix[:, :-1], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(answer[f"{k}.bias"], matrix[:, -1], rtol=1e-7, atol=1e-9)


def test_neighbours_matter():
    """The natural gradient differs from K-FAC's; otherwise the tests above would prove nothing."""
    model, (x, y) = perceptron(4, 6, 5, 3, seed=0), batch(0, 40)
    nn.functional.cross_entropy(model(x), y).backward()
    v, answers = {name: p.grad for name, p in model.named_parameters()}, []
    for fit in (CHAIN, "kfac"):
        fisher = kf.estimate(model, x, kf.Categorical(), fit=fit, labels="exact") + kf.FactoredTikhonov(1e-4)
        answers.append(torch.cat([t.flatten() for t in fisher.solve(v).values()]))
    assert (answers[0] - answers[1]).norm() > 0.2 * answers[1].norm()


@pytest.mark.parametrize("labels", ["exact", "sampled", "observed"])
def test_the_optimiser_descends_and_continues_from_its_state(labels):
    def run(steps, state=None, model=None):
        model = model or perceptron(4, 6, 5, 3, seed=0)
        optimizer = kf.NaturalGradient(
            model,
            kf.Categorical(),
            fit=CHAIN,
            labels=labels,
            refresh=kf.Refresh(statistics=2, inverse=3),
            step=kf.QuadraticModel(),
        )
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        losses = []
        for k in steps:
            x, y = batch(k, 40)
            losses.append(float(optimizer.step(lambda x=x: model(x), y)))
        return losses, model, optimizer

    losses, model, optimizer = run(range(12))
    assert losses[-1] < 0.7 * losses[0]
    assert optimizer.report().cuts == ()
    first, half, halfway = run(range(6))
    saved = {k: v.clone() for k, v in half.state_dict().items()}, halfway.state_dict()
    rest, resumed, _ = run(range(6, 12), saved)
    assert first + rest == losses
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_preconditioner_solves_with_the_chain():
    model, (x, y) = perceptron(4, 6, 5, 3, seed=0), batch(0, 30)
    preconditioner = kf.Preconditioner(model, kf.Categorical(), fit=CHAIN, labels="exact", trust=0.1, scale=None)
    nn.functional.cross_entropy(preconditioner(x), y).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    preconditioner.step()
    fisher = kf.estimate(model, x, kf.Categorical(), fit=CHAIN, labels="exact") + kf.FactoredTikhonov(0.1)
    for name, expected in fisher.solve(gradients).items():
        torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=1e-8, atol=1e-10)


def test_cuts_are_in_the_report_before_and_after_resuming():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit=CHAIN, step=kf.QuadraticModel())
    x, y = batch(0)
    optimizer.step(lambda: model(x), y)
    cuts = optimizer.report().cuts
    assert len(cuts) == 3 and all("layer_norm of 1.weight, 1.bias" in cut or "1.weight" in cut for cut in cuts)
    assert cuts[-1] in str(optimizer.report())
    other = kf.NaturalGradient(model, kf.Categorical(), fit=CHAIN, step=kf.QuadraticModel())
    other.load_state_dict(optimizer.state_dict())
    for _ in range(12):
        other.step(lambda: model(x), y)
    assert other.report().cuts == cuts
    names = [[block.name for block in layer.blocks] for layer in other.parts.statistics.layers]
    assert ["2.weight", "4.weight"] in names and ["0.weight"] in names


def test_rows_that_mix_examples_are_treated_as_independent():
    """Below a normalisation over the batch rows of neighbouring layers are still in one order."""
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit=CHAIN, momentum=0.9)
    x, y = batch(0, 40)
    losses = [float(optimizer.step(lambda: model(x), y)) for _ in range(12)]
    report = optimizer.report()
    assert losses[-1] < losses[0] and not report.uncovered and "0.weight" in report.coupled
    names = [[block.name for block in layer.blocks] for layer in optimizer.parts.statistics.layers]
    assert names == [["0.weight", "3.weight", "5.weight"]]
