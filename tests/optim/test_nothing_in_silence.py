"""Whatever a loop leaves out is refused at the first step or told once: nothing stands still in silence."""

import copy
import warnings

import pytest
import torch
from torch import nn

import kronfisher as kf
from tests.helpers.training import batches, network, train, weights

STEPS = pytest.mark.parametrize("step", [kf.LayerwiseStep(), kf.QuadraticModel()], ids=["layerwise", "quadratic"])


def plain_step(model, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


@STEPS
def test_a_fresh_state_that_is_loaded_changes_nothing(step):
    data = batches(12)
    model, again = network(), network()
    optimizer, loaded = (kf.NaturalGradient(m, kf.Categorical(), step=step) for m in (model, again))
    loaded.load_state_dict(loaded.state_dict())
    train(optimizer, model, data)
    train(loaded, again, data)
    assert torch.equal(weights(model), weights(again)) and not torch.equal(weights(model), weights(network()))
    assert loaded.report().overdue == loaded.report().skipped == 0


@STEPS
def test_a_first_step_without_a_pass_of_ours_is_refused_also_after_loading(step):
    model, ((x, y), *_) = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), step=step)
    for _ in range(2):
        with pytest.raises(kf.UnsupportedError, match=r"no curvature yet: call step\(lambda: model\(x\), y\)"):
            plain_step(model, optimizer, x, y)
        optimizer.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        optimizer.forward(x)  # to evaluate; no step can be made of it
    with pytest.raises(kf.UnsupportedError, match="no curvature yet"):
        plain_step(model, optimizer, x, y)
    assert torch.equal(weights(model), weights(network())) and optimizer.steps == 0
    optimizer.backward(optimizer.forward(x), y)  # as the message says
    optimizer.step()
    assert not torch.equal(weights(model), weights(network()))


@STEPS
def test_later_steps_on_old_curvature_are_told_once_and_counted(step):
    model, data = network(), batches(8)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), step=step, refresh=kf.Refresh(statistics=2))
    train(optimizer, model, data[:1])
    with pytest.warns(kf.NumericalWarning, match="no forward pass was captured") as caught:
        for x, y in data[1:]:
            plain_step(model, optimizer, x, y)
    assert len(caught) == 1 and optimizer.report().overdue == 7
    assert "7 steps on statistics older than promised" in str(optimizer.report())
    train(optimizer, model, data)
    assert optimizer.report().overdue == 7


@STEPS
def test_a_step_without_gradients_is_told_once_and_counted(step):
    model, data = network(), batches(2)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), step=step)
    train(optimizer, model, data)
    optimizer.zero_grad()
    with pytest.warns(kf.NumericalWarning, match="no trained parameter has a gradient") as caught:
        optimizer.step()
        optimizer.step()
    assert len(caught) == 1 and optimizer.report().skipped == 2


@STEPS
def test_a_closure_that_returns_a_loss_without_a_backward_pass_is_told_what_to_write(step):
    model, ((x, y), *_) = network(), batches(1)
    optimizer, before = kf.NaturalGradient(model, kf.Categorical(), step=step), weights(model)
    with pytest.warns(kf.NumericalWarning, match=r"give step\(\) the outputs and the targets, step\(lambda: model"):
        optimizer.step(lambda: nn.functional.cross_entropy(model(x), y))
    assert torch.equal(weights(model), before)
    optimizer.step(lambda: model(x), y)  # the advice works
    assert not torch.equal(weights(model), before)


def test_a_preconditioner_is_as_loud():
    model, data = network(), batches(8)
    preconditioner = kf.Preconditioner(model, kf.Categorical(), refresh=kf.Refresh(statistics=2))
    preconditioner.load_state_dict(preconditioner.state_dict())

    def step(run, x, y):
        model.zero_grad()
        nn.functional.cross_entropy(run(x), y).backward()
        before = torch.cat([p.grad.flatten().clone() for p in model.parameters()])
        preconditioner.step()
        return bool((torch.cat([p.grad.flatten() for p in model.parameters()]) != before).any())

    with pytest.raises(kf.UnsupportedError, match="in place of the model"):
        step(model, *data[0])
    assert step(preconditioner, *data[0])
    with pytest.warns(kf.NumericalWarning, match="older than `refresh` promises") as caught:
        for x, y in data[1:]:
            assert step(model, x, y)
    assert len(caught) == 1 and preconditioner.watch.overdue == 7
    model.zero_grad()
    with pytest.warns(kf.NumericalWarning, match="no parameter has a gradient"):
        preconditioner.step()


