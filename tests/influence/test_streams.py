"""Low rank, refinement by conjugate gradients, slices of queries, and files that survive being killed."""

import json
import os
import signal
import subprocess
import sys
import weakref
from itertools import cycle

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import kronfisher as kf
from kronfisher.influence.contractions import inner_products
from kronfisher.influence.vectors import Vectors
from kronfisher.layers.activations import Dense
from kronfisher.layers.samples import Samples
from tests.helpers.close import close
from tests.helpers.layout import ROOT
from tests.helpers.networks import Tied, images, perceptron
from tests.helpers.truth import dense_fisher, gradients

SHUFFLED = {
    "shuffle": lambda data: DataLoader(data, 2, shuffle=True),
    "weighted": lambda data: DataLoader(data, 2, sampler=WeightedRandomSampler([1.0] * len(data), len(data))),
    "subset": lambda data: DataLoader(data, 2, sampler=SubsetRandomSampler(range(len(data)))),
    "distributed": lambda data: DataLoader(data, 2, sampler=DistributedSampler(data, 1, 0, shuffle=True)),
    "batches": lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 2, False)),
    "shard": lambda data: kf.distributed.Shard(DataLoader(data, 2, shuffle=True), 0, 2),
}


def problem(model=None, shape=(4,), n=24, q=5, **options):
    model = model or perceptron(4, 6, 5, 3, seed=1)
    x = torch.randn(n + q, *shape).double()
    y = torch.randint(3, model(x).shape[:-1])
    train = [(x[k : k + 8], y[k : k + 8]) for k in range(0, n, 8)]
    fisher = kf.estimate(model, train, kf.Categorical(), fit="ekfac", labels="exact")
    return kf.Influence(model, fisher, kf.Categorical(), **options), train, (x[n:], y[n:])


@pytest.mark.parametrize("build", [lambda: (None, (4,)), lambda: (images(), (2, 4, 4)), lambda: (Tied(), (2, 4))])
def test_the_bound_of_truncated_queries_holds_and_full_rank_changes_nothing(build):
    model, shape = build()
    influence, train, queries = problem(model if model is None else model.double(), shape)
    whole = influence.scores(train, queries).values
    for rank in (1, 2):
        truncated = influence.scores(train, queries, rank=rank)
        error = (truncated.values - whole).abs()
        assert bool((error <= truncated.bounds * (1 + 1e-9) + 1e-14).all()) and error.max() > 1e-8
        assert truncated.bounds.min() > 0
    close(influence.scores(train, queries, rank=40).values, whole)


def test_queries_of_low_rank_never_form_the_gradient_of_an_example(monkeypatch):
    influence, train, queries = problem(perceptron(4, 40, 3, seed=1), q=40)
    (asked,) = influence._slices(queries, "loss", None, False, influence.damped)
    expected = influence.scores(train, queries, rank=1)
    monkeypatch.setattr(influence, "_slices", lambda *options: iter([asked]))
    monkeypatch.setattr(Samples, "per_sample", lambda self, room=0: pytest.fail("a gradient was formed"))
    close(influence.scores(train, queries, rank=1).values, expected.values)
    with pytest.raises(pytest.fail.Exception, match="a gradient was formed"):
        influence.scores(train, queries)


def test_of_gradients_that_are_written_out_one_piece_is_in_memory_at_a_time(monkeypatch):
    a, g, queries = (torch.randn(*shape).double() for shape in ((1, 6, 3, 4), (1, 6, 3, 5), (7, 1, 5, 4)))
    pieces, own = [], Samples.per_sample

    def few(self, room):
        for piece in own(self, 1):
            assert not any(earlier() is not None for earlier in pieces)
            pieces.append(weakref.ref(piece))
            held = [piece]
            del piece
            yield held.pop()

    monkeypatch.setattr(Samples, "per_sample", few)
    found = inner_products(Samples(Dense(a), g), queries)
    close(found, torch.einsum("qhoi,hkto,hkti->kq", queries, g, a))
    assert len(pieces) == 6


