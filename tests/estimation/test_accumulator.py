"""Between batches and states: which fit treats what, masks, gradients that never come, refusals with names."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from kronfisher.capture.observation import observe
from kronfisher.errors import UnsupportedError
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.estimation.recipe import Recipe
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fisher.windows import Claims, left_over, settle
from kronfisher.fits import FITS, choose
from tests.helpers.checks import SETTLED, assert_exact, assert_fallback
from tests.helpers.networks import Written
from tests.helpers.truth import exact_fisher, kept

# Which fit treats what -----------------------------------------------------------------------------------------------


def test_the_first_pattern_that_matches_counts():
    names = dict.fromkeys(["body.0.weight", "body.0.bias", "head.weight"])
    chosen = choose({"head*": "full", "*.bias": kf.Diagonal(), "*": "kfac"}, names)
    assert list(chosen.values()) == [kf.KFAC(), kf.Diagonal(), kf.Full()]
    assert choose("ekfac", names) == dict.fromkeys(names, kf.EKFAC())
    assert choose({"*": "kfac", "*.bias": "full"}, names)["body.0.bias"] == kf.KFAC()
    assert choose({"body.[0-3].*": "kfac", "head.weight": "full"}, names)["head.weight"] == kf.Full()
    assert choose({"a[1]": "kfac"}, {"a[1]": 0}) == {"a[1]": kf.KFAC()}  # a name is not a pattern
    with pytest.raises(
        ValueError, match=r"patterns \['tail'\] match no trainable parameter; there are \['body.0.weight'"
    ):
        choose({"tail": "kfac", "*": "kfac"}, names)
    with pytest.raises(ValueError, match=r"no pattern matches head\.weight; add '\*'"):
        choose({"body*": "kfac"}, names)
    with pytest.raises(ValueError, match="fit='gauss' is not known"):
        choose({"*": "gauss"}, names)


def test_weight_and_bias_part_where_their_fits_differ():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3)
    fisher = kf.estimate(model, x, kf.Gaussian(), fit={"0.bias": "diagonal", "2.weight": "full", "*": "kfac"})
    assert list(fisher.blocks) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [type(o).__name__ for o in fisher.blocks.values()] == ["Kronecker", "Diagonal", "Dense", "Kronecker"]
    joined = kf.estimate(model, x, kf.Gaussian(), fit={"0.*": "diagonal", "*": "kfac"})
    assert list(joined.blocks) == ["0.weight", "2.weight"] and joined["0.bias"] is joined["0.weight"]


# Masks ---------------------------------------------------------------------------------------------------------------


def targets(n=4, positions=6, classes=3):
    y = torch.randint(classes, (n, positions), generator=torch.Generator().manual_seed(0))
    y[:, 1], y[0, 4], y[2] = -100, -100, -100  # a position of all, a single one, a whole datum
    return y


@pytest.mark.parametrize("fit", ["full", "diagonal", kf.Full(across_layers=True)], ids=str)
def test_ignored_positions_that_act_on_others(fit):
    """The output at an ignored pixel counts for nothing, but its features act on the neighbours."""
    model = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.GroupNorm(2, 4), nn.Conv1d(4, 3, 3, padding=1))
    model, x, y = model.double(), torch.randn(4, 2, 6).double(), targets()
    likelihood = kf.Categorical(class_dim=1)
    fisher = kf.estimate(model, (x, y), likelihood, fit=fit, labels="exact")
    assert fisher.count == 3
    truth = exact_fisher(model, x, likelihood, y) * 4 / 3 * kept(fisher)
    assert (fisher.to_dense() - truth).norm() < 1e-10 * truth.norm()


def test_positions_are_not_confused_with_other_axes():
    """As many channels as tokens: the mask is of tokens."""
    model = Written(
        lambda m, x: m.ch(x + m.tok(x.transpose(1, 2)).tanh().transpose(1, 2)), tok=nn.Linear(6, 6), ch=nn.Linear(6, 3)
    ).double()
    x, y, likelihood = torch.randn(4, 6, 6).double(), targets(), kf.Categorical(class_dim=-1)
    fisher = kf.estimate(model, (x, y), likelihood, fit="full", labels="exact")
    truth = exact_fisher(model, x, likelihood, y) * 4 / 3 * kept(fisher)
    assert (fisher.to_dense() - truth).norm() < 1e-10 * truth.norm()


@pytest.mark.parametrize("fit", SETTLED)
@pytest.mark.parametrize("first", ["data", "sequence"])
def test_padding_a_batch_changes_nothing(fit, first):
    """Positions that are ignored and act on nothing: neither factor, nor their number, nor the count sees them."""
    axes = (0, 1) if first == "data" else (1, 0)
    model = Written(
        lambda m, x: m.l1(m.n(m.l0(x.transpose(*axes)).tanh()) + m.b).transpose(*axes),
        l0=nn.Linear(3, 4), n=nn.LayerNorm(4), b=torch.randn(4), l1=nn.Linear(4, 3),
    ).double()  # fmt: skip
    x, y = torch.randn(5, 4, 3).double(), torch.randint(3, (5, 4))
    likelihood = kf.Categorical(class_dim=-1)
    plain = kf.estimate(model, (x, y), likelihood, fit=fit, labels="exact")
    padded = torch.cat([x, torch.randn(5, 2, 3).double()], 1), torch.cat([y, torch.full((5, 2), -100)], 1)
    longer = torch.cat([padded[0], torch.randn(2, 6, 3).double()]), torch.cat([padded[1], torch.full((2, 6), -100)])
    for data in (padded, longer):
        found = kf.estimate(model, data, likelihood, fit=fit, labels="exact")
        assert found.count == 5 and found.rows == plain.rows
        assert (found.to_dense() - plain.to_dense()).norm() < 1e-12 * plain.to_dense().norm()


# Gradients that never come -------------------------------------------------------------------------------------------


class Deaf(torch.autograd.Function):
    """Passes no gradient on, not even a zero."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None


