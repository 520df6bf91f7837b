"""Ranks that train on a shard make equally many steps, or are told before they would wait for each other."""

import re
from types import SimpleNamespace

import pytest
import torch

import kronfisher as kf
from kronfisher.distributed import Shard, batches_trained_on, train_on_what_is_read
from tests.distributed import epochs
from tests.distributed.cases import same_bits
from tests.helpers.close import close

pytestmark = pytest.mark.usual_ranks(3)


@pytest.mark.parametrize(
    ("kind", "how", "rule"),
    [
        ("list", "ddp", "default"),
        ("loader", "rows", "default"),
        ("stream", "ddp", "papers"),
        ("stream", "ddp", "gram"),
        ("loader", "ddp", "preconditioner"),
        ("list", "ddp", "attached"),
    ],
)
def test_the_shortest_ends_an_epoch_for_all(ranks, kind, how, rule):
    """Seen: a rank with one batch more waited for the others until the group's timeout. Others read all batches."""
    number = 4 * ranks.size - 1
    case = (ranks.size, number, kind, how, rule)
    answers, (truth, steps, _) = ranks.call(epochs.trained, *case, limit=60), epochs.trained(None, *case)
    assert same_bits([found for found, _, _ in answers]) and steps == 6
    assert [(made, read) for _, made, read in answers] == [(6, 3 + (r < ranks.size - 1)) for r in range(ranks.size)]
    for name, weight in answers[0][0].items():
        close(weight, truth[name], 1e-9, name)


@pytest.mark.parametrize("kind", ["list", "loader", "stream"])
def test_fewer_batches_than_ranks_are_refused_where_a_rank_has_one(ranks, kind):
    answers = ranks.call(epochs.few, ranks.size, kind, limit=60)
    for rank, (text, equal, _) in enumerate(answers):
        assert re.search("has given this rank a batch, and others none of the same round", text) or (
            rank == ranks.size - 1 and not text
        )
        assert "fewer batches than there are ranks" in equal
    assert same_bits([found for *_, found in answers])


def test_loaders_of_other_lengths_are_told_in_the_first_step(ranks):
    for steps, text in ranks.call(epochs.other_numbers, ranks.size, limit=60):
        assert steps == 0 and re.match(r"rank 0 has \d+ batches, rank 1 \d+ batches", text), text


def test_join_ends_an_epoch_of_loaders_of_their_own(ranks):
    answers = ranks.call(epochs.joined, ranks.size, limit=60)
    assert same_bits([found for found, _ in answers]) and {steps for _, steps in answers} == {9}


GROUP = SimpleNamespace(members=[0, 1], size=2, gather=lambda order, call: [order, order])


def shard(rank, number, **options):
    return Shard(list(range(number)), rank, 2, members=[0, 1], **options)


def test_a_shard_knows_the_training_that_reads_it():
    """Only the one whose batch was given last; in a pass that is over, or of other ranks, nothing is meant."""
    train, validation, read = shard(0, 5), shard(0, 5), []
    for batch in train:
        assert list(validation) == [0, 2, 4]
        train_on_what_is_read(GROUP)
        assert batches_trained_on() == "5 batches"
        read.append(batch)
    assert read == [0, 2] and batches_trained_on() == ""
    train_on_what_is_read(GROUP)
    assert list(train) == [0, 2, 4]
    for _ in train:
        train_on_what_is_read(SimpleNamespace(members=[0, 2], size=2))
        assert batches_trained_on() == ""
    kept = iter(validation)
    assert [next(kept), *(train_on_what_is_read(GROUP) or batch for batch in train), *kept] == [0, 0, 2, 2, 4]


def test_a_shard_that_was_read_before_its_training_is_refused():
    ahead = iter(shard(0, 5))
    assert [next(ahead), next(ahead), next(ahead)] == [0, 2, 4]
    with pytest.raises(kf.DataError, match=r"kf\.shard\(loader\) of 5 batches has given this rank a batch"):
        train_on_what_is_read(GROUP)
    ahead = iter(shard(0, 5, equal=True))
    assert [next(ahead), next(ahead)] == [0, 2]
    train_on_what_is_read(GROUP)
    assert list(ahead) == []


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("kind", ["list", "loader", "stream", "generator"])
def test_a_loader_without_a_batch_is_told_where_it_is_read(kind, equal):
    """Seen: its rank made no step, said nothing, and the others waited for it until the group's timeout."""
    empty = torch.utils.data.TensorDataset(torch.zeros(0, 4))
    data = {
        "list": [],
        "loader": torch.utils.data.DataLoader(empty),
        "stream": torch.utils.data.DataLoader(epochs.Stream([]), batch_size=None),
        "generator": iter(()),
    }[kind]
    with pytest.raises(kf.DataError, match=r"rank 1 of 2 was given a loader without a batch"):
        list(Shard(data, 1, 2, equal, members=[0, 1]))
    assert list(Shard([0], 1, 2, members=[0, 1])) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_with_workers_leave_out_the_same(workers):
    whole = torch.utils.data.TensorDataset(torch.arange(7))
    read = []
    for (batch,) in Shard(torch.utils.data.DataLoader(whole, num_workers=workers), 0, 2, members=[0, 1]):
        train_on_what_is_read(GROUP)
        read.append(int(batch))
    assert read == [0, 2, 4]
