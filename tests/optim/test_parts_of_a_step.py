"""Each of the five parts of a step can be replaced alone, and keeps its own state."""

from contextlib import nullcontext

import torch
from torch import nn

import kronfisher as kf
from kronfisher.optim.direction import Descent
from kronfisher.optim.forward_backward import ForwardBackward
from kronfisher.optim.judge import Judge
from kronfisher.optim.step_size import StepLength
from tests.helpers.training import batches, network, train, weights

PARTS = ("watch", "forward_backward", "statistics", "direction", "step_size", "judge")


def gradient(model, x, y):
    loss = nn.functional.cross_entropy(model(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


class Plain:
    """Steps of length ½ along any direction."""

    exact, refusal, step_size, used = False, "", 0.5, 0.0

    def solves(self, step):
        return False

    def choose(self, inputs, step, *, solve, longest):
        return StepLength(0.5, 0.0)


class Gradient:
    """The gradient itself as direction."""

    due, troubles, seconds = {}, {}, 0.0

    def follow(self, layers, step):
        pass

    def measure(self):
        return 1.0

    def renew(self, value, step):
        pass

    def row_inverse(self, capture, rates):
        return None

    def descend(self, gradients, value, rates, rows):
        natural = {name: gradient.clone() for name, gradient in gradients.items()}
        slope = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum()
        return Descent(natural, dict(gradients), slope, 1.0)

    def overdue(self, step):
        return {}


class NoStatistics:
    """No curvature at all."""

    started, ready, labels, layers, parameters = True, True, "sampled", [], {}
    watched = staticmethod(nullcontext)

    def prepare(self, step):
        pass

    def is_due(self, step):
        return False

    def merge(self, step):
        pass

    def schedule_bases(self, due):
        pass


class Refusing(Judge):
    """Every step is undone."""

    def rejects(self, change, predicted, step):
        return True


def test_length_and_direction_are_replaced_alone():
    for part, other, options in (("step_size", Plain(), {}), ("direction", Gradient(), {"momentum": 0.0})):
        model, ((x, y), *_) = network(dtype=torch.float64), batches(dtype=torch.float64)
        optimizer = kf.NaturalGradient(model, kf.Categorical(), trust=0.1, kl_limit=1e9, labels="exact", **options)
        setattr(optimizer.parts, part, other)
        before, g = weights(model), gradient(model, x, y)
        v = dict(zip(dict(model.named_parameters()), g.split([p.numel() for p in model.parameters()]), strict=True))
        v = {name: t.reshape(model.get_parameter(name).shape) for name, t in v.items()}
        damped = kf.estimate(model, x, kf.Categorical(), fit="kfac", labels="exact") + kf.FactoredTikhonov(0.1)
        natural = torch.cat([t.flatten() for t in damped.solve(v).values()])
        train(optimizer, model, [(x, y)])
        expected = -natural / 2 if part == "step_size" else -g
        torch.testing.assert_close(weights(model) - before, expected)
        assert optimizer.report().step == 1


def test_without_statistics_steps_are_those_of_plain_gradient_descent():
    model, ((x, y), *_) = network(dtype=torch.float64), batches(dtype=torch.float64)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), trust=0.1, momentum=0.0, kl_limit=1e9)
    optimizer.parts.statistics = NoStatistics()
    before, g = weights(model), gradient(model, x, y)
    train(optimizer, model, [(x, y)])
    torch.testing.assert_close(weights(model) - before, -g / 0.1)


def test_another_judge_undoes_steps_by_its_own_rule():
    model, data = network(), batches(3)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), step=kf.QuadraticModel())
    optimizer.parts.judge = Refusing(optimizer.trust)
    before = weights(model)
    train(optimizer, model, data)
    assert torch.equal(weights(model), before) and optimizer.steps == 3


def test_other_passes_give_other_gradients():
    models = [network(), network()]
    plain, relabelled = (kf.NaturalGradient(model, kf.Categorical()) for model in models)

    class Relabelled(ForwardBackward):
        def backward(self, outputs, targets, *given, **options):
            return super().backward(outputs, 2 - targets, *given, **options)

    relabelled.parts.forward_backward = Relabelled(models[1], kf.Categorical())
    data = batches(6)
    train(plain, models[0], [(x, 2 - y) for x, y in data])
    train(relabelled, models[1], data)
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_parts_keep_their_own_state():
    model, data = network(), batches(3)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), step=kf.QuadraticModel())
    train(optimizer, model, data)
    own = optimizer.state_dict()["natural_gradient"]
    assert own.keys() == {"steps", *PARTS} and own["steps"] == 3
    for part in PARTS:
        assert own[part].keys() == getattr(optimizer.parts, part).state_dict().keys()
