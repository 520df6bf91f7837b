"""Trainings that ranks are asked to run: each function gets its rank first; None is one process with all data."""

import contextlib
import io
import os
import warnings
from itertools import islice
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import kronfisher as kf
from kronfisher.distributed import ranks as ranks_module
from kronfisher.distributed import ranks_of
from kronfisher.optim import layer_inverse
from kronfisher.optim.layerwise import output_changes
from kronfisher.optim.layerwise.running import RunningStatistics
from kronfisher.optim.shared_buffers import SharedBuffers
from tests.distributed import cases
from tests.distributed.cases import Branches, fresh, numbers, perceptron, watched

BATCH = 4


def batches(rank, ranks, steps, width=4, outputs=3):
    """Batches of all ranks together, or the part of one."""
    for step in range(steps):
        x = numbers(BATCH * ranks, width, seed=step)
        y = torch.arange(BATCH * ranks).mul(step + 1) % outputs
        part = slice(None) if rank is None else slice(BATCH * rank, BATCH * (rank + 1))
        yield x[part], y[part]


def around(rank, model, how="ddp", **options):
    """A model as a rank trains it, and the option of the optimiser."""
    if rank is None:
        return model, {}
    group = {"group": dist.group.WORLD}
    if how == "ddp":
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # an option has two names, by version
            return DistributedDataParallel(model, **options), group
    cases.spread(model, how)
    return model, group


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights(model):
    return {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def steps(rank, ranks, number=20, fit="kfac", labels="observed", how="ddp", **options):
    """Whole steps of the default optimiser."""
    model = perceptron()
    wrapped, group = around(rank, model, how)
    likelihood = kf.Categorical()
    optimizer = kf.NaturalGradient(wrapped, likelihood, fit=fit, labels=labels, **options, **group)
    for x, y in batches(rank, ranks, number):
        optimizer.step(lambda x=x: wrapped(x), y)
    return weights(model)


def owned(rank, ranks, share, number=20, fit="kfac", labels="observed", kind="default", how="ddp"):
    """Weights after steps with inverses at owners, or everywhere; what each rank holds; and calls by step."""
    model, unused = (fresh(Sharing()), {"find_unused_parameters": True}) if how == "ddp" else (perceptron(), {})
    wrapped, group = around(rank, model, how, **unused)
    options = {"fit": fit, "labels": labels, "share": share, **group}
    if kind == "preconditioner":
        made, sgd = kf.Preconditioner(wrapped, kf.Categorical(), **options), torch.optim.SGD(model.parameters(), 0.1)
    else:
        made, sgd = kf.NaturalGradient(wrapped, kf.Categorical(), **options), None
    calls = []
    for step, (x, y) in enumerate(batches(rank, ranks, number)):
        due = (made if sgd else made.parts).statistics.is_due(step)
        with watched() as seen:
            if sgd is None:
                made.step(lambda x=x: wrapped(x), y)
            else:
                sgd.zero_grad()
                cross_entropy(made(x, targets=y), y).backward()
                made.step()
                sgd.step()
        calls.append((due, seen))
    direction = (made if sgd else made.parts).direction
    held = [one.name for one in direction.inverses if one.inverse is not None]
    schedule = [(one.due, one.made, one.begun, one.inputs_due) for one in direction.inverses]
    return weights(model), held, schedule, calls, made.report()


def brought(rank, ranks, fit, kind="default"):
    """Weights of steps that go on, and of steps from a state that went through an optimiser with all inverses; states.

    The inverses that ranks hold after they loaded, too.
    """
    found, states, held = [], [], []
    for way in ("on", "through"):
        model = fresh(Sharing())
        group = {"find_unused_parameters": True}
        wrapped, group = around(rank, model, **group)

        def made(share, wrapped=wrapped, group=group):
            if kind == "preconditioner":
                return kf.Preconditioner(wrapped, kf.Categorical(), fit=fit, labels="observed", share=share, **group)
            return kf.NaturalGradient(wrapped, kf.Categorical(), fit=fit, labels="observed", share=share, **group)

        optimizer = made("owned")
        for step, (x, y) in enumerate(batches(rank, ranks, 9)):
            if step == 5 and way == "through":
                states.append(optimizer.state_dict())
                for share in ("all", "owned"):
                    optimizer = made(share)
                    optimizer.load_state_dict(states[-1])
                    states.append(optimizer.state_dict())
                parts = optimizer if kind == "preconditioner" else optimizer.parts
                held = [one.name for one in parts.direction.inverses if one.inverse is not None]
            if kind == "preconditioner":
                wrapped.zero_grad()
                cross_entropy(optimizer(x, targets=y), y).backward()
                optimizer.step()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.sub_(parameter.grad if parameter.grad is not None else 0.0, alpha=0.1)
            else:
                optimizer.step(lambda x=x, wrapped=wrapped: wrapped(x), y)
        found.append(weights(model))
    return found, states, held


def unmade(rank, ranks, kind):
    """The error where a rank cannot make an inverse, whether weights moved, and those of steps after it."""
    model = fresh(Sharing())
    wrapped, group = around(rank, model, find_unused_parameters=True)
    optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), labels="observed", share="owned", **group)
    data, before, plain = list(batches(rank, ranks, 6)), weights(model), layer_inverse.LayerInverse.make

    def make(one, *args, **options):
        if one.name.startswith("second"):
            raise kind("second cannot be inverted")
        plain(one, *args, **options)

    texts = []
    for _ in range(2):
        with mock.patch.object(layer_inverse.LayerInverse, "make", make):
            texts.append(cases.raised(lambda: optimizer.step(lambda: wrapped(data[0][0]), data[0][1])))
    moved = not cases.same_bits([before, weights(model)])
    for x, y in data:
        optimizer.step(lambda x=x: wrapped(x), y)
    return texts, moved, weights(model)


