"""Block-tridiagonal K-FAC against the dense Markov completion of moments taken by hand."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.fisher.layout import gather
from kronfisher.fits import resolve
from kronfisher.operators import Kronecker, Tridiagonal
from tests.helpers.close import close
from tests.helpers.networks import Written, perceptron
from tests.helpers.truth import completed, dense, gradients, output_vectors, positions

LABELS = ("exact", "sampled", "observed")
CASES = {
    "categorical": (kf.Categorical(), lambda n: torch.randint(3, (n,))),
    "gaussian": (kf.Gaussian(0.7), lambda n: torch.randn(n, 3, dtype=torch.float64)),
}


class Recorder:
    """Inputs and outputs of linear layers and convolutions, by plain module hooks."""

    def __init__(self, model):
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        self.seen = {}
        for layer in self.layers:
            layer.register_forward_hook(self)

    def __call__(self, layer, inputs, output):
        self.seen[layer] = inputs[0].detach(), output


def rows(layer, a, y, g):
    """Inputs ``[R, I]`` with the bias coordinate and output gradients ``[R, O]``, row by row alike."""
    if isinstance(layer, nn.Conv2d):
        a = nn.functional.unfold(a, layer.kernel_size, padding=layer.padding, stride=layer.stride).mT
        g = g.flatten(2).mT
    a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
    return (a if layer.bias is None else torch.cat([a, torch.ones_like(a[:, :1])], dim=1)), g


def moments(model, x, vectors):
    """Layer by layer ``a [R, I]`` and ``g [V, R, O]``, from one backward pass for each vector."""
    recorder = Recorder(model)
    outputs = model(x)
    found = []
    for layer in recorder.layers:
        a, y = recorder.seen[layer]
        gs = [torch.autograd.grad(outputs, y, v, retain_graph=True)[0] for v in vectors]
        parts = [rows(layer, a, y, g) for g in gs]
        found.append((parts[0][0], torch.stack([g for _, g in parts])))
    return found


def completion(model, x, vectors):
    """``[P, P]`` in the order of the chain: every layer's weight with its bias as the last column."""
    found = moments(model, x, vectors)

    def block(k, j):
        (a, g), (b, h) = found[k], found[j]
        A, B = a.T @ b / len(a), torch.einsum("vro,vrp->op", g, h) / len(x)
        return torch.kron(B, A)

    size = range(len(found))
    return completed([block(k, k) for k in size], [block(k, k + 1) for k in size[:-1]])


def in_chain(fisher, model):
    """The dense matrix of the only chain, and where its elements lie among all parameters."""
    ((blocks, operator),) = fisher.entries
    assert isinstance(operator, Tridiagonal)
    index = gather(blocks, {name: place[None] for name, place in positions(model).items()})[0]
    return fisher.to_dense()[index[:, None], index], index


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_completion_of_moments_taken_by_hand(case, labels, bias):
    torch.manual_seed(1)
    likelihood, draw = CASES[case]
    model, x, y = perceptron(4, 5, 4, 3, bias=bias), torch.randn(40, 4).double(), draw(40)
    vectors = output_vectors(likelihood, model(x), y, labels, 2, 3)
    truth = completion(model, x, vectors)
    options = {"fit": kf.BlockTridiagonal(), "labels": labels, "samples": 2, "seed": 3}
    fisher = kf.estimate(model, (x, y), likelihood, **options)
    found, _ = in_chain(fisher, model)
    close(found, truth)
    again = kf.estimate(model, (x, y), likelihood, **options)
    assert torch.equal(fisher.to_dense(), again.to_dense())
    total = kf.estimate(model, (x, y), likelihood, reduction="sum", **options)
    close(total.to_dense(), 40 * fisher.to_dense(), 1e-12)
    parts = [(x[low:high], y[low:high]) for low, high in ((0, 7), (7, 8), (8, 40))]
    close(kf.estimate(model, parts, likelihood, **options).to_dense(), fisher.to_dense(), 1e-10)
    single = kf.estimate(model.float(), (x.float(), y if y.dtype == torch.long else y.float()), likelihood, **options)
    assert single.dtype == torch.float32
    if labels != "sampled":  # other numbers may be drawn from outputs of another precision
        close(single.to_dense(), fisher.to_dense(), 1e-3)


