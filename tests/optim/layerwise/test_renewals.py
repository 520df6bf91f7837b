"""What the default step renews when: factors of a layer apart, those of data rarely, from as many rows as it takes."""

import copy
import itertools

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fits import KFAC
from kronfisher.layers.activations import Dense
from kronfisher.layers.samples import Samples
from kronfisher.operators import Kronecker
from kronfisher.optim.layerwise import direction
from kronfisher.optim.moving_average import ENOUGH, FEWEST, MovingAverage
from tests.helpers.training import batches, network, wide


def renewed(optimizer, model, data):
    """At each step, per layer, which of its factors had their inverses made: of the inputs, of the outputs."""
    before: dict[str, list] = {}
    for x, y in data:
        optimizer.step(lambda x=x: model(x), y)
        now = {one.name: [one.inverse.A, one.inverse.B] for one in optimizer.parts.direction.inverses}
        yield {
            name: tuple(factor is not old for factor, old in zip(factors, before.get(name, (None, None)), strict=True))
            for name, factors in now.items()
        }
        before = now


def test_factors_of_a_layer_that_is_dearer_than_a_pass_are_inverted_in_different_steps():
    model = wide().double()
    optimizer = kf.NaturalGradient(model, kf.Categorical(), lr=1e-2)
    seen = [made["3.weight"] for made in renewed(optimizer, model, batches(80, n=4, dtype=torch.float64))]
    assert seen[0] == (True, True)
    assert (True, True) not in seen[1:]
    outputs, inputs = seen.index((False, True)), seen.index((True, False))
    assert inputs == outputs + 1  # the second follows the first
    assert abs(seen[1:].count((False, True)) - seen[1:].count((True, False))) <= 1


def test_factors_of_which_one_is_nearly_all_of_a_dear_layer_are_inverted_together():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 80), nn.Tanh(), nn.Linear(80, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = kf.NaturalGradient(model, kf.Categorical(), lr=1e-2)
    seen = [made["2.weight"] for made in renewed(optimizer, model, batches(40, n=4))]
    dear = optimizer.parts.direction.inverses[1]
    assert direction._cost(dear) > direction.DEAR * optimizer.parts.statistics.figures.pass_cost
    assert set(seen) == {(True, True), (False, False)} and seen.count((True, True)) > 2


@pytest.mark.parametrize(("left", "fall"), [(1.0, 1.0), (0.25, 0.5), (1e-9, direction.LEAST)])
@pytest.mark.parametrize("fit", [kf.KFAC(), kf.EKFAC()])
def test_dampings_fall_with_the_root_of_what_is_left_to_fit(left, fall, fit):
    model = network(dtype=torch.float64)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit=fit)
    for x, y in batches(3, dtype=torch.float64):
        optimizer.step(lambda x=x: model(x), y)
    made = optimizer.parts.direction
    one = made.inverses[-1]
    made.renew(100, 1e9, torch.tensor(left))  # float32: of the losses, not of the layer
    share, operator = 0.05 * fall, one.layer.operator()
    torch.testing.assert_close(one.inverse.to_dense(), operator.normalized(share, share).inverse().to_dense())
    if fit == kf.KFAC():
        A, B = operator.A[0], operator.B[0]
        damped = [x / x.diagonal().mean() + share * torch.eye(len(x), dtype=torch.float64) for x in (B, A)]
        torch.testing.assert_close(one.inverse.to_dense(), torch.linalg.inv(torch.kron(*damped)))


@pytest.mark.parametrize("outputs", [True, False])
def test_each_half_is_the_damped_inverse_of_its_factor(outputs):
    model = network(dtype=torch.float64)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    for x, y in batches(3, dtype=torch.float64):
        optimizer.step(lambda x=x: model(x), y)
    one = optimizer.parts.direction.inverses[-1]
    kept = one.inverse.A if outputs else one.inverse.B
    one.operator = one.layer.operator()
    A, B = one.operator.A[0], one.operator.B[0]
    one.make(direction.Shares(inputs=0.1, outputs=0.2), 1.0, 3, outputs=outputs)
    factor, share, made = (B, 0.2, one.inverse.B) if outputs else (A, 0.1, one.inverse.A)
    damped = factor / factor.diagonal().mean() + share * torch.eye(len(factor), dtype=torch.float64)
    torch.testing.assert_close(made[0], torch.linalg.inv(damped))
    assert (one.inverse.A if outputs else one.inverse.B) is kept