def test_blocks_without_a_gradient_take_no_memory():
    influence, *_ = problem()
    nothing = Vectors.of_answers(influence.fisher, {}, 100, torch.float64)
    assert [part.shape for part in nothing.parts] == [(100, own.dim) for _, own in influence.fisher.entries]
    assert sum(part.untyped_storage().nbytes() for part in nothing.parts) < 100
    assert not influence.damped.solve_(nothing).any() and not nothing.rows()["0.weight"].any()


class Counted:
    """A list of batches that counts its readings."""

    def __init__(self, batches):
        self.batches, self.readings = batches, 0

    def __iter__(self):
        self.readings += 1
        return iter(self.batches)


def test_training_data_are_read_once_and_once_more_for_each_refinement():
    influence, train, queries = problem()
    counted = Counted(train)
    influence.scores(counted, queries)
    assert counted.readings == 1
    influence, train, queries = problem(refine=3)
    counted = Counted(train)
    influence.scores(counted, queries)
    assert counted.readings == 4


def test_refined_scores_converge_to_the_exact_matrix():
    influence, train, queries = problem(damping=0.02, refine=24)
    x, y = (torch.cat([batch[k] for batch in train]) for k in (0, 1))
    exact = dense_fisher(influence.model, x, y, kf.Categorical())
    vectors = [kf.Categorical().observed(influence.model(a).detach(), b)[None] for a, b in ((x, y), queries)]
    rows, asked = gradients(influence.model, x, vectors[0])[0], gradients(influence.model, queries[0], vectors[1])[0]
    truth = asked @ torch.linalg.solve(exact + 0.02 * torch.eye(len(exact)).double(), rows.T) / len(x)
    scores = influence.scores(train, queries)
    close(scores.values, truth, 1e-6)
    assert scores.residuals.max() < 1e-6
    errors = []
    for steps in (1, 3, 9):
        influence.refine = steps
        few = influence.scores(train, queries)
        errors.append(float((few.values - truth).norm() / truth.norm()))
    influence.refine = 0
    unrefined = float((influence.scores(train, queries).values - truth).norm() / truth.norm())
    assert errors[2] < errors[1] < errors[0] < unrefined, (unrefined, errors)


def test_a_generator_of_queries_is_refused_where_a_file_needs_them_twice(tmp_path):
    influence, train, queries = problem()
    close(influence.scores(train, iter([queries])).values, influence.scores(train, queries).values)
    with pytest.raises(kf.DataError, match="queries are read twice for a file"):
        influence.scores(train, iter([queries]), path=tmp_path / "scores")
    assert not [*tmp_path.iterdir()]


def test_refinement_keeps_ignored_positions_out():
    model = Tied().double()
    influence, train, queries = problem(model, (2, 4), refine=4)
    for _, y in train:
        y[2, 1] = -100
    scores = influence.scores(train, queries).values
    masked = kf.Influence(model, influence.fisher, kf.Categorical(), refine=4, mask=lambda b: b[1] != -100)
    close(masked.scores(train, queries).values, scores)


@pytest.mark.parametrize("options", [{}, {"rank": 1}, {"per": "block"}])
@pytest.mark.parametrize("refine", [0, 2])
def test_queries_in_slices_give_what_all_at_once_give(options, refine):
    influence, train, (x, y) = problem(refine=refine)
    queries = [(x[k : k + 1], y[k : k + 1]) for k in range(len(x))]
    whole, counted = influence.scores(train, queries, **options), Counted(train)
    sliced = influence.scores(counted, queries, at_once=2, **options)
    assert counted.readings == 3 * (refine + 1)
    close(sliced.values, whole.values, 1e-12)
    if refine:
        close(sliced.residuals, whole.residuals, 1e-9)
    if "rank" in options:
        close(sliced.bounds, whole.bounds, 1e-9)


def test_data_that_change_between_readings_are_refused():
    influence, train, queries = problem(refine=1)
    with pytest.raises(kf.DataError, match="only once"):
        influence.scores(iter(train), queries)

    class Changing(Counted):
        def __iter__(self):
            self.readings += 1
            return iter(self.batches[:: 1 if self.readings == 1 else -1])

    with pytest.raises(kf.DataError, match="differs from that of the first pass"):
        influence.scores(Changing(train), queries)


