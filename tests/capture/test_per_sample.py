"""Parameters that only the gradients of single data tell about: exact, announced, counted, refused where nothing is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from kronfisher.capture.per_sample import per_sample_block, per_sample_gradients, samples_of_gradients
from kronfisher.fits import resolve
from tests.helpers.checks import SETTLED, assert_fallback
from tests.helpers.networks import Written
from tests.helpers.truth import exact_fisher

N = 6


class Kernel(torch.autograd.Function):
    """A recurrent kernel that a user wrote: it receives the weights, and nobody sees what it does with them."""

    @staticmethod
    def forward(ctx, kind, x, *weights):
        ctx.kind = kind
        ctx.save_for_backward(x, *weights)
        return Kernel.run(kind, x, weights)

    @staticmethod
    def run(kind, x, weights):
        module = kind(x.shape[-1], weights[1].shape[1], batch_first=True)
        named = dict(zip(module._flat_weights_names, weights, strict=True))
        return torch.func.functional_call(module, named, (x,))[0]

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            outputs = Kernel.run(ctx.kind, leaves[0], leaves[1:])
        return None, *torch.autograd.grad(outputs, leaves, gradient)


class Recurrent(nn.Module):
    """A recurrent layer, a table of words and a last layer; every second position may be ignored."""

    def __init__(self, kind=nn.GRU):
        super().__init__()
        self.embed, self.rnn, self.out = nn.Embedding(9, 3), kind(3, 4, batch_first=True), nn.Linear(4, 5)

    def forward(self, x):
        return self.out(Kernel.apply(type(self.rnn), self.embed(x), *self.rnn._flat_weights))


def words(n=N, length=4):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(9, (n, length), generator=generator), torch.randint(5, (n, length), generator=generator)


def recurrent(kind=nn.GRU):
    torch.manual_seed(0)
    return Recurrent(kind).double()


def flat(mapping):
    return torch.cat([value.flatten() for value in mapping.values()])


@pytest.mark.parametrize("workspace", [None, 10**9, 2 * 48 * 8, 1])
def test_gradients_of_single_data(workspace):
    model = recurrent()
    x, _ = words()
    outputs = model(x)
    vector = torch.randn(outputs.shape, dtype=torch.float64)
    leaves = {name: p for name, p in model.named_parameters() if name.startswith("rnn.")}
    parts = list(per_sample_gradients(outputs, vector, leaves, workspace))
    rows = {name: torch.cat([part[name] for part in parts]) for name in leaves}
    for k in range(N):  # each in a forward pass of its own
        own = torch.autograd.grad(model(x[k : k + 1]), list(leaves.values()), vector[k : k + 1])
        for name, gradient in zip(leaves, own, strict=True):
            torch.testing.assert_close(rows[name][k], gradient, rtol=1e-10, atol=1e-12)
    for name, p in leaves.items():  # in the form of samples they are the same again
        (G,) = samples_of_gradients(rows[name]).per_sample()
        block = per_sample_block(name, p)
        assert G.shape[1:2] == (N,) and (G.shape[0], *G.shape[2:]) == block.shape
        found = {name: torch.zeros_like(rows[name])}
        block.scatter(G[0].flatten(1), found)
        torch.testing.assert_close(found[name], rows[name])
        torch.testing.assert_close(
            samples_of_gradients(rows[name]).squares().flatten(), rows[name].square().sum(0).flatten()
        )


def test_against_vmap_of_grad():
    model = Written(lambda m, x: torch.einsum("ni,ij,nj->n", x, m.w.exp(), x)[:, None] * m.s.sigmoid(),
                    w=torch.randn(3, 3), s=torch.randn(2)).double()  # fmt: skip
    x = torch.randn(N, 3, dtype=torch.float64)

    def outputs(parameters, datum):
        return torch.func.functional_call(model, parameters, (datum[None],))[0]

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jacobians = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))(parameters, x)
    fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact")
    for name, jacobian in jacobians.items():
        torch.testing.assert_close(fisher.diagonal()[name], jacobian.square().sum((0, 1)) / N)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_between_others(kind):
    model = recurrent(kind)
    x, _ = words()
    fisher = assert_fallback(Written(lambda m, x: m.r(x).flatten(1), r=model), x, r"r\.rnn\.weight_hh_l0: used by")
    assert fisher["r.out.weight"].structure == "kronecker 5x5"
    assert fisher["r.embed.weight"].structure == "kronecker diag(9)x3"


@pytest.mark.parametrize("labels", ["exact", "sampled", "observed"])
@pytest.mark.parametrize("fit", [name for name in SETTLED if not resolve(name).by_batch])
def test_batches_do_not_matter(fit, labels):
    model = recurrent()
    x, y = words()
    y[0, 1:] = -100
    likelihood = kf.Categorical(class_dim=-1)
    options = {"fit": fit, "labels": labels, "samples": 2}
    whole = kf.estimate(model, (x, y), likelihood, **options)
    parts = kf.estimate(model, [(x[:1], y[:1]), (x[1:4], y[1:4]), (x[4:], y[4:])], likelihood, **options)
    torch.testing.assert_close(parts.to_dense(), whole.to_dense(), rtol=1e-8, atol=1e-10)
    assert whole.count == N
    if fit in ("diagonal", "full"):
        names = [name for name in whole.names if name.startswith("rnn.")]
        truth = kf.estimate(model, (x, y), likelihood, **{**options, "fit": kf.Full(across_layers=True)}).diagonal()
        torch.testing.assert_close(flat({n: whole.diagonal()[n] for n in names}), flat({n: truth[n] for n in names}))


def test_a_small_budget_takes_a_few_data_at_a_time():
    model = recurrent()
    x, _ = words()
    options = {"likelihood": kf.Categorical(class_dim=-1), "fit": "diagonal"}
    whole = kf.estimate(model, x, **options)
    small = kf.estimate(model, x, **options, memory_budget=whole.bytes + 3000)
    torch.testing.assert_close(small.to_dense(), whole.to_dense(), rtol=1e-12, atol=0)


def test_what_it_costs_is_announced_and_counted(read_again):
    model, said = recurrent(), []
    kf.estimate(model, words(), kf.Categorical(class_dim=-1), fit="ekfac", samples=2, progress=said.append)
    announced = [line for line in said if "per-sample gradients" in line]
    assert len(announced) == 1  # the second pass is for the others
    assert announced[0].startswith(f"batch 0: {2 * N} backward passes for rnn.weight_ih_l0")
    assert f"{2 + 2 * N + 2} backward passes" in [line for line in said if line][-1]


def test_methods_and_notes():
    model = recurrent()
    x, _ = words()
    fisher = kf.estimate(model, x, kf.Categorical(class_dim=-1), fit="kfac")
    rows = {row.name: row for row in fisher.report().rows}
    assert rows["rnn.weight_hh_l0"].method == "fallback: Diagonal()"
    assert rows["rnn.weight_hh_l0"].notes == "fallback: used by KernelBackward out of sight"
    assert rows["out.weight"].notes == ""
    assert "fallback: diagonal 48" in str(fisher.report())
    across = kf.estimate(model, x, kf.Categorical(class_dim=-1), fit=kf.Full(across_layers=True))
    (block,) = across.info.blocks.values()
    assert (
        block.method == "Full(across_layers=True)" and "fallback: rnn.bias_hh_l0: used by KernelBackward" in block.notes
    )


def test_the_error_of_what_is_left_out():
    model = recurrent()
    x, _ = words()
    likelihood = kf.Categorical(class_dim=-1)
    fisher = kf.estimate(model, x, likelihood, labels="exact")
    truth = kf.estimate(model, x, likelihood, labels="exact", fit="full")
    errors = {name: error for name, error in fisher.error(x).blocks.items() if name.startswith("rnn.")}
    assert errors.keys() == {name for name, _ in model.named_parameters() if name.startswith("rnn.")}
    for name, error in errors.items():
        dense = truth[name].to_dense()
        left_out = float((dense - dense.diagonal().diag()).norm() / dense.norm())
        assert error == pytest.approx(left_out, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    model = Written(lambda m, x: x @ m.w.exp(), w=torch.randn(3, 2)).to(dtype)
    x = torch.randn(N, 3).to(dtype)
    fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact")
    assert fisher.dtype == torch.float32
    truth = exact_fisher(model.double(), x.double()).diagonal()
    assert torch.allclose(flat(fisher.diagonal()).double(), truth, rtol=0.05 if dtype == torch.bfloat16 else 1e-4)


def test_a_use_that_comes_too_late_is_refused():
    model = Written(lambda m, x: F.linear(x, m.w.abs() if len(x) > 2 else m.w), w=torch.randn(2, 3))
    x = torch.randn(5, 3)
    with pytest.raises(kf.UnsupportedError, match=r"batch 1: w: used by abs\. Earlier batches used it in another way"):
        kf.estimate(model, iter([x[:2], x[2:]]), kf.Gaussian())  # cannot be read again
    for data in ([x[:2], x[2:]], [x[2:], x[:2]]):
        fisher = kf.estimate(model, data, kf.Gaussian(), labels="exact")
        assert torch.allclose(flat(fisher.diagonal()).double(), exact_fisher(model, data).diagonal(), rtol=1e-4)


def test_a_parameter_that_some_batches_do_not_use():
    model = Written(lambda m, x: m.l(x) * (m.s.exp() if x[0, 0] > 0 else 1), l=nn.Linear(3, 2), s=torch.randn(2))
    x = torch.randn(8, 3).abs()
    data = [x[:3], -x[3:5], x[5:]]
    fisher = kf.estimate(model, data, kf.Gaussian(), labels="exact", fit="diagonal")
    assert torch.allclose(flat(fisher.diagonal()).double(), exact_fisher(model, data).diagonal(), rtol=1e-4)


def test_nothing_is_left_behind():
    model = recurrent()
    x, _ = words()
    kf.estimate(model, x, kf.Categorical(class_dim=-1))
    assert all(p.grad is None for p in model.parameters())


def test_coupled_below_what_is_not_understood():
    """Where nothing else looks, the places at which data meet the parameter are looked at."""
    for forward in (
        lambda m, x: (lambda h: h - h.mean(0))(x * m.s.exp()),
        lambda m, x: (lambda h: h + h.roll(1, 0))(torch.sub(x, m.s, alpha=2)),
        lambda m, x: (lambda h: h.cumsum(0))(Scaled.apply(x, m.s)),
    ):
        model = Written(forward, s=torch.ones(3))
        with pytest.raises(kf.UnsupportedError, match="mixes several examples"):
            kf.estimate(model, torch.randn(N, 3), kf.Gaussian())
        assert kf.estimate(model, torch.randn(1, 3), kf.Gaussian()).trace() >= 0


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, s):
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        return g * s, (g * x).sum(0)


def test_functions_of_weights_alone_are_no_reason_to_refuse():
    """A straight-through estimator makes a weight of a weight; what is made meets the data in a linear layer."""

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.round()

        @staticmethod
        def backward(ctx, g):
            return g

    model = Written(lambda m, x: F.linear(x, Rounded.apply(m.w), m.b).tanh(), w=torch.randn(2, 3), b=torch.randn(2))
    assert_fallback(model, torch.randn(N, 3), "w: used by Rounded")
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2), dim=None).eval()
    assert_fallback(normed, torch.randn(N, 3), r"parametrizations\.weight\.original1: used by")
