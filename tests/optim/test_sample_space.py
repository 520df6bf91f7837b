"""Steps in the space of samples against dense formulas; training that goes far below first-order methods."""

import math
import re
import warnings

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import kronfisher as kf
from kronfisher.errors import DataError, NumericalError, UnsupportedError
from kronfisher.optim.sample_space import ROWS_A_WEIGHT
from kronfisher.optim.sample_steps import Rows, Thinned
from tests.helpers.close import close
from tests.helpers.layout import ROOT
from tests.helpers.residuals import laplacian, network, rows
from tests.helpers.truth import dense_fisher

LIKELIHOODS = {
    "gaussian": (kf.Gaussian(0.5), lambda n: torch.randn(n, 3).double()),
    "categorical": (kf.Categorical(), lambda n: torch.randint(3, (n,))),
    "bernoulli": (kf.Bernoulli(), lambda n: torch.randint(2, (n, 3)).double()),
    "poisson": (kf.Poisson(), lambda n: torch.randint(4, (n, 3)).double()),
}


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def metric(F):
    """What λ is multiplied by: the roots of F's diagonal, of mean one."""
    curvature = F.diagonal()
    root = (curvature / curvature.mean() + 0.1).sqrt()
    return torch.diag(root / root.mean())


def balanced(generator, n, columns, values):
    """Rows whose columns are equally long, so that λ holds back all weights alike; their singular vectors."""
    left = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64, generator=generator))[0]
    corner = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    right = torch.ones(1, 1, dtype=torch.float64)
    while len(right) < columns:
        right = torch.kron(right, corner) / 2**0.5
    right = right[:, : len(values)]
    return (left * values) @ right.mT, left, right


def check_step(model, likelihood, x, y, F, **options):
    """A step is the gradient of all examples over this matrix, damped."""
    loss = -likelihood.log_prob(model(x), y).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    optimizer, before = kf.NaturalGradient(model, likelihood, fit="gram", **options), flat(model)
    optimizer.bends = False
    close(optimizer.step(lambda: model(x), y), loss.detach(), 1e-12)
    step = optimizer.step_length * torch.linalg.solve(F + optimizer.damping * metric(F), gradient)
    assert optimizer.step_length > 0
    close(before - flat(model), step, 1e-8)


@pytest.mark.parametrize("labels", ["exact", "observed"])
@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("n", [5, 40])
def test_a_step_is_the_damped_natural_gradient(name, labels, n):
    torch.manual_seed(0)
    (likelihood, draw), model = LIKELIHOODS[name], network(2, 4, 3)
    x, y = torch.randn(n, 2).double(), draw(n)
    F = dense_fisher(model, x, y, likelihood, labels)
    check_step(model, likelihood, x, y, F, labels=labels)


def test_memory_is_that_of_spring():
    torch.manual_seed(0)
    model, x, y = network(2, 4, 1), torch.randn(30, 2).double(), torch.randn(30, 1).double()
    optimizer = kf.NaturalGradient(model, kf.Gaussian(), fit="gram", momentum=0.7)
    optimizer.bends = False
    optimizer.step(lambda: model(x), y)
    last, before = optimizer._last.clone(), flat(model)
    J, r = rows(model(x)[:, 0], model), (model(x) - y).detach()[:, 0]
    optimizer.step(lambda: model(x), y)
    inverse = metric(J.mT @ J).inverse()
    inner = J @ inverse @ J.mT + 30 * optimizer.damping * torch.eye(30).double()
    step = 0.7 * last + inverse @ J.mT @ torch.linalg.solve(inner, r - 0.7 * J @ last)
    close(before - flat(model), optimizer.step_length * step, 1e-8)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_batch_of_many_rows_has_the_gradient_of_all_and_the_matrix_of_some(name):
    torch.manual_seed(0)
    (likelihood, draw), model, n = LIKELIHOODS[name], network(1, 2, 3), 200
    x, y, weights = torch.randn(n, 1).double(), draw(n), flat(model).numel()
    places = Thinned(ROWS_A_WEIGHT * weights, 0).places(n)
    assert len(places) == 4 * weights == 52
    F = dense_fisher(model, x[places], y[places], likelihood, "exact")
    check_step(model, likelihood, x, y, F)