def alone_at_owners(rank, ranks):
    """Weights of a group of one with inverses at owners, and without."""
    own, found = [dist.new_group([each]) for each in range(ranks)][rank], []
    for share in ("all", "owned"):
        optimizer = kf.NaturalGradient(model := perceptron(), kf.Categorical(), group=own, share=share)
        for x, y in batches(rank, ranks, 6):
            optimizer.step(lambda x=x, model=model: model(x), y)
        found.append(weights(model))
        assert optimizer.report().collectives == 0
    return found


class Sharing(torch.nn.Module):
    """Layers of several widths, a table, a scale, three weights in one parameter, and a layer that nobody uses."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 6), torch.nn.Linear(6, 6)
        self.norm, self.packed = torch.nn.LayerNorm(6), torch.nn.Parameter(torch.empty(18, 6))
        self.last, self.unused = torch.nn.Linear(6, 3), torch.nn.Linear(2, 2)

    def forward(self, x):
        hidden = self.norm(self.second(self.first(x).tanh()).tanh())
        q, k, v = (torch.nn.functional.linear(hidden, weight) for weight in self.packed.chunk(3))
        return self.last((q * k).tanh() + v)


def wrapped_later(rank, ranks, number=8):
    """Weights where the model was given to the optimiser before DDP wrapped it."""
    model = perceptron()
    group = {} if rank is None else {"group": dist.group.WORLD}
    optimizer = kf.NaturalGradient(model, kf.Categorical(), labels="observed", **group)
    wrapped, _ = around(rank, model)
    for x, y in batches(rank, ranks, number):
        optimizer.step(lambda x=x: wrapped(x), y)
    return weights(model)


def evened(rank, ranks, affordable, number=12, **options):
    """Steps of a network whose output changes are evened, as those of large ones are; and how many weights are."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    ).double()
    wrapped, group = around(rank, model)
    with mock.patch.object(output_changes, "AFFORDABLE", affordable), mock.patch.object(output_changes, "CALLS", 0.0):
        optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), labels="observed", **options, **group)
        for x, y in batches(rank, ranks, number):
            optimizer.step(lambda x=x: wrapped(x), y)
    known = optimizer.parts.direction.changes._known
    return weights(model) | {"evened": torch.tensor(float(len(known)), dtype=torch.float64)}


