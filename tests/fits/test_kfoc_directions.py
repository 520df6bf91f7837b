"""K-FOC through a few directions, for wide weights and for those that many positions share."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fits.rearrangement import cheapest, projected
from kronfisher.layers.activations import Dense
from kronfisher.layers.onehot import Indices
from kronfisher.linalg import add_symmetric_product_
from tests.fits.pieces import SHARP, excess, fitted, gradients_of, random_samples, samples_of


@pytest.mark.parametrize(("T", "n"), [(1, 900), (9, 64)])
def test_projections_are_close(T, n):
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(60, 60, generator=generator) * torch.logspace(0, -2, 60)
    a = torch.relu(torch.randn(1, n, T, 60, generator=generator) @ mix)
    g = torch.randn(1, n, T, 50, generator=generator) * torch.logspace(0, -1.5, 50)
    samples = samples_of(a.double(), g.double())
    exact = fitted(kf.KFOC(route="explicit", **SHARP), samples)[0]
    near = fitted(kf.KFOC(route="projected"), samples)[0]
    rows = gradients_of(samples)[0].flatten(1)
    block = rows.mT @ rows
    errors = [float((block - operator.to_dense()).norm() / block.norm()) for operator in (exact, near)]
    assert errors[0] <= errors[1] <= errors[0] + 0.001
    assert cheapest((1, 1000, 784), 512, 1, tolerance=1e-3) == "projected"
    assert cheapest((1, 1000, 784), 512, 1, tolerance=1e-6) == "gram"
    assert cheapest((1, 512, 4609), 64, 49, tolerance=1e-3) == "projected"
    assert cheapest((1, 32, 65), 512, 1, steps=5) == "weights"  # a Gram matrix of so many samples takes longer to read
    assert cheapest((1, 32, 65), 64, 1, steps=5) == "gram"


@pytest.mark.parametrize(("T", "n", "pieces"), [(1, 4096, 8), (9, 256, 4)])
def test_later_pieces_go_on_from_the_directions_of_earlier_ones(T, n, pieces):
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(24, 24, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 24)
    a = torch.relu(torch.randn(1, n, T, 24, generator=generator, dtype=torch.float64) @ mix)
    g = torch.randn(1, n, T, 20, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, 20)
    samples = samples_of(a, g)
    batches = [samples.part(n * k // pieces, n * (k + 1) // pieces) for k in range(pieces)]
    errors, steps = {}, {}
    for warm in (False, True):
        fit = kf.KFOC(route="projected", rank_memory=1, warm_start=warm)
        block = Block("w", "linear", Window.of("w", torch.zeros(1, 20, 24)))
        state = fit.init((block,), replace(fit.plan((block,), 8), waiting=0), g)
        for batch in batches:
            state = fit.update(state, (batch,))
        assert float(state.sums["pieces"]) == pieces
        state.count, steps[warm] = 1.0, float(state.sums["steps"])
        errors[warm] = excess(fit.finish(state), samples)
    assert steps[True] < steps[False]
    assert errors[True] <= errors[False] + 0.001 and errors[True] <= 0.003


@pytest.mark.parametrize(("outputs", "pieces"), [(120, 1), (10, 2)])
def test_weights_with_a_single_term_are_projected_in_large_pieces_or_after_the_first(outputs, pieces):
    samples = random_samples(n=1024, I=550, O=outputs, dtype=torch.float32)
    operator, state, _ = fitted(kf.KFOC(), samples)
    assert float(state.pieces) == pieces and state.route == "projected"
    best = fitted(kf.KFOC("exact", tolerance=1e-6), samples)[0]
    sizes = operator.frobenius_norm() / best.frobenius_norm()  # its inner product with the block, and so its error
    assert 0.999 <= float(sizes) <= 1.0001


def test_inputs_sum_with_rows_and_have_lengths_as_if_written_out():
    values, y = torch.randn(2, 6, 1, 4).double(), torch.randn(2, 6, 3).double()
    index = Indices(torch.randint(4, (6, 1, 2)), torch.rand(6, 1, 2).double(), 4)
    for inputs in (Dense(values), Dense(values, bias=True), index):
        rows = inputs.dense()[:, :, 0]
        torch.testing.assert_close(inputs.sum_with(y[: len(rows)]), rows.mT @ y[: len(rows)])
        torch.testing.assert_close(inputs.lengths(), rows.norm(dim=-1))


@pytest.mark.parametrize(("workspace", "formed"), [(2**27, False), (2**16, True)])
def test_a_half_step_through_directions_forms_no_wide_matrix_unless_its_rows_take_too_much_room(
    workspace, formed, monkeypatch
):
    samples = replace(random_samples(n=24, T=3, I=300, O=5), workspace=workspace)
    left, v = torch.randn(1, 5, 16).double(), torch.randn(1, 300, 2).double()
    G, calls = gradients_of(samples)[0], []
    monkeypatch.setattr(projected, "add_symmetric_product_", lambda *args: calls.append(add_symmetric_product_(*args)))
    found = projected._half_step(300, left, [samples], transposed=True)(v)
    torch.testing.assert_close(found[0], torch.einsum("koi,op,kpj,jr->ir", G, left[0] @ left[0].mT, G, v[0]))
    assert bool(calls) == formed


def test_few_samples_tell_the_first_directions_where_positions_share_the_weight(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    a = torch.relu(torch.randn(1, 320, 6, 30, generator=generator, dtype=torch.float64) + 0.3)
    scale = torch.randn(1, 320, 1, 1, generator=generator, dtype=torch.float64).exp()
    samples = samples_of(a, torch.randn(1, 320, 6, 24, generator=generator, dtype=torch.float64) * scale)
    half_step, numbers = projected._half_step, []

    def counted(width, directions, some, transposed):
        numbers.append(sum(map(len, some)))
        return half_step(width, directions, some, transposed)

    monkeypatch.setattr(projected, "_half_step", counted)
    near = fitted(kf.KFOC(route="projected"), samples)[0]
    assert numbers and max(numbers) <= 64 * 1.25
    assert excess(near, samples) <= 0.001
    numbers.clear()
    fitted(kf.KFOC(route="projected"), samples_of(a[:, :, :2], samples.gradients[:, :, :2]))
    assert max(numbers) == 40 + 140  # of two positions each: the largest eighth, and every second of the others


@pytest.mark.parametrize("clear", [True, False])
def test_very_few_samples_and_half_of_the_directions_do_where_the_pair_stands_out(clear, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(1, 256, 20, 40, generator=generator, dtype=torch.float64)
    g = torch.randn(1, 256, 20, 30, generator=generator, dtype=torch.float64)
    samples = samples_of(torch.relu(a + 2) if clear else a, g)
    half_step, numbers = projected._half_step, []

    def counted(width, directions, some, transposed):
        numbers.append(sum(map(len, some)))
        return half_step(width, directions, some, transposed)

    monkeypatch.setattr(projected, "_half_step", counted)
    operator, state, _ = fitted(kf.KFOC(route="projected"), samples)
    assert [directions.shape[-1] for directions in state.directions] == 2 * [8 if clear else 16]
    assert set(numbers) == ({20} if clear else {20, 76})  # of each, the largest and some of the others
    assert excess(operator, samples) <= (0.001 if clear else 0.02)


def fewer_there(device, L):
    return projected._fewer(L.to(device), torch.ones((), dtype=torch.bool, device=device)).cpu()


def test_a_host_that_would_wait_takes_zeros_in_place_of_directions(on_device):
    L = torch.randn(1, 20, 16, dtype=torch.float64)
    here, there = projected._fewer(L, torch.tensor(True)), on_device(fewer_there, L)
    assert here.shape[-1] == 8 and not there[..., 8:].any()
    torch.testing.assert_close(there @ there.mT, here @ here.mT)
    assert projected._fewer(L, torch.tensor(False)) is L


class Language(nn.Module):
    def __init__(self, words=65, width=32, hidden=128):
        super().__init__()
        self.embedding, self.first = nn.Embedding(words, width), nn.Linear(width, hidden)
        self.second, self.head = nn.Linear(hidden, width), nn.Linear(width, words)

    def forward(self, x):
        h = self.embedding(x)
        h = h + h.cumsum(1) / 5
        return self.head(h + self.second(torch.relu(self.first(h))))


def notes_of(fisher):
    return [block.notes for block in fisher.info.blocks.values()]


@pytest.mark.parametrize(("size", "most"), [(10, 0.001), (200, 0.002), (16, 0.003)])
def test_few_long_sequences_and_many_small_batches_come_close_to_the_best_product(size, most):
    torch.manual_seed(1)
    model, x = Language(), torch.randint(65, (10 if size == 10 else 200, 32))
    batches = [x[low : low + size] for low in range(0, len(x), size)]
    errors = {}
    for fit in (kf.KFOC(), kf.KFOC("exact", tolerance=1e-6), kf.TKFAC()):
        fisher = kf.estimate(model, batches, kf.Categorical(class_dim=-1), fit=fit)
        errors[repr(fit)] = fisher.error(batches).blocks
        if fit == kf.KFOC():
            steps = [float(notes.split()[0]) for notes in notes_of(fisher) if "projected" in notes]
            assert len(steps) >= 2 and max(steps) <= 3  # two on the first batch, and one over everything
    found, best, tensor = errors.values()
    for name in best:
        assert best[name] - 1e-6 <= found[name] <= best[name] + most, name
        assert size == 16 or found[name] <= tensor[name] + 1e-4


def test_states_with_one_term_and_with_several_add_up():
    fit, block = kf.KFOC(), Block("w", "linear", Window.of("w", torch.zeros(1, 5, 7)))
    several = random_samples(n=40)
    wide, thin = (fit.init((block,), replace(fit.plan((block,), 8), waiting=0), several.gradients) for _ in range(2))
    thin.narrow()
    assert all(factor.untyped_storage().nbytes() == factor.nbytes for factor in (thin.inputs, thin.outputs))
    wide, thin = fit.update(wide, (several.part(0, 20),)), fit.update(thin, (several.part(20, 40),))
    wide.count = thin.count = 0.5
    for pair in ((wide, thin), (thin, wide)):
        both = fit.combine(*pair)
        assert len(both.sums["inputs"]) == 4 and both.count == 1.0
        assert excess(fit.finish(both), several) < 0.01


def test_a_start_that_has_nothing_of_a_piece_loses_nothing_of_it():
    first, second = random_samples(n=512, I=40, O=20), random_samples(n=512, I=40, O=20, seed=1)
    halves = torch.arange(40) < 20
    first = samples_of(first.activations.dense() * halves, first.gradients)  # inputs of one are zero in the other
    second = samples_of(second.activations.dense() * ~halves * 2, second.gradients)
    found = fitted(kf.KFOC(route="projected", rank_memory=1), first, second)[0]
    both = samples_of(
        torch.cat([use.activations.dense() for use in (first, second)], dim=1),
        torch.cat([first.gradients, second.gradients], dim=1),
    )
    traces = found.A[0].diagonal().unflatten(0, (2, 20)).sum(1)
    assert traces[1] > traces[0] > 0
    assert excess(found, both) <= excess(fitted(kf.KFAC(), both)[0], both)