def test_a_term_of_many_points_is_thinned_and_a_small_one_kept_whole():
    torch.manual_seed(0)
    model, x = network(1, 2, 1), torch.rand(300, 1).double()
    optimizer, before = kf.NaturalGradient(model, kf.Residuals({"many": 1.0, "few": 2.0}), fit="gram"), flat(model)
    optimizer.bends = False

    def residuals():
        return {"many": model(x)[:, 0] - x[:, 0].sin(), "few": model(x[:3])[:, 0] - 1}

    terms = optimizer.likelihood.terms(residuals())
    many, few = (rows(term, model) for term in terms.values())
    gradient = many.mT @ terms["many"].detach() + few.mT @ terms["few"].detach()
    some = many[Thinned(ROWS_A_WEIGHT * many.shape[1], 0).places(300)]
    F = some.mT @ some * 300 / len(some) + few.mT @ few
    optimizer.step(residuals)
    step = torch.linalg.solve(F + optimizer.damping * metric(F), gradient.detach())
    close(before - flat(model), optimizer.step_length * step, 1e-8)


@pytest.mark.parametrize("decades", [5, 13])
def test_what_all_rows_have_besides_is_solved_with_either_route(decades):
    generator = torch.Generator().manual_seed(0)
    values, damping = torch.logspace(0, -4, 8, dtype=torch.float64), 10.0**-decades
    J, left, right = balanced(generator, 30, 8, values)
    u, v = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (30, 8))
    truth = right @ ((values * (left.mT @ u) + right.mT @ v) / (values**2 + damping))
    close(Rows(J, u, 1.0, rest=v).solver(damping)(u, v), truth, 1e-6)


@pytest.mark.parametrize("others", [0.0, 1e-2])
def test_rows_that_are_too_few_to_see_the_one_that_matters_are_drawn_in_greater_number(others):
    """Seen: the row was not drawn, and no step was made, or one that was far too long, again and again."""
    x = others * torch.rand(500, 2, generator=torch.Generator().manual_seed(0)).double()
    x[7] = 1000.0
    model = nn.Linear(2, 1, bias=False).double()
    optimizer = kf.NaturalGradient(model, kf.Gaussian(), fit="gram")
    losses = [float(optimizer.step(lambda: model(x), 2 * x[:, :1])) for _ in range(12)]
    assert losses[-1] - losses[-2] < 1e-3 and losses[-1] < 0.93 < losses[0] and optimizer.rows_a_weight > ROWS_A_WEIGHT


def test_a_row_that_is_not_drawn_is_named_too():
    torch.manual_seed(0)
    model, x = network(1, 2, 1), torch.rand(300, 1).double()
    bad = next(k for k in range(300) if k not in Thinned(28, 0).places(300))
    optimizer, before = kf.NaturalGradient(model, kf.Residuals({"root": 1.0}), fit="gram"), flat(model)

    def residuals():
        u = model(x)[:, 0]
        return {"root": torch.where(torch.arange(300) == bad, 0.0 * u, 1 + u.square()).sqrt()}

    with pytest.raises(NumericalError, match=rf"residuals 'root' hold NaN or Inf in 1 of 300 rows \({bad}\)"):
        optimizer.step(residuals)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_step_bends_by_the_second_derivative_of_the_outputs(name):
    """``θ₀ − s(δ + s b)`` with ``b = −½ (F + λ)⁻¹ Jᵀ H f″/N``: of ``‖J(b) + ½ f″‖²`` in the metric, damped."""
    torch.manual_seed(0)
    (likelihood, draw), model = LIKELIHOODS[name], network(2, 4, 3)
    x, y = torch.randn(20, 2).double(), draw(20)
    F = dense_fisher(model, x, y, likelihood, "exact")
    optimizer, before = kf.NaturalGradient(model, likelihood, fit="gram", damping=5.0), flat(model)
    gradient = torch.autograd.grad(-likelihood.log_prob(model(x), y).mean(), list(model.parameters()))
    shapes = {key: p.shape for key, p in model.named_parameters()}

    def outputs(t, direction):
        moved, start = {}, 0
        for key, p in model.named_parameters():
            step = direction[start : (start := start + p.numel())].view(shapes[key])
            moved[key] = p.detach() - t * step
        return torch.func.functional_call(model, moved, (x,))

    optimizer.step(lambda: model(x), y)
    scale, moved = optimizer.step_length, before - flat(model)
    start = 0
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(before[start : (start := start + p.numel())].view(p.shape))
    damped = F + optimizer.damping * metric(F)
    step = torch.linalg.solve(damped, torch.cat([g.flatten() for g in gradient]))
    h = 0.1
    second = (outputs(h, step) - outputs(0, step)) * 2 / h**2
    first = torch.autograd.functional.jacobian(lambda t: outputs(t, step), torch.zeros(()).double())
    second = (second - first * 2 / h).detach()
    hessian = sum(c * (c * second).flatten(1).sum(1).view(-1, 1) for c in likelihood.exact(model(x).detach(), y))
    back = torch.autograd.grad(model(x), list(model.parameters()), hessian)
    bend = torch.linalg.solve(damped, torch.cat([g.flatten() for g in back]) / 20) / 2
    assert scale > 0 and 1e-3 < float(bend.norm() / step.norm()) < 0.375
    close(moved, scale * (step + scale * bend), 1e-7)


