"""K-FOC of data that are degenerate: zero, alike, of extreme sizes, in batches of nothing."""

import pytest
import torch

import kronfisher as kf
from kronfisher.fits.running_sum import leading
from tests.fits.pieces import best, fitted, gradients_of, random_samples, samples_of

AGGREGATIONS = ["memory", "exact", "running", "approx"]
each = pytest.mark.parametrize("aggregation", AGGREGATIONS)
positions = pytest.mark.parametrize("T", [1, 3])


def block(*batches):
    G = torch.cat([gradients_of(batch) for batch in batches], 1)[0].double()
    rows = G.flatten(1)
    return rows.mT @ rows, float(best(G)[1][0])


def close_to_the_optimum(fit, *batches, slack=1e-3):
    operator, state, _ = fitted(fit, *batches)
    truth, sigma = block(*batches)
    squared = float(truth.norm() ** 2)
    error = float((truth - operator.to_dense().double()).norm()) ** 2 / squared
    assert error <= 1 - sigma**2 / squared + slack
    for factor in (operator.A, operator.B):
        assert torch.linalg.eigvalsh(factor).min() >= -1e-6 * factor.norm()
    reported = fit.error(state, fit.finish(state))
    assert reported is None or reported == pytest.approx(error**0.5, abs=0.02)
    return operator


def nothing(samples):
    return samples_of(samples.activations.dense()[:, :0], samples.gradients[:, :0])


@each
@positions
def test_batches_of_no_data_add_nothing(aggregation, T):
    """Seen: an IndexError, and a shape of no dimensions."""
    fit, samples = kf.KFOC(aggregation), random_samples(T=T)
    empty = nothing(samples)
    alone, _, _ = fitted(fit, samples)
    for batches in ((empty, samples), (samples, empty), (empty, samples, empty)):
        torch.testing.assert_close(fitted(fit, *batches)[0].to_dense(), alone.to_dense())
    operator, state, _ = fitted(fit, empty)
    assert not operator.to_dense().any() and fit.notes(state)


@each
@positions
def test_zero_gradients_give_zero_and_are_no_news(aggregation, T):
    fit, samples = kf.KFOC(aggregation), random_samples(T=T)
    zero = samples_of(samples.activations.dense(), 0 * samples.gradients)
    assert not fitted(fit, zero)[0].to_dense().any()
    for batches in ((zero, samples), (samples, zero)):
        close_to_the_optimum(fit, *batches)


@each
@positions
@pytest.mark.parametrize(("I", "O"), [(1, 5), (5, 1), (1, 1), (1, 40), (40, 1)])
def test_a_factor_of_one_row_is_exact_in_several_batches(aggregation, T, I, O):
    """Seen: all of it counted twice, with an error of zero reported, where a second term was rounding noise."""
    batches = [random_samples(n, T, I, O, seed=n) for n in (24, 7)]
    slack = 0.1 if aggregation == "approx" else 1e-6
    close_to_the_optimum(kf.KFOC(aggregation), *batches, slack=slack)
    close_to_the_optimum(kf.KFOC(aggregation, tolerance=0.0), batches[0], slack=1e-6)


@each
@positions
@pytest.mark.parametrize("apart", [False, True])
def test_equal_singular_values_give_a_positive_product(aggregation, T, apart):
    """Seen: an indefinite factor, of the many that lead then."""
    e = torch.eye(5, dtype=torch.float64)[None, :, None].expand(1, 5, T, 5)
    whole = samples_of(e / T, e)
    batches = [whole.part(k, k + 1) for k in range(5)] if apart else [whole]
    if aggregation in ("memory", "exact"):
        close_to_the_optimum(kf.KFOC(aggregation), *batches)
    else:
        operator, _, _ = fitted(kf.KFOC(aggregation), *batches)
        assert all(torch.linalg.eigvalsh(factor).min() >= -1e-6 * factor.norm() for factor in (operator.A, operator.B))


def test_the_leading_pair_of_equal_terms_is_the_positive_mixture():
    A = torch.stack([torch.eye(4), torch.diag(torch.tensor([1.0, -1, 1, -1]))]).double()[:, None]
    first, second = leading(A, A.clone(), "w")
    assert torch.linalg.eigvalsh(first).min() >= -1e-12 and torch.linalg.eigvalsh(second).min() >= -1e-12
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]]).double()
    mixed = torch.einsum("rs,shij->rhij", turn, A)  # the same sum
    again = leading(mixed, mixed.clone(), "w")
    torch.testing.assert_close(torch.kron(again[0][0], again[1][0]), torch.kron(first[0], second[0]))


@pytest.mark.parametrize("aggregation", ["memory", "exact"])
@positions
@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e20])
def test_batches_of_very_different_sizes(aggregation, T, scale):
    first, second, third = (random_samples(seed=seed, T=T) for seed in (1, 2, 3))
    smaller = samples_of(second.activations.dense(), second.gradients * scale)
    close_to_the_optimum(kf.KFOC(aggregation), first, smaller, slack=2e-3)
    close_to_the_optimum(kf.KFOC(aggregation), smaller, first, third, slack=2e-3)


@each
def test_what_overflows_is_named_and_what_vanishes_is_told(aggregation):
    """Seen: 'linalg.svd failed to converge', and zero for gradients of 1e-20 with an error of zero reported."""
    samples = random_samples(dtype=torch.float32)
    a, g = samples.activations.dense(), samples.gradients
    with pytest.raises(kf.NumericalError, match="w: "):
        fitted(kf.KFOC(aggregation), samples_of(a, g * 1e20), samples_of(a, g * 1e20))
    with pytest.warns(
        kf.NumericalWarning, match=r"w: its gradients and inputs are \de-20 at most, and their squares va"
    ):
        fitted(kf.KFOC(aggregation), samples_of(a * 1e-20, g * 1e-20 * 3 / g.abs().max()))
    product, _, _ = fitted(kf.KFOC(aggregation), samples_of(a, g * 2.0**-66))  # the matrix vanishes, its factors do not
    whole, _, _ = fitted(kf.KFOC(aggregation), samples)
    truth = torch.kron(whole.B[0].double(), whole.A[0].double())
    found = torch.kron(product.B[0].double() * 2.0**66, product.A[0].double() * 2.0**66)
    assert (found - truth).norm() <= 1e-4 * truth.norm()


def test_states_that_are_finished_saved_and_combined_go_on():
    """What was finished early waits as before."""
    fit = kf.KFOC()
    batches = [random_samples(n, seed=n) for n in (13, 20, 7)]
    state = None
    for batch in batches:
        if state is None:
            plan_of = fitted(fit, batch)[1]
            state = fit.init(plan_of.blocks, plan_of.plan, batch.gradients)
        state.count += len(batch)
        state = fit.update(state, (batch,))
        early = fit.finish(state)
        assert fit.error(state, early) is not None and "double steps" in fit.notes(state)
    torch.testing.assert_close(fit.finish(state).to_dense(), (fitted(fit, *batches)[0] / 40).to_dense())
