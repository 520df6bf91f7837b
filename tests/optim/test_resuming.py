"""A training that is resumed from its saved state gives the same bits; a state that does not belong is refused."""

import copy
import io

import pytest
import torch
from torch import nn

import kronfisher as kf
from tests.helpers.training import FITS, FIXED, batches, network, train, weights, wide


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"fit": fit} for fit in FITS),
        {"fit": kf.KFOC("running")},
        {"fit": "full"},
        {"fit": "diagonal", "damping": kf.Tikhonov()},
        FIXED,
    ],
    ids=str,
)
def test_a_resumed_training_gives_the_same_bits(options):
    data = batches(14)
    options = {"refresh": kf.Refresh(statistics=3, inverse=4, model=2), **options}
    model = network(nn.Dropout(0.2))
    optimizer = kf.NaturalGradient(model, kf.Categorical(), **options)
    torch.manual_seed(0)
    train(optimizer, model, data[:7])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, file)
    train(optimizer, model, data[7:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = network(nn.Dropout(0.2))
    again.load_state_dict(saved["model"])
    resumed = kf.NaturalGradient(again, kf.Categorical(), **options)
    resumed.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    train(resumed, again, data[7:])
    assert torch.equal(weights(model), weights(again))
    assert resumed.report().damping == optimizer.report().damping


@pytest.mark.parametrize("step", [None, kf.QuadraticModel()], ids=["layerwise", "quadratic"])
def test_optimisers_share_no_state_though_one_was_loaded_from_the_other(step):
    data, first, second = batches(8), network(), network()
    one, other = (kf.NaturalGradient(model, kf.Categorical(), step=step) for model in (first, second))
    train(one, first, data[:4])
    second.load_state_dict(first.state_dict())
    other.load_state_dict(one.state_dict())  # as it is, without a file or a copy between
    for batch in data[4:]:  # in turn
        train(one, first, [batch])
        train(other, second, [batch])
    assert torch.equal(weights(first), weights(second))


def test_preconditioners_share_no_state_though_one_was_loaded_from_the_other():
    (x, _), *more = batches(5)
    first, second = network(), network()
    one, other = (kf.Preconditioner(model, kf.Categorical(), refresh=kf.Refresh(1, 1)) for model in (first, second))

    def step(preconditioner, model, x):
        model.zero_grad()
        preconditioner(x).logsumexp(1).sum().backward()
        preconditioner.step()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    step(one, first, x)
    other.load_state_dict(one.state_dict())
    for x, _ in more:
        assert torch.equal(step(one, first, x), step(other, second, x))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize(
    "fit",
    [
        *FITS,
        kf.KFOC("running"),
        kf.KFOC("approx"),
        kf.EKFAC(kf.KFOC("running")),
        kf.TKFAC(),
        kf.KFACCorrected(),
        kf.BlockTridiagonal(kf.KFAC()),
        "full",
        "diagonal",
    ],
    ids=str,
)
def test_saving_after_any_step_changes_nothing(fit, steps):
    data, refresh = batches(7), kf.Refresh(statistics=2, inverse=2, model=2)
    model = network()
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit=fit, refresh=refresh)
    train(optimizer, model, data[:steps])
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    again = network()
    resumed = kf.NaturalGradient(again, kf.Categorical(), fit=fit, refresh=refresh)
    for target, state in zip((again, resumed), torch.load(file, weights_only=True), strict=True):
        target.load_state_dict(state)
    train(optimizer, model, data[steps:])
    train(resumed, again, data[steps:])
    assert torch.equal(weights(model), weights(again))


@pytest.mark.usefixtures("few_rows_pay")
def test_a_resumed_training_from_rows_gives_the_same_bits():
    data, model = batches(40, n=6), wide()
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    train(optimizer, model, data[:22])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(optimizer, model, data[22:])
    other = wide()
    resumed = kf.NaturalGradient(other, kf.Categorical())
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert (
        resumed.parts.statistics.figures.pass_cost == optimizer.parts.statistics.figures.pass_cost > 0
    )  # it decides on renewals
    train(resumed, other, data[22:])
    assert torch.equal(weights(model), weights(other))


def test_a_state_of_other_fits_is_refused():
    model, data = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    train(optimizer, model, data)
    other = kf.NaturalGradient(model, kf.Categorical(), fit={"0.*": "diagonal", "*": "kfac"})
    with pytest.raises(kf.DataError, match=r"differ at 0\.bias, 0\.weight"):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(kf.DataError, match="lacks the curvature"):
        other.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())


def test_a_state_of_an_earlier_layout_is_refused():
    model, data = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    train(optimizer, model, data)
    state = optimizer.state_dict()
    with pytest.raises(kf.DataError, match="earlier version"):
        optimizer.load_state_dict({**state, "natural_gradient": {"region": {}}, "curvature": {}})
    with pytest.raises(kf.DataError, match="earlier version"):
        kf.Preconditioner(model, kf.Categorical()).load_state_dict({"damping": 0.1, "curvature": {}})


def test_a_state_of_the_first_version_is_loaded_and_one_of_another_step_refused():
    model, data = network(), batches(3)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), step=kf.QuadraticModel())
    train(optimizer, model, data)
    state = optimizer.state_dict()
    own = {key: value for key, value in state["natural_gradient"].items() if key != "watch"}
    kf.NaturalGradient(model, kf.Categorical(), trust=kf.LevenbergMarquardt()).load_state_dict(
        {**state, "natural_gradient": own}
    )
    other = kf.NaturalGradient(model, kf.Categorical())
    with pytest.raises(kf.DataError, match=r"saved with step=kf\.QuadraticModel"):
        other.load_state_dict(state)
    with pytest.raises(kf.DataError, match=r"saved with step=kf\.LayerwiseStep"):
        optimizer.load_state_dict(other.state_dict())
