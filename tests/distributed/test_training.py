"""Ranks that train together follow one process with all their batches, and have the same weights to the last bit."""

import re
import time
import warnings
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

import kronfisher as kf
from kronfisher.optim.normalisation import KINDS
from tests.distributed import epochs, trainings
from tests.distributed.cases import numbers, same_bits
from tests.helpers.close import close
from tests.helpers.ranks import LIMIT, World, run, world

pytestmark = pytest.mark.usual_ranks(2)


def follow(answers, truth, tolerance=1e-9):
    assert same_bits(answers)
    for name, weight in answers[0].items():
        close(weight, truth[name], tolerance, name)


@pytest.mark.parametrize("fit", ["kfac", "ekfac", "block-tridiagonal"])
def test_steps(ranks, fit):
    case = (ranks.size, 20, fit)
    follow(ranks.call(trainings.steps, *case), trainings.steps(None, *case))


def test_a_model_that_is_wrapped_after_its_optimiser_was_made(ranks):
    follow(ranks.call(trainings.wrapped_later, ranks.size), trainings.wrapped_later(None, ranks.size))


@pytest.mark.parametrize("affordable", [1.0, 1e9])
def test_evened_steps(ranks, affordable):
    truth = trainings.evened(None, ranks.size, affordable)
    assert float(truth["evened"]) == 1
    follow(ranks.call(trainings.evened, ranks.size, affordable), truth)


@pytest.mark.parametrize(
    ("name", "fit"), [("exact", "kfac"), ("exact", "ekfac"), ("momentum", "kfac"), ("undone", "kfac")]
)
def test_steps_of_the_papers_rule(ranks, name, fit):
    """One quadratic model, one comparison of losses and one λ for all ranks, those of one process."""
    truth = trainings.papers(None, ranks.size, name, fit)
    follow(ranks.call(trainings.papers, ranks.size, name, fit), truth)
    steered = truth["steered"]
    assert bool(steered[-1, -1] > 1) == (name == "undone")
    assert len(steered[:, 0 if name == "momentum" else 1].unique()) > 5


@pytest.mark.parametrize("what", ["residuals", "exact", "observed"])
def test_steps_in_the_space_of_samples(ranks, what):
    """One matrix of all ranks' rows, one λ and one length: those of one process with all of them."""
    answers, (truth, losses, _) = ranks.call(trainings.gram, ranks.size, what), trainings.gram(None, ranks.size, what)
    follow([found for found, _, _ in answers], truth)
    for whole, *parts in zip(losses, *(own for _, own, _ in answers), strict=True):
        assert whole == pytest.approx(sum(parts) / ranks.size, rel=1e-9)
    assert what != "residuals" or losses[-1] < 0.1 * losses[0]


def test_steps_in_the_space_of_samples_whose_rows_are_drawn(ranks):
    """Each rank draws from its own; all draw more where that is too few, and make the same step."""
    answers = ranks.call(trainings.gram, ranks.size, "thin")
    assert same_bits([found for found, _, _ in answers])
    means = [sum(losses) for losses in zip(*(own for _, own, _ in answers), strict=True)]
    assert means[-1] < means[0] - 0.1 and means == sorted(means, reverse=True)
    assert same_bits([state["sample_space"]["last"] for *_, state in answers])


def test_training_in_the_space_of_samples_goes_on_from_its_named_state(ranks, tmp_path):
    """With a scheduler; all ranks, and one process with all batches."""
    path = str(tmp_path)
    whole, own = (ranks.call(trainings.gram_handed_on, ranks.size, path, saved) for saved in (False, True))
    assert same_bits([*whole, *own])
    follow([trainings.gram_handed_on(None, ranks.size, path, None)], whole[0])


def test_what_fails_in_the_space_of_samples_on_one_rank(ranks):
    for rank, (error, moved, _) in enumerate(answers := ranks.call(trainings.gram_fails, ranks.size, "batch")):
        kind, text = error
        assert (kind == "NumericalError") if rank == 1 else (kind == "RankError" and "rank 1: NumericalError" in text)
        assert not moved
    assert same_bits([found for *_, found in answers])
    for rank, (error, _, _) in enumerate(ranks.call(trainings.gram_fails, ranks.size, "call")):
        assert error[0] == ("DataError" if rank == 1 else "RankError") and "evaluates the loss again" in error[1]
    for error, moved, _ in ranks.call(trainings.gram_fails, ranks.size, "weights"):
        assert (
            error[0] == "RankError" and not moved and re.match(r"parameter 0\.weight: rank 0 has .*, rank 1 ", error[1])
        )