def test_a_file_holds_the_scores_and_refuses_other_settings(tmp_path):
    influence, train, queries = problem()
    path = tmp_path / "scores"
    for options in ({}, {"per": "block"}, {"rank": 1}):
        kept = influence.scores(train, queries, path=tmp_path / str(len(str(options))), **options)
        plain = influence.scores(train, queries, **options)
        close(kept.values, plain.values, 1e-15)
        assert kept.names == plain.names and kept.top(2).indices.equal(plain.top(2).indices)
        if "rank" in options:
            close(kept.bounds, plain.bounds, 1e-15)
    influence.scores(train, queries, path=path)
    before = path.read_bytes(), path.with_name("scores.json").read_bytes()

    def refused(message, influence=influence, train=train, queries=queries, **options):
        with pytest.raises(kf.DataError, match=message):
            influence.scores(train, queries, path=path, **options)
        assert before == (path.read_bytes(), path.with_name("scores.json").read_bytes())

    refused(r"\(rank\)", rank=1)
    refused("measurement", measurement="margin")
    refused("damping", kf.Influence(influence.model, influence.fisher, kf.Categorical(), damping=1.0))
    refused("queries", queries=(queries[0] + 1, queries[1]))
    refused("batches are not those", train=train[::-1])
    refused("there are 2", train=train[:2])
    with torch.no_grad():
        influence.model[0].weight[0, 0] += 1
    refused("model")
    with pytest.raises(kf.DataError, match="other parameters than the model has now"):
        kf.Influence(influence.model, influence.fisher, kf.Categorical())
    path.with_name("scores.json").unlink()
    with pytest.raises(kf.DataError, match="no record"):
        influence.scores(train, queries, path=path)
    assert path.read_bytes() == before[0]


def test_a_file_depends_on_all_that_scores_depend_on(tmp_path):
    """The measurement's surroundings, forward, mask, training mode and texts in batches change numbers, too."""
    influence, train, queries = problem()
    model, fisher, path = influence.model, influence.fisher, tmp_path / "scores"

    def of_class(chosen):
        return lambda outputs, targets: outputs[:, chosen]

    def scaled(factor):
        return lambda model, batch: (factor * model(batch[0]), batch[1])

    def masked(limit):
        return lambda batch: (batch[0].sum(1) > limit)[:, None]

    def made(**options):
        return kf.Influence(model, fisher, kf.Categorical(), **options)

    first = made(forward=scaled(1), mask=masked(-9)).scores(train, queries, measurement=of_class(0), path=path)
    again = made(forward=scaled(1), mask=masked(-9)).scores(train, queries, measurement=of_class(0), path=path)
    close(first.values, again.values, 0)
    for message, options, measurement in (
        ("measurement", {"forward": scaled(1), "mask": masked(-9)}, of_class(1)),
        ("forward", {"forward": scaled(2), "mask": masked(-9)}, of_class(0)),
        ("mask", {"forward": scaled(1), "mask": masked(0)}, of_class(0)),
    ):
        with pytest.raises(kf.DataError, match=rf"other settings \({message}\)"):
            made(**options).scores(train, queries, measurement=measurement, path=path)
    model.train(not model.training)
    with pytest.raises(kf.DataError, match="training mode"):
        made(forward=scaled(1), mask=masked(-9)).scores(train, queries, measurement=of_class(0), path=path)
    model.train(not model.training)


def test_texts_in_batches_are_told_apart(tmp_path):
    influence, train, queries = problem()
    words = {"a": 0.0, "b": 1.0}

    def forward(model, batch):
        return model(batch["x"] + torch.tensor([[words[word]] for word in batch["texts"]])), batch["y"]

    def batches(texts):
        return [{"x": x, "texts": texts, "y": y} for x, y in train]

    influence = kf.Influence(influence.model, influence.fisher, kf.Categorical(), forward=forward)
    asked, path = {"x": queries[0], "texts": ["a"] * 5, "y": queries[1]}, tmp_path / "scores"
    influence.scores(batches(["a"] * 8), asked, path=path)
    with pytest.raises(kf.DataError, match="queries"):
        influence.scores(batches(["a"] * 8), asked | {"texts": ["b"] * 5}, path=path)
    with pytest.raises(kf.DataError, match="batches are not those"):
        influence.scores(batches(["b"] * 8), asked, path=path)


