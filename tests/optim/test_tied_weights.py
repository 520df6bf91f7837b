"""A weight that is a matrix in one place and its transpose in another is trained by the sum of both terms."""

import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kronfisher as kf
from tests.helpers.close import close
from tests.helpers.networks import Written

pytestmark = pytest.mark.usefixtures("double")


def words(count=7, width=5):
    """Words in, words out by the same table."""
    torch.manual_seed(0)
    model = Written(
        lambda m, x: F.linear(torch.tanh(m.h(m.e(x))), m.e.weight),
        e=nn.Embedding(count, width),
        h=nn.Linear(width, width),
    )
    return model, torch.randint(count, (40,)), torch.randint(count, (40,)), kf.Categorical()


def autoencoder():
    torch.manual_seed(0)
    model = Written(
        lambda m, x: F.linear(F.linear(x, m.w, m.b).tanh(), m.w.t(), m.c),
        w=torch.randn(4, 6) / 2, b=torch.randn(4), c=torch.randn(6),
    )  # fmt: skip
    return model, torch.randn(40, 6), torch.randn(40, 6), kf.Gaussian()


MODELS = {"words": (words, "e.weight"), "autoencoder": (autoencoder, "w")}


def trained(made, steps=1, **options):
    model, x, y, likelihood = made
    options = {"labels": "observed", "step": kf.QuadraticModel(trust=kf.Constant(0.3)), **options}
    optimizer = kf.NaturalGradient(model, likelihood, **options)
    for _ in range(steps):
        optimizer.step(lambda: model(x), y)
    return optimizer


def inverse_of(optimizer, name):
    (one,) = (one for one in optimizer.parts.direction.inverses if one.blocks[0].parameters == (name,))
    assert one.other is not None
    return one


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fit", ["kfac", "kfoc", "tkfac"])
def test_the_curvature_is_that_of_an_estimate(name, fit):
    make, weight = MODELS[name]
    model, x, y, likelihood = make()
    fisher = kf.estimate(model, (x, y), likelihood, fit={weight: fit, "*": "kfac"}, labels="observed")
    optimizer = trained(make(), fit={weight: fit, "*": "kfac"})
    assert not optimizer.report().uncovered
    one = inverse_of(optimizer, weight)
    one.read()
    close(one.operator.to_dense(), fisher[weight].to_dense(), 1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_the_natural_gradient_solves_with_the_sum(name):
    make, weight = MODELS[name]
    optimizer = trained(make())
    one, direction = inverse_of(optimizer, weight), optimizer.parts.direction
    terms = [one.layer.operator(), one.other.operator().transposed(*one.blocks[0].shape[1:])]
    first, second = sorted(terms, key=lambda term: -float(term.trace()))
    damped = first.factored_damping(0.3).to_dense() + second.to_dense()
    gradient = torch.randn_like(optimizer.trained()[weight])
    natural = direction.apply({weight: gradient})[weight]
    close(damped @ natural.flatten(), gradient.flatten(), 1e-9)


def test_a_table_that_is_long_takes_the_diagonal_along_it():
    """Eigenvectors of a vocabulary's width would be dearer than all else; the lookup has a diagonal there anyway."""
    optimizer = trained(words(30, 4))
    one = inverse_of(optimizer, "e.weight")
    one.read()
    lookup, last = sorted((one.layer, one.other), key=lambda layer: not layer.blocks[0].onehot)
    inner, outer = (last.operator().product[k].tensor[0] for k in (0, 1))  # last reads [4] and writes [30]
    rows = lookup.operator()
    table = rows.transposed(30, 4).to_dense() if lookup is one.other else rows.to_dense()
    close(one.operator.to_dense(), table + torch.kron(outer.diag().diag(), inner), 1e-12)
    assert one.operator.B.dim() == 3  # diagonals alone


@pytest.mark.parametrize("step", [kf.QuadraticModel(), kf.LayerwiseStep()], ids=["papers", "default"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("saved", [1, 3])
def test_a_resumed_training_gives_the_same_bits(name, step, saved):
    make, _ = MODELS[name]
    options = {"step": step, "refresh": kf.Refresh(statistics=2, inverse=3)}
    made = make()
    optimizer, file = trained(made, saved, **options), io.BytesIO()
    torch.save((made[0].state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = make()
    other[0].load_state_dict(weights)
    resumed = trained(other, 0, **options)
    resumed.load_state_dict(state)
    for own, (model, x, y, _) in ((optimizer, made), (resumed, other)):
        for _ in range(5):
            own.step(lambda model=model, x=x: model(x), y)
    for one, two in zip(made[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_named_state_has_both_roles(tmp_path):
    """As torch.distributed.checkpoint keeps it."""
    import torch.distributed.checkpoint as dcp

    made, other = autoencoder(), autoencoder()
    optimizer, again = trained(made, 3), trained(other, 0)
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        dcp.save({"optimizer": kf.named_state(optimizer)}, checkpoint_id=tmp_path)
    kf.load_named_state(again, tmp_path)
    other[0].load_state_dict(made[0].state_dict())
    for own, (model, x, y, _) in ((optimizer, made), (again, other)):
        own.step(lambda model=model, x=x: model(x), y)
    assert torch.equal(made[0].w, other[0].w)


@pytest.mark.parametrize("step", [kf.QuadraticModel(trust=kf.Constant(0.3)), kf.LayerwiseStep()])
def test_a_role_that_a_later_batch_shows_joins(step):
    torch.manual_seed(0)
    model = Written(
        lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.t()) if m.both else F.pad(F.linear(x, m.w), (0, 2)),
        w=torch.randn(4, 6) / 2,
    )
    x, y = torch.randn(40, 6), torch.randn(40, 6)
    optimizer = kf.NaturalGradient(
        model, kf.Gaussian(), step=step, labels="observed", refresh=kf.Refresh(statistics=1, inverse=1)
    )
    losses = []
    for model.both in (False, False, True, True, True, True):
        losses.append(float(optimizer.step(lambda: model(x), y)))
    one = inverse_of(optimizer, "w")
    assert one.ready and one.inverse is not None and not optimizer.report().uncovered
    assert losses[1] < losses[0] and losses[-1] < losses[2]


def test_tables_that_are_looked_up_make_the_steps_of_tables_by_default():
    """As they do where the last layer is another one; a matrix in two roles follows the natural gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table, matrix = trained(words(), 3, step=None), trained(autoencoder(), 3, step=None)
    assert [one.name for one in table.parts.direction.inverses] == ["h.weight"]
    assert inverse_of(matrix, "w").inverse is not None
    assert not table.report().uncovered and not matrix.report().uncovered


@pytest.mark.parametrize("fit", ["ekfac", "full", "diagonal", "block-tridiagonal"])
def test_fits_without_such_a_sum_say_so(fit):
    with pytest.warns(kf.errors.NumericalWarning, match="two roles"):
        optimizer = trained(words(), fit=fit)
    assert "two roles" in optimizer.report().uncovered["e.weight"]


def test_a_preconditioner_takes_both_roles():
    model, x, y, _ = autoencoder()
    optimizer = kf.Preconditioner(model, kf.Gaussian(), labels="observed")
    torch.nn.functional.mse_loss(optimizer(x, targets=y), y).backward()
    optimizer.step()
    (one,) = (one for one in optimizer.direction.inverses if one.other is not None)
    assert one.inverse is not None