def alone(rank, ranks, number=8):
    """Each rank on its own, by a group of itself, on batches of its own: weights by both optimisers and both steps."""
    groups = [None] * ranks if rank is None else [dist.new_group([each]) for each in range(ranks)]
    found = []
    for own in range(ranks) if rank is None else [rank]:
        for kind in ("default", "papers", "preconditioner"):
            model, likelihood = perceptron(), kf.Categorical()
            options = {"group": groups[own], "labels": "observed"}
            if kind == "preconditioner":
                made, plain = kf.Preconditioner(model, likelihood, **options), torch.optim.SGD(model.parameters(), 0.1)
            else:
                step = kf.QuadraticModel() if kind == "papers" else None
                made = kf.NaturalGradient(model, likelihood, step=step, **options)
            for x, y in batches(own, ranks, number):
                if kind != "preconditioner":
                    made.step(lambda x=x, m=model: m(x), y)
                    continue
                plain.zero_grad()
                cross_entropy(made(x, targets=y), y).backward()
                made.step()
                plain.step()
            found.append(weights(model))
    return found


PAPERS = {
    "exact": {"step": kf.QuadraticModel()},
    "momentum": {"step": kf.QuadraticModel(momentum=0.8, trust=kf.LevenbergMarquardt(initial=0.1))},
    "undone": {"step": kf.QuadraticModel(trust=kf.LevenbergMarquardt(initial=1e-6, stride=100.0)), "lr": 30.0},
}


def papers(rank, ranks, name, fit, labels="observed"):
    """Steps of the papers' rule: weights, and what steered them."""
    model = perceptron()
    wrapped, group = around(rank, model)
    options = {"fit": fit, "labels": labels, **PAPERS[name], **group}
    optimizer, found = kf.NaturalGradient(wrapped, kf.Categorical(), **options), []
    for x, y in batches(rank, ranks, 20):
        optimizer.step(lambda x=x: wrapped(x), y)
        report = optimizer.report()
        found.append([report.damping, report.step_size, report.momentum, float(report.ratio or 0.0), report.rejected])
    return weights(model) | {"steered": torch.tensor(found, dtype=torch.float64).nan_to_num()}