def test_the_neighbouring_blocks_are_better_than_none():
    torch.manual_seed(0)
    model, x = perceptron(4, 5, 4, 3), torch.randn(60, 4).double()
    truth = dense(gradients(model, x, output_vectors(kf.Gaussian(), model(x), x[:, :3], "exact")), len(x))
    chain, apart = (
        kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact") for fit in ("block-tridiagonal", "kfac")
    )
    far, near = ((fisher.to_dense() - truth).norm() for fisher in (apart, chain))
    assert near < 0.5 * far
    assert chain.error(x).relative == pytest.approx(float(near / truth.norm()))


def test_one_example_is_exact():
    """With one example, rows of the Jacobian are products, and all gradients are linear in those of the next layer."""
    torch.manual_seed(0)
    for case, (likelihood, draw) in CASES.items():
        model, x, y = perceptron(4, 5, 4, 3), torch.randn(1, 4).double(), draw(1)
        truth = dense(gradients(model, x, output_vectors(likelihood, model(x), y, "exact")), 1)
        fisher = kf.estimate(model, (x, y), likelihood, fit=kf.BlockTridiagonal(), labels="exact")
        close(fisher.to_dense(), truth, 1e-6 if case == "categorical" else 1e-8)


def test_deep_linear_networks_are_exact():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)).double(), torch.randn(30, 3).double()
    truth = dense(gradients(model, x, output_vectors(kf.Gaussian(), model(x), x[:, :2], "exact")), 30)
    fisher = kf.estimate(model, x, kf.Gaussian(), fit=kf.BlockTridiagonal(), labels="exact")
    close(fisher.to_dense(), truth)


def test_the_solution_is_the_papers_three_steps():
    """Section 4.3, written out with inverses: Psi, the conditional covariances, and back."""
    torch.manual_seed(2)
    model, x = perceptron(4, 5, 4, 3), torch.randn(30, 4).double()
    fisher = kf.estimate(model, x, kf.Categorical(), fit=kf.BlockTridiagonal(), labels="exact")
    damped = fisher + kf.FactoredTikhonov(1e-2)
    operator = damped["0.weight"]
    V = [torch.randn(1, layer.B.shape[1], layer.A.shape[1]).double()[0] for layer in operator.layers]
    A, B = [layer.A[0] for layer in operator.layers], [layer.B[0] for layer in operator.layers]
    for k, (own, layer) in enumerate(zip(operator.layers, fisher["0.weight"].layers, strict=True)):
        pi = ((layer.A[0].trace() / len(A[k])) / (layer.B[0].trace() / len(B[k]))).sqrt()
        close(own.A[0], layer.A[0] + 0.1 * pi * torch.eye(len(A[k])).double())
        close(own.B[0], layer.B[0] + 0.1 / pi * torch.eye(len(B[k])).double())
    gain = [(operator.B[k] @ B[k + 1].inverse(), operator.A[k] @ A[k + 1].inverse()) for k in range(2)]
    first = [V[k] - gain[k][0] @ V[k + 1] @ gain[k][1].T if k < 2 else V[k] for k in range(3)]
    second = []
    for k in range(3):
        S = torch.kron(B[k], A[k])
        if k < 2:
            S = S - torch.kron(gain[k][0] @ B[k + 1] @ gain[k][0].T, gain[k][1] @ A[k + 1] @ gain[k][1].T)
        second.append(torch.linalg.solve(S, first[k].flatten()).reshape(V[k].shape))
    third = [second[k] - gain[k - 1][0].T @ second[k - 1] @ gain[k - 1][1] if k else second[0] for k in range(3)]
    close(operator.solve(torch.cat([v.flatten() for v in V])), torch.cat([v.flatten() for v in third]))


def test_positions_are_rows():
    """Layers that act on positions apart, and convolutions that keep their number."""
    torch.manual_seed(0)
    tokens = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2), nn.Flatten())
    images = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1, bias=False), nn.Tanh(), nn.Flatten()
    )
    mixed = Written(  # one convolution of one pixel, and the same rows as tokens
        lambda m, x: m.tokens(m.conv(x).tanh().flatten(2).transpose(1, 2)).flatten(1),
        conv=nn.Conv2d(2, 3, 1),
        tokens=nn.Linear(3, 2),
    )
    for model, x in (
        (tokens, torch.randn(20, 5, 3)),
        (images, torch.randn(9, 2, 4, 4)),
        (mixed, torch.randn(9, 2, 4, 4)),
    ):
        model, x = model.double(), x.double()
        vectors = output_vectors(kf.Gaussian(), model(x), model(x).detach(), "exact")
        for data in (x, list(x.split(4))):
            fisher = kf.estimate(model, data, kf.Gaussian(), fit=kf.BlockTridiagonal(), labels="exact")
            found, _ = in_chain(fisher, model)
            close(found, completion(model, x, vectors))