@pytest.mark.parametrize("decades", [6, 13, 18])
@pytest.mark.parametrize("shape", [(30, 16), (12, 16)])
def test_small_damping_is_solved_through_rows(decades, shape):
    generator = torch.Generator().manual_seed(0)
    (n, columns), damping = shape, 10.0**-decades
    values = torch.logspace(0, -4, min(shape), dtype=torch.float64)
    J, left, right = balanced(generator, n, columns, values)
    u = torch.randn(n, dtype=torch.float64, generator=generator)
    truth = right @ (values / (values**2 + damping) * (left.mT @ u))
    close(Rows(J, u, 1.0).solver(damping)(u), truth, 1e-8)
    with pytest.raises(NumericalError, match="hidden by rounding"):
        Rows(J, u, 1.0).solver(1e-31)


@pytest.mark.parametrize("decades", [4, 11])
@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_lambda_holds_back_each_weight_by_the_root_of_its_own_curvature(decades, shape):
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(shape, dtype=torch.float64, generator=generator) * torch.logspace(0, -3, shape[1]).double()
    u, damping = torch.randn(shape[0], dtype=torch.float64, generator=generator), 10.0**-decades
    if shape[0] > shape[1]:
        truth = torch.linalg.solve(J.mT @ J + damping * metric(J.mT @ J), J.mT @ u)
    else:
        inverse = metric(J.mT @ J).inverse()
        truth = inverse @ J.mT @ torch.linalg.solve(J @ inverse @ J.mT + damping * torch.eye(shape[0]).double(), u)
    close(Rows(J, u, 1.0).solver(damping)(u), truth, 1e-6)


@pytest.mark.parametrize("size", [1e-24, 1e22])
@pytest.mark.parametrize("shape", [(30, 8), (8, 8)])
def test_single_precision_holds_rows_whose_squares_it_does_not(shape, size):
    generator = torch.Generator().manual_seed(0)
    J, u = size * torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    rows, damping = Rows(J, u, 1.0), 0.1 * float((J.double() / size).square().mean()) * size * size
    F = J.double().mT @ J.double()
    truth = torch.linalg.solve(F / size**2 + damping / size**2 * metric(F), (J.double() / size).mT @ u.double())
    assert 0 < rows.size < math.inf
    close(rows.solver(damping)(u).double() * size, truth, 1e-3)


def poisson(model):
    """Of -Δu = 2π² sin πx sin πy: residuals at new points, and the error on a grid."""

    def residuals():
        x, edge = torch.rand(200, 2).double(), torch.rand(40, 2).double()
        edge[:20, 0], edge[20:, 1] = edge[:20, 0].round(), edge[20:, 1].round()
        source = 2 * math.pi**2 * torch.sin(math.pi * x).prod(1)
        return {"equation": laplacian(model, x) + source, "boundary": model(edge)}

    axis = torch.linspace(0, 1, 30).double()
    grid = torch.cartesian_prod(axis, axis)
    truth = torch.sin(math.pi * grid).prod(1)
    return residuals, lambda: float((model(grid)[:, 0].detach() - truth).norm() / truth.norm())


def test_poisson_is_solved_to_three_digits_at_new_points_every_step():
    torch.manual_seed(0)
    model = network(2, 16, 1)
    residuals, error = poisson(model)
    optimizer = kf.NaturalGradient(model, kf.Residuals({"equation": 1.0, "boundary": 1.0}), fit="gram")
    for _ in range(80):
        optimizer.step(residuals)
    assert error() < 1e-3