class Shallow(torch.nn.Module):
    """With a number that every forward pass counts up, in a buffer that DDP lets rank 0 send."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(1, 6), torch.nn.Linear(6, 1)
        self.register_buffer("passes", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.passes += 1
        return self.outer(self.inner(x).tanh())


def equation(wrapped, x):
    """Residuals of ``u' = -u, u(0) = 1`` at some points."""
    u = wrapped(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return {"equation": (slope + u)[:, 0], "start": wrapped(torch.zeros(1, 1, dtype=torch.float64))[0] - 1}


def gram(rank, ranks, what, number=12):
    """Steps in the space of samples: weights, what steered them, and the losses of this rank's own batches."""
    if what == "residuals":
        wrapped, group = around(rank, model := fresh(Shallow()))
        optimizer = kf.NaturalGradient(wrapped, kf.Residuals({"equation": 1.0, "start": 1.0}), fit="gram", **group)
    else:
        wrapped, group = around(rank, model := perceptron())
        likelihood, labels = (kf.Gaussian() if what == "thin" else kf.Categorical()), "exact"
        labels = "observed" if what == "observed" else labels
        optimizer = kf.NaturalGradient(wrapped, likelihood, fit="gram", labels=labels, **group)
    steered, losses = [], []
    for step in range(number):
        part = slice(rank or 0, None, 1 if rank is None else ranks)
        if what == "residuals":
            x = numbers(6 * ranks, 1, seed=step)[part].requires_grad_()
            losses.append(optimizer.step(lambda x=x: equation(wrapped, x)))
        else:
            many = 120 if what == "thin" else 3
            x = numbers(many * ranks, 4, seed=step if what != "thin" else 0)
            y = torch.arange(many * ranks) % 3
            y = x[:, :3].sin() if what == "thin" else y
            losses.append(optimizer.step(lambda x=x[part]: wrapped(x), y[part]))
        steered.append([optimizer.damping, optimizer.step_length, optimizer.follower.factor, optimizer.rows_a_weight])
    state = optimizer.state_dict()
    return (
        weights(model) | {"steered": torch.tensor(steered, dtype=torch.float64)},
        [float(own) for own in losses],
        state,
    )


NORMALISED = {
    "default": {},
    "no average": {"step": kf.LayerwiseStep(average=False)},
    "papers": {"step": kf.QuadraticModel()},
    "fixed rate": {"step": kf.QuadraticModel(momentum=0.9, trust=kf.Constant(0.1))},
}


def normalised(rank, ranks, how, rule, number=8):
    """Weights and buffers of a model with batch normalisation after some steps, and while it is evaluated."""
    layers = torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    model = fresh(torch.nn.Sequential(*layers))
    options = {"broadcast_buffers": False} if how == "apart" else {}
    wrapped, group = around(rank, model, "rows" if how == "rows" else "ddp", **options)
    if rule == "preconditioner":
        made, sgd = kf.Preconditioner(wrapped, kf.Categorical(), **group), torch.optim.SGD(model.parameters(), 0.1)
    else:
        made, sgd = kf.NaturalGradient(wrapped, kf.Categorical(), **NORMALISED[rule], **group), None
    for x, y in batches(rank, ranks, number):
        if sgd is None:
            made.step(lambda x=x: wrapped(x), y)
            continue
        sgd.zero_grad()
        cross_entropy(made(x), y).backward()
        made.step()
        sgd.step()
    found = [weights(model), {name: buffer.clone() for name, buffer in model.named_buffers()}]
    if sgd is None:
        made.eval()
    found += [weights(model), {name: buffer.clone() for name, buffer in model.named_buffers()}]
    return found


def running_statistics(rank, ranks, number=6):
    """Those of a layer that rank 0 does not use in the second step, and that is not finite on rank 1 in the third."""
    layer = torch.nn.BatchNorm1d(4, momentum=0.3, dtype=torch.float64)
    running, shared = RunningStatistics(), SharedBuffers()
    wrapped, _ = around(rank, model := torch.nn.Sequential(layer))
    for step in range(number):
        shared.begin(model)
        if rank != 0 or step != 1:
            bad = float("nan") if (rank, step) == (1, 2) else 1.0
            with torch.no_grad():
                (wrapped if step != 1 else model)(bad * numbers(8, 4, seed=10 * step + rank))
        shared.share(model, ranks_of(dist.group.WORLD))
        running.update(model, torch.tensor(1 / (step + 1)))
    averages = {f"average of {name}": value for name, value in running.averages.items()}
    return averages | dict(model.named_buffers())


def gram_handed_on(rank, ranks, path, saved, number=8):
    """Weights after steps in the space of samples whose second half goes on from what all ranks saved by name.

    Args:
        rank: of this process; None: it is alone, and makes the second half.
        ranks: of the group.
        path: of the folder.
        saved: whether the state is saved and loaded; None: it is loaded.
    """

    def made():
        wrapped, group = around(rank, model := perceptron())
        optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), fit="gram", **group)
        return model, wrapped, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)

    model, wrapped, optimizer, schedule = made()
    for step, (x, y) in enumerate(batches(rank, ranks, number)):
        if 2 * step == number and saved is not False:
            kept = model.state_dict(), optimizer.state_dict()["param_groups"]
            if saved:
                state = {"model": model.state_dict(), "optimizer": kf.named_state(optimizer)}
                dcp.save(state | {"schedule": schedule.state_dict()}, checkpoint_id=path)
            model, wrapped, optimizer, schedule = made()
            state = {"model": model.state_dict(), "schedule": schedule.state_dict()}
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # that one process loads alone
                dcp.load(state, checkpoint_id=path, no_dist=rank is None)
            model.load_state_dict(state["model"])
            schedule.load_state_dict(state["schedule"])
            kf.load_named_state(optimizer, path)
            assert not saved or optimizer.state_dict()["param_groups"] == kept[1]
        if saved is not None or 2 * step >= number:
            optimizer.step(lambda x=x, wrapped=wrapped: wrapped(x), y)
            schedule.step()
    return weights(model)


def gram_fails(rank, ranks, what):
    """The error where one rank's batch cannot be used; steps after it, and whether weights moved before."""
    wrapped, group = around(rank, model := perceptron())
    optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), fit="gram", **group)
    x, y = numbers(4, 4, seed=rank), torch.arange(4) % 3
    bad = x * (float("inf") if rank == 1 else 1.0)
    if what == "weights" and rank == 1:
        with torch.no_grad():
            model[0].weight.add_(1)
    before = weights(model)
    try:
        optimizer.step((lambda: wrapped(bad if what == "batch" else x)) if what != "call" or rank != 1 else None, y)
    except Exception as error:
        text = type(error).__name__, str(error)
    else:
        text = "none", ""
    moved = not cases.same_bits([before, weights(model)])
    if what == "batch":
        optimizer.step(lambda: wrapped(x), y)
    return text, moved, weights(model)