def test_two_runs_do_not_write_to_one_file(tmp_path):
    influence, train, queries = problem()
    path = tmp_path / "scores"

    class Overtaken:
        def __iter__(self):
            yield train[0]
            influence.scores(train, queries, path=path)  # another run, from the first batch on
            yield from train[1:]

    with pytest.raises(kf.DataError, match="another run has written to it"):
        influence.scores(Overtaken(), queries, path=path)
    assert json.loads(path.with_name("scores.json").read_text())["finished"]
    close(kf.Influence.load(path).values, influence.scores(train, queries).values, 1e-15)


PROBLEM = """
import os, signal, sys, torch
import kronfisher as kf
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Linear(4, 3).double()
x, y = torch.randn(40, 4).double(), torch.randint(3, (40,))
train = [(x[k : k + 8], y[k : k + 8]) for k in range(0, 40, 8)]
fisher = kf.estimate(model, train, kf.Categorical(), labels="exact")
influence = kf.Influence(model, fisher, kf.Categorical())
"""
KILLED = """
class Killing:
    def __iter__(self):
        yield from train[:2]
        os.kill(os.getpid(), signal.SIGKILL)

influence.scores(Killing(), (x[:5], y[:5]), path=sys.argv[1])
"""


def test_a_run_that_was_killed_goes_on_without_a_row_lost_or_counted_twice(tmp_path):
    path, record = tmp_path / "scores", tmp_path / "scores.json"
    command = [sys.executable, "-c", PROBLEM + KILLED, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert json.loads(record.read_text())["rows"] == 16
    with open(path, "ab") as file:  # rows that were written, but not counted
        file.write(b"\xff" * 100)
    (tmp_path / ".scores.json.123.tmp").write_text("{")  # a record that was killed on its way
    names = {}
    exec(PROBLEM, names)
    influence, train, queries = names["influence"], names["train"], (names["x"][:5], names["y"][:5])
    kept = influence.scores(train, queries, path=path).values
    assert json.loads(record.read_text())["rows"] == 40
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scores", "scores.json"]
    close(kept, influence.scores(train, queries).values, 1e-14)


@pytest.mark.parametrize("place", ["os.replace", "os.fsync"])
def test_a_run_that_stops_anywhere_while_it_writes_can_go_on(tmp_path, monkeypatch, place):
    influence, train, queries = problem()
    expected, times = influence.scores(train, queries).values, 0
    while True:
        path, left, own = tmp_path / f"scores{times}", times, getattr(os, place.removeprefix("os."))

        def stopping(*what, own=own):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return own(*what)

        with monkeypatch.context() as patch:
            patch.setattr(place, stopping)
            try:
                influence.scores(train, queries, path=path)
            except KeyboardInterrupt:
                stopped = True
            else:
                stopped = False
        close(influence.scores(train, queries, path=path).values, expected, 1e-14)
        if not stopped:
            break
        times += 1
    assert times > len(train)


def test_loaders_that_shuffle_or_never_end_are_refused(tmp_path):
    influence, train, queries = problem()
    shuffled = DataLoader(TensorDataset(*queries), batch_size=2, shuffle=True)
    with pytest.raises(kf.DataError, match="train comes from a loader that shuffles"):
        influence.scores(shuffled, queries)
    with pytest.raises(kf.DataError, match="queries comes from a loader that shuffles"):
        influence.scores(train, shuffled)
    with pytest.raises(kf.DataError, match="never ends"):
        influence.scores(cycle(train), queries)
    with pytest.raises(kf.DataError, match="queries never ends"):  # before they are read for the file's record
        influence.scores(train, cycle([queries]), path=tmp_path / "scores")
    with pytest.raises(kf.DataError, match="no batch"):
        influence.scores([], queries)


class Stream(IterableDataset):
    """Examples one after the other, several times over; inf: it never ends."""

    def __init__(self, data, times):
        self.data, self.times = data, times

    def __iter__(self):
        while self.times:
            self.times -= 1
            yield from zip(*self.data, strict=True)


@pytest.mark.parametrize("ask", ["scores", "file", "self-scores", "index", "refined"])
def test_a_loader_without_a_length_that_goes_on_after_the_data_of_the_fisher_is_refused(ask, tmp_path):
    influence, train, queries = problem()
    data = tuple(map(torch.cat, zip(*train, strict=True)))
    data[1][3] = -100  # of which no position counts
    influence = kf.Influence(
        influence.model, kf.estimate(influence.model, data, kf.Categorical(), labels="exact"), kf.Categorical()
    )
    refined = kf.Influence(influence.model, influence.fisher, kf.Categorical(), refine=1)

    def asked(data):
        path = tmp_path / str(len([*tmp_path.iterdir()]))
        return {
            "scores": lambda: influence.scores(data, queries).values,
            "file": lambda: influence.scores(data, queries, path=path).values,
            "self-scores": lambda: influence.self_scores(data),
            "index": lambda: influence.index(data, path).scores(queries).values,
            "refined": lambda: refined.scores(data, queries).values,
        }[ask]()

    with pytest.raises(kf.DataError, match="more than the 23 examples of the Fisher, and may never end"):
        asked(DataLoader(Stream(data, torch.inf), 7))
    if ask != "refined":  # which reads them twice, and this stream ends with the first reading
        close(asked(DataLoader(Stream(data, 1), 7)), asked([data]), 1e-9)
        return
    asked([tuple(part[:12] for part in data), tuple(part[12:] for part in data)])
    with pytest.raises(kf.DataError, match="have 46 examples, and the Fisher counts 23"):
        asked([data, data])


def test_queries_without_a_length_that_go_on_are_refused_before_anything_is_written(tmp_path):
    influence, train, queries = problem()
    with pytest.raises(
        kf.DataError, match=r"^query batch 12: the queries have given more than the 24 examples of the Fisher"
    ):
        influence.scores(train, DataLoader(Stream(queries, torch.inf), 2), path=tmp_path / "scores")
    assert not [*tmp_path.iterdir()]
    train, many = [tuple(part[:5] for part in queries)], tuple(torch.cat([part] * 6) for part in queries)
    influence.scores(train, [many], path=tmp_path / "scores")  # more, but they end
    influence.scores(train, [{"input": queries[0], "labels": queries[1]}], path=tmp_path / "keyed")


@pytest.mark.parametrize("name", SHUFFLED)
def test_every_kind_of_random_order_is_refused_wherever_data_are_read(name, tmp_path):
    influence, train, queries = problem()
    loader = SHUFFLED[name](TensorDataset(*queries))
    index = influence.index(train, tmp_path / "index")
    for ask in (
        lambda: influence.scores(loader, queries),
        lambda: influence.scores(train, loader),
        lambda: influence.self_scores(loader),
        lambda: influence.gradients(loader),
        lambda: influence.index(loader, tmp_path / "other"),
        lambda: index.scores(loader),
    ):
        with pytest.raises(kf.DataError, match=r"from a loader that shuffles \(\w+\)"):
            ask()


@pytest.mark.parametrize(
    "build",
    [
        lambda data: DataLoader(data, 2),
        lambda data: DataLoader(data, 2, sampler=DistributedSampler(data, 1, 0, shuffle=False)),
        lambda data: DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 2, False)),
    ],
)
def test_samplers_of_a_fixed_order_are_read(build):
    influence, train, queries = problem()
    close(
        influence.scores(train, build(TensorDataset(*queries))).values, influence.scores(train, queries).values, 1e-12
    )