@STEPS
def test_gradients_may_be_set_to_zero_between_forward_and_backward(step):
    runs = []
    for between in (False, True):
        model = network()
        optimizer = kf.NaturalGradient(model, kf.Categorical(), step=step)
        for x, y in batches(6):
            if not between:
                optimizer.zero_grad()
            outputs = optimizer.forward(x)
            if between:
                optimizer.zero_grad()
            optimizer.backward(outputs, y)
            optimizer.step()
        runs.append(weights(model))
    assert torch.equal(*runs)


def test_forward_passes_that_nothing_follows_are_forgotten():
    model, ((x, y), *_) = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    for _ in range(5):
        outputs = optimizer.forward(x)
        optimizer.zero_grad()
    assert len(optimizer.parts.forward_backward._passes) == 1
    optimizer.backward(outputs, y)
    optimizer.step()
    with pytest.raises(kf.DataError, match=r"outputs = optimizer.forward\(x\); optimizer.backward"):
        optimizer.backward(outputs, y)


@STEPS
def test_several_ranks_are_refused_at_the_first_step(step):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model, ((x, y), *_) = network(), batches(1)
    with warnings.catch_warnings(action="ignore"):
        torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        for call in (
            lambda: kf.NaturalGradient(model, kf.Categorical(), step=step).step(lambda: model(x), y),
            lambda: kf.Preconditioner(model, kf.Categorical())(x),
        ):
            with pytest.raises(kf.UnsupportedError, match="process group of 2 ranks"):
                call()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(weights(model), weights(network()))


def test_a_rate_as_of_another_optimiser_is_told():
    with pytest.warns(kf.NumericalWarning, match="leave lr out"):
        kf.NaturalGradient(network(), kf.Categorical(), lr=1e-3)
    kf.NaturalGradient(network(), kf.Categorical(), lr=0.0)  # before a scheduler's warm-up


def test_a_rate_as_of_another_optimiser_is_told_in_groups_and_where_it_is_set_later():
    model, ((x, y), *_) = network(), batches(1)
    groups = [{"params": [p], "lr": 3e-4} for p in model.parameters()]
    with pytest.warns(kf.NumericalWarning, match="leave lr out"):
        kf.NaturalGradient(model, kf.Categorical(), params=groups)
    kf.NaturalGradient(model, kf.Categorical(), params=[{**groups[0], "lr": 1.0}, *groups[1:]])  # some may go slowly
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    for group in optimizer.param_groups:
        group["lr"] = 3e-4
    for _ in range(99):
        optimizer.step(lambda: model(x), y)
    with pytest.warns(kf.NumericalWarning, match=r"lr was never above 0\.0003"):
        optimizer.step(lambda: model(x), y)
    optimizer.step(lambda: model(x), y)
    assert any("never above" in text for text in optimizer.report().warnings)


def test_a_warm_up_is_not_told():
    model, ((x, y), *_) = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, 1.0, 1000)
    for _ in range(110):
        optimizer.step(lambda: model(x), y)
        schedule.step()


def test_parameters_that_no_group_trains_are_told_and_trained_once_they_are_added():
    model, ((x, y), *_) = nn.ModuleDict({"first": network()}), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), refresh=kf.Refresh(statistics=1))
    optimizer.step(lambda: model["first"](x), y)
    model["extra"] = extra = nn.Linear(4, 3, bias=False)
    old = extra.weight.detach().clone()
    with pytest.warns(kf.NumericalWarning, match=r"extra\.weight: in the model, but in no group"):
        optimizer.step(lambda: model["first"](x) + extra(x), y)
    assert torch.equal(extra.weight, old)
    optimizer.add_param_group({"params": extra.parameters()})
    optimizer.step(lambda: model["first"](x) + extra(x), y)
    assert not torch.equal(extra.weight, old) and "extra.weight" in optimizer.trained()
    assert not optimizer.report().uncovered  # it has curvature, too


def test_a_layer_that_took_the_place_of_another_is_told_and_not_mixed_up_with_it():
    model, ((x, y), *_) = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), refresh=kf.Refresh(statistics=1))
    optimizer.step(lambda: model(x), y)
    name, last = [(name, module) for name, module in model.named_children() if isinstance(module, nn.Linear)][-1]
    setattr(model, name, copy.deepcopy(last))
    with pytest.warns(kf.NumericalWarning, match="took the place"):
        optimizer.step(lambda: model(x), y)
    with pytest.raises(kf.UnsupportedError, match="took the place"):
        optimizer.add_param_group({"params": getattr(model, name).parameters()})
    assert len(optimizer.param_groups) == 1


def test_a_model_that_ran_before_the_step_is_told():
    model, ((x, y), *_) = network(), batches(1)
    optimizer, outputs = kf.NaturalGradient(model, kf.Categorical()), model(x)
    with pytest.warns(kf.NumericalWarning, match="run them within the function"):
        optimizer.step(lambda: outputs, y)