def tied(rank, ranks, step, **options):
    """Weights of a model that uses one as a matrix and as its transpose."""
    model = fresh(TiedOut())
    wrapped, group = around(rank, model)
    optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), step=step, labels="observed", **options, **group)
    for x, y in batches(rank, ranks, 12, outputs=4):
        optimizer.step(lambda x=x: wrapped(x), y)
    assert any(one.other is not None for one in optimizer.parts.direction.inverses)
    assert len({*kf.named_state(optimizer)}) > 10
    return weights(model)


class TiedOut(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 5, bias=False)

    def forward(self, x):
        return torch.nn.functional.linear(self.inner(x).tanh(), self.inner.weight.t())


class OneWay(torch.autograd.Function):
    """The hyperbolic tangent with a backward pass alone, or without a second one."""

    @staticmethod
    def forward(ctx, x, twice):
        ctx.save_for_backward(y := x.tanh())
        ctx.twice = twice
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        if not ctx.twice and torch.is_grad_enabled():
            raise NotImplementedError("no second derivative")
        return gradient * (1 - y * y), None


class Ways(torch.nn.Sequential):
    """A perceptron whose activations have derivatives by another way on the last rank than elsewhere."""

    odd, twice = False, True

    def forward(self, x):
        for k, module in enumerate(self):
            x = OneWay.apply(x, self.twice) if k == 1 and self.odd else module(x)
        return x


def ways(rank, ranks, twice):
    """Weights where one rank needs another way to products than the others, and the way; warnings where it has none."""
    model = fresh(Ways(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)))
    model.odd, model.twice = rank == ranks - 1, twice
    wrapped, group = around(rank, model)
    step = kf.QuadraticModel(trust=kf.Constant(0.1))
    optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), labels="observed", step=step, **group)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in batches(rank, ranks, 12):
            optimizer.step(lambda x=x: wrapped(x), y)
    return weights(model), optimizer.parts.step_size.products.way, [str(one.message) for one in caught]


def loop(rank, ranks, how="ddp", number=12, **options):
    """A loop of one's own: two batches a step, clipped gradients, weight decay, frozen weights, a scheduler."""
    model = perceptron()
    model[0].bias.requires_grad_(False)
    wrapped, group = around(rank, model, how)
    options = {"labels": "observed", "weight_decay": 0.1, **options, **group}
    optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), **options)
    exact = "step" in options  # which evaluates the likelihood's own loss, a sum over batches
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    data = iter(batches(rank, ranks, 2 * number))
    for _ in range(number):
        optimizer.zero_grad()
        for last in (False, True):
            x, y = next(data)
            if how != "ddp" and rank is not None:
                wrapped.set_requires_gradient_sync(last)
            with wrapped.no_sync() if how == "ddp" and rank is not None and not last else contextlib.nullcontext():
                outputs = optimizer.forward(x)
                optimizer.backward(outputs, y, None if exact else optimizer.loss(outputs, y) / 2)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
    return weights(model)


def scaled(rank, ranks, how, number=10, **options):
    """A loop with a GradScaler, whose scale is too large for the third batch of one rank: the step is left out."""
    model = perceptron()
    wrapped, group = around(rank, model, how)
    optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), labels="observed", **options, **group)
    scaler, found = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4), {}
    for step, (x, y) in enumerate(batches(rank, ranks, number)):
        optimizer.zero_grad()
        outputs = optimizer.forward(x)
        over = float("inf") if step == 2 and rank in (None, 1) else 1.0
        optimizer.backward(outputs, y, scale=lambda loss, over=over: scaler.scale(loss) * over)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        found |= {f"{name} after {step}": value for name, value in weights(model).items() if step in (1, 2)}
    return weights(model) | found | {"scale": torch.tensor(scaler.get_scale())}


