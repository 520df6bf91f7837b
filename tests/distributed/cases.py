"""What ranks are asked to do in the tests: each function gets its rank first."""

import contextlib
import os
import time
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import kronfisher as kf
from kronfisher.distributed.ranks import ranks_of
from kronfisher.distributed.sums import Sum
from tests.conformance.problems import DRAWS, SEED, problem


def parts(p, sizes):
    """A problem's data in batches of these sizes."""
    return list(zip(p.x.split(sizes), p.targets.split(sizes), strict=True))


def described(fisher):
    """A matrix in plain numbers."""
    blocks = {name: operator.to_dense() for name, operator in fisher.blocks.items()}
    return blocks, (fisher.info.count, fisher.info.log_likelihood, fisher.info.outputs, fisher.info.targets)


def estimate(rank, example, likelihood, fit, labels, sizes):
    p = problem(example, likelihood)
    data, group = parts(p, sizes), None
    if rank is not None:
        data, group = kf.shard(data), dist.group.WORLD
    options = {"samples": DRAWS if labels == "sampled" else 1, "seed": SEED}
    return described(kf.estimate(p.model, data, p.likelihood, fit=fit, labels=labels, group=group, **options))


def estimates(rank, many):
    """Many of them, one after the other."""
    return [estimate(rank, *case) for case in many]


def same_bits(answers):
    """Whether all ranks have one answer, bit by bit."""
    first, rest = answers[0], answers[1:]
    return all(
        one.keys() == first.keys() and all(torch.equal(one[name], first[name]) for name in first) for one in rest
    )


class Branches(torch.nn.Module):
    """One of two layers, by the sign of the first number of a batch; a third is used by nobody."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.unused = (torch.nn.Linear(3, 2) for _ in range(3))

    def forward(self, x):
        return self.left(x) if x[0, 0] > 0 else self.right(x)


def of_all(rank, batches):
    """Data and group of a rank, or of one process."""
    return (batches, {}) if rank is None else (kf.shard(batches), {"group": dist.group.WORLD})


def fresh(model):
    """The same weights wherever it is made."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.double()


