"""Ranks that read a part of the data each get the matrix that one process gets of all of it."""

import re
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

import kronfisher as kf
from kronfisher.distributed.parcel import Parcel
from kronfisher.fits import FITS, resolve
from kronfisher.likelihoods import REGISTRY
from kronfisher.tables import size
from tests.distributed import cases
from tests.helpers.close import close
from tests.helpers.ranks import World, run

pytestmark = pytest.mark.usual_ranks(3)
BATCHES = [2, 1, 1]  # three ranks get one each, two ranks other numbers of them


def agree(answers, truth):
    assert cases.same_bits([blocks for blocks, _ in answers])
    (blocks, facts), (true_blocks, (count, score, *others)) = answers[0], truth
    assert all(other == facts for _, other in answers)
    assert facts == (count, score if score is None else pytest.approx(score, rel=1e-12), *others)
    assert blocks.keys() == true_blocks.keys()
    for name, matrix in blocks.items():
        close(matrix, true_blocks[name], 1e-10, name, vanishing=True)


@pytest.mark.parametrize("fit", [name for name in FITS if not resolve(name).by_batch])
def test_every_fit_is_that_of_one_process(ranks, fit):
    fit = kf.KL(iterations=3) if fit == "kl" else fit  # which else reads the data forty times
    case = ("conv2d", "categorical-sequence", fit, "exact" if ranks.size == 2 else "observed", BATCHES)
    agree(ranks.call(cases.estimate, *case), cases.estimate(None, *case))


@pytest.mark.parametrize(("fit", "likelihood"), [("kfoc-exact", "gaussian-variances"), ("auto", "bernoulli-images")])
def test_searches_that_depend_on_the_order_of_samples_see_that_of_the_batches(ranks, fit, likelihood):
    """Put together in the order of ranks, they end elsewhere, with each of these numbers of them."""
    case = ("linear", likelihood, fit, "observed", [1] * 5)
    agree(ranks.call(cases.estimate, *case), cases.estimate(None, *case))


@pytest.mark.parametrize("fit", [name for name in FITS if resolve(name).by_batch])
def test_means_of_batches_that_depend_on_their_order_are_alike_on_all_ranks(ranks, fit):
    case = ("linear", "categorical", fit, "exact", [2, 1, 2])
    answers, (truth, facts) = ranks.call(cases.estimate, *case), cases.estimate(None, *case)
    assert cases.same_bits([blocks for blocks, _ in answers]) and answers[0][1][0] == facts[0]
    for name, matrix in answers[0][0].items():
        assert (matrix - truth[name]).norm() < 0.1 * truth[name].norm()


@pytest.mark.parametrize("likelihood", REGISTRY)
def test_every_likelihood_is_that_of_one_process(ranks, likelihood):
    case = ("linear", likelihood, "kfac", "observed" if ranks.size == 2 else "exact", [2, 1, 2])
    agree(ranks.call(cases.estimate, *case), cases.estimate(None, *case))


def test_a_rank_without_data_adds_nothing(ranks):
    case = ("linear", "categorical", "ekfac", "exact", [5])
    agree(ranks.call(cases.estimate, *case), cases.estimate(None, *case))


def test_data_without_a_batch_are_told_on_all_ranks(ranks):
    """Seen: that all positions are masked. On one rank alone there may be none, but for a loader that is dealt out."""
    for rank, (nowhere, dealt, some) in enumerate(ranks.call(cases.empty)):
        assert nowhere.keys() == {"estimate", "error", "spectrum", "owned error", "compare", "calibrate", "score"}
        for name, (kind, text) in nowhere.items():
            says = {"calibrate": "validation data hold no batch", "score": "training data hold no batch"}
            assert kind == "DataError" and says.get(name, f"no batch on any of the {ranks.size} ranks") in text, name
        kind, text = dealt
        assert "rank 1 of " in text and "was given a loader without a batch" in text
        assert kind == ("DataError" if rank == 1 else "RankError")
        assert some == ("", "") if not rank else "batches than there are ranks" in some[1]