def preconditioned(rank, ranks, fit, how="ddp", number=20):
    """SGD with momentum on gradients that a preconditioner changes."""
    model = perceptron()
    wrapped, group = around(rank, model, how)
    preconditioner = kf.Preconditioner(wrapped, kf.Categorical(), fit=fit, labels="observed", **group)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches(rank, ranks, number):
        sgd.zero_grad()
        cross_entropy(preconditioner(x, targets=y), y).backward()
        preconditioner.step()
        sgd.step()
    return weights(model)


def attached(rank, ranks, how, number=12):
    """A loop that calls the model itself; what it says with the average of its iterates; and the weights again."""
    model = perceptron()
    wrapped, group = around(rank, model, how)
    optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), labels="observed", **group)
    optimizer.attach(targets=lambda inputs, options: y)
    for x, y in batches(rank, ranks, number):
        optimizer.zero_grad()
        cross_entropy(wrapped(x), y).backward()
        optimizer.step()
    optimizer.eval()
    averaged = {f"average of {name}": value for name, value in weights(model).items()}
    with torch.no_grad():
        averaged["outputs"] = model(numbers(5, 4, seed=9))
    optimizer.train()
    return weights(model) | averaged


def compiled(rank, ranks, how, number=8):
    """The matrix of a compiled model, and weights after whole steps; compiled around the wrapper or inside it."""
    model, compile = perceptron(), lambda module: torch.compile(module, backend="eager")
    if how == "inside":
        model[1] = compile(model[1])
    elif how == "in place":
        model.compile(backend="eager")
    wrapped, group = around(rank, model, "rows" if how == "around rows" else "ddp")
    wrapped = compile(wrapped) if how.startswith("around") else wrapped
    data = [x for x, _ in batches(None, ranks, 3)]
    options = {"labels": "exact", **group}
    fisher = kf.estimate(wrapped, data if rank is None else kf.shard(data), kf.Categorical(), **options)
    optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), labels="observed", **group)
    for x, y in batches(rank, ranks, number):
        optimizer.step(lambda x=x: wrapped(x), y)
    found = {f"matrix {name}": operator.to_dense() for name, operator in fisher.blocks.items()}
    return found | {name.replace("_orig_mod.", ""): value for name, value in weights(model).items()}


def unused(rank, ranks, fit, number=8, **options):
    """Layers that some ranks do not use in some steps; in the first one of them is used by rank 0 alone."""
    model = fresh(Branches())
    wrapped, group = around(rank, model, find_unused_parameters=True)
    optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), fit=fit, labels="observed", **options, **group)
    for step, (x, y) in enumerate(batches(rank, ranks, number, 3, 2)):
        x[:, 0] = x[:, 0].abs() * (-1 if (step + rank) % ranks else 1)
        optimizer.step(lambda x=x: wrapped(x), y)
    return weights(model)


def resumed(rank, ranks, saved, **options):
    """Ten steps, of which the last five start from what rank 0 saved; or none do."""
    model, likelihood = perceptron(), kf.Categorical()
    wrapped, group = around(rank, model)
    optimizer = kf.NaturalGradient(wrapped, likelihood, **options, **group)
    for step, (x, y) in enumerate(batches(rank, ranks, 10)):
        if step == 5 and saved:
            state = optimizer.state_dict() if rank == 0 or options else None
            box = [(model.state_dict(), state) if rank == 0 else None]
            dist.broadcast_object_list(box)
            model = perceptron()
            wrapped, group = around(rank, model)
            optimizer = kf.NaturalGradient(wrapped, likelihood, **options, **group)
            model.load_state_dict(box[0][0])
            optimizer.load_state_dict(box[0][1])
        optimizer.step(lambda x=x, wrapped=wrapped: wrapped(x), y)
    return weights(model)


def saving(rank, ranks, path, number):
    """Weights after so many steps, which go on from the file that rank 0 writes after each of them."""
    model = perceptron()
    wrapped, group = around(rank, model)
    optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), weight_decay=0.01, **group)
    if os.path.exists(path):
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for x, y in islice(batches(rank, ranks, number), optimizer.steps, None):
        optimizer.step(lambda x=x: wrapped(x), y)
        if rank == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path + " new")
            os.replace(path + " new", path)
    return weights(model)