def numbers(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def branches(rank, fit):
    x = [numbers(4, 3, seed=seed).abs() * (-1) ** (seed == 1) for seed in range(4)]
    data, group = of_all(rank, x)
    return described(kf.estimate(fresh(Branches()), data, kf.Categorical(), fit=fit, labels="exact", **group))


def raised(call):
    """The kind of the error of a call, and its text."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def empty(rank):
    """Errors where no rank has a batch; where one's loader, of which parts are dealt out, has none; and of scores."""
    model, group, categorical = perceptron(), {"group": dist.group.WORLD}, kf.Categorical()
    x, y = numbers(6, 4), torch.arange(6) % 3
    fisher, own = (kf.estimate(model, (x, y), categorical, share=share, **group) for share in ("all", "owned"))
    laplace = kf.Laplace(model, fisher)
    nowhere = {
        "estimate": lambda: kf.estimate(model, [], categorical, **group),
        "error": lambda: fisher.error([]),
        "spectrum": lambda: fisher.spectrum([]),
        "owned error": lambda: own.error([]),
        "compare": lambda: kf.compare(model, [], categorical, **group),
        "calibrate": lambda: laplace.calibrate([], **group),
        "score": lambda: laplace.score([], **group),
    }
    data = kf.shard([] if rank == 1 else [(x, y)])
    dealt = raised(lambda: kf.estimate(model, data, categorical, **group))
    scores = raised(lambda: kf.Influence(model, fisher, categorical).scores(kf.shard([(x, y)]), (x, y)))
    return {name: raised(call) for name, call in nowhere.items()}, dealt, scores


def covered(rank):
    """What coverage lists of several models, on ranks whose first batches differ, and errors."""
    group, size = {"group": dist.group.WORLD}, dist.get_world_size()
    x, found = numbers(4, 3).abs(), {}
    odd = x * (-1 if rank == 1 else 1)
    found["branches"] = kf.coverage(fresh(Branches()), odd, **group)
    found["late"] = kf.coverage(fresh(Late()), odd, **group)
    found["some"] = kf.coverage(fresh(Late()), [odd] if rank == 1 else [], **group)
    for how in ("rows", "ddp", "plain"):
        model = perceptron()
        if how == "ddp":
            model = torch.nn.parallel.DistributedDataParallel(model)
        elif how == "rows":
            spread(model, how)
        found[how] = kf.coverage(model, kf.shard(list(numbers(2 * size, 4).split(2))), **group)
    errors = {
        "none": lambda: kf.coverage(perceptron(), [], **group),
        "fit": lambda: kf.coverage(perceptron(), numbers(2, 4), fit="ekfac" if rank else "kfac", **group),
        "batch": lambda: kf.coverage(perceptron(), numbers(2, 4 - (rank == 1)), **group),
        "model": lambda: kf.coverage(perceptron(4 + (rank == 1)), numbers(2, 4), **group),
    }
    return found, {name: raised(call) for name, call in errors.items()}


def other_calls(rank):
    """Errors where ranks make other calls, or where one fails while others are at the end of an equal part."""
    model, group, categorical = perceptron(), {"group": dist.group.WORLD}, kf.Categorical()
    x, y = numbers(12, 4), torch.arange(12) % 3
    data = list(zip(x.split(1), y.split(1), strict=True))
    fisher = kf.estimate(model, (x, y), categorical, **group)
    laplace = kf.Laplace(model, fisher)
    bad = kf.shard(
        [(each[:, :2] if place == 1 else each, label) for place, (each, label) in enumerate(data)], equal=True
    )
    return {
        "estimate": raised(lambda: kf.estimate(model, bad, categorical, **group)),
        "score": raised(lambda: laplace.score(bad, **group)),
        "calibrate": raised(lambda: laplace.calibrate(bad, **group)),
        "other": raised(lambda: laplace.score(data, **group) if rank else fisher.error(data)),
    }


class Late(torch.nn.Module):
    """A layer whose weight is also used in a way that is not understood, in one batch only."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)

    def forward(self, x):
        hidden = self.first(x)
        if x[0, 0] < 0:
            hidden = hidden + torch.linalg.norm(self.first.weight, dim=1) * x
        return self.last(hidden)


def late(rank, fit):
    x = [numbers(4, 3, seed=seed).abs() * (-1) ** (seed == 2) for seed in range(4)]
    data, group = of_all(rank, x)
    return described(kf.estimate(fresh(Late()), data, kf.Categorical(), fit=fit, labels="exact", **group))


def perceptron(width=4):
    return fresh(torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 3)))


def wrapped(rank):
    model = perceptron()
    if rank is not None:
        model = torch.nn.parallel.DistributedDataParallel(model)
    data, group = of_all(rank, list(numbers(10, 4).split(2)))
    return described(kf.estimate(model, data, kf.Categorical(), labels="exact", **group))


def sampled(rank, samples):
    data, group = of_all(rank, list(numbers(10, 4).split(2)))
    how = {"labels": "exact"} if samples is None else {"samples": samples}
    return described(kf.estimate(perceptron(), data, kf.Categorical(), fit="full", **how, **group))


def measured(rank):
    """The error and the spectrum of a matrix, whose second block is not written out."""
    from kronfisher.estimation import error

    before, error._WRITTEN_OUT = error._WRITTEN_OUT, 16
    try:
        data, group = of_all(rank, list(numbers(11, 4).split(2)))
        fisher = kf.estimate(perceptron(), data, kf.Categorical(), labels="exact", **group)
        distance, spectra = fisher.error(data), fisher.spectrum(data, rank=3)
    finally:
        error._WRITTEN_OUT = before
    return distance.distances, distance.norms, {name: own.values.tolist() for name, own in spectra.items()}


CALLS = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single"),
    *("barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "irecv", "isend", "recv", "reduce"),
    *("reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send"),
)


@contextlib.contextmanager
def watched():
    """Calls of torch.distributed, but those within others: name and bytes that this rank gives."""
    calls, inside = [], []
    old = {name: getattr(dist, name) for name in CALLS}

    def watch(name):
        def call(*args, **kwargs):
            if not inside:
                gives = name in ("all_reduce", "reduce", "send") or (name == "broadcast" and args[1] == dist.get_rank())
                calls.append((name, args[0].numel() * args[0].element_size() if gives else 0))
            inside.append(name)
            try:
                return old[name](*args, **kwargs)
            finally:
                inside.pop()

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            for module in (dist, dist.distributed_c10d):
                patch.setattr(module, name, watch(name))
        yield calls


def counted(rank, fit):
    """A matrix and what torch.distributed was called with for it."""
    with watched() as calls:
        data = list(numbers(10, 4).split(2))
        fisher = kf.estimate(perceptron(), data, kf.Gaussian(), fit=fit, labels="exact", group=dist.group.WORLD)
    return replace(fisher, context=None), calls


class Read(list):
    """Batches that count how often they are read."""

    times = 0

    def __iter__(self):
        self.times += 1
        return super().__iter__()


def passes_counted(rank, fits):
    """By fit: passes over the data, what torch.distributed was called with, and what the report says of it."""
    found = {}
    for fit in fits:
        data = Read(numbers(12, 4, seed=rank).split(3))
        options = {"labels": "exact", "group": dist.group.WORLD}
        with watched() as calls:
            info = kf.estimate(perceptron(), data, kf.Gaussian(), fit=fit, **options).info
        found[str(fit)] = data.times, calls, (info.sent, info.planned, info.collectives)
    return found


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from range(7)


def shards(rank):
    """Examples that a rank gets of several kinds of loaders of seven batches."""
    data = torch.utils.data.TensorDataset(torch.arange(7))
    loader = torch.utils.data.DataLoader
    shuffled = loader(data, shuffle=True, generator=torch.Generator().manual_seed(3))
    kinds = [loader(data), shuffled, loader(data, batch_size=None), loader(Stream(), batch_size=None)]
    found = [[int(batch[0]) if isinstance(batch, list | tuple) else int(batch) for batch in kf.shard(k)] for k in kinds]
    equal = [list(kf.shard(every, equal=True)) for every in (list(range(7)), kinds[3])]
    assert all(len(part) == 7 // dist.get_world_size() for part in equal)
    return [*found, list(kf.shard(list(range(7))))]


def shuffled(rank):
    """Batches in two passes with one seed on all ranks and in one with others, and the error after that."""
    data, found = torch.utils.data.TensorDataset(torch.arange(7)), []
    shard = kf.shard(torch.utils.data.DataLoader(data, shuffle=True), equal=True)
    for _ in range(2):
        found.append(len(list(shard)))
    torch.manual_seed(rank)
    found.append(0)
    try:
        for _ in shard:
            found[-1] += 1
    except Exception as error:
        return found, type(error).__name__, str(error)
    return found, "none", ""


def alone(rank):
    """A matrix, and weights after two steps of two optimisers, of a process in a group of its own."""
    groups = [] if rank is None else [dist.new_group([own]) for own in range(dist.get_world_size())]
    group = {} if rank is None else {"group": groups[rank]}
    model, x, y = perceptron(), numbers(6, 4), torch.arange(6) % 3
    data = [(x[:2], y[:2]), (x[2:], y[2:])]
    data = data if rank is None else kf.shard(data, groups[rank])
    blocks, _ = described(kf.estimate(model, data, kf.Categorical(), labels="exact", **group))
    optimizer = kf.NaturalGradient(model, kf.Categorical(), **group)
    preconditioner = kf.Preconditioner(model, kf.Categorical(), **group)
    for _ in range(2):
        optimizer.step(lambda: model(x), y)
        model.zero_grad()
        torch.nn.functional.cross_entropy(preconditioner(x, targets=y), y).backward()
        preconditioner.step()
    return blocks, {name: p.grad for name, p in model.named_parameters()} | dict(model.state_dict())


def spread(model, how):
    """Let fully_shard spread the parameters of a perceptron over the ranks, in one of several ways."""
    from torch.distributed.fsdp import fully_shard

    size = dist.get_world_size()
    shapes = {"replicas": (size, 1), "both": (1, size), "grid": (2, size // 2)}
    shape = shapes.get(how, (size,))  # by rows, all of it, or its last layer alone, or with all parts unsharded
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    fully_shard(model[2], mesh=mesh, reshard_after_forward=how != "both")
    if how != "last layer":
        fully_shard(model, mesh=mesh)
    if how == "unsharded":
        model.unshard()
        model[2].unshard()


def sharded(rank, fit, how):
    """A matrix, its error, and the model's outputs before and after, of a model that fully_shard spread over ranks."""
    model, x = perceptron(), numbers(11, 4)
    data, group = of_all(rank, list(x.split(2)))
    if rank is not None:
        spread(model, how)
    before = model(x)
    fisher = kf.estimate(model, data, kf.Categorical(), fit=fit, labels="exact", **group)
    distance = fisher.error(data).distances
    after = model(x)
    after.sum().backward()  # the hooks are in their places again
    placed = {type(p).__name__ for p in model[2 if how == "last layer" else 0 :].parameters()}
    same = torch.equal(before, after) and placed == {"Parameter" if rank is None else "DTensor"}
    return *described(fisher), distance, same


def masked(rank, how, fit, labels):
    """A matrix of sequences of which ranks count other numbers of positions, by a mask, weights or ignored targets."""
    model, x, y = fresh(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))), None, None
    x, y, counts = numbers(7, 5, 3), torch.arange(35).view(7, 5) % 3, torch.arange(35).view(7, 5) % 4 != 1
    counts[4], counts[1, 2:] = False, False
    weights, ignored = numbers(7, 5, seed=9).abs() * counts, y.where(counts, -100)
    options, likelihood, targets = {}, kf.Categorical(class_dim=-1), list(y.split(2))
    inputs = list(x.split(2))
    if how == "mask":
        inputs = [{"x": each, "counts": mask} for each, mask in zip(inputs, counts.split(2), strict=True)]
        options = {"mask": "counts", "forward": lambda model, batch: (model(batch[0]["x"]), batch[1])}
    elif how == "weights":
        likelihood, targets = kf.Weighted(likelihood), list(zip(targets, weights.split(2), strict=True))
    else:
        targets = list(ignored.split(2))
    data, group = of_all(rank, list(zip(inputs, targets, strict=True)))
    fisher = kf.estimate(model, data, likelihood, fit=fit, labels=labels, **options, **group)
    blocks, facts = described(fisher)
    return blocks, (*facts, tuple(info.rows for info in fisher.info.blocks.values()))


