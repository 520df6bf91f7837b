"""Training with inverses at owners follows training with inverses everywhere, and has the same weights on all ranks."""

from functools import partial

import pytest
import torch

import kronfisher as kf
from tests.distributed import trainings
from tests.distributed.cases import same_bits
from tests.helpers.close import close

pytestmark = pytest.mark.usual_ranks(2)


def follow(answers, truth):
    assert same_bits(answers)
    for name, weight in answers[0].items():
        close(weight, truth[name], 1e-9, name)


@pytest.mark.parametrize(
    ("fit", "labels", "kind", "how"),
    [
        ("kfac", "observed", "default", "ddp"),
        ("ekfac", "observed", "default", "ddp"),
        ("kfac", "sampled", "default", "rows"),
        ("kfac", "observed", "preconditioner", "ddp"),
        pytest.param("ekfac", "observed", "preconditioner", "ddp", marks=pytest.mark.slow),
        pytest.param("kfoc", "observed", "default", "ddp", marks=pytest.mark.slow),
        pytest.param("block-tridiagonal", "observed", "default", "ddp", marks=pytest.mark.slow),
        pytest.param("kfoc", "observed", "preconditioner", "ddp", marks=pytest.mark.slow),
    ],
)
def test_steps_with_inverses_at_owners(ranks, fit, labels, kind, how):
    """One rank holds each inverse, all follow one schedule, and between renewals one collective is all that is sent."""
    case = 20, fit, labels, kind, how
    (truth, everything, *_), *_ = ranks.call(trainings.owned, ranks.size, "all", *case)
    answers = ranks.call(trainings.owned, ranks.size, "owned", *case)
    follow([found for found, *_ in answers], truth)
    held = [name for _, names, *_ in answers for name in names]
    assert sorted(held) == sorted(everything) and len(held) > 1
    assert sum("packed" in str(names) for _, names, *_ in answers) == (how == "ddp")  # three weights in one parameter
    assert all(schedule == answers[0][2] for _, _, schedule, *_ in answers)
    for *_, calls, report in answers:
        if how == "ddp":
            plain = [[name for name, _ in seen] for due, seen in calls if not due]
            assert plain and all(names == ["all_gather"] for names in plain)
            assert report.collectives == sum(len(seen) for _, seen in calls)
        assert report.sent == answers[0][-1].sent


def test_fewer_layers_than_ranks(worlds):
    answers = worlds(3).call(partial(trainings.steps, share="owned"), 3)
    follow(answers, trainings.steps(None, 3))


@pytest.mark.parametrize(
    ("function", "case"),
    [
        ("tied", (None,)),
        ("loop", ()),
        ("scaled", ("ddp",)),
        pytest.param("scaled", ("rows",), marks=pytest.mark.slow),
        pytest.param("evened", (1.0,), marks=pytest.mark.slow),
    ],
)
def test_loops_with_inverses_at_owners(ranks, function, case):
    """Weights in two roles; accumulated and clipped gradients, frozen weights; a scaler; evened changes of outputs."""
    call = getattr(trainings, function)
    follow(ranks.call(partial(call, share="owned"), ranks.size, *case), call(None, ranks.size, *case))


def test_layers_that_come_later_get_owners(ranks):
    own, every = (ranks.call(partial(trainings.unused, share=share), ranks.size, "kfac") for share in ("owned", "all"))
    follow(own, every[0])


@pytest.mark.parametrize("fit", ["kfac", pytest.param("ekfac", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["default", pytest.param("preconditioner", marks=pytest.mark.slow)])
def test_states_go_to_all_ranks_and_back(ranks, fit, kind):
    """A state is that of a rank with all inverses; steps from it have the bits of those that go on."""
    answers = ranks.call(trainings.brought, ranks.size, fit, kind)
    assert same_bits([found for way, *_ in answers for found in way])
    states = [state.get("natural_gradient", state) for _, found, _ in answers for state in found]
    directions = [state["direction"] | {"owners": None} for state in states]  # one way to share has none
    assert len({repr(flat(each)) for each in directions}) == 1
    held = [name for *_, names in answers for name in names]
    assert len(held) == len(set(held)) and all(len(names) < len(held) for *_, names in answers)


def flat(state):
    if isinstance(state, torch.Tensor):
        return state.flatten().tolist(), tuple(state.shape), state.stride()
    if isinstance(state, dict):
        return {key: flat(state[key]) for key in sorted(state, key=str)}
    return [flat(each) for each in state] if isinstance(state, list | tuple) else state


@pytest.mark.parametrize(
    ("how", "share"),
    [
        ("rank 0", "owned to all"),
        ("names", "owned to owned"),
        pytest.param("names", "all to owned", marks=pytest.mark.slow),
    ],
)
def test_three_ranks_go_on_from_what_two_owned(worlds, how, share, tmp_path):
    path, whole = str(tmp_path / "saved"), str(tmp_path / "whole")
    answers = worlds(3).call(trainings.handed_on, 3, path, 2, 3, how, "ddp", share)
    follow(answers, trainings.handed_on(None, 1, whole, 2, 3, "rank 0"))


@pytest.mark.parametrize("kind", [kf.NumericalError, pytest.param(MemoryError, marks=pytest.mark.slow)])
def test_an_inverse_that_cannot_be_made_ends_all_ranks(ranks, kind):
    """Its owner with its own error, the others with one that names it; nothing moves, and all may try again."""
    answers = ranks.call(trainings.unmade, ranks.size, kind)
    errors = [error for error, _, _ in answers]
    (owner,) = [rank for rank, texts in enumerate(errors) if texts[0][0] == kind.__name__]
    said = "second cannot be inverted"
    for rank, texts in enumerate(errors):
        expected = (kind.__name__, said) if rank == owner else ("RankError", f"rank {owner}: {kind.__name__}: {said}")
        assert texts == [expected, expected]
    assert not any(moved for _, moved, _ in answers)
    assert same_bits([found for *_, found in answers])


def test_a_group_of_one_owns_everything(ranks):
    for found in ranks.call(trainings.alone_at_owners, ranks.size):
        assert same_bits(found)


def test_what_cannot_be_owned_is_refused():
    model, likelihood = torch.nn.Linear(3, 2), kf.Categorical()
    for kind in (kf.NaturalGradient, kf.Preconditioner, partial(kf.NaturalGradient, fit="gram")):
        with pytest.raises(ValueError, match="share='some': use 'all' or 'owned'"):
            kind(model, likelihood, share="some")
    with pytest.raises(kf.UnsupportedError, match=r"QuadraticModel.*its λ changes"):
        kf.NaturalGradient(model, likelihood, step=kf.QuadraticModel(), share="owned")
    with pytest.raises(kf.UnsupportedError, match="fit='gram': steps in the space of samples have one system"):
        kf.NaturalGradient(model, likelihood, fit="gram", share="owned")