@pytest.mark.parametrize("fit", [*sorted(FITS.keys() - {"kl"}), kf.Full(across_layers=True)], ids=str)  # KL has a λ
def test_a_branch_that_passes_no_gradient(fit):
    model = Written(
        lambda m, x: m.l1(m.l0(x).tanh()) + Deaf.apply(m.deaf(x)) + m.shared(Deaf.apply(m.shared(x))),
        l0=nn.Linear(3, 3), l1=nn.Linear(3, 3), deaf=nn.Linear(3, 3), shared=nn.Linear(3, 3),
    ).double()  # fmt: skip
    x = torch.randn(5, 3).double()
    fisher = kf.estimate(model, [x[:2], x[2:]], kf.Gaussian(), fit=fit, labels="exact")
    assert sum(fisher.diagonal()[name].abs().sum() for name in ("deaf.weight", "deaf.bias")) == 0
    if fit == "full" or isinstance(fit, kf.Full):
        truth = exact_fisher(model, x) * kept(fisher)
        assert (fisher.to_dense() - truth).norm() < 1e-10 * truth.norm()


def test_outputs_that_are_apart():
    """Heads of which each backward pass of a column reaches one only."""
    model = Written(
        lambda m, x: torch.cat([m.a(x), m.b(m.c(x).tanh())], 1), a=nn.Linear(3, 1), b=nn.Linear(2, 2), c=nn.Linear(3, 2)
    )
    x = torch.randn(6, 3)
    assert_exact(model, x)
    fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact", fit="kfac")
    rows = torch.cat([x, torch.ones(6, 1)], 1)
    for name in ("a.weight", "c.weight"):
        assert torch.allclose(fisher[name].A[0], rows.T @ rows / 6, atol=1e-6)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_all_that_is_not_supported_is_named_at_once():
    model = Written(
        lambda m, x: m.l(torch.addcmul(y := m.k(x), y, m.s)) + torch.hypot(x[:, :2], m.e),
        k=nn.Linear(3, 4), s=torch.randn(4), l=nn.Linear(4, 2), e=torch.randn(2),
    )  # fmt: skip
    with pytest.raises(UnsupportedError) as caught:
        kf.estimate(model, torch.randn(5, 3), kf.Gaussian(), strict=True)
    said = str(caught.value)
    assert said.startswith("batch 0: strict=True, and these trainable parameters are used in ways")
    assert "s: used by addcmul" in said and "e: used by hypot" in said and "requires_grad_(False)" in said
    assert "k.weight" not in said
    assert_fallback(model, torch.randn(5, 3), "s: used by addcmul")
    model.s.requires_grad_(False)
    model.e.requires_grad_(False)
    assert_exact(model, torch.randn(5, 3))