def grouped(fit):
    """The matrix of one process."""
    fisher = kf.estimate(perceptron(), list(numbers(10, 4).split(2)), kf.Categorical(), labels="exact", fit=fit)
    return described(fisher)[0]


GROUPS = [("kfac", "all"), ("kfoc", "all"), ("ekfac", "owned")]


def groups(rank):
    """Matrices by a mesh of all ranks, by one dimension of another, and by the first and the last; and errors."""
    size, init = dist.get_world_size(), dist.device_mesh.init_device_mesh
    data = list(numbers(10, 4).split(2))
    rest = 2 if size % 2 == 0 else 1
    both = init("cpu", (size // rest, rest), mesh_dim_names=("dp", "tp"))
    some = dist.new_group([0, size - 1])
    found = {"mesh": init("cpu", (size,)), "dimension": both["dp"]}
    errors = {"both": raised(lambda: kf.shard(data, both)), "no group": raised(lambda: kf.shard(data, "dp"))}
    if rank in (0, size - 1):
        found["some"] = some
    else:
        errors["outside"] = raised(lambda: kf.estimate(perceptron(), data, kf.Categorical(), group=some))
    for name, group in found.items():
        found[name] = []
        for fit, share in GROUPS:
            options = {"labels": "exact", "fit": fit, "group": group, "share": share}
            fisher = kf.estimate(perceptron(), kf.shard(data, group), kf.Categorical(), **options)
            whole = fisher.whole() if share == "owned" and fisher.info.ranks > 1 else fisher
            found[name].append(({key: own.to_dense() for key, own in whole.blocks.items()}, fisher.info.ranks))
    return found, errors


def refused(rank):
    """Errors of what a model is wrapped in, or is a part of, that is not treated."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    group, size, cpu = {"group": dist.group.WORLD}, dist.get_world_size(), torch.device("cpu")
    with warnings.catch_warnings(action="ignore"):  # that there is no GPU
        flat = FullyShardedDataParallel(perceptron(), device_id=cpu)
    stage = PipelineStage(torch.nn.Linear(4, 4), rank, size, cpu)
    pipeline, errors = ScheduleGPipe(stage, size, loss_fn=torch.nn.functional.cross_entropy), {}
    for name, model in {"flat": flat, "PipelineStage": stage, "ScheduleGPipe": pipeline}.items():
        calls = [lambda model=model: kf.estimate(model, numbers(4, 4), kf.Categorical(), **group)]
        calls += [lambda m=model, make=make: make(m, kf.Categorical(), **group) for make in OPTIMISERS]
        errors[name] = [raised(call) for call in calls]
    return errors


OPTIMISERS = kf.NaturalGradient, kf.Preconditioner


def compared(rank):
    """Rows of a comparison, without their seconds."""
    data, group = of_all(rank, list(numbers(10, 4).split(2)))
    table = kf.compare(perceptron(), data, kf.Categorical(), fits=["kfac", "ekfac", "gram"], labels="exact", **group)
    return [(row.fit, row.count, row.error, row.trace, row.failure) for row in table.rows]


def posterior(rank, empty, share="all"):
    """The evidence and the calibrated prior precision of a posterior; a rank may be without validation data."""
    model, x, y = perceptron(), numbers(12, 4), torch.arange(12) % 3
    data, group = of_all(rank, list(zip(x.split(3), y.split(3), strict=True)))
    how = {"share": share} if group else {}
    fisher = kf.estimate(model, data, kf.Categorical(), fit="kfac", labels="exact", **group, **how)
    unlabelled, _ = of_all(rank, list(x.split(3)))
    later = kf.Laplace(model, kf.estimate(model, unlabelled, kf.Categorical(), labels="exact", fit="kfac", **group))
    laplace, scored = kf.Laplace(model, fisher).optimize_prior(), later.score(data, **group)
    evidence = [float(each.log_marginal_likelihood()) for each in (laplace, scored)]
    validation = [(numbers(6, 4, seed=5), torch.arange(6) % 3)]  # all ranks predict each of them many times
    validation = of_all(rank, validation if empty else list(zip(x.split(5), y.split(5), strict=True)))[0]
    laplace.calibrate(validation, **group)
    return evidence, [float(value) for value in laplace.prior_precision.values()]


def exchanged(rank, predictor, number=2):
    """Calls of torch.distributed while a posterior of owned blocks is calibrated with so many batches on each rank."""
    model, x, y = perceptron(), numbers(12, 4), torch.arange(12) % 3
    group = {"group": dist.group.WORLD}
    shard = kf.shard(list(zip(x.split(3), y.split(3), strict=True)))
    laplace = kf.Laplace(model, kf.estimate(model, shard, kf.Categorical(), fit="kfac", share="owned", **group))
    validation = [(numbers(6, 4, seed=5 + rank), torch.arange(6) % 3)] * number
    with watched() as calls:
        laplace.calibrate(validation, predictor=predictor, **group)
    return calls, [float(value) for value in laplace.prior_precision.values()]


def uncalibrated(rank, share, reads):
    """The error where one rank's validation data do not fit, or cannot be read."""
    model, x, y = perceptron(), numbers(12, 4), torch.arange(12) % 3
    how = {"fit": "kfac", "group": dist.group.WORLD, "share": share}
    laplace = kf.Laplace(model, kf.estimate(model, (x, y), kf.Categorical(), **how))

    class Torn:
        def __iter__(self):
            yield x, y
            raise kf.errors.DataError("torn")

    try:
        laplace.calibrate(Torn() if reads and rank == 1 else [(x, y + 9 * (rank == 1))], group=dist.group.WORLD)
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


class Tied(torch.nn.Module):
    """A table whose rows are looked up, and which is the last layer, too."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4)

    def forward(self, x):
        return torch.nn.functional.linear(self.layer(self.table(x)), self.table.weight)


def used(fisher):
    """Products, solutions, numbers and other matrices, as tensors."""
    flat = numbers(fisher.dim, 2)
    named = {name: numbers(*shape) for name, shape in fisher.shapes.items()}
    damped = fisher + 0.1
    found = {"product": fisher @ flat, "solution": damped.solve(flat), "dense": fisher.to_dense()}
    found |= {f"{name} of a product": value for name, value in (fisher @ named).items()}
    found |= {"trace": fisher.trace(), "determinant": damped.logdet(), "diagonal": fisher.diagonal()}
    found |= {"norm": fisher.frobenius_norm(), "factored": (fisher + kf.FactoredTikhonov(0.1)).solve(flat)}
    found |= {"roots": damped.inverse_sqrt() @ flat, "sum": (fisher + 3 * fisher) @ flat}
    found |= {"draw": damped.sample(2, seed=4), "narrow": fisher.to(dtype=torch.float32) @ flat.float()}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def owned(rank, fit, tied):
    """What is made of a matrix that every rank holds, and of one whose blocks stay with their owners; its memory."""
    model, x = (fresh(Tied()), torch.arange(10) % 5) if tied else (perceptron(), numbers(10, 4))
    data, group = of_all(rank, list(x.split(3)))
    how = {"fit": fit, "labels": "exact", **group}
    whole = kf.estimate(model, data, kf.Categorical(), **how)
    own = kf.estimate(model, data, kf.Categorical(), share="owned", **how)
    with watched() as calls:
        own @ numbers(own.dim)
    again = own.whole()
    assert all(torch.equal(again[name].to_dense(), whole[name].to_dense()) for name in whole.blocks)
    memory = whole.bytes, own.bytes, len(whole.blocks), sum(row.bytes for row in own.report().rows)
    return used(whole), used(own), memory, [name for name, _ in calls]


def believed(model, fisher, likelihood):
    """Everything that a posterior says, as tensors."""
    laplace, x = kf.Laplace(model, fisher, prior_precision=2.0), numbers(3, 4, seed=7)
    y = torch.arange(3) if isinstance(likelihood, kf.Categorical) else numbers(3, 3, seed=8)
    prior = torch.full((len(fisher.blocks),), 0.7, requires_grad=True)
    evidence = laplace.log_marginal_likelihood(prior)
    (slope,) = torch.autograd.grad(evidence, prior)
    found = {"evidence": evidence.detach(), "its slope": slope, "own evidence": laplace.log_marginal_likelihood()}
    found |= {f"draws of {name}": value for name, value in laplace.sample(3, seed=2).items()}
    found |= {f"variance of {name}": value for name, value in laplace.variance().items()}
    found |= dict(zip(("outputs", "their variance"), laplace.functional_variance(x), strict=True))
    found["their covariance"] = laplace.functional_covariance(x)[1]
    found["functions"] = laplace.functional_samples(x, 4)
    for predictor in likelihood.predictors:
        found[f"density, {predictor}"] = laplace.log_predictive_density(x, y, predictor=predictor, samples=5)
    found["flat"] = torch.tensor(list(laplace.flat_directions.values()))
    priors = {name: 1.0 + name.endswith("bias") for name in fisher.shapes}
    other = kf.Laplace(model, fisher, prior_precision=priors, temperature=0.5)
    found["varied"] = other.functional_variance(x)[1]
    found["varied evidence"] = other.log_marginal_likelihood()
    noise = isinstance(likelihood, kf.Gaussian)
    tuned = kf.Laplace(model, fisher).optimize_prior(per_block=True, noise=noise)
    found["tuned"] = torch.stack(list(tuned.prior_precision.values()))
    found["tuned noise"] = torch.tensor(tuned.noise or 0.0)
    found["calibrated"] = torch.stack(list(laplace.calibrate([(x, y)]).prior_precision.values()))
    return found


def owned_posterior(rank, fit, likelihood):
    """What two posteriors say: of a matrix that every rank holds, and of one whose blocks stay with their owners."""
    likelihood = {"categorical": kf.Categorical(), "gaussian": kf.Gaussian(0.5)}[likelihood]
    model, x = perceptron(), numbers(10, 4)
    y = torch.arange(10) % 3 if isinstance(likelihood, kf.Categorical) else numbers(10, 3, seed=3)
    data, group = of_all(rank, list(zip(x.split(3), y.split(3), strict=True)))
    how = {"fit": fit, "labels": "exact", **group}
    fishers = [kf.estimate(model, data, likelihood, share=share, **how) for share in ("all", "owned")]
    return [believed(model, fisher, likelihood) for fisher in fishers]


def owned_posterior_misused(rank):
    """Errors of what a posterior whose blocks stay with their owners does not do; how it is written."""
    model, x, y = perceptron(), numbers(12, 4), torch.arange(12) % 3
    data, group = of_all(rank, list(zip(x.split(3), y.split(3), strict=True)))
    fisher = kf.estimate(model, data, kf.Categorical(), labels="exact", share="owned", **group)
    laplace, errors = kf.Laplace(model, fisher), {}
    without = {name: float("weight" in name) for name in fisher.shapes}
    for name, call in {
        "batch": lambda: laplace.predict(x[rank : rank + 2], predictor="probit"),
        "prior": lambda: kf.Laplace(model, fisher, prior_precision=1.0 + rank),
        "no prior": lambda: kf.Laplace(model, fisher, prior_precision=without),
    }.items():
        try:
            call()
        except Exception as error:
            errors[name] = type(error).__name__, str(error)
    return errors, repr(laplace)


def influences(rank, fit):
    """Scores of a rank's part of the data, by a matrix of all of them; None: of all."""
    model, x, y = perceptron(), numbers(12, 4), torch.arange(12) % 3
    data, group = of_all(rank, list(zip(x.split(2), y.split(2), strict=True)))
    fisher = kf.estimate(model, data, kf.Categorical(), fit=fit, labels="exact", **group)
    influence = kf.Influence(model, fisher, kf.Categorical(), damping=0.1)
    return influence.scores(data, (x[:3], y[:3])).values, influence.self_scores(data)


def owned_influences(rank, fit, folder):
    """Scores by a matrix that every rank holds, and by one whose blocks stay with their owners."""
    model, x, y = perceptron(), numbers(12, 4), torch.arange(12) % 3
    batches = list(zip(x.split(2), y.split(2), strict=True))
    data, group = of_all(rank, batches)
    how = {"fit": fit, "labels": "exact", **group}
    found, queries = [], [(x[:3], y[:3]), (x[5:7], y[5:7])]
    for share in ("all", "owned"):
        fisher = kf.estimate(model, data, kf.Categorical(), share=share, **how)
        own = kf.Influence(model, fisher, kf.Categorical(), damping=0.05)
        scores = {"own part": own.scores(data, queries), "by block": own.scores(data, queries, per="block")}
        scores["truncated"] = own.scores(data, queries, rank=1)
        scores["some at a time"] = own.scores(data, queries, at_once=2)
        scores["filed"] = own.scores(data, queries, path=f"{folder}/{share} {rank}")
        for name, options in {"cosine": {"normalize": "cosine"}, "relative": {"normalize": "relative"}}.items():
            other = kf.Influence(model, fisher, kf.Categorical(), damping=0.05, **options)
            scores[name] = other.scores(batches, queries)
        refined = kf.Influence(model, fisher, kf.Categorical(), damping=0.05, refine=3)
        scores["refined"] = refined.scores(batches, queries)
        found.append({name: each.values.clone() for name, each in scores.items()} | {"self": own.self_scores(batches)})
        found[-1]["bounds"] = scores["truncated"].bounds
    parts = [f"{folder}/owned {rank}" for rank in range(dist.get_world_size())]
    dist.barrier()
    return *found, kf.Influence.load(*parts).values.clone()


def owned_influences_misused(rank):
    """Errors where ranks ask, or read, different things."""
    model, x, y = perceptron(), numbers(12, 4), torch.arange(12) % 3
    batches = list(zip(x.split(2), y.split(2), strict=True))
    fisher = kf.estimate(model, kf.shard(batches), kf.Categorical(), group=dist.group.WORLD, share="owned")
    own, errors = kf.Influence(model, fisher, kf.Categorical()), {}
    refined = kf.Influence(model, fisher, kf.Categorical(), refine=1)
    for name, call in {
        "queries": lambda: own.scores(batches, (x[rank : rank + 2], y[:2])),
        "fewer queries": lambda: own.scores(batches, batches[: 1 + (rank == 0)]),
        "self": lambda: own.self_scores(kf.shard(batches)),
        "fewer": lambda: own.self_scores(batches[: 2 + (rank == 0)]),
        "refined": lambda: refined.scores(batches[rank:] + batches[:rank], batches[0]),
        "index": lambda: own.index(batches, "nowhere"),
    }.items():
        try:
            call()
        except Exception as error:
            errors[name] = type(error).__name__, str(error)
    return errors


def owned_and_measured(rank, fit, labels, folder):
    """Errors of a matrix that every rank holds, and of one whose blocks stay with their owners, which is saved."""
    model, x, y = perceptron(5), numbers(10, 4), torch.arange(10) % 3
    data, group = of_all(rank, list(zip(x.split(3), y.split(3), strict=True)))
    how = {"fit": fit, "labels": labels, **group}
    fishers = [kf.estimate(model, data, kf.Categorical(), share=share, **how) for share in ("all", "owned")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kronfisher.estimation.error._WRITTEN_OUT", 20)  # blocks of 25 and of 18
        whole, own = ((fisher.error(data), (2 * fisher).reduced("sum").error(data)) for fisher in fishers)
    fishers[1].save(f"{folder}/owned.safetensors")
    found = kf.load(f"{folder}/owned.safetensors", model)
    pairs = [(found[name].to_dense(), fishers[0][name].to_dense()) for name in fishers[0].blocks]
    same = all(torch.allclose(one, other, rtol=1e-12, atol=1e-14) for one, other in pairs)
    kf.Laplace(model, fishers[1], prior_precision=2.0).save(f"{folder}/posterior.safetensors")
    again = kf.Laplace.load(f"{folder}/posterior.safetensors", model, kf.Categorical())
    evidence = kf.Laplace(model, fishers[0], prior_precision=2.0).log_marginal_likelihood()
    same = same and torch.allclose(again.log_marginal_likelihood(), evidence, rtol=1e-12, atol=0)
    failure = ""
    try:
        fishers[1].save(f"{folder}/nowhere/owned.safetensors")
    except Exception as error:
        failure = type(error).__name__
    return [{**e.distances, **{f"norm {k}": v for k, v in e.norms.items()}} for e in (*whole, *own)], same, failure


def owned_elsewhere(rank):
    """Errors of what a matrix whose blocks stay with their owners does not give."""
    model, x = perceptron(), numbers(10, 4)
    data, group = of_all(rank, list(x.split(3)))
    fisher = kf.estimate(model, data, kf.Categorical(), labels="exact", share="owned", **group)
    errors = {}
    for name, call in {
        "tensors": lambda: [operator.tensors() for operator in fisher.blocks.values()],
        "singular": lambda: fisher.solve(numbers(fisher.dim)),
    }.items():
        try:
            call()
        except Exception as error:
            errors[name] = type(error).__name__, str(error)
    return errors, fisher.spectrum(data, rank=1)["0.weight"].values.tolist()


def ended(rank):
    """The error of the other ranks when the last one ends, once they have come to meet it."""
    if rank == dist.get_world_size() - 1:
        time.sleep(1)
        os._exit(1)
    try:
        kf.estimate(perceptron(), numbers(4, 4), kf.Categorical(), group=dist.group.WORLD)
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def warned(rank):
    """What an estimate warns of without a group, and with a sampler that repeats examples."""
    data = torch.utils.data.TensorDataset(numbers(7, 4))
    sampler = torch.utils.data.DistributedSampler(data, shuffle=False)
    padded = torch.utils.data.DataLoader(data, 2, sampler=sampler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kf.estimate(perceptron(), numbers(4, 4), kf.Categorical())
        kf.estimate(perceptron(), padded, kf.Categorical(), group=dist.group.WORLD)
    return [str(each.message) for each in caught]


def different(rank, what):
    """Ranks that disagree, or of which one fails: the kind of error and its text."""
    torch.manual_seed(rank if what == "weights" else 0)
    layer, x, y = torch.nn.Linear(3, 2), numbers(12, 3).float(), torch.arange(12) % 2
    if rank == 1 and what in ("model", "names"):
        layer = torch.nn.Linear(3, 4) if what == "model" else torch.nn.Sequential(layer)
    if what == "buffers":
        layer = torch.nn.Sequential(layer, torch.nn.BatchNorm1d(2)).eval()
        layer[1].running_mean.fill_(rank)
    labels = "observed" if what == "labels" and rank == 1 else "exact"
    fit = "kfoc" if what == "fit" and rank == 1 else "kfac"
    if what == "finish":
        fit = kf.KL(damping=0.0)
    data = list(zip(x.split(2), y.split(2), strict=True))
    if what == "data" and rank == 1:
        data[0] = (x[:2, :1], y[:2])
    shard = kf.shard(data) if what != "data" else data
    if what == "order":
        every = torch.utils.data.TensorDataset(x, y)
        generator = torch.Generator().manual_seed(rank)
        shard = kf.shard(torch.utils.data.DataLoader(every, 2, shuffle=True, generator=generator))
    try:
        kf.estimate(layer, shard, kf.Categorical(), fit=fit, labels=labels, group=dist.group.WORLD)
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def other_owners(rank, fit):
    """The blocks of an estimate, and what they are where every block has the last rank as its owner."""
    model, x = perceptron(), numbers(10, 4)
    data, group = of_all(rank, list(x.split(3)))
    found = []
    for given in (None, lambda costs, ranks: [ranks - 1] * len(costs)):
        with pytest.MonkeyPatch.context() as patch:
            if given is not None:
                patch.setattr("kronfisher.estimation.meeting.owners", given)
            fisher = kf.estimate(model, data, kf.Categorical(), fit=fit, labels="exact", **group)
        found.append({name: operator.to_dense() for name, operator in fisher.blocks.items()})
    return found


def summed(rank, owners):
    """Whether sums of triangles and of other tensors, in several buckets, are those of torch."""
    ranks, right = ranks_of(dist.group.WORLD), []
    for owner in owners:
        own = [numbers(*shape, seed=10 * k + rank) for k, shape in enumerate([(5, 5), (2, 4, 4), (7,), (6, 6), (1, 1)])]
        own += [one.float() for one in own[:3]]
        plain = [one.clone() for one in own]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kronfisher.distributed.sums._BUCKET", 300)
            sums = [Sum(one, owner, one.dim() > 1) for one in own]
            ranks.sum_(sums)
        for one, true in zip(own, plain, strict=True):
            dist.all_reduce(true) if owner < 0 else dist.reduce(true, owner)
            if owner in (-1, rank):
                upper = (one.triu(), true.triu()) if one.dim() > 1 else (one, true)
                right.append(torch.allclose(*upper, rtol=1e-12 if one.dtype == torch.float64 else 1e-5, atol=0))
    return right