def test_a_loop_of_ones_own_by_the_papers_rule(ranks):
    options = {"step": kf.QuadraticModel(trust=kf.Constant(0.3))}
    answers = ranks.call(partial(trainings.loop, **options), ranks.size)
    follow(answers, trainings.loop(None, ranks.size, **options))


def test_the_papers_rule_with_drawn_labels_is_alike_on_all_ranks(ranks):
    assert same_bits(ranks.call(trainings.papers, ranks.size, "exact", "ekfac", "sampled"))


def test_ranks_take_the_same_way_to_products_with_the_exact_matrix(ranks):
    """A rank whose operators have no forward mode, and one that has no model at all, decide for all of them."""
    answers, (truth, *_) = ranks.call(trainings.ways, ranks.size, True), trainings.ways(None, ranks.size, True)
    follow([found for found, _, _ in answers], truth)
    assert {way for _, way, _ in answers} == {"backward"}
    answers = ranks.call(trainings.ways, ranks.size, False)
    assert same_bits([found for found, _, _ in answers])
    assert all(any("Training continues at a fixed rate" in text for text in told) for _, _, told in answers)


@pytest.mark.parametrize("step", [kf.LayerwiseStep(), kf.QuadraticModel()], ids=["default", "papers"])
def test_a_weight_in_two_roles(ranks, step):
    follow(ranks.call(trainings.tied, ranks.size, step), trainings.tied(None, ranks.size, step))


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ("ddp", "default"),
        ("apart", "default"),
        ("rows", "default"),
        ("ddp", "no average"),
        ("ddp", "papers"),
        ("apart", "fixed rate"),
        ("ddp", "preconditioner"),
        ("rows", "preconditioner"),
    ],
)
def test_batch_normalisation_is_evaluated_alike_on_all_ranks(ranks, how, rule):
    """Seen: its running statistics, which are each rank's own after a forward pass, passed for other models."""
    answers = ranks.call(trainings.normalised, ranks.size, how, rule)
    for found in zip(*answers, strict=True):
        assert same_bits(found)
    _, buffers, _, averages = answers[0]
    assert int(buffers["1.num_batches_tracked"]) == 8
    averaged = not torch.equal(buffers["1.running_mean"], averages["1.running_mean"])
    assert averaged == (rule == "default")


@pytest.mark.parametrize(("how", "rule"), [("ddp", "default"), ("rows", "default"), ("ddp", "preconditioner")])
def test_buffers_that_forward_passes_change_are_alike_on_all_ranks(ranks, how, rule):
    """Instance normalisation, a codebook, a counter: means over ranks are those of one process with all batches."""
    answers, (truth, _) = ranks.call(epochs.moving, ranks.size, how, rule), epochs.moving(None, ranks.size, how, rule)
    follow([found for found, _ in answers], truth)
    assert truth["passes"] == 6 and not torch.equal(answers[0][1], answers[1][1])
    assert same_bits([{"still": truth["still"]}, {"still": answers[1][0]["still"]}])


def test_running_statistics_of_all_ranks_are_means_of_their_batches(ranks):
    """Of those that came, and were finite."""
    answers = ranks.call(trainings.running_statistics, ranks.size)
    assert same_bits(answers)
    own, averages = torch.tensor([[0.0], [1.0]]).double(), None
    for step in range(6):
        there = [rank for rank in range(ranks.size) if (rank, step) not in {(0, 1), (1, 2)}]
        xs = [numbers(8, 4, seed=10 * step + rank) for rank in there]
        batch = torch.stack([torch.stack([x.mean(0), x.var(0)]) for x in xs]).mean(0)
        own = own.lerp(batch, 0.3)
        averages = own if averages is None else averages.lerp(batch, 1 / (step + 1))
    for kind, value, average in zip(KINDS, own, averages, strict=True):
        close(answers[0][f"0.{kind}"], value, 1e-9)
        close(answers[0][f"average of 0.{kind}"], average, 1e-7)  # shares are of single precision


def test_a_group_of_one_trains_alone_beside_others(ranks):
    answers = ranks.call(trainings.alone, ranks.size)
    found = [weight for answer in answers for weight in answer]
    truth = trainings.alone(None, ranks.size)
    assert len(found) == len(truth) == 3 * ranks.size
    for own, expected in zip(found, truth, strict=True):
        for name, weight in own.items():
            close(weight, expected[name], 1e-9, name)
    assert not torch.equal(found[0]["0.weight"], found[3]["0.weight"])


