"""The exact quadratic model agrees with dense matrices."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.optim import exact_fisher as exact
from kronfisher.optim.replay import ForwardPass, Snapshot
from tests.helpers.truth import exact_fisher

LIKELIHOODS = {
    "gaussian": (kf.Gaussian(0.5), lambda n: torch.randn(n, 3, dtype=torch.float64)),
    "categorical": (kf.Categorical(), lambda n: torch.randint(3, (n,))),
    "bernoulli": (kf.Bernoulli(), lambda n: torch.rand(n, 3, dtype=torch.float64).round()),
}


def problem(name):
    likelihood, targets = LIKELIHOODS[name]
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), targets(6)
    record, _ = passed(model, lambda: model(x), y, likelihood)
    parameters = dict(model.named_parameters())
    return model, parameters, x, likelihood, record


def directions(parameters, count=2):
    return [{name: torch.randn_like(p) for name, p in parameters.items()} for _ in range(count)]


def flat(vectors):
    return torch.stack([torch.cat([v.flatten() for v in vector.values()]) for vector in vectors])


def passed(model, function, y, likelihood):
    """A pass as training makes it, with the slopes of its loss along directions."""
    snapshot = Snapshot(model)
    outputs = function()
    loss = -likelihood.log_prob(outputs, y).sum(dtype=torch.float64) / len(outputs)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    record = ForwardPass(
        function, snapshot, values=outputs.detach(), targets=y, loss=loss.detach(), count=float(len(outputs))
    )

    def slopes(given):
        named = dict(zip(dict(model.named_parameters()), gradients, strict=True))
        return [float(sum((v * named[k]).sum() for k, v in d.items() if named[k] is not None)) for d in given]

    return record, slopes


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("way", exact.WAYS)
def test_products_are_those_of_the_exact_fisher_matrix(name, way, monkeypatch):
    def fails(*_):
        raise NotImplementedError("no forward mode")

    for before in exact.WAYS[: exact.WAYS.index(way)]:
        monkeypatch.setitem(exact._FUNCTIONS, before, fails)
    model, parameters, x, likelihood, record = problem(name)
    given = directions(parameters, 3)
    v = flat(given)
    expected = v @ exact_fisher(model, x, likelihood) @ v.T
    products = exact.FisherProducts()
    gram = products.gram(model, parameters, record, given, likelihood)
    torch.testing.assert_close(gram, expected, rtol=1e-9, atol=1e-10)
    assert products.way == way


class Listed(nn.Module):
    """Its second layer is met in a list, as no module's own parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.weights = [self.last.weight, self.last.bias]

    def forward(self, x):
        return nn.functional.linear(self.first(x).tanh(), *self.weights)


class Detaching(nn.Module):
    """A scale that no gradient goes through."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.first(x).tanh()
        with torch.no_grad():
            scale = hidden.abs().max()
        return self.last(hidden / scale)


class Asserting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        assert isinstance(self.first.weight, nn.Parameter)
        return self.last(self.first(x).tanh())


class Remembering(Detaching):
    """Keeps tensors and counts in attributes."""

    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, None

    def forward(self, x):
        self.calls, self.seen = self.calls + 1, self.first(x).detach()
        return self.last(self.first(x).tanh())


def convolution():
    drop = nn.Dropout2d(0.3)
    return nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), drop, nn.Flatten(), nn.Linear(64, 3))


TRICKY = {  # shape of the inputs, the model, and the way that is left for it
    "dropout": ((6, 4), lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 3)), "together"),
    "convolution": ((6, 2, 6, 6), convolution, "together"),
    "channels last": ((6, 2, 6, 6), lambda: convolution().to(memory_format=torch.channels_last), None),
    "attributes": ((6, 4), Remembering, "together"),
    "batch norm": ((6, 4), lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), "apart"),
    "attention": (
        (6, 5, 4),
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 8, 0.3, batch_first=True), nn.Flatten(), nn.Linear(20, 3)
        ),
        "apart or together",  # newer versions of torch draw other masks
    ),
    "in a list": ((6, 4), Listed, "backward"),
    "without gradient": ((6, 4), Detaching, "backward"),
    "assertion": ((6, 4), Asserting, "backward"),
}


@pytest.mark.parametrize("name", TRICKY)
def test_the_quickest_way_that_is_right_is_taken(name):
    shape, build, way = TRICKY[name]
    model, likelihood, y = build().double(), kf.Categorical(), torch.arange(6) % 3
    x = torch.randn(*shape).double()
    if name == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    record, slopes = passed(model, lambda: model(x), y, likelihood)
    parameters, given = dict(model.named_parameters()), directions(dict(model.named_parameters()))
    given[1].popitem()
    buffers, state = {k: b.clone() for k, b in model.named_buffers()}, torch.get_rng_state()
    attributes = [dict(module.__dict__) for module in model.modules()]
    products = exact.FisherProducts()
    gram = products.gram(model, parameters, record, given, likelihood, slopes(given))
    assert way is None or products.way in way.split(" or ")  # other masks may be drawn for channels last
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(buffers[k], b) for k, b in model.named_buffers())
    after = [module.__dict__ for module in model.modules()]
    assert all(
        old.keys() == new.keys() and all(old[k] is new[k] for k in old)
        for old, new in zip(attributes, after, strict=True)
    )
    truth = exact.FisherProducts("backward").gram(model, parameters, record, given, likelihood)
    torch.testing.assert_close(gram, truth)


def test_directions_may_leave_parameters_out():
    model, parameters, _, likelihood, record = problem("categorical")
    (whole,) = directions(parameters, 1)
    part = {name: v for name, v in whole.items() if name.startswith("3.")}
    zeroed = {name: v if name in part else torch.zeros_like(v) for name, v in whole.items()}
    one, other = (exact.FisherProducts().gram(model, parameters, record, [d], likelihood) for d in (part, zeroed))
    torch.testing.assert_close(one, other)
    assert all(isinstance(p, nn.Parameter) for module in model.modules() for p in module._parameters.values())


def test_a_tied_weight_moves_in_both_places():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(3, (5,))
    likelihood = kf.Categorical()
    record, _ = passed(model, lambda: model(x), y, likelihood)
    parameters = dict(model.named_parameters())
    given = directions(parameters, 1)
    v = flat(given)
    expected = v @ exact_fisher(model, x, likelihood) @ v.T
    torch.testing.assert_close(exact.FisherProducts().gram(model, parameters, record, given, likelihood), expected)


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
    record, _ = passed(model, lambda: model(x), y, likelihood)
    parameters = dict(model.named_parameters())
    given = directions(parameters, 1)
    gram = exact.FisherProducts().gram(model, parameters, record, given, likelihood)
    v = flat(given).double()
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        expected = v @ exact_fisher(model, x, likelihood) @ v.T
    torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-6)


def test_another_loss_on_the_same_batch_is_refused():
    model, parameters, _, likelihood, record = problem("gaussian")
    record.forward = lambda: model(torch.randn(6, 4, dtype=torch.float64))
    with pytest.raises(kf.DataError, match="another loss when it was run again"):
        exact.FisherProducts().gram(model, parameters, record, directions(parameters, 1), likelihood)
