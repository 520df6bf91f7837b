"""Trainings over a shard of whose batches ranks have other numbers: each function gets its rank first."""

import contextlib

import torch
import torch.distributed as dist
from torch.distributed.algorithms import Join

import kronfisher as kf
from tests.distributed.cases import fresh, numbers, perceptron
from tests.distributed.trainings import around, batches, weights

BATCH = 4


def data(number):
    """So many batches of inputs and labels."""
    x = numbers(BATCH * number, 4, seed=7)
    return list(zip(x.split(BATCH), torch.arange(BATCH * number).mul(5).remainder(3).split(BATCH), strict=True))


class Stream(torch.utils.data.IterableDataset):
    """Batches whose number is not known before."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        yield from self.batches


def loader_of(batches, kind):
    """Batches as a list, a stream, or a loader that shuffles examples."""
    if kind == "stream":
        return torch.utils.data.DataLoader(Stream(batches), batch_size=None)
    if kind == "loader":
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        generator = torch.Generator().manual_seed(3)
        whole = torch.utils.data.TensorDataset(x, y)
        return torch.utils.data.DataLoader(whole, BATCH, shuffle=True, generator=generator)
    return batches


def rounds(loader, ranks):
    """Batches of all ranks together, of rounds in which each has one."""
    batches = list(loader)
    for k in range(len(batches) // ranks):
        yield tuple(map(torch.cat, zip(*batches[k * ranks : (k + 1) * ranks], strict=True)))


def trained(rank, ranks, number, kind, how, rule, epochs=2):
    """Weights after some epochs of a plain loop, how many steps were made, and what a pass without training read."""
    model, loader = perceptron(), loader_of(data(number), kind)
    wrapped, group = around(rank, model, how)
    options = {"labels": "observed", **group}
    options |= {"papers": {"step": kf.QuadraticModel()}, "gram": {"fit": "gram"}}.get(rule, {})
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    made = (kf.Preconditioner if rule == "preconditioner" else kf.NaturalGradient)(wrapped, kf.Categorical(), **options)
    if rule == "attached":
        made.attach(targets=lambda inputs, options: y)
    steps = 0
    for _ in range(epochs):
        for x, y in rounds(loader, ranks) if rank is None else kf.shard(loader):
            steps += 1
            if rule not in ("preconditioner", "attached"):
                made.step(lambda x=x: wrapped(x), y)
                continue
            model.zero_grad()
            outputs = wrapped(x) if rule == "attached" else made(x, targets=y)
            torch.nn.functional.cross_entropy(outputs, y).backward()
            made.step()
            if rule == "preconditioner":
                sgd.step()
    read = 0 if rank is None else len(list(kf.shard(loader)))
    return weights(model), steps, read


def few(rank, ranks, kind):
    """The error of a rank whose step the others have no batch for, and which trains again with smaller batches."""
    model = perceptron()
    wrapped, group = around(rank, model)
    optimizer, text = kf.NaturalGradient(wrapped, kf.Categorical(), **group), ""
    try:
        for x, y in kf.shard(loader_of(data(ranks - 1), kind)):
            optimizer.step(lambda x=x: wrapped(x), y)
    except kf.DataError as error:
        text = str(error)
    for x, y in kf.shard(data(ranks)):
        optimizer.step(lambda x=x: wrapped(x), y)
    equal = ""
    try:
        list(kf.shard(data(ranks - 1), equal=True))
    except kf.DataError as error:
        equal = str(error)
    return text, equal, weights(model)


def other_numbers(rank, ranks):
    """The error where ranks give loaders of other lengths."""
    wrapped, group = around(rank, perceptron())
    optimizer, steps = kf.NaturalGradient(wrapped, kf.Categorical(), **group), 0
    try:
        for x, y in kf.shard(data(4 * ranks + 2 * ranks * (rank == 1))):
            optimizer.step(lambda x=x: wrapped(x), y)
            steps += 1
    except kf.RankError as error:
        return steps, str(error)
    return steps, ""


def joined(rank, ranks, epochs=3):
    """Weights where each rank has a loader of its own, of other lengths, and the shortest ends the epoch for all."""
    model = perceptron()
    wrapped, group = around(rank, model)
    optimizer, steps = kf.NaturalGradient(wrapped, kf.Categorical(), labels="observed", **group), 0
    for epoch in range(epochs):
        own = data(ranks * 9)[rank::ranks][: 3 + (rank + epoch) % ranks]
        with contextlib.suppress(RuntimeError), Join([wrapped], throw_on_early_termination=True):
            for x, y in own:
                optimizer.step(lambda x=x: wrapped(x), y)
                steps += 1
    dist.barrier()
    return weights(model), steps


class Moving(torch.nn.Sequential):
    """Buffers of several kinds that a forward pass changes in training, and some that ranks have of their own."""

    def __init__(self):
        norm = torch.nn.InstanceNorm1d(2, track_running_stats=True)
        super().__init__(norm, torch.nn.Linear(4, 5), torch.nn.Linear(5, 3))
        self.register_buffer("codes", torch.ones(4))
        self.register_buffer("still", torch.ones(3))
        self.register_buffer("passes", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)

    def forward(self, x):
        before = self.codes.clone()
        if self.training:
            with torch.no_grad():
                self.codes.lerp_(x.mean(0), 0.3)
                self.scratch.copy_(x[0])
                self.passes += 1
        return self[2](self[1](self[0](x.view(-1, 2, 2)).flatten(1) + before).tanh())


def moving(rank, ranks, how, rule, number=6):
    """The weights and saved buffers of such a model after some steps, and its scratch."""
    model = fresh(Moving())
    wrapped, group = around(rank, model, how, **({"broadcast_buffers": False} if how == "ddp" else {}))
    options = {"labels": "observed", **group}
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    made = (kf.Preconditioner if rule == "preconditioner" else kf.NaturalGradient)(wrapped, kf.Categorical(), **options)
    for x, y in batches(rank, ranks, number):
        if rule == "default":
            made.step(lambda x=x: wrapped(x), y)
            continue
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(made(x, targets=y), y).backward()
        made.step()
        sgd.step()
    saved = {name: buffer.double() for name, buffer in model.named_buffers() if buffer.any() and name != "scratch"}
    return weights(model) | saved, model.scratch
