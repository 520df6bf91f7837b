"""The exact quadratic model agrees with dense matrices."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.natural_gradient import quadratic
from kronfisher.natural_gradient.replay import Pass, Snapshot
from tests.exact import exact_fisher

LIKELIHOODS = {
    "gaussian": (kf.Gaussian(0.5), lambda n: torch.randn(n, 3, dtype=torch.float64)),
    "categorical": (kf.Categorical(), lambda n: torch.randint(3, (n,))),
    "bernoulli": (kf.Bernoulli(), lambda n: torch.rand(n, 3, dtype=torch.float64).round()),
}


def problem(name):
    likelihood, targets = LIKELIHOODS[name]
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), targets(6)
    loss = -likelihood.log_prob(model(x), y).mean().detach()
    done = Pass(lambda: model(x), Snapshot(model), targets=y, loss=loss, count=6.0)
    parameters = dict(model.named_parameters())
    return model, parameters, x, likelihood, done


def directions(parameters, count=2):
    return [{name: torch.randn_like(p) for name, p in parameters.items()} for _ in range(count)]


def flat(vectors):
    return torch.stack([torch.cat([v.flatten() for v in vector.values()]) for vector in vectors])


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("mode", ["at once", "one by one", "double backward"])
def test_products_are_those_of_the_exact_fisher_matrix(name, mode, monkeypatch):

    def fails(*_):
        raise NotImplementedError("no forward mode")

    if mode != "at once":
        monkeypatch.setattr(quadratic, "_all_at_once", fails)
    if mode == "double backward":
        monkeypatch.setattr(quadratic, "_forward_mode", fails)
    model, parameters, x, likelihood, done = problem(name)
    given = directions(parameters, 3)
    v = flat(given)
    expected = v @ exact_fisher(model, x, likelihood) @ v.T
    found = quadratic.gram(model, parameters, done, given, likelihood)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert (model in quadratic._one_by_one) == (mode != "at once")


TRICKY = {  # what draws at random, writes to buffers or has no batching rule, and whether directions can go together
    "dropout": ((6, 4), True, [nn.Linear(4, 8), nn.Dropout(0.4), nn.ReLU(), nn.Linear(8, 3)]),
    "convolution": (
        (6, 2, 6, 6),
        True,
        [
            nn.Conv2d(2, 4, 3, groups=2),
            nn.GroupNorm(2, 4),
            nn.MaxPool2d(2),
            nn.Dropout2d(0.3),
            nn.Flatten(),
            nn.Linear(16, 3),
        ],
    ),
    "batch norm": ((6, 4), False, [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)]),
    "attention": (
        (6, 5, 4),
        False,
        [nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True), nn.Flatten(), nn.Linear(20, 3)],
    ),
}


@pytest.mark.parametrize("name", TRICKY)
def test_directions_go_together_only_where_nothing_changes_by_it(name):
    shape, together, layers = TRICKY[name]
    model, x, y, likelihood = (
        nn.Sequential(*layers).double(),
        torch.randn(*shape).double(),
        torch.arange(6) % 3,
        kf.Categorical(),
    )
    snapshot = Snapshot(model)
    loss = -likelihood.log_prob(model(x), y).mean().detach()
    done = Pass(lambda: model(x), snapshot, targets=y, loss=loss, count=6.0)
    parameters = dict(model.named_parameters())
    first, second = directions(parameters)
    second.popitem()
    buffers, state = {k: b.clone() for k, b in model.named_buffers()}, torch.get_rng_state()
    found = quadratic.gram(model, parameters, done, [first, second], likelihood)
    assert (model not in quadratic._one_by_one) == together
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(buffers[k], b) for k, b in model.named_buffers())
    alone = [quadratic.gram(model, parameters, done, [d], likelihood)[0, 0] for d in (first, second)]
    torch.testing.assert_close(found.diagonal(), torch.stack(alone))
    both = {k: first[k] + second.get(k, 0) for k in first}
    total = quadratic.gram(model, parameters, done, [both], likelihood)[0, 0]
    torch.testing.assert_close(found.sum(), total)


def test_directions_may_leave_parameters_out():
    model, parameters, _, likelihood, done = problem("categorical")
    (whole,) = directions(parameters, 1)
    part = {name: v for name, v in whole.items() if name.startswith("3.")}
    zeroed = {name: v if name in part else torch.zeros_like(v) for name, v in whole.items()}
    one, other = (quadratic.gram(model, parameters, done, [d], likelihood) for d in (part, zeroed))
    torch.testing.assert_close(one, other)
    assert all(isinstance(p, nn.Parameter) for module in model.modules() for p in module._parameters.values())


def test_a_tied_weight_moves_in_both_places():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(3, (5,))
    likelihood = kf.Categorical()
    loss = -likelihood.log_prob(model(x), y).mean().detach()
    done = Pass(lambda: model(x), Snapshot(model), targets=y, loss=loss, count=5.0)
    parameters = dict(model.named_parameters())
    given = directions(parameters, 1)
    v = flat(given)
    expected = v @ exact_fisher(model, x, likelihood) @ v.T
    torch.testing.assert_close(quadratic.gram(model, parameters, done, given, likelihood), expected)


def test_attention_has_a_forward_mode():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).mean(1)

    model, x, y = Attention(), torch.randn(3, 5, 4), torch.randn(3, 4)
    likelihood = kf.Gaussian()
    loss = -likelihood.log_prob(model(x), y).mean().detach()
    done = Pass(lambda: model(x), Snapshot(model), targets=y, loss=loss, count=3.0)
    parameters = dict(model.named_parameters())
    given = directions(parameters, 1)
    found = quadratic.gram(model, parameters, done, given, likelihood)
    v = flat(given).double()
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        expected = v @ exact_fisher(model, x, likelihood) @ v.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_another_loss_on_the_same_batch_is_refused():
    model, parameters, _, likelihood, done = problem("gaussian")
    done.forward = lambda: model(torch.randn(6, 4, dtype=torch.float64))
    with pytest.raises(kf.DataError, match="another loss when it was run again"):
        quadratic.gram(model, parameters, done, directions(parameters, 1), likelihood)


def test_the_minimum_is_where_the_model_is_least():
    root = torch.randn(2, 2, dtype=torch.float64)
    matrix, slopes = root @ root.T + torch.eye(2), torch.tensor([-1.0, -0.3], dtype=torch.float64)
    found = quadratic.minimum(matrix, slopes, most=1e9)
    free = -torch.linalg.solve(matrix, slopes)
    expected = free if free[1] >= 0 else torch.stack([-slopes[0] / matrix[0, 0], torch.zeros(())])
    torch.testing.assert_close(found, expected.double())
    value = quadratic.model_change(matrix, slopes, found)
    for _ in range(20):
        other = (found + 0.1 * torch.randn(2)).double()
        other[1].clamp_(min=0)
        assert quadratic.model_change(matrix, slopes, other) >= value


def test_a_bounded_momentum_has_its_own_best_step():
    matrix = torch.tensor([[1.0, 0.2], [0.2, 0.1]], dtype=torch.float64)
    slopes = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    alpha, mu = quadratic.minimum(matrix, slopes, most=0.5).tolist()
    assert mu == 0.5 and alpha == pytest.approx(1.0 - 0.2 * 0.5)


def test_parallel_directions_count_once():
    matrix = torch.ones(2, 2, dtype=torch.float64)
    found = quadratic.minimum(matrix, torch.tensor([-1.0, -1.0], dtype=torch.float64))
    assert found.tolist() == [1.0, 0.0]