def test_options_that_are_no_integers_are_refused_before_any_work(tmp_path):
    influence, _, queries = problem()

    def unread():
        raise AssertionError("the data were read")
        yield

    settings = influence.model, influence.fisher, kf.Categorical()
    for value in (True, 1.5, "a", 0):
        for ask in (
            lambda: influence.scores(unread(), queries, rank=value),  # noqa: B023
            lambda: influence.scores(unread(), queries, at_once=value),  # noqa: B023
            lambda: influence.index(unread(), tmp_path / "index", size=value),  # noqa: B023
            lambda: kf.Influence(*settings, refine=value or -1),  # noqa: B023
            lambda: kf.Scores(torch.ones(2, 3)).top(value),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"^\w+=.*integer"):
                ask()
        if value:
            with pytest.raises(ValueError, match=r"'logit', class\) with class=.*an integer"):
                influence.scores(unread(), queries, measurement=("logit", value))
    with pytest.raises(ValueError, match="only without path="):
        influence.scores(unread(), queries, at_once=2, path=tmp_path / "scores")
    with pytest.raises(TypeError, match=r"fisher=None.*kf\.estimate"):
        kf.Influence(influence.model, None, kf.Categorical())


def test_a_folder_that_does_not_exist_is_named_before_any_work(tmp_path):
    influence, _, queries = problem()

    def unread():
        raise AssertionError("the data were read")
        yield

    path = tmp_path / "none" / "file"
    for ask in (
        lambda: influence.scores(unread(), queries, path=path),
        lambda: influence.index(unread(), path),
        lambda: kf.attribution.lds(torch.ones(2, 6), lambda kept, seed: next(unread()), subsets=2, path=path),
    ):
        with pytest.raises(kf.DataError, match=r"there is no folder .*none\. Make it"):
            ask()