@pytest.mark.parametrize("fit", ["kfac", "ekfac"])
def test_a_loop_of_ones_own(ranks, fit):
    follow(ranks.call(partial(trainings.loop, fit=fit), ranks.size), trainings.loop(None, ranks.size, fit=fit))


@pytest.mark.parametrize("fit", ["kfac", "ekfac"])
def test_a_preconditioner(ranks, fit):
    follow(ranks.call(trainings.preconditioned, ranks.size, fit), trainings.preconditioned(None, ranks.size, fit))


@pytest.mark.parametrize(
    ("fit", "labels", "how"),
    [("kfac", "observed", "rows"), ("ekfac", "observed", "both"), ("kfac", "exact", "replicas")],
)
def test_steps_of_models_that_fully_shard_spread(ranks, fit, labels, how):
    case = (ranks.size, 20, fit, labels, how)
    follow(ranks.call(trainings.steps, *case), trainings.steps(None, *case))


@pytest.mark.parametrize("how", ["ddp", "rows"])
def test_a_scale_that_is_too_large_on_one_rank(ranks, how):
    answers, truth = ranks.call(trainings.scaled, ranks.size, how), trainings.scaled(None, ranks.size, how)
    follow(answers, truth)
    assert float(truth["scale"]) == 2.0**10  # halved once, and doubled once after four steps
    for name in trainings.perceptron().state_dict():
        assert torch.equal(answers[0][f"{name} after 1"], answers[0][f"{name} after 2"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_two_replicas_of_a_model_in_two_parts(ranks):
    for fit, labels in (("kfac", "observed"), ("ekfac", "exact")):
        case = (4, 12, fit, labels, "grid")
        follow(ranks.call(trainings.steps, *case), trainings.steps(None, *case))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["around", "inside", "in place", "around rows"])
def test_compiled_models(ranks, how):
    follow(ranks.call(trainings.compiled, ranks.size, how), trainings.compiled(None, ranks.size, "not"))


def test_loops_over_models_that_fully_shard_spread(ranks):
    for function, case in (
        (trainings.loop, ("both",)),
        (trainings.preconditioned, ("kfac", "rows")),
        (trainings.attached, ("rows",)),
    ):
        follow(ranks.call(function, ranks.size, *case), function(None, ranks.size, *case))


@pytest.mark.parametrize(("fit", "labels"), [("ekfac", "sampled"), ("kfoc", "observed")])
def test_what_is_drawn_or_merged_is_alike_on_all_ranks(ranks, fit, labels):
    answers = ranks.call(trainings.steps, ranks.size, 12, fit, labels)
    assert same_bits(answers)
    assert not torch.equal(answers[0]["0.weight"], trainings.weights(trainings.perceptron())["0.weight"])


@pytest.mark.parametrize("fit", ["kfac", "ekfac"])
def test_layers_that_some_ranks_do_not_use(ranks, fit):
    assert same_bits(ranks.call(trainings.unused, ranks.size, fit))


def test_training_goes_on_from_what_rank_0_saved(ranks):
    whole, parts = (ranks.call(trainings.resumed, ranks.size, saved) for saved in (False, True))
    assert same_bits(whole) and same_bits(parts)
    # DDP puts gradients together in other buckets in its first step; a sum of two does not depend on that.
    assert same_bits([*whole, *parts]) or ranks.size > 2
    for name, value in whole[0].items():
        torch.testing.assert_close(parts[0][name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("ranks", "how", "model"),
    [
        (3, "rank 0", "ddp"),
        pytest.param(3, "checkpoint", "ddp", marks=pytest.mark.slow),
        (3, "names", "ddp"),
        (2, "names", "ddp to rows"),
        pytest.param(2, "names", "both to ddp", marks=pytest.mark.slow),
    ],
    indirect=["ranks"],
)
def test_other_numbers_of_ranks_go_on_from_what_two_saved(ranks, how, model, tmp_path):
    """Two ranks save; three load that, one process as well; they follow one process with their batches.

    Where fully_shard spreads the model, two ranks save and two load, since its mesh is all ranks.
    """
    saved, path, whole = 2, str(tmp_path / "saved"), str(tmp_path / "whole")
    answers = ranks.call(trainings.handed_on, ranks.size, path, saved, ranks.size, how, model)
    follow(answers, trainings.handed_on(None, 1, whole, saved, ranks.size, "rank 0"))
    if how != "checkpoint":
        truth = trainings.handed_on(None, 1, whole, None, 1, "rank 0")
        follow([trainings.handed_on(None, 1, path, None, 1, how)], truth)
    if how == "names":
        kept = FileSystemReader(path).read_metadata().state_dict_metadata
        names = trainings.perceptron().state_dict()
        assert kept.keys() >= {f"optimizer.state.{name}.momentum" for name in names}
        assert all(any(name in key for name in names) for key in kept if "layers" in key or "average.averages" in key)


@pytest.mark.parametrize("models", ["rows to rows", pytest.param("both to rows", marks=pytest.mark.slow)])
def test_three_ranks_go_on_from_a_spread_model_that_two_saved(worlds, models, tmp_path):
    """Both times fully_shard spreads it over all ranks there are."""
    path, whole = str(tmp_path / "saved"), str(tmp_path / "whole")
    first, then = models.split(" to ")
    worlds(2).call(trainings.handed_on, 2, path, 2, None, "names", first)
    answers = worlds(3).call(trainings.handed_on, 3, path, None, 3, "names", then)
    follow(answers, trainings.handed_on(None, 1, whole, 2, 3, "rank 0"))


@pytest.mark.slow
def test_one_two_and_eight_ranks_go_on_from_what_four_saved(tmp_path):
    path, whole = str(tmp_path / "saved"), str(tmp_path / "whole")
    (tmp_path / "four").mkdir()
    with world(4, tmp_path / "four") as four:
        answers = four.call(trainings.handed_on, 4, path, 4, 2, "names")
    follow(answers[:2], trainings.handed_on(None, 1, whole, 4, 2, "rank 0"))
    one = trainings.handed_on(None, 1, path, None, 1, "names")
    follow([one], trainings.handed_on(None, 1, whole, None, 1, "rank 0"))
    (tmp_path / "eight").mkdir()
    with world(8, tmp_path / "eight") as eight:
        answers = eight.call(trainings.handed_on, 8, path, None, 8, "names")
    follow(answers, trainings.handed_on(None, 1, whole, None, 8, "rank 0"))


def test_named_states_that_do_not_belong(tmp_path):
    optimizer = kf.NaturalGradient(trainings.perceptron(), kf.Categorical())
    with warnings.catch_warnings(action="ignore"):  # that one process saves
        dcp.save({"optimizer": kf.named_state(optimizer)}, checkpoint_id=tmp_path)
    with pytest.raises(kf.DataError, match="has no state of an optimiser under 'other'"):
        kf.load_named_state(optimizer, tmp_path, "other")
    with pytest.raises(kf.DataError, match="not the state of a Preconditioner"):
        kf.load_named_state(kf.Preconditioner(trainings.perceptron(), kf.Categorical()), tmp_path)
    with pytest.raises(TypeError, match=r"for others use torch\.distributed\.checkpoint\.state_dict"):
        kf.named_state(torch.optim.SGD(trainings.perceptron().parameters()))


def test_a_preconditioner_goes_on_from_its_named_state(tmp_path):
    """To the last bit, layouts of tensors among it."""

    def go(number, folder=None):
        model = trainings.perceptron()
        preconditioner, sgd = kf.Preconditioner(model, kf.Categorical()), torch.optim.SGD(model.parameters(), 0.1)
        for step, (x, y) in enumerate(trainings.batches(None, 1, number)):
            if step == 3 and folder:
                with warnings.catch_warnings(action="ignore"):
                    dcp.save({"optimizer": kf.named_state(preconditioner)}, checkpoint_id=folder)
                preconditioner = kf.Preconditioner(model, kf.Categorical())
                kf.load_named_state(preconditioner, folder)
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(preconditioner(x), y).backward()
            preconditioner.step()
            sgd.step()
        return trainings.weights(model)

    assert same_bits([go(8), go(8, tmp_path)])


@pytest.mark.parametrize(
    ("how", "at"),
    [("ddp", 7), pytest.param("ddp", 0, marks=pytest.mark.slow), pytest.param("rows", 5, marks=pytest.mark.slow)],
)
def test_a_rank_that_ends_in_training_ends_the_others(how, at, tmp_path):
    """Between two steps, so that the others miss it in their backward pass; their errors name it.

    One of them may wait for another that waits no more, until the group's timeout; the first has named both by then.
    """
    own = World(3, tmp_path, patience=30)
    calls = [each.submit(run, trainings.ended, rank, (how, at)) for rank, each in enumerate(own.executors)]
    alone = []
    for rank, call in enumerate(calls[:2]):
        kind, text = call.result(timeout=LIMIT)
        found = re.search(rf"rank {rank} lost the other ranks: (rank {1 - rank}, )?rank 2 has ended", text)
        assert kind == "RankError" and found, text
        alone.append(found[1] is None)
    assert any(alone)
    with pytest.raises(BrokenProcessPool):
        calls[2].result(timeout=LIMIT)
    own.end()


def test_other_errors_of_a_step_are_not_taken_for_ranks_that_ended(ranks):
    assert set(ranks.call(trainings.wrong)) == {("RuntimeError", "of the model's own")}


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_ranks_that_are_killed_go_on_to_the_same_bits(ranks, tmp_path):
    """Of two: sums of three depend on DDP's buckets, which are others in its first step."""
    whole, path = str(tmp_path / "whole"), tmp_path / "killed"
    for rank, each in enumerate(ranks.executors):
        each.submit(run, trainings.saving, rank, (ranks.size, str(path), 1_000_000))
    before = time.monotonic()
    while not path.exists() and time.monotonic() < before + LIMIT:
        time.sleep(0.01)
    ranks.kill()  # at any moment of a step
    ranks.start()
    saved = torch.load(path)["optimizer"]["natural_gradient"]["steps"]
    answers = [ranks.call(trainings.saving, ranks.size, file, saved + 5) for file in (str(path), whole)]
    assert saved and same_bits([*answers[0], *answers[1]])


def test_steps_between_renewals_send_nothing_but_gradients(ranks):
    """Two calls where statistics are due: what the ranks agree on, and the sums."""
    answers = ranks.call(trainings.between, ranks.size)
    for found, report in answers:
        assert {due for due, _ in found} == {False, True}
        for due, calls in found:
            assert [name for name, _ in calls] == (["all_gather_object", "all_reduce"] if due else [])
        assert report.collectives == sum(len(calls) for _, calls in found)
        assert report.sent == sum(size for other, _ in answers for _, calls in other for _, size in calls)
        assert f"sent in {report.collectives} collectives" in str(report)


def test_parameters_that_are_spread_over_ranks_are_refused_by_placement(ranks):
    says = {
        "narrow": r"0\.weight is torch\.float64 and fully_shard computes with it in torch\.bfloat16: leave the Mixed",
        "papers": r"step=kf\.QuadraticModel.* fully_shard puts its own there\. Use the default, step=kf\.LayerwiseStep",
        "partly": r"0\.weight is outside the parts that fully_shard treats, .* call fully_shard\(model\) for the whole",
        "without group": r"0\.weight is spread over ranks \[0, 1.* group=torch\.distributed\.group\.WORLD",
        "a larger group": rf"0\.weight is spread over ranks \[\d\] by fully_shard, and group= has {ranks.size} of them",
    }
    says |= dict.fromkeys(["training, narrow", "preconditioning, narrow"], says["narrow"])
    says["another group"] = says["without group"]
    placement = r"0\.weight is a DTensor with placements \[Shard\(dim=0\)\].* use DistributedDataParallel"
    others = ["posterior", "influence", "penalty", "gram", "tensor parallel", "training, tensor parallel"]
    says |= dict.fromkeys(others, placement)
    for errors in ranks.call(trainings.spread):
        assert errors.keys() == says.keys()
        for name, text in errors.items():
            assert re.match(says[name], text), (name, text)


@pytest.mark.parametrize(
    ("fit", "labels", "how"),
    [
        ("kfac", "observed", "ddp"),
        ("ekfac", "observed", "ddp"),
        ("ekfac", "sampled", "ddp"),
        ("ekfac", "observed", "rows"),
        ("kfac", "sampled", "both"),
    ],
)
def test_a_batch_that_is_not_finite_on_one_rank_moves_nothing(ranks, fit, labels, how):
    answers = ranks.call(trainings.not_finite, ranks.size, fit, labels, how)
    for found, dropped in answers:
        assert torch.equal(found[2], found[3]) and not torch.equal(found[3], found[4]) and dropped == answers[0][1]
        assert all(map(torch.equal, found, answers[0][0]))


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("passes", "RankError", "ran . forward and backward passes before step"),
        (
            "other weights",
            "RankError",
            "parameter 0.weight: rank 0 has .* hold the same weights. While they train, Dist",
        ),
        ("no wrapper", "RankError", "parameter 0.weight: rank 0 has .* averages their gradients, as fully_shard"),
    ],
)
def test_what_is_refused(ranks, what, kind, message):
    for name, text in ranks.call(trainings.refused, what):
        assert name == kind and re.search(message, text), (name, text)