def test_points_are_the_same_within_a_step_and_new_in_the_next():
    torch.manual_seed(0)
    model, seen = network(1, 4, 1), []

    def residuals():
        x = torch.rand(10, 1).double()
        seen.append(float(x.sum()))
        return {"a": model(x) - x}

    optimizer = kf.NaturalGradient(model, kf.Residuals({"a": 1.0}), fit="gram")
    optimizer.step(residuals)
    first = set(seen)
    optimizer.step(residuals)
    assert len(first) == 1 and len(set(seen)) == 2


def test_a_step_that_raises_or_does_not_help_leaves_weights():
    torch.manual_seed(0)
    model, x = network(1, 4, 1), torch.rand(10, 1).double()
    optimizer, before = kf.NaturalGradient(model, kf.Residuals({"a": 1.0}), fit="gram"), flat(model)
    calls = []

    def fails():
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("no")
        return {"a": model(x) - x}

    with pytest.raises(RuntimeError, match="no"):
        optimizer.step(fails)
    assert torch.equal(flat(model), before)
    count = []

    def worse():  # the loss of every further evaluation is larger
        count.append(1)
        return {"a": (model(x) - x) * 10 ** len(count)}

    factor = optimizer.follower.factor
    optimizer.step(worse)
    assert torch.equal(flat(model), before) and optimizer.step_length == 0 and optimizer.follower.factor > factor


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_batch_that_is_not_finite_is_refused_and_training_goes_on(name, bad):
    def setup():
        torch.manual_seed(0)
        model = network(2, 4, 3)
        return model, kf.NaturalGradient(model, LIKELIHOODS[name][0], fit="gram")

    (model, optimizer), (other, plain) = setup(), setup()
    x, y = torch.randn(10, 2).double(), LIKELIHOODS[name][1](10)
    for each, of in ((optimizer, model), (plain, other)):
        each.step(lambda of=of: of(x), y)
    odd = x.clone()
    odd[3, 0] = bad
    before = flat(model)
    with pytest.raises(NumericalError, match=r"NaN or Inf in 1 of 10 rows|outputs are NaN or infinite"):
        optimizer.step(lambda: model(odd), y)
    assert torch.equal(flat(model), before)
    for each, of in ((optimizer, model), (plain, other)):
        each.step(lambda of=of: of(x), y)
    assert torch.equal(flat(model), flat(other))  # memory and λ were left alone


def test_gradients_that_are_not_finite_name_the_term_and_the_points():
    torch.manual_seed(0)
    model, x = network(1, 4, 1), torch.rand(6, 1).double()
    optimizer, before = kf.NaturalGradient(model, kf.Residuals({"fine": 1.0, "root": 1.0}), fit="gram"), flat(model)

    def residuals():  # the root of zero has no derivative
        u = model(x)[:, 0]
        return {"fine": u, "root": torch.where(torch.arange(6) == 4, 0.0 * u, 1 + u.square()).sqrt()}

    with pytest.raises(NumericalError, match=r"residuals 'root' hold NaN or Inf in 1 of 6 rows \(4\)"):
        optimizer.step(residuals)
    assert torch.equal(flat(model), before)


def test_steps_into_overflow_are_shortened():
    """Seen: a step that overflowed raised, where half of it makes the loss fall."""
    w = nn.Parameter(torch.tensor(1.0).double())
    holder = nn.Module()
    holder.w = w
    optimizer = kf.NaturalGradient(holder, kf.Residuals({"a": 1.0}), fit="gram", damping=1e-6)
    seen = []

    def residuals():
        u = w.reshape(1)
        seen.append(u.item())
        return {"a": torch.where(u < 0.4, math.inf * torch.ones_like(u), 0.5 * u)}  # a full step goes to zero

    optimizer.step(residuals)
    assert min(seen) < 0.4 < w.item() < 1 and optimizer.step_length == 0.5


X = torch.rand(12, 2, generator=torch.Generator().manual_seed(0)).double()
OTHER = network(2, 4, 1)


def spent(model):
    u = model(X)[:, 0]
    u.sum().backward()
    return {"a": u}