def test_a_refined_run_asks_for_the_targets_in_its_first_reading():
    influence, train, queries = problem(refine=2)
    with pytest.raises(kf.DataError, match=r"^batch 0: .*loss of an example, need targets"):
        influence.scores([(inputs,) for inputs, _ in train], queries)


@pytest.mark.parametrize("labels", [["a", "b", "c"], [0.0, 1.0, 2.0], [0, 1], [0, -1, 1], [0, [1], 2], None])
def test_groups_have_integers_as_labels(labels):
    scores = kf.Scores(torch.tensor([[1.0, 3.0, -2.0]]))
    if labels is None:
        assert scores.sum(data=torch.tensor([True, False, True])).values.tolist() == [[3.0, -1.0]]
        return
    with pytest.raises(kf.DataError, match="groups of data need a label, an integer from 0, for each of the 3"):
        scores.sum(data=labels)


def test_rows_that_are_not_finite_are_named():
    influence, train, queries = problem()
    train[1][0][3, 2] = torch.nan
    with pytest.raises(kf.NumericalError, match="batch 1"):
        influence.scores(train, queries)
    with pytest.raises(kf.NumericalError, match="query batch 0"):
        influence.scores(train[:1], (queries[0] * torch.inf, queries[1]))


@pytest.mark.parametrize("options", [{}, {"rank": 1}, {"per": "block"}])
def test_parts_of_the_data_are_scored_apart_and_put_together(tmp_path, options):
    influence, train, queries = problem()
    whole = influence.scores(train, queries, **options)
    for number, part in enumerate((train[:2], train[2:])):
        influence.scores(part, queries, path=tmp_path / str(number), **options)
    loaded = kf.Influence.load(tmp_path / "0", tmp_path / "1")
    close(loaded.values, whole.values, 1e-14)
    assert loaded.per == whole.per and loaded.names == whole.names
    if "rank" in options:
        close(loaded.bounds, whole.bounds, 1e-14)
    close(kf.Influence.load(tmp_path / "1").values, whole.values[:, 16:], 1e-14)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    influence, train, queries = problem()
    influence.scores(train[:2], queries, path=tmp_path / "a")
    influence.scores(train[2:], queries, path=tmp_path / "b", measurement="margin")
    with pytest.raises(kf.DataError, match=r"other settings than .*a \(measurement\)"):
        kf.Influence.load(tmp_path / "a", tmp_path / "b")
    with pytest.raises(kf.DataError, match="no such file"):
        kf.Influence.load(tmp_path / "a", tmp_path / "c")

    def interrupted():
        yield train[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        influence.scores(interrupted(), queries, path=tmp_path / "d")
    with pytest.raises(kf.DataError, match="interrupted"):
        kf.Influence.load(tmp_path / "d")
    refined = kf.Influence(influence.model, influence.fisher, kf.Categorical(), refine=2)
    with pytest.raises(kf.DataError, match="needs all of them"):
        refined.scores(train[:2], queries)
    influence.index(train, tmp_path / "index", size=4)
    with pytest.raises(kf.DataError, match=r"no scores but coordinates and left: an index, which influence\.index"):
        kf.Influence.load(tmp_path / "index")
    with pytest.raises(kf.DataError, match="one file at least"):
        kf.Influence.load()