def test_coverage_lists_what_the_batches_of_all_ranks_show(ranks):
    answers = ranks.call(cases.covered)
    kfac = "KFAC(mode='expand')"
    for found, errors in answers:
        assert found == answers[0][0]
        treated = {name: {row.parameter: row.treatment for row in own.rows} for name, own in found.items()}
        assert set(treated["branches"].values()) == {kfac, "unused"}
        for name, treatment in treated["branches"].items():
            assert (treatment == "unused") == name.startswith("unused"), name
        assert treated["late"] == treated["some"] == {
            "first.weight": "fallback: Diagonal()", "first.bias": kfac, "last.weight": kfac, "last.bias": kfac,
        }  # fmt: skip
        row = found["late"].rows[0]
        assert row.operators == ("linear", "mul") and "used in 2 different ways" in row.reason
        assert found["rows"] == found["ddp"] == found["plain"] == kf.coverage(cases.perceptron(), cases.numbers(2, 4))
        says = {"none": "no batch on any rank", "fit": "fit is KFAC.* on rank 0 and EKFAC.* on rank 1"}
        says |= {"batch": "mat1 and mat2", "model": r"parameter 0\.weight: rank 0 has \[4, 4\].*, rank 1 \[5, 4\]"}
        for name, text in says.items():
            assert re.search(text, errors[name][1]), (name, errors[name])


def test_ranks_that_make_other_calls_are_told_which(ranks):
    """Seen: a TypeError, an AttributeError, or the group's timeout; a batch that fails while others end a part, too."""
    for rank, errors in enumerate(ranks.call(cases.other_calls)):
        assert re.search("rank 0 puts together what it has read, and rank 1 scores training data", errors["other"][1])
        for name in ("estimate", "score", "calibrate"):
            kind, text = errors[name]
            if rank == 1:
                assert kind != "RankError" and "mat1 and mat2" in text, (name, kind, text)
            else:
                assert kind == "RankError" and "every rank has to make the same calls" in text, (name, kind, text)


def test_layers_that_some_ranks_do_not_use(ranks):
    agree(ranks.call(cases.branches, "kfac"), cases.branches(None, "kfac"))
    agree(
        ranks.call(cases.branches, {"right*": "ekfac", "*": "full"}),
        cases.branches(None, {"right*": "ekfac", "*": "full"}),
    )


def test_a_batch_that_needs_another_treatment_makes_all_ranks_begin_again(ranks):
    agree(ranks.call(cases.late, "kfac"), cases.late(None, "kfac"))


def test_wrapped_in_ddp(ranks):
    agree(ranks.call(cases.wrapped), cases.wrapped(None))


