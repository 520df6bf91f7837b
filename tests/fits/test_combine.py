"""States combine linearly: partitions of the data, moving averages; in one basis only."""

import pytest
import torch

import kronfisher as kf
from kronfisher.capture.isolation import isolate
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.estimation.recipe import Recipe
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fits import FITS, choose, resolve
from tests.fits.pieces import gradients_of, random_samples
from tests.helpers.networks import sequences

LINEAR = [name for name in FITS if resolve(name).linear]
ONE_PASS = [name for name in LINEAR if name not in ("ekfac", "kl")]


def states(model, data, fit):
    run = Accumulator(Recipe(model, kf.Categorical(), labels="exact"), fit)
    with isolate(model, 0):
        run.add((data, None), "batch 0")
    return run.groups


@pytest.mark.parametrize("fit", LINEAR)
def test_partitions_add_up_and_averages_are_weighted(fit):
    model, x, y = sequences(seed=3), torch.randn(5, 2, 4).double(), torch.randn(8, 2, 4).double()
    for one, other, both in zip(*(states(model, data, fit) for data in (x, y, torch.cat([x, y]))), strict=True):
        before = {name: value.clone() for name, value in one.state.sums.items()}
        joined = one.fit.combine(one.state, other.state)
        assert (joined.count, joined.rows) == (both.state.count, both.state.rows) and joined.count == 13
        average = one.fit.combine(one.state, other.state, 0.95, 0.05)
        assert average.count == pytest.approx(0.95 * 5 + 0.05 * 8)
        for name, value in joined.sums.items():
            torch.testing.assert_close(value.triu(), both.state.sums[name].triu(), rtol=1e-10, atol=1e-12)
            expected = 0.95 * one.state.sums[name] + 0.05 * other.state.sums[name]
            torch.testing.assert_close(average.sums[name], expected)
            assert torch.equal(one.state.sums[name], before[name])  # what goes in is left alone


@pytest.mark.parametrize("fit", ONE_PASS)
def test_a_combined_state_finishes_as_the_mean_over_both(fit):
    model, x, y = sequences(seed=3), torch.randn(5, 2, 4).double(), torch.randn(8, 2, 4).double()
    whole = kf.estimate(model, torch.cat([x, y]), kf.Categorical(), fit=fit, labels="exact")
    for one, other, both in zip(states(model, x, fit), states(model, y, fit), whole.blocks.values(), strict=True):
        operator = one.fit.finish(one.fit.combine(one.state, other.state))
        torch.testing.assert_close(operator.to_dense(), both.to_dense(), rtol=1e-10, atol=1e-12)


def test_states_of_other_blocks_or_bases_do_not_combine():
    model, x, y = sequences(seed=3), torch.randn(5, 2, 4).double(), torch.randn(8, 2, 4).double()
    first, second = states(model, x, "kfac")
    with pytest.raises(ValueError, match=r"0\.weight: states can be combined only"):
        first.fit.combine(first.state, second.state)
    groups = []
    for data in (x, y):
        run = Accumulator(Recipe(model, kf.Categorical(), labels="exact"), "ekfac")
        run.read(data)
        groups.append(next(iter(run.groups)))
    with pytest.raises(ValueError, match="same pass and basis"):
        groups[0].fit.combine(groups[0].state, groups[1].state)
    doubled = groups[0].fit.combine(groups[0].state, groups[0].state)
    torch.testing.assert_close(groups[0].fit.finish(doubled).values, groups[0].fit.finish(groups[0].state).values)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(("wx", "wy"), [(0.5, 1.0), (1.0, 0.5), (0.25, 3.0)])
def test_errors_of_weighted_states_are_those_of_what_they_weigh(rank, wx, wy):
    fit, block = kf.KFOC(rank_memory=rank), Block("w", "linear", Window.of("w", torch.zeros(1, 5, 7)))
    samples = random_samples(n=60)
    halves, states = (samples.part(0, 30), samples.part(30, 60)), []
    for half in (*halves, None):
        state = fit.init((block,), fit.plan((block,), 8), samples.gradients)
        states.append(state if half is None else fit.update(state, (half,)))
        state.count = 0.0 if half is None else 30.0
    x, y, empty = states
    alone = fit.combine(x, empty, wx, wy)
    G = gradients_of(halves[0])[0].flatten(1) * wx**0.5
    operator = fit.finish(alone)
    truth = G.mT @ G
    error = (truth - operator.to_dense() * alone.count).norm() / truth.norm()
    torch.testing.assert_close(fit.error(alone, operator), float(error), rtol=1e-3, atol=0)
    both = fit.combine(x, y, wx, wy)
    operator = fit.finish(both)
    G = gradients_of(halves[1])[0].flatten(1) * wy**0.5
    truth = truth + G.mT @ G
    error = (truth - operator.to_dense() * both.count).norm() / truth.norm()
    if rank == 1:
        assert fit.error(both, operator) is None  # one term a half does not tell
    else:
        torch.testing.assert_close(fit.error(both, operator), float(error), rtol=0.02, atol=0)


def test_parameters_with_the_same_choice_have_the_same_instance():
    own = kf.KFOC()
    chosen = choose({"a": "kfac", "b": "kfac", "c": own, "d": own, "e": kf.KFOC()}, dict.fromkeys("abcde"))
    assert chosen["a"] is chosen["b"] and chosen["c"] is chosen["d"] and chosen["e"] is not own


@pytest.mark.parametrize("aggregation", ["memory", "running", "approx", "exact"])
def test_a_copy_is_finished_and_the_state_goes_on_as_if_nobody_had_looked(aggregation):
    """Training renews the eigenvalues of EKFAC from the average so far, while samples of it wait to be merged."""
    fit = kf.EKFAC(kf.KFOC(aggregation))
    block = Block("w", "linear", Window.of("w", torch.zeros(1, 5, 7)))

    def state(seed):
        samples = random_samples(seed=seed)
        begun = fit.init((block,), fit.plan((block,), 8), samples.gradients)
        begun.count += len(samples)
        return fit.update(begun, (samples,))

    matrices = []
    for looks in (False, True):
        first = state(0)
        if looks:
            assert fit.next_pass(first.copy()) is not None
        matrices.append(fit.basis.finish(fit.combine(first, state(1), 0.95)).to_dense())
    assert torch.equal(*matrices) and matrices[0].norm() > 0.1