@pytest.mark.parametrize(
    ("residuals", "error", "says"),
    [
        (lambda model: {"a": model(X[:0])[:, 0]}, DataError, r"residuals 'a' are \[0\]"),
        (lambda model: {"a": model(X).to(torch.complex128)}, DataError, "residuals 'a' are torch.complex128"),
        (lambda model: {"a": model(X)[:, 0].detach()}, UnsupportedError, "residuals 'a' have no graph"),
        (lambda model: {"a": model(X) * math.nan}, NumericalError, "12 of 12 residuals 'a'"),
        (lambda model: {"a": model(X).mean()}, DataError, r"residuals 'a' are \[\]; give a tensor .* one row"),
        (lambda model: {"b": model(X)}, DataError, "differing: a, b"),
        (lambda model: {"a": model(X)[:, 0].to_sparse()}, DataError, "residuals 'a' are stored as torch.sparse_coo"),
        (lambda model: {"a": 1e160 * model(X)}, NumericalError, "12 rows, most .* residuals 'a', overflow"),
        (lambda model: {"a": OTHER(X)}, UnsupportedError, "part in the residuals 'a'. Was the optimizer made for"),
        (spent, DataError, "graph of the residuals 'a' is gone"),
    ],
)
def test_bad_residuals_are_named_and_nothing_is_lost(residuals, error, says):
    torch.manual_seed(0)
    model = network(2, 4, 1)
    optimizer = kf.NaturalGradient(model, kf.Residuals({"a": 1.0}), fit="gram")
    optimizer.step(lambda: {"a": model(X)[:, 0] - 1})
    before, state = flat(model), optimizer.state_dict()["sample_space"]
    with pytest.raises(error, match=says):
        optimizer.step(lambda: residuals(model))
    after = optimizer.state_dict()["sample_space"]
    last, kept = after.pop("last"), state.pop("last")
    assert torch.equal(flat(model), before) and all(torch.equal(last[name], kept[name]) for name in kept)
    assert after == state and last.keys() == kept.keys() == model.state_dict().keys()


def test_a_system_of_equations_may_be_one_term(monkeypatch):
    """Seen: a backward pass for each number, because all columns meet in the rows of the network."""

    def ends(split):
        torch.manual_seed(0)
        model, passes, grad = network(2, 5, 2), [], torch.autograd.grad

        def residuals():
            x = X.clone().requires_grad_()
            u = model(x)
            slopes = [grad(u[:, k].sum(), x, create_graph=True)[0] for k in (0, 1)]
            first, second = u[:, 0] * slopes[0][:, 0] + slopes[1][:, 1] - 1, slopes[0].sum(1) - u[:, 1]
            return {"a": first, "b": second} if split else {"ab": torch.stack([first, second], 1)}

        weights = {"a": 1.0, "b": 1.0} if split else {"ab": 2.0}
        optimizer = kf.NaturalGradient(model, kf.Residuals(weights), fit="gram")
        monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: passes.append(1) or grad(*args, **options))
        for _ in range(2):
            optimizer.step(residuals)
        monkeypatch.undo()
        return flat(model), len(passes)

    (apart, fewest), (together, passes) = ends(split=True), ends(split=False)
    close(together, apart, 1e-10)
    assert passes == fewest


@pytest.mark.parametrize("size", [1.0, 1e160])
def test_what_rounding_hides_names_the_term_of_the_longest_rows(size):
    model, damping = network(2, 4, 1), 0.1 if size > 1 else 1e-40
    optimizer = kf.NaturalGradient(model, kf.Residuals({"a": 1.0, "b": 1.0, "c": 1.0}), fit="gram", damping=damping)
    before = flat(model)
    with pytest.raises(NumericalError, match=r"rows.*, most of it those of the residuals 'b'.*nothing was changed"):
        optimizer.step(lambda: {"a": model(X), "b": 2 * size * model(X[:2]) - 1, "c": model(X)})
    assert torch.equal(flat(model), before)


def test_points_that_change_their_number_within_a_step_are_refused():
    """Seen: torch's words about the sizes of two tensors."""
    model, calls = network(2, 4, 1), []
    optimizer, before = kf.NaturalGradient(model, kf.Residuals({"a": 1.0, "b": 1.0}), fit="gram"), flat(model)

    def residuals():
        calls.append(1)
        return {"a": model(X), "b": model(X[len(calls) :]) - 1}

    with pytest.raises(DataError, match=r"residuals 'b' are \[11, 1\] and then \[10, 1\] within one step"):
        optimizer.step(residuals)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("many", [False, True])
