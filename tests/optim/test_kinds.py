"""Parameters that are converted, moved or exchanged while they are trained."""

import copy
import warnings

import pytest
import torch

import kronfisher as kf
from tests.helpers.training import batches, network

STEPS = {"layerwise": {}, "quadratic": {"step": kf.QuadraticModel()}, "gram": {"fit": "gram"}}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [*STEPS, "attached", "preconditioner"])
def test_a_model_that_is_converted_after_the_first_step_is_refused(kind, dtype):
    model, ((x, y),) = network(), batches(1)
    preconditioner = kf.Preconditioner(model, kf.Categorical())
    optimizer = kf.NaturalGradient(model, kf.Categorical(), **STEPS.get(kind, {}))
    if kind == "attached":
        optimizer.attach()

    def step(x):
        if kind == "preconditioner":
            preconditioner(x)
        elif kind == "attached":
            model(x)
        else:
            optimizer.step(lambda: model(x), y)

    step(x)
    model.to(dtype)
    with pytest.raises(
        kf.UnsupportedError, match=rf"{dtype} on cpu, and was torch.float32 on cpu .* make a new optimi"
    ):
        step(x.to(dtype))
    model.float()
    step(x)
    model.to(dtype)
    if kind == "attached":
        optimizer.detach()
    if kind != "gram":
        again = kf.NaturalGradient(model, kf.Categorical(), **STEPS.get(kind, {}))  # as the message says
        assert torch.isfinite(again.step(lambda: model(x.to(dtype)), y))


@pytest.mark.parametrize("kind", STEPS)
def test_a_state_of_another_dtype_is_refused(kind):
    model, ((x, y),) = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), **STEPS[kind])
    optimizer.step(lambda: model(x), y)
    state = optimizer.state_dict()
    other = kf.NaturalGradient(copy.deepcopy(model).double(), kf.Categorical(), **STEPS[kind])
    with pytest.raises(kf.DataError, match=r"saved for .* in torch.float32, which is torch.float64 now"):
        other.load_state_dict(state)
    kf.NaturalGradient(copy.deepcopy(model), kf.Categorical(), **STEPS[kind]).load_state_dict(state)


def test_half_precision_is_refused_in_the_space_of_samples():
    model, ((x, y),) = network(dtype=torch.bfloat16), batches(1, dtype=torch.bfloat16)
    with pytest.raises(kf.UnsupportedError, match=r"0\.weight is torch.bfloat16: .* Keep the weights in float32"):
        kf.NaturalGradient(model, kf.Categorical(), fit="gram").step(lambda: model(x), y)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def trained():
    model, data = network(), batches(3)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    for x, y in data:
        optimizer.step(lambda x=x: model(x), y)
    return model, optimizer, data


@pytest.mark.parametrize("evaluating", [False, True])
def test_model_and_optimiser_that_were_saved_together_go_on_as_before(evaluating):
    model, optimizer, ((x, y), *_) = trained()
    iterate = weights(model)
    if evaluating:
        optimizer.eval()
        assert not same(weights(model), iterate)
    other = network()
    other.load_state_dict(weights(model))
    resumed = kf.NaturalGradient(other, kf.Categorical())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with warnings.catch_warnings(action="error"):
        resumed.train()
        optimizer.train()
    assert same(weights(other), iterate) and same(weights(model), iterate)
    assert torch.equal(resumed.step(lambda: other(x), y), optimizer.step(lambda: model(x), y))
    assert same(weights(other), weights(model))


@pytest.mark.parametrize("how", ["other weights loaded", "saved at other times"])
def test_weights_that_took_the_place_of_the_average_are_kept(how):
    """They were replaced by the iterate, or the average was taken for it, without a word."""
    model, optimizer, ((x, y), *_) = trained()
    iterate = weights(model)
    optimizer.eval()
    if how == "other weights loaded":
        wanted = {name: tensor + 1 for name, tensor in iterate.items()}
        model.load_state_dict(wanted)
    else:
        state, wanted = optimizer.state_dict(), iterate
        model = network()
        model.load_state_dict(iterate)
        optimizer = kf.NaturalGradient(model, kf.Categorical())
        optimizer.load_state_dict(copy.deepcopy(state))
    with pytest.warns(kf.NumericalWarning, match="Training goes on from what it holds now"):
        optimizer.train()
    assert same(weights(model), wanted)
    optimizer.step(lambda: model(x), y)
    moved = weights(model)
    optimizer.eval()
    assert same(weights(model), moved)  # the average begins with the iterate of this step
    optimizer.train()
    assert same(weights(model), moved)