@pytest.mark.parametrize("width", [60, 4])
def test_input_factors_of_data_are_inverted_rarely_where_they_are_dear_and_others_every_time(width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    inputs = torch.randn(200, 16, width)
    seen = list(renewed(optimizer, model, [(x, x[:, :3].argmax(1)) for x in inputs]))
    first, last = ([made[name] for made in seen] for name in seen[0])
    assert sum(inputs for inputs, _ in last) == sum(outputs for _, outputs in last)
    often, rarely = sum(outputs for _, outputs in first), sum(inputs for inputs, _ in first)
    if width == 4:
        assert rarely == often > 20
        return
    assert 2 <= rarely <= 1 + often / 3
    late = [step for step, (inputs, _) in enumerate(first) if inputs and step >= 60]
    assert late and all(b - a >= direction.RARE * 10 for a, b in itertools.pairwise(late))


def test_a_resumed_training_renews_the_same_factors():
    data = batches(60, n=4)
    model, twin = wide(), wide()
    optimizer, other = (kf.NaturalGradient(each, kf.Categorical()) for each in (model, twin))
    begun = 0
    for x, y in data:
        optimizer.step(lambda x=x: model(x), y)
        begun = next((k for k, one in enumerate(optimizer.parts.direction.inverses) if one.begun), -1)
        if optimizer.steps > 10 and begun >= 0:
            break
    assert begun >= 0
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.parts.direction.inverses[begun].begun
    for (x, y), _ in zip(data, range(6), strict=False):
        optimizer.step(lambda x=x: model(x), y)
        other.step(lambda x=x: twin(x), y)
    for one, same in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, same)


def test_statistics_that_no_step_uses_take_no_memory():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    for x, y in batches(4):
        optimizer.step(lambda x=x: model(x), y)
    run = optimizer.parts.statistics._run
    assert len(run.groups) == 4 and len(optimizer.parts.statistics.layers) == 2  # with the scale and the shift
    assert sum(t.numel() for group in run.groups for one in group.state.states for t in one.sums.values()) == 0


def group_of(samples):
    return (Block("w", "linear", Window.of("w", torch.zeros(samples.shape))),)


@pytest.mark.parametrize("flat", [False, True])
def test_parts_of_large_batches_stand_for_all_and_go_round(flat):
    torch.manual_seed(0)
    size, positions, width = 3 * FEWEST, 4, 4  # or as rows in any order, as K-FAC of a linear layer has them
    shape = (1, size * positions, 1) if flat else (1, size, positions)
    a, g = (torch.randn(*shape, n, dtype=torch.float64) for n in (width, 3))
    whole, fit = Samples(Dense(a), g), MovingAverage(KFAC())
    average, group = None, group_of(whole)
    state = fit.init(group, fit.plan(group, 8), g)
    for _ in range(3):  # of equal weights
        state.count = state.states[0].count = float(size)
        state.examples = size
        state = fit.update(state, (whole,))
        assert state.states[0].rows == FEWEST * positions
        average = state if average is None else fit.combine(average, state, 1.0, 1.0)
        state = fit.fresh(average)
    found, rows = fit.finish(average), a.flatten(0, 2)
    assert isinstance(found, Kronecker)
    torch.testing.assert_close(found.A[0], rows.mT @ rows / len(rows))
    torch.testing.assert_close(found.B[0], g.flatten(0, 2).mT @ g.flatten(0, 2) / size)


def test_batches_are_read_whole_where_half_of_them_is_too_few_or_no_layer_has_positions_or_some_do_not_count():
    fit = MovingAverage(KFAC())
    wide = 2 * FEWEST * 9 // (2 * ENOUGH) + 1
    cases = (
        *((2 * FEWEST - 1, 9, 4, False), (2 * FEWEST, 9, wide, False), (999, 1, 4, False), (999, 9, 4, True)),
        (1998, 1, 999 // ENOUGH + 1, False),  # two rows of each example
    )
    for size, positions, width, mask in cases:
        samples = Samples(
            Dense(torch.randn(1, size, positions, width)),
            torch.randn(1, size, positions, 3),
            mask=torch.ones(size, positions) if mask else None,
        )
        group = group_of(samples)
        state = fit.init(group, fit.plan(group, 4), samples.gradients)
        state.examples = min(size, 999)
        state = fit.update(state, (samples,))
        assert state.states[0].rows == size * positions