def test_residuals_of_another_precision_than_the_weights_train(many):
    """Seen: torch's words about a dot product of two precisions."""
    x = torch.rand(400 if many else 12, 2, generator=torch.Generator().manual_seed(0)).double()
    for weights, kind in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        torch.manual_seed(0)
        model = network(2, 4, 1).to(weights)
        optimizer = kf.NaturalGradient(model, kf.Residuals({"a": 1.0, "b": 1.0}), fit="gram")
        fields = lambda: {"a": model(x.to(weights)).to(kind) - 1, "b": model(x[:3].to(weights)) - 1}  # noqa: B023, E731
        losses = [float(optimizer.step(fields)) for _ in range(8)]
        assert losses[-1] < 1e-4 * losses[0] and next(model.parameters()).dtype == weights


@pytest.mark.parametrize(
    ("outputs", "targets", "error", "says"),
    [
        (lambda model: model(X[:0]), torch.ones(0, 1), DataError, "the batch is empty"),
        (lambda model: model(X).detach(), torch.ones(12, 1), UnsupportedError, "no graph to the parameters"),
        (lambda model: OTHER(X), torch.ones(12, 1), UnsupportedError, "made for another model"),
        (lambda model: (model(X) - 1).square().mean(), torch.ones(12, 1), DataError, "single number"),
    ],
)
def test_bad_outputs_are_refused_and_nothing_is_lost(outputs, targets, error, says):
    model = network(2, 4, 1)
    optimizer, before = kf.NaturalGradient(model, kf.Gaussian(), fit="gram"), flat(model)
    with pytest.raises(error, match=says):
        optimizer.step(lambda: outputs(model), targets.double())
    assert torch.equal(flat(model), before)


def test_one_output_an_example_may_have_no_dimension_of_its_own():
    def end(shape):
        torch.manual_seed(0)
        model = network(2, 4, 1)
        optimizer = kf.NaturalGradient(model, kf.Gaussian(), fit="gram")
        for _ in range(2):
            optimizer.step(lambda: model(X).view(shape), torch.ones(12).double().view(shape))
        return flat(model)

    close(end((12,)), end((12, 1)), 1e-12)