def test_reduced_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Flatten()).double()
    x = torch.randn(30, 5, 3).double()
    vectors = output_vectors(kf.Gaussian(), model(x), model(x).detach(), "exact")
    found, _ = in_chain(
        kf.estimate(model, x, kf.Gaussian(), fit=kf.BlockTridiagonal(kf.KFAC("reduce")), labels="exact"), model
    )
    parts = []
    for a, g in moments(model, x, vectors):
        parts.append((a.unflatten(0, (30, 5)).sum(1), g.unflatten(1, (30, 5)).mean(2)))
    (a, g), (b, h) = parts
    links = torch.kron(torch.einsum("vro,vrp->op", g, h) / 30, a.T @ b / 30)
    diagonal = [torch.kron(torch.einsum("vro,vrp->op", g, g) / 30, a.T @ a / 30) for a, g in parts]
    close(found, completed(diagonal, [links]))


def test_masked_positions_do_not_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 5, 3).double(), torch.randint(3, (6, 5))
    y[1, 2:], y[4] = -100, -100
    options = {"fit": kf.BlockTridiagonal(), "labels": "exact"}
    whole = kf.estimate(model, (x, y), kf.Categorical(), **options)
    rows = x[y >= 0]
    plain = kf.estimate(model, (rows, y[y >= 0]), kf.Categorical(), **options)
    assert whole.count == 5 and plain.count == len(rows)
    close(whole["0.weight"].A[0], plain["0.weight"].A[0])
    close(whole["0.weight"].B[0] * 5, plain["0.weight"].B[0] * len(rows))
    padded = torch.cat([x, torch.randn(6, 2, 3).double()], 1), torch.cat([y, torch.full((6, 2), -100)], 1)
    close(kf.estimate(model, padded, kf.Categorical(), **options).to_dense(), whole.to_dense(), 1e-12)


def test_settings():
    with pytest.raises(ValueError, match="KFAC"):
        kf.BlockTridiagonal(kf.KFOC())  # pyright: ignore[reportArgumentType]
    assert resolve("block-tridiagonal") == kf.BlockTridiagonal(kf.KFAC())
    layer = nn.Linear(3, 2).double()
    fisher = kf.estimate(layer, torch.randn(9, 3).double(), kf.Gaussian(), fit="block-tridiagonal")
    assert isinstance(fisher["weight"], Kronecker)


def test_files(tmp_path):
    model, x = perceptron(4, 5, 4, 3), torch.randn(30, 4).double()
    fisher = kf.estimate(model, x, kf.Gaussian(), fit="block-tridiagonal") + kf.FactoredTikhonov(1e-3)
    fisher.save(tmp_path / "chain.safetensors")
    back = kf.load(tmp_path / "chain.safetensors", model)
    v = torch.randn(fisher.dim).double()
    assert torch.equal(back.solve(v), fisher.solve(v)) and torch.equal(back @ v, fisher @ v)
    assert torch.equal(
        torch.cat([t.flatten() for t in back.sample(2).values()]),
        torch.cat([t.flatten() for t in fisher.sample(2).values()]),
    )


def test_the_error_of_a_chain_needs_no_dense_matrix(monkeypatch):
    torch.manual_seed(0)
    tokens = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2), nn.Flatten())
    for model, x in ((perceptron(4, 5, 4, 3), torch.randn(20, 4)), (tokens.double(), torch.randn(7, 5, 3))):
        fisher = kf.estimate(model, x.double(), kf.Gaussian(), fit="block-tridiagonal", labels="exact")
        expected = fisher.error(x.double()).relative
        with monkeypatch.context() as patch:
            patch.setattr("kronfisher.estimation.error._WRITTEN_OUT", 0)
            patch.setattr(Tridiagonal, "to_dense", None)
            for data in (x.double(), list(x.double().split(3))):
                assert fisher.error(data).relative == pytest.approx(expected, rel=1e-7)
        assert expected > 0.01