def handed_on(rank, ranks, path, saved, loaded, how, model="ddp", share="all"):
    """Weights after five steps of some ranks, and five steps of other ranks that go on from what these saved.

    Args:
        rank: of this process; None: it is alone.
        ranks: of the group.
        path: of the file or folder.
        saved: how many ranks train and save at first; None: what others saved is loaded.
        loaded: how many go on; others of the group do not come. None: nobody.
        how: rank 0 saves alone, or all of them through torch.distributed.checkpoint, as bytes or by names.
        model: what the ranks that save train, and what those that load do: DDP, or how fully_shard spreads it.
        share: of inverses, likewise.
    """
    models, shares = model.split(" to "), share.split(" to ")

    def some(number):
        if rank is None:
            return None
        return dist.group.WORLD if number == ranks else dist.new_group(list(range(number)))

    def made(group, how, share):
        model = perceptron()
        wrapped = model
        if rank is not None and how == "ddp":
            wrapped = DistributedDataParallel(model, process_group=group)
        elif rank is not None:
            cases.spread(model, how)
        options = {"labels": "observed", "group": group, "share": share}
        return model, wrapped, kf.NaturalGradient(wrapped, kf.Categorical(), **options)

    def go(wrapped, optimizer, number, first):
        for x, y in list(batches(rank if rank is not None and number > 1 else None, number, first + 5))[first:]:
            optimizer.step(lambda x=x: wrapped(x), y)

    groups = [None if number is None else some(number) for number in (saved, loaded)]
    if saved is not None:
        if rank is None or rank < saved:
            model, wrapped, optimizer = made(groups[0], models[0], shares[0])
            go(wrapped, optimizer, saved, 0)
            state = {"model": model.state_dict()}
            if how == "rank 0" and (shares[0] == "owned" or not rank):
                state["optimizer"] = optimizer.state_dict()
                if not rank:
                    torch.save(state, path)
            elif how == "checkpoint":
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                dcp.save(state | {"optimizer": file.getvalue()}, checkpoint_id=path, process_group=groups[0])
            elif how == "names":
                named = {"optimizer": kf.named_state(optimizer)}
                dcp.save(state | named, checkpoint_id=path, process_group=groups[0])
        if rank is not None:
            dist.barrier()
    if rank is not None and (loaded is None or rank >= loaded):
        return {}
    model, wrapped, optimizer = made(groups[1], models[-1], shares[-1])
    if how == "rank 0":
        state = torch.load(path)
    else:
        state = {"model": model.state_dict()} | ({"optimizer": b""} if how == "checkpoint" else {})
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that one process loads alone
            dcp.load(state, checkpoint_id=path, no_dist=rank is None, process_group=groups[1])
    model.load_state_dict(state["model"])
    if how == "names":
        kf.load_named_state(optimizer, path)
    elif how == "checkpoint":
        optimizer.load_state_dict(torch.load(io.BytesIO(state["optimizer"])))
    else:
        optimizer.load_state_dict(state["optimizer"])
    go(wrapped, optimizer, loaded, 5)
    return weights(model)


def between(rank, ranks):
    """Calls of torch.distributed in each of twenty steps beside DDP's own, whether it was due, and the report."""
    model = perceptron()
    wrapped, group = around(rank, model)
    refresh = kf.Refresh(statistics=4)
    optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), labels="observed", refresh=refresh, **group)
    found = []
    for step, (x, y) in enumerate(batches(rank, ranks, 20)):
        due = optimizer.parts.statistics.is_due(step)
        with watched() as calls:
            optimizer.step(lambda x=x: wrapped(x), y)
        found.append((due, calls))
    return found, optimizer.report()


def not_finite(rank, ranks, fit, labels, how="ddp"):
    """Weights before and after a step in which one rank's batch holds NaN, and after one more."""
    model = perceptron()
    wrapped, group = around(rank, model, how)
    optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), fit=fit, labels=labels, **group)
    found = []
    for step, (x, y) in enumerate(batches(rank, ranks, 5)):
        if step == 3 and rank == 1:
            x = x * float("nan")
        with warnings.catch_warnings(action="ignore", category=kf.NumericalWarning):  # that statistics are left out
            optimizer.step(lambda x=x: wrapped(x), y)
        found.append(torch.cat([value.flatten() for value in weights(model).values()]))
    return found, optimizer.parts.statistics.dropped