def test_trial_steps_see_the_same_points_and_leave_buffers_alone():
    """Points from NumPy are repeated within a step like those of torch, and running averages move once a step."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4, momentum=0.5), nn.Linear(4, 1)).double()
    seen, means, average = [], [], torch.zeros(4).double()

    def residuals():
        x = torch.from_numpy(numpy.random.rand(8, 1))
        seen.append(float(x.sum()))
        means.append(model[0](x).mean(0).detach())
        return {"a": model(x)[:, 0] - x[:, 0].exp()}

    optimizer = kf.NaturalGradient(model, kf.Residuals({"a": 1.0}), fit="gram")
    for _ in range(2):
        first = len(seen)
        optimizer.step(residuals)
        average = 0.5 * average + 0.5 * means[first]
        assert len(seen) > first + 1 and len(set(seen[first:])) == 1
    close(model[1].running_mean, average, 1e-12)
    assert int(model[1].num_batches_tracked) == 2 and len(set(seen)) == 2


def test_examples_without_curvature_are_counted_once():
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = kf.NaturalGradient(model, kf.Bernoulli(), fit="gram")
    x = torch.tensor([[1e3, 0.0], [0.0, 1.0], [1.0, 0.0]]).double()
    with pytest.warns(kf.NumericalWarning, match="1 of 3 examples are left out"):
        optimizer.step(lambda: model(x), torch.tensor([[0.0], [1.0], [0.0]]).double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: model(x), torch.tensor([[0.0], [1.0], [0.0]]).double())


def test_what_has_no_meaning_here_is_refused():
    model = nn.Linear(1, 1)
    with pytest.raises(DataError, match="hold their own targets"):
        kf.NaturalGradient(model, kf.Residuals({"a": 1.0}), fit="gram").step(lambda: {}, torch.ones(1))
    with pytest.raises(TypeError, match="groups have no meaning"):
        kf.NaturalGradient(model, kf.Gaussian(), fit="gram", params=[{"params": list(model.parameters())}])
    with pytest.raises(ValueError, match="positive and finite"):
        kf.NaturalGradient(model, kf.Gaussian(), fit="gram", damping=math.inf)
    with pytest.raises(ValueError, match="not in the range"):
        kf.NaturalGradient(model, kf.Gaussian(), fit="gram", labels="sampled")
    with pytest.raises(TypeError, match="kl_limit"):
        kf.NaturalGradient(model, kf.Gaussian(), fit="gram", kl_limit=1.0)
    with pytest.raises(UnsupportedError, match="Settings are for estimates"):
        kf.NaturalGradient(model, kf.Gaussian(), fit=kf.Gram(max_rows=10))
    with pytest.raises(UnsupportedError, match="trained in the space of samples"):
        kf.NaturalGradient(model, kf.Residuals({"a": 1.0}))
    with pytest.raises(UnsupportedError, match="no groups"):
        kf.NaturalGradient(model, kf.Gaussian(), fit="gram").add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(DataError, match="evaluates the loss again"):
        kf.NaturalGradient(model, kf.Gaussian(), fit=kf.Gram()).step()


@pytest.mark.parametrize("how", ["state", "names", "one vector"])
def test_training_is_resumed_to_the_same_bits(how, tmp_path):
    def setup(**options):
        torch.manual_seed(0)
        model = network(2, 5, 1)
        return model, kf.NaturalGradient(model, kf.Gaussian(), fit="gram", **options)

    x, y = torch.randn(20, 2).double(), torch.randn(20, 1).double()
    model, optimizer = setup()
    for _ in range(3):
        optimizer.step(lambda: model(x), y)
    other, resumed = setup(lr=0.3)
    other.load_state_dict(model.state_dict())
    state = optimizer.state_dict()
    if how == "names":
        named = kf.named_state(optimizer)
        last = state["sample_space"]["last"]
        assert all(torch.equal(named[f"sample_space.last.{name}"], last[name]) for name in model.state_dict())
        with warnings.catch_warnings(action="ignore"):  # that one process saves
            dcp.save({"optimizer": named}, checkpoint_id=tmp_path)
        kf.load_named_state(resumed, tmp_path)
    else:
        if how == "one vector":  # as earlier versions kept it, which had no lr
            own = torch.cat([part.flatten() for part in state["sample_space"]["last"].values()])
            state["sample_space"]["last"] = own
            del state["param_groups"][0]["lr"]
            other, resumed = setup()
            other.load_state_dict(model.state_dict())
        resumed.load_state_dict(state)
    for _ in range(3):
        optimizer.step(lambda: model(x), y)
        resumed.step(lambda: other(x), y)
    assert torch.equal(flat(model), flat(other))
    larger = kf.NaturalGradient(network(2, 6, 1), kf.Gaussian(), fit="gram")
    says = "has 21 weights, and 25" if how == "one vector" else r"of 0\.weight has shape \[5, 2\], .* \[6, 2\]"
    with pytest.raises(DataError, match=f"another model: its last step {says}"):
        larger.load_state_dict(state)
    assert larger.steps == 0


def test_schedulers_shorten_the_step_that_is_tried_first():
    """It is refined by halves from there; what it remembers is the whole step, and at zero nothing moves."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 2).double(), torch.randn(20, 3).double()
    y = torch.randn(20, 2).double()
    optimizer = kf.NaturalGradient(model, kf.Gaussian(), fit="gram", lr=0.5, damping=1e-6)
    optimizer.bends = False
    factors = [1.0, 0.0, 4.0]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[min(step, 2)])
    F = dense_fisher(model, x, model(x).detach(), kf.Gaussian())
    for factor in factors:
        loss = -kf.Gaussian().log_prob(model(x), y).mean()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        before, last = flat(model), 0.0 if optimizer._last is None else 0.9 * optimizer._last
        optimizer.step(lambda: model(x), y)
        schedule.step()
        if not factor:
            assert torch.equal(before, flat(model)) and optimizer.step_length == 0
            continue
        assert optimizer.step_length == (0.5 if factor == 1 else 1)  # twice the step overshoots
        whole = last + torch.linalg.solve(F + optimizer.damping * metric(F), gradient - F @ (last + 0 * gradient))
        close(before - flat(model), optimizer.step_length * whole, 1e-8)
        close(optimizer._last, optimizer.step_length / (0.5 * factor) * whole, 1e-8)
    with pytest.warns(kf.NumericalWarning, match=r"lr=0\.001 multiplies the optimiser's own step") as caught:
        kf.NaturalGradient(model, kf.Gaussian(), fit="gram", lr=1e-3)
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match=r"lr=-1 must not"):
        kf.NaturalGradient(model, kf.Gaussian(), fit="gram", lr=-1)


def test_the_page_on_residuals_runs():
    text = (ROOT / "docs" / "residuals.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    exec("\n".join(blocks), {})
