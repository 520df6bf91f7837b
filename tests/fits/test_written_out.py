"""Samples that wait as their gradients are the same samples, and what all waits for its end is one piece."""

import pytest
import torch

import kronfisher as kf
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fits.products import ProductSums
from kronfisher.fits.rearrangement import rearrange
from kronfisher.fits.scaling import level
from kronfisher.fits.written_out import WrittenOut, write_out
from tests.fits.pieces import SHARP, excess, fitted, random_samples


def rows(use):
    return torch.cat([part.transpose(0, 1) for part in use.per_sample()]).flatten(1)


CHANGES = {
    "none": lambda use: use,
    "copy": lambda use: use.copy(),
    "part": lambda use: use.part(2, 7),
    "select": lambda use: use.select(torch.tensor([5, 0, 3])),
    "level": lambda use: level([use])[0],
}


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_gradients_written_out_are_the_same_samples(change, groups):
    samples = random_samples(n=10, T=9, H=groups)
    use = write_out(samples)
    assert use is not None and use.bytes < samples.bytes and use.shape == samples.shape and len(use) == 10
    use, samples = change(use), change(samples)
    torch.testing.assert_close(rows(use), rows(samples))
    dense = torch.einsum("hnto,hnti->nhoi", use.gradients, use.activations.dense()).flatten(1)
    torch.testing.assert_close(dense, rows(samples))  # in the canonical form as well
    assert len(use) == len(use.activations.dense()[0]) == len(samples)


def test_gradients_are_written_out_only_where_that_takes_less_memory():
    assert write_out(random_samples(T=2)) is None  # 35 numbers, and 2 · 12


def waiting(fit, samples):
    groups, outputs, inputs = samples.shape
    block = Block("w", "linear", Window.of("w", torch.zeros(groups, outputs, inputs)))
    state = fit.init((block,), fit.plan((block,), 8), samples.gradients)
    state = fit.update(state, (samples,))
    assert isinstance(state, ProductSums)
    return state.waiting


def test_they_wait_where_half_steps_are_on_gradients():
    samples = random_samples(T=9)
    (use,) = waiting(kf.KFOC(), samples)
    assert isinstance(use, WrittenOut)
    for fit in (kf.KFOC(route="rows"), kf.KFOC("approx"), kf.KFOC(max_dim=6)):
        assert not any(isinstance(use, WrittenOut) for use in waiting(fit, samples))


@pytest.mark.parametrize("T", [1, 2, 9])
def test_samples_that_all_wait_are_one_piece_and_its_optimum(T):
    samples = random_samples(n=900, T=T)
    batches = [samples.part(low, low + 300) for low in range(0, 900, 300)]
    operator, state, _ = fitted(kf.KFOC(**SHARP), *batches)
    assert isinstance(state, ProductSums) and state.single is not None and float(state.single.pieces) == 1
    assert abs(excess(operator, samples)) <= 1e-12


def test_a_single_term_of_a_weight_that_positions_share_takes_a_few_samples_at_once():
    samples = random_samples(n=256, T=9)
    batches = [samples.part(low, low + 64) for low in range(0, 256, 64)]
    pieces = {rank: fitted(kf.KFOC(rank_memory=rank, route="rows"), *batches)[1].sums["pieces"] for rank in (1, 4)}
    assert float(pieces[1]) == 2 and float(pieces[4]) == 0  # these are still waiting


@pytest.mark.parametrize(("T", "route"), [(1, "weights"), (1, "rows"), (6, "rows"), (1, "explicit"), (6, "explicit")])
def test_a_half_step_from_the_identity_has_no_product_with_it_but_its_result(T, route):
    source = rearrange([random_samples(T=T, H=3), random_samples(T=T, H=3, seed=1)], route)
    torch.testing.assert_close(source.outputs_of_identity(), source.outputs(source.first()))