@pytest.mark.parametrize(
    ("fit", "how"),
    [("kfac", "rows"), ("ekfac", "both"), ("full", "replicas"), ("kfac", "last layer"), ("kfac", "unsharded")],
)
def test_a_model_that_fully_shard_spread_over_ranks(ranks, fit, how):
    answers, truth = ranks.call(cases.sharded, fit, how), cases.sharded(None, fit, how)
    agree([answer[:2] for answer in answers], truth[:2])
    assert all(answer[2] == pytest.approx(truth[2], rel=1e-9) and answer[3] for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_a_model_in_two_replicas_of_two_parts(ranks):
    answers, truth = ranks.call(cases.sharded, "ekfac", "grid"), cases.sharded(None, "ekfac", "grid")
    agree([answer[:2] for answer in answers], truth[:2])


@pytest.mark.parametrize(
    ("how", "fit", "labels"),
    [
        ("mask", "kfac", "exact"),
        ("mask", "ekfac", "observed"),
        ("weights", "tkfac", "exact"),
        ("weights", "kfac", "observed"),
        ("ignored", "ekfac", "observed"),
        ("ignored", "kfoc", "observed"),
    ],
)
def test_ranks_that_count_other_numbers_of_positions(ranks, how, fit, labels):
    """An example without any, on one rank, among them."""
    answers, truth = ranks.call(cases.masked, how, fit, labels), cases.masked(None, how, fit, labels)
    agree(answers, truth)
    assert truth[1][0] == 6 and min(truth[1][-1]) < 35


def test_groups_of_some_of_the_ranks_and_meshes(ranks):
    """Owners are numbered in their group, and messages go to other numbers."""
    truths = [cases.grouped(fit) for fit, _ in cases.GROUPS]
    for rank, (found, errors) in enumerate(ranks.call(cases.groups)):
        inside = rank in (0, ranks.size - 1)
        assert errors.keys() == {"both", "no group"} | (set() if inside else {"outside"})
        assert "is a mesh of 2 dimensions; name the one" in errors["both"][1]
        assert errors["no group"][0] == "TypeError" and errors.get("outside", ("ValueError",))[0] == "ValueError"
        sizes = {"mesh": ranks.size, "dimension": ranks.size // (2 - ranks.size % 2)} | ({"some": 2} if inside else {})
        assert found.keys() == sizes.keys()
        for name, matrices in found.items():
            for (blocks, number), truth in zip(matrices, truths, strict=True):
                assert number == sizes[name] and blocks.keys() == truth.keys()
                for block, matrix in blocks.items():
                    close(matrix, truth[block], 1e-10, f"{name} {block}")


def test_what_a_model_is_wrapped_in_is_refused_by_name(ranks):
    for errors in ranks.call(cases.refused):
        says = {"flat": "wrapped in FullyShardedDataParallel, whose parameters are flat.*or fully_shard"}
        for name, found in errors.items():
            for kind, text in found:
                assert kind == "UnsupportedError" and re.search(says.get(name, f"a {name}, of which each"), text), text


def test_errors_and_spectra_are_those_over_all_data(ranks):
    answers, truth = ranks.call(cases.measured), cases.measured(None)
    assert all(answer == answers[0] for answer in answers)
    for own, true in zip(answers[0], truth, strict=True):
        assert own == {name: pytest.approx(value, rel=1e-10, abs=1e-12) for name, value in true.items()}


@pytest.mark.parametrize(("fit", "tied"), [("kfac", False), ("ekfac", False), ("full", False), ("kfac", True)])
def test_blocks_that_stay_with_their_owners_are_the_whole_together(ranks, fit, tied):
    """Every product costs one broadcast a block; all ranks together hold each block once."""
    answers = ranks.call(cases.owned, fit, tied)
    assert cases.same_bits([own for _, own, _, _ in answers])
    whole, own, (bytes_of_all, _, blocks, _), calls = answers[0]
    assert whole.keys() == own.keys() and len(own) > 10
    for name, value in own.items():
        close(value, whole[name], 1e-5 if name == "narrow" else 1e-12, name)
    assert calls == ["broadcast"] * blocks
    assert sum(held for _, _, (_, held, _, _), _ in answers) == bytes_of_all
    assert all(reported == held < bytes_of_all for _, _, (_, held, _, reported), _ in answers)


@pytest.mark.parametrize(("fit", "labels"), [("ekfac", "exact"), ("block-tridiagonal", "observed")])
def test_errors_and_files_of_blocks_that_stay_with_their_owners(ranks, fit, labels, tmp_path):
    """Blocks that are compared as dense matrices, and a larger one, are measured where they are."""
    answers = ranks.call(cases.owned_and_measured, fit, labels, str(tmp_path))
    for found, same, failure in answers:
        assert found == answers[0][0] and same
        assert failure == ("RankError" if found is not answers[0][0] else failure) and failure
        whole, doubled, own, own_doubled = found
        assert own == pytest.approx(whole, rel=1e-9, abs=1e-12)
        assert own_doubled == pytest.approx(doubled, rel=1e-9, abs=1e-12)
        assert min(whole.values()) > 1e-6


def test_what_needs_blocks_everywhere_is_refused_with_the_owner(ranks):
    for errors, spectrum in ranks.call(cases.owned_elsewhere):
        kind, text = errors["tensors"]
        assert kind == "UnsupportedError" and re.match(r"0\.weight: rank \d alone holds this block", text)
        kind, text = errors["singular"]
        assert kind in ("SingularError", "RankError") and "SingularError" in kind + text
        assert 0 < spectrum[0] <= 1


@pytest.mark.usual_ranks(2)
@pytest.mark.parametrize(
    ("fit", "likelihood"),
    [("kfac", "categorical"), ("ekfac", "gaussian"), pytest.param("full", "categorical", marks=pytest.mark.slow)],
)
def test_posteriors_whose_blocks_stay_with_their_owners(ranks, fit, likelihood):
    answers = ranks.call(cases.owned_posterior, fit, likelihood)
    assert cases.same_bits([own for _, own in answers])
    whole, own = answers[0]
    assert whole.keys() == own.keys() and len(own) > 20
    for name, value in own.items():
        close(
            value.double(),
            whole[name].double(),
            1e-6 if name in ("tuned", "tuned noise") else 1e-10,
            name,
            vanishing=True,
        )


def test_what_posteriors_of_owned_blocks_refuse(ranks):
    says = {
        "batch": ("RankError", "the batch to predict: rank 1 has another than rank 0"),
        "prior": ("RankError", "the prior: rank 1 has another than rank 0"),
        "no prior": ("(SingularError|RankError)", "must be positive everywhere"),
    }
    for errors, text in ranks.call(cases.owned_posterior_misused):
        assert errors.keys() == says.keys() and "held by several ranks" in text
        for name, (kind, message) in says.items():
            assert re.fullmatch(kind, errors[name][0]) and re.search(message, errors[name][1]), (name, errors[name])


@pytest.mark.parametrize("fit", ["ekfac", "gram"])
def test_influences_of_parts_of_the_data(ranks, fit):
    """Each rank scores its own part with the matrix of all data; batches of two were dealt out in turn."""
    (scores, own), answers = cases.influences(None, fit), ranks.call(cases.influences, fit)
    for rank, (part, own_part) in enumerate(answers):
        mine = torch.arange(12).view(6, 2)[rank :: ranks.size].flatten()
        close(part, scores[:, mine], 1e-10)
        close(own_part, own[mine], 1e-10)


def test_fits_are_compared_over_all_data(ranks):
    answers, truth = ranks.call(cases.compared), cases.compared(None)
    for answer in answers:
        assert answer == answers[0]
        for row, true in zip(answer, truth, strict=True):
            assert row[:2] == true[:2] and row[4] == true[4]
            assert row[2:4] == pytest.approx(true[2:4], rel=1e-9, abs=1e-12)


@pytest.mark.usual_ranks(2)
@pytest.mark.parametrize("fit", ["ekfac", pytest.param("full", marks=pytest.mark.slow)])
def test_influences_by_blocks_that_stay_with_their_owners(ranks, fit, tmp_path):
    """Queries are solved together; each rank scores its own part, and what needs more all read the same."""
    answers = ranks.call(cases.owned_influences, fit, str(tmp_path))
    for whole, own, loaded in answers:
        assert whole.keys() == own.keys() and len(own) == 10
        for name, value in own.items():
            close(value, whole[name], 1e-10, name)
        close(loaded, torch.cat([each["filed"] for _, each, _ in answers], dim=1), 1e-12)


def test_influences_of_owned_blocks_refuse_what_ranks_do_not_share(ranks):
    says = {
        "queries": ("RankError", "the queries: rank 1 has another than rank 0"),
        "fewer queries": ("RankError", "the queries: rank 1 has another than rank 0"),
        "self": ("RankError", r"the training data \(of .*self-scores\): rank 1 has another than rank 0"),
        "fewer": ("RankError", "the training data .* rank 1 has another than rank 0"),
        "refined": ("RankError", "the training data .* rank 1 has another than rank 0"),
        "index": ("UnsupportedError", r"rank \d alone holds this block .*an index would take it on every rank"),
    }
    for errors in ranks.call(cases.owned_influences_misused):
        assert errors.keys() == says.keys()
        for name, (kind, message) in says.items():
            assert errors[name][0] == kind and re.search(message, errors[name][1]), (name, errors[name])


@pytest.mark.usual_ranks(2)
@pytest.mark.parametrize(
    ("empty", "share"),
    [pytest.param(False, "all", marks=pytest.mark.slow), (True, "all"), (False, "owned"), (True, "owned")],
)
def test_evidence_and_calibration_over_all_data(ranks, empty, share):
    answers, truth = ranks.call(cases.posterior, empty, share), cases.posterior(None, empty)
    for answer in answers:
        assert answer == answers[0]
        assert all(own == pytest.approx(true, rel=1e-10) for own, true in zip(answer, truth, strict=True))


@pytest.mark.usual_ranks(2)
def test_owned_blocks_are_calibrated_by_one_exchange_a_batch(ranks):
    """What ranks agree on, the batch, errors, a sum. Seen: a broadcast for each block and each candidate of a prior."""
    answers = ranks.call(cases.exchanged, "probit")
    assert all(values == answers[0][1] for _, values in answers)
    for calls, _ in answers:
        batches = 2 * 2 * ranks.size  # of all ranks, in two passes
        assert sum(name == "all_reduce" for name, _ in calls) == batches
        assert len(calls) <= 4 * batches + 10


@pytest.mark.parametrize(("share", "reads"), [("all", False), ("owned", True)])
def test_validation_data_that_do_not_fit_on_one_rank(ranks, share, reads):
    for rank, (kind, text) in enumerate(ranks.call(cases.uncalibrated, share, reads)):
        assert (kind == "DataError") if rank == 1 else (kind == "RankError" and "rank 1: DataError" in text)


@pytest.mark.usual_ranks(2)
def test_labels_are_drawn_apart(ranks):
    """In distribution the same: over many draws the exact matrix."""
    answers = ranks.call(cases.sampled, 400)
    assert cases.same_bits([blocks for blocks, _ in answers])
    exact = cases.sampled(None, None)[0]
    for name, matrix in answers[0][0].items():
        assert 1e-4 * exact[name].norm() < (matrix - exact[name]).norm() < 0.2 * exact[name].norm()


def test_bytes_and_collectives(ranks):
    """One agreement, a sum at each of two owners, whether there is another pass; then what each owner has finished."""
    answers = ranks.call(cases.counted, "kfac")
    sums = 8 * sum((size + 1) // 2 * (size + 1) for size in (5, 4, 5, 3))  # upper triangles
    for fisher, _ in answers:
        operators = [-(-tensor.numel() * 8 // 16) * 16 for own in fisher.blocks.values() for tensor in (own.A, own.B)]
        assert fisher.info.collectives == 1 + 2 + 1 + 1 + 2
        assert fisher.info.sent == ranks.size * sums + sum(operators)


@pytest.mark.parametrize("fit", ["kfac", "kfoc", "ekfac"])
def test_a_report_says_what_was_sent(ranks, fit):
    answers = ranks.call(cases.counted, fit)
    info = answers[0][0].info
    messages = sum(name == "send" for _, calls in answers for name, _ in calls)
    assert info.sent == sum(size for _, calls in answers for _, size in calls) > 0
    planned = sum(size for _, calls in answers for name, size in calls if name in ("reduce", "send"))
    assert info.sent > info.planned == planned > 0
    assert info.collectives == messages + sum(name not in ("send", "recv") for name, _ in answers[0][1])
    assert (messages > 0) == (fit == "kfoc")
    for fisher, _ in answers:
        assert (fisher.info.ranks, fisher.info.sent, fisher.info.collectives) == (
            ranks.size,
            info.sent,
            info.collectives,
        )
    says = f"processes: {ranks.size}, which sent {size(info.sent)} in {info.collectives} collectives, "
    says += f"{size(info.planned)} of it sums, as planned"
    assert says in " ".join(str(answers[0][0].report()).split())


@pytest.mark.usual_ranks(2)
def test_what_every_fit_sends_is_planned_and_takes_few_meetings(ranks):
    """At most three meetings a pass besides sums in buckets, messages, and what owners hand out."""
    answers = ranks.call(cases.passes_counted, list(FITS))
    for fit in FITS:
        passes, calls, info = answers[0][fit]
        every = [call for answer in answers for call in answer[fit][1]]
        together = [name for name, _ in calls if name not in ("send", "recv")]
        for answer in answers:
            other, others_calls, others_info = answer[fit]
            assert (other, others_info) == (passes, info)
            assert [name for name, _ in others_calls if name not in ("send", "recv")] == together
        sums = sum(size for name, size in every if name in ("reduce", "send"))
        messages = sum(name == "send" for name, _ in every)
        assert info == (sum(size for _, size in every), sums, messages + len(together)), fit
        meetings = [name for name in together if name not in ("reduce", "broadcast")]
        assert set(meetings) == {"all_gather_object"} and len(meetings) <= 3 * passes, (fit, passes, len(meetings))


def test_shards_hold_every_batch_once(ranks):
    for parts in zip(*ranks.call(cases.shards), strict=True):
        assert sorted(place for part in parts for place in part) == list(range(7))
        assert [len(part) for part in parts] == [len(range(rank, 7, ranks.size)) for rank in range(ranks.size)]


def test_ranks_that_train_on_batches_in_other_orders_are_told_at_the_end_of_a_pass(ranks):
    """Seen: a seed of each rank's own before a loader that shuffles, and every epoch repeated some of the data."""
    for rank, (parts, kind, text) in enumerate(ranks.call(cases.shuffled)):
        assert "generator=torch.Generator().manual_seed(0)" in text
        assert parts == [7 // ranks.size] * 3 and kind == "RankError", rank
        assert re.match(r"rank 0 read \w+, rank 1 \w+; the batches were dealt out in different orders", text)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("order", "dealt out in different orders"),
        ("weights", r"parameter weight: rank 0 has .* rank 1"),
        ("model", r"parameter weight: rank 0 has \[2, 3\] .*, rank 1 \[4, 3\] "),
        ("names", r"parameter weight: rank 0 has \[2, 3\] .*, rank 1 none"),
        (
            "buffers",
            r"buffer 1\.running_mean: rank 0 has .*Give all of them those of rank 0 before: for buffer in model",
        ),
        ("labels", "labels: rank 0 has exact, rank 1 observed"),
        ("fit", "weight: fit is KFAC"),
        ("data", "rank 1: RuntimeError"),
        ("finish", r"rank \d: SingularError: weight"),
    ],
)
def test_ranks_that_differ_or_fail_raise_everywhere(ranks, what, message):
    errors = ranks.call(cases.different, what)
    assert any(kind == "RankError" for kind, _ in errors)
    for rank, (kind, text) in enumerate(errors):
        if kind != "RankError":  # the rank itself keeps its own error
            assert (what, kind) in {("data", "RuntimeError"), ("finish", "SingularError")}, (rank, kind, text)
        else:
            assert re.search(message, text), text


def test_what_is_warned_of(ranks):
    for first, second in ranks.call(cases.warned):
        assert re.match(rf"{ranks.size} ranks are initialised, and this estimate sees the data of one", first)
        assert re.search(rf"repeats {-7 % ranks.size} examples, which count twice", second)


def test_a_rank_that_ends_ends_the_others(tmp_path):
    own = World(3, tmp_path)
    calls = [each.submit(run, cases.ended, rank, ()) for rank, each in enumerate(own.executors)]
    for call in calls[:2]:
        kind, text = call.result(timeout=90)
        assert kind == "RankError" and "could not meet the other ranks: rank 2 has ended" in text
    with pytest.raises(BrokenProcessPool):
        calls[2].result(timeout=90)
    own.end()


def test_a_group_of_one_rank_is_one_process(ranks):
    truth = cases.alone(None)
    for blocks, weights in ranks.call(cases.alone):
        for one, true in ((blocks, truth[0]), (weights, truth[1])):
            assert one.keys() == true.keys() and all(torch.equal(one[name], true[name]) for name in true)


def test_a_parcel_holds_one_number_of_any_stride():
    parcel = Parcel.of({"one": torch.tensor(2.0).expand(1, 1)})
    assert torch.equal(Parcel.open(parcel.frame, parcel.numbers)["one"], torch.tensor([[2.0]]))


def test_one_process():
    batches = [torch.randn(2, 3)]
    assert kf.shard(batches) is batches
    with pytest.raises(RuntimeError, match="no process group is initialised"):
        kf.estimate(torch.nn.Linear(3, 2), batches, kf.Categorical(), group=3)