def spread(rank):
    """Errors for parameters that are spread over the ranks, by what was called."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    size = dist.get_world_size()
    mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
    x, group, likelihood = numbers(4, 4), {"group": dist.group.WORLD}, kf.Categorical()
    sharded, parallel, narrow, partly, apart = (perceptron() for _ in range(5))
    fully_shard(sharded, mesh=mesh)
    fully_shard(narrow, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(partly[2], mesh=mesh)
    parallelize_module(parallel, mesh, {"0": ColwiseParallel()})
    alone = [dist.new_group([each]) for each in range(size)][rank]
    fully_shard(apart, mesh=dist.device_mesh.DeviceMesh.from_group(alone, "cpu"))
    fisher = kf.estimate(sharded, x, likelihood, **group)
    errors = {}
    for name, call in {
        "posterior": lambda: kf.Laplace(sharded, fisher),
        "influence": lambda: kf.Influence(sharded, fisher, likelihood),
        "penalty": lambda: fisher.penalty(sharded),
        "gram": lambda: kf.NaturalGradient(sharded, likelihood, fit="gram", **group),
        "tensor parallel": lambda: kf.estimate(parallel, x, likelihood, **group),
        "training, tensor parallel": lambda: kf.NaturalGradient(parallel, likelihood, **group),
        "narrow": lambda: kf.estimate(narrow, x, likelihood, **group),
        "training, narrow": lambda: kf.NaturalGradient(narrow, likelihood, **group),
        "preconditioning, narrow": lambda: kf.Preconditioner(narrow, likelihood, **group),
        "papers": lambda: kf.NaturalGradient(sharded, likelihood, step=kf.QuadraticModel(), **group),
        "partly": lambda: kf.NaturalGradient(partly, likelihood, **group),
        "without group": lambda: kf.NaturalGradient(sharded, likelihood),
        "another group": lambda: kf.Preconditioner(sharded, likelihood, group=alone),
        "a larger group": lambda: kf.Preconditioner(apart, likelihood, **group),
    }.items():
        try:
            call()
        except kf.UnsupportedError as error:
            errors[name] = str(error)
    return errors


def uneven(rank, wrapped, group):
    """The papers' step after other numbers of passes on each rank."""
    optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), step=kf.QuadraticModel(), labels="observed", **group)
    for x, y in islice(batches(rank, dist.get_world_size(), 3), rank + 1):
        with wrapped.no_sync():
            optimizer.backward(optimizer.forward(x), y)
    optimizer.step()
    return "none", ""


def unwrapped(rank, model, group):
    """Steps of a model that nothing wraps, so that gradients are each rank's own."""
    optimizer = kf.NaturalGradient(model, kf.Categorical(), **group)
    for x, y in batches(rank, dist.get_world_size(), 30):
        optimizer.step(lambda x=x: model(x), y)
    return "none", ""


def refused(rank, what):
    """The error of a training that several ranks cannot run."""
    model = perceptron()
    wrapped, group = around(rank, model)
    try:
        if what == "no wrapper":
            return unwrapped(rank, model, group)
        if what == "other weights":
            with torch.no_grad():
                model[0].weight.add_(rank)
        if what == "passes":
            return uneven(rank, wrapped, group)
        optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), **group)
        x, y = next(batches(rank, dist.get_world_size(), 1))
        optimizer.step(lambda: wrapped(x), y)
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def ended(rank, how, at):
    """The error of the other ranks when the last one ends between two steps; they call the roll for two seconds."""
    wrapped, group = around(rank, perceptron(), how)
    optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), **group)
    size = dist.get_world_size()
    try:
        with mock.patch.object(ranks_module, "_PATIENCE", 2.0):
            for step, (x, y) in enumerate(batches(rank, size, 100)):
                if rank == size - 1 and step == at:
                    os._exit(1)
                optimizer.step(lambda x=x: wrapped(x), y)
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def wrong(rank):
    """The error of a step whose forward pass fails on all ranks."""

    def fails():
        raise RuntimeError("of the model's own")

    wrapped, group = around(rank, perceptron())
    try:
        kf.NaturalGradient(wrapped, kf.Categorical(), **group).step(fails, torch.zeros(4, dtype=torch.long))
    except RuntimeError as error:
        return type(error).__name__, str(error)