def test_windows_of_blocks():
    w, b = torch.zeros(4, 3), torch.zeros(4)
    whole = Block("w", "linear", Window.of("w", w).reshaped(1, 4, 3), Window.of("b", b).reshaped(1, 4))
    assert settle([whole]) == Claims()
    halves = [Block("w", "linear", Window.of("w", w, part).reshaped(1, 2, 3)) for part in w.chunk(2)]
    assert settle(halves) == settle(halves[:1]) == Claims()
    assert [view.label for view in left_over([half.weight for half in halves[:1]])] == ["w[2:4, :]"]
    assert left_over([half.weight for half in halves]) == left_over([whole.weight]) == []
    corner = Window.of("w", w, w[1:3, :2]).reshaped(1, 2, 2)
    assert [view.label for view in left_over([corner])] == ["w[0:1, :]", "w[1:3, 2:3]", "w[3:4, :]"]
    assert settle([whole, Block("w", "addmm", whole.weight)]).apart == {"w"}
    assert settle([whole, Block("b", "add", None, whole.bias)]).apart == {"b"}
    alone, turned = Block("w", "linear", whole.weight), Window.of("w", w, w.t()).reshaped(1, 3, 4)
    roles = [alone, Block("w", "addmm", turned)]
    assert settle(roles) == Claims()
    assert (
        "used in two roles, as a matrix and as its transpose (by addmm, linear)" in settle(roles, {"w"}).problems["w"]
    )
    assert "used in 2 different ways (by linear)" in settle([alone, halves[0]]).problems["w"]
    wide = Window.of("v", torch.zeros(200, 2), torch.zeros(200, 2)[::2]).reshaped(1, 100, 2)
    assert "100 of its 400" not in settle([Block("v", "linear", wide)]).problems["v"]
    assert "only 200 of its 400 elements are used (by linear)" in settle([Block("v", "linear", wide)]).problems["v"]


def test_an_accumulator_by_itself():
    """States add up over batches and count what was counted."""
    model = nn.Linear(3, 2)
    run = Accumulator(Recipe(model, kf.Gaussian()), "kfac")
    for k in range(3):
        run.add(torch.randn(4, 3), f"batch {k}")
    (group,) = run.groups
    assert run.count == group.state.count == 12 and run.backward_passes == 3 and run.passes == 1
    assert group.state.rows == 12 and group.seconds > 0
    assert run.next_pass() is False and group.done
    assert model.weight.grad is None


def test_errors_name_the_batch():
    model = Written(lambda m, x: m.l(x) if len(x) > 1 else F.linear(x, m.l.weight.abs()), l=nn.Linear(3, 3, bias=False))
    with pytest.raises(UnsupportedError, match=r"batch 1: l.weight: used by abs\. Earlier batches"):
        kf.estimate(model, iter([torch.randn(2, 3), torch.randn(1, 3)]), kf.Gaussian())
    data = [torch.randn(1, 3), torch.randn(2, 3)]
    for some in (data, data[::-1]):  # known in time, or read again
        fisher = kf.estimate(model, some, kf.Gaussian(), labels="exact", fit="diagonal")
        assert torch.allclose(fisher.to_dense().diagonal().double(), exact_fisher(model, data).diagonal(), rtol=1e-4)


# What is let go of ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retain", [False, True])
def test_inputs_go_with_the_last_pass_and_not_before(retain):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    run = Accumulator(Recipe(model, kf.Gaussian(), labels="exact"), kf.KFAC())
    observation = observe(model, run.parameters, torch.randn(5, 4), None, "batch 0")
    run.absorb(observation, retain=retain)
    assert run.backward_passes == 2
    kept = [use.inputs is not None for call in observation.calls for use in call.uses]
    assert kept == [retain, retain]
