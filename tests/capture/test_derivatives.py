"""Derivatives propagated forward: their numbers, what fits make of residuals that hold them, and what is refused."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.capture.derivatives import _ELEMENTWISE
from kronfisher.operators import Kronecker
from tests.helpers.close import close
from tests.helpers.residuals import laplacian, network, rows

BLOCKS = {"0.weight": ("0.weight", "0.bias"), "2.weight": ("2.weight", "2.bias"), "4.weight": ("4.weight", "4.bias")}


def problem():
    torch.manual_seed(0)
    return network(2, 5, 4, 1), torch.rand(7, 2).double(), torch.rand(3, 2).double()


def inside(model, x):
    """A residual with a value, slopes, second derivatives and a Laplacian."""
    found = kf.derivatives(model, x, second=[(0, 1), (1, 1)], laplacian=True)
    u, (along, across) = found.value[:, 0], found.first[:, :, 0].unbind(1)
    assert found.laplacian is not None
    return found.laplacian[:, 0] + u * along - across**2 + found.second[0, 1][:, 0] - 0.3 * found.second[1, 1][:, 0] - 1


def by_autograd(model, x):
    x = x.clone().requires_grad_()
    u = model(x)[:, 0]
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    second = [torch.autograd.grad(first[:, i].sum(), x, create_graph=True)[0] for i in range(2)]
    bent = second[0][:, 0] + second[1][:, 1]
    return bent + u * first[:, 0] - first[:, 1] ** 2 + second[0][:, 1] - 0.3 * second[1][:, 1] - 1


def gradients(model, numbers, name):
    """``G_k [K, O, I + 1]`` of a layer, its bias in the last column, by autograd."""
    J, at, parts = rows(numbers, model), 0, {}
    for each, p in model.named_parameters():
        parts[each] = J[:, at : at + p.numel()].reshape(len(J), len(p), -1)
        at += p.numel()
    return torch.cat([parts[each] for each in BLOCKS[name]], dim=2)


@pytest.mark.parametrize("kind", _ELEMENTWISE, ids=lambda kind: kind.__name__)
def test_numbers_and_their_gradients_are_those_of_autograd(kind):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 5), kind()), nn.Identity(), nn.Linear(5, 4, bias=False), kind(),
                          nn.Linear(4, 1)).double()  # fmt: skip
    x = torch.randn(6, 2).double()
    try:
        wanted = by_autograd(model, x)
    except RuntimeError:  # slopes that are constants have no graph to differentiate
        assert kind is nn.ReLU or kind is nn.LeakyReLU
        with torch.no_grad():
            found = kf.derivatives(model, x, laplacian=True)
        close(found.value, model(x).detach())
        assert found.laplacian is not None and not found.laplacian.any()
        return
    close(inside(model, x), wanted, 1e-12)
    close(rows(inside(model, x), model), rows(wanted, model), 1e-10)
    with torch.no_grad():
        alone = inside(model, x)
    assert not alone.requires_grad
    close(alone, wanted.detach(), 1e-12)


def test_exact_fits_are_exact_layer_by_layer_without_the_fallback():
    model, x, _ = problem()
    likelihood = kf.Residuals({"equation": 2.0})
    J = rows(likelihood.joined({"equation": by_autograd(model, x)}), model)
    forward = lambda m, batch: ({"equation": inside(m, batch)}, None)  # noqa: E731
    for fit in (kf.Full(across_layers=True), "gram"):
        fisher = kf.estimate(model, x, likelihood, fit=fit, labels="exact", forward=forward, strict=True)
        close(fisher.to_dense(), J.mT @ J, 1e-12)
    fisher = kf.estimate(model, x, likelihood, fit="diagonal", labels="exact", forward=forward, strict=True)
    close(torch.cat([v.flatten() for v in fisher.diagonal().values()]), J.square().sum(0), 1e-12)


def test_the_best_products_are_the_best_of_the_dense_truth():
    model, x, _ = problem()
    likelihood = kf.Residuals({"equation": 1.0})
    forward = lambda m, batch: ({"equation": inside(m, batch)}, None)  # noqa: E731
    numbers = likelihood.joined({"equation": by_autograd(model, x)})
    for fit, rank in ((kf.KFOC("exact", tolerance=1e-9), 1), (kf.KroneckerSum(2, tolerance=1e-9), 2)):
        fisher = kf.estimate(model, x, likelihood, fit=fit, labels="exact", forward=forward, strict=True)
        for name in BLOCKS:
            assert_best(fisher[name], gradients(model, numbers, name), rank)


def assert_best(operator, G, rank):
    """Its error is that of the leading singular values of the rearranged truth."""
    truth = torch.einsum("koi,kpj->oipj", G, G)
    singular = torch.linalg.svdvals(truth.permute(0, 2, 1, 3).flatten(2).flatten(0, 1))
    error = (operator.to_dense() - truth.flatten(2).flatten(0, 1)).norm()
    assert abs(float(error - singular[rank:].norm())) <= 1e-7 * float(singular.norm()) > 0


def test_kfac_has_one_position_for_each_propagated_quantity_and_a_bias_at_the_value():
    model, x, _ = problem()
    likelihood = kf.Residuals({"equation": 1.0})
    fisher = kf.estimate(model, x, likelihood, labels="exact", fit="kfac", strict=True,
                         forward=lambda m, batch: ({"equation": inside(m, batch)}, None))  # fmt: skip
    stack = torch.cat([x[:, None], torch.eye(2).double().expand(7, 2, 2), torch.zeros(7, 3, 2).double()], 1)
    z = stack @ model[0].weight.mT
    z = torch.cat([z[:, :1] + model[0].bias, z[:, 1:]], 1).detach().requires_grad_()

    def onward(z):
        """The rest of the network, written out for tanh."""
        y, s = torch.tanh(z[:, 0]), 1 - torch.tanh(z[:, 0]) ** 2
        b, t = -2 * y * s, z[:, 1:3]
        more = [(b * t[:, i] * t[:, j] + s * z[:, 3 + k])[:, None] for k, (i, j) in enumerate([(0, 1), (1, 1)])]
        bent = (b * (t**2).sum(1) + s * z[:, 5])[:, None]
        return torch.cat([y[:, None], s[:, None] * t, *more, bent], 1)

    h = onward(z) @ model[2].weight.mT
    h = torch.cat([h[:, :1] + model[2].bias, h[:, 1:]], 1)
    u, along, across, mixed, second, bent = (onward(h) @ model[4].weight[0]).unbind(1)
    residual = bent + (u + model[4].bias) * along - across**2 + mixed - 0.3 * second - 1
    close(residual, by_autograd(model, x), 1e-12)
    (g,) = torch.autograd.grad(likelihood.joined({"equation": residual}).sum(), z)
    a = torch.cat([stack, torch.zeros(7, 6, 1).double()], 2)
    a[:, 0, 2] = 1
    A, B = (part.flatten(0, 1).mT @ part.flatten(0, 1) for part in (a, g))
    close(fisher["0.weight"].to_dense(), torch.kron(B, A / 42), 1e-12)


def test_terms_add_up_to_a_product_each():
    """A boundary is a term of its own, and meets the same layers by an ordinary call."""
    model, x, edge = problem()
    both = kf.Residuals({"equation": 1.0, "boundary": 4.0})

    def of(name, weight):
        terms = {"equation": inside, "boundary": lambda m, _: m(edge)[:, 0]}
        return kf.estimate(model, x, kf.Residuals({name: weight}), fit="kfac", labels="exact", strict=True,
                           forward=lambda m, batch: ({name: terms[name](m, batch)}, None))  # fmt: skip

    first, second = of("equation", 1.0), of("boundary", 4.0)
    total = first + second
    close(total.to_dense(), first.to_dense() + second.to_dense(), 1e-14)
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    close(((total + 0.1) @ (total + 0.1).solve(v))["2.weight"], v["2.weight"], 1e-10)
    J = rows(both.joined({"equation": by_autograd(model, x), "boundary": model(edge)}), model)
    forward = lambda m, batch: ({"equation": inside(m, batch), "boundary": m(edge)}, None)  # noqa: E731
    exact = kf.estimate(model, x, both, fit="gram", labels="exact", forward=forward)
    close(exact.to_dense(), J.mT @ J, 1e-12)
    pooled = kf.estimate(model, x, both, fit="kfac", labels="exact", forward=forward, strict=True)
    products = [f.blocks["0.weight"] for f in (first, second)]
    assert all(isinstance(each, Kronecker) for each in products)
    # One product for both terms: 42 rows of the one and 3 of the other are pooled.
    A, B = (sum(n * each.A[0] for n, each in zip((42, 3), products, strict=True)), sum(each.B[0] for each in products))
    close(pooled["0.weight"].to_dense(), torch.kron(B, A / 45), 1e-12)


@pytest.mark.parametrize("fit, rank", [(kf.KFOC("exact", tolerance=1e-9), 1), (kf.KPSVD(tolerance=1e-9), 1),
                                       (kf.KroneckerSum(2, tolerance=1e-9), 2)], ids=str)  # fmt: skip
def test_other_derivatives_are_treated_by_the_rows_of_j(fit, rank):
    """Derivatives by autograd, and terms of their own numbers of points: the best products of the dense truth."""
    model, x, edge = problem()
    likelihood = kf.Residuals({"equation": 1.0, "boundary": 4.0})
    terms = lambda m, batch: {"equation": laplacian(m, batch) + m(batch)[:, 0] ** 2, "boundary": m(edge)}  # noqa: E731
    fisher = kf.estimate(model, x, likelihood, fit=fit, labels="exact", forward=lambda m, b: (terms(m, b), None))
    numbers = likelihood.joined(terms(model, x))
    for name, (weight, bias) in BLOCKS.items():
        G = gradients(model, numbers, name)
        assert_best(fisher[weight], G[..., :-1], rank)
        assert_best(fisher[bias], G[..., -1:], rank)
        assert "fallback" in fisher.info.blocks[weight].method
    with pytest.raises(kf.UnsupportedError, match=r"0\.weight"):
        kf.estimate(model, x, likelihood, fit=fit, forward=lambda m, b: (terms(m, b), None), strict=True)


def test_traces_and_corrected_eigenvalues_by_the_rows_of_j():
    model, x, edge = problem()
    likelihood = kf.Residuals({"equation": 1.0, "boundary": 4.0})
    terms = lambda m, batch: {"equation": laplacian(m, batch), "boundary": m(edge)}  # noqa: E731
    G = gradients(model, likelihood.joined(terms(model, x)), "2.weight")[..., :-1]
    found = {}
    for fit in ("tkfac", "ekfac-kfoc", "kfoc"):
        fisher = kf.estimate(model, x, likelihood, fit=fit, labels="exact", forward=lambda m, b: (terms(m, b), None))
        found[fit] = fisher["2.weight"]
    outputs, inputs = torch.einsum("koi,kpi->op", G, G), torch.einsum("koi,koj->ij", G, G)
    close(found["tkfac"].to_dense(), torch.kron(outputs, inputs) / G.square().sum(), 1e-12)
    truth = torch.einsum("koi,kpj->oipj", G, G).flatten(2).flatten(0, 1)
    best, corrected = ((found[name].to_dense() - truth).norm() for name in ("kfoc", "ekfac-kfoc"))
    assert corrected < best
    close(found["ekfac-kfoc"].trace(), truth.trace(), 1e-12)


class Sine(nn.Module):
    def forward(self, x):
        return x.sin()


def test_what_is_no_chain_is_refused_by_name():
    x = torch.rand(4, 2).double()
    hooked = network(2, 3, 1)
    hooked[0].register_forward_hook(lambda module, args, output: 2 * output)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 1)))
    for model, message in (
        (nn.Sequential(nn.Sequential(nn.Linear(2, 3), Sine())), r"0\.1 is Sine, .*autograd\.grad"),
        (hooked, r"0 is Linear with hooks"),
        (normed, r"0 is ParametrizedLinear"),
        (Sine(), r"the network is Sine"),
    ):
        with pytest.raises(kf.UnsupportedError, match=message):
            kf.derivatives(model, x)
    with pytest.raises(kf.DataError, match=r"coordinates 0 to 1"):
        kf.derivatives(network(2, 1), x, second=[(0, 2)])
    for odd in (x[0], x.long()):
        with pytest.raises(kf.DataError, match=r"points \[n, d\]"):
            kf.derivatives(network(2, 1), odd)


def test_transforms_of_functions_are_refused_with_the_reason():
    model, x, _ = problem()

    def bent(m, batch):
        own = lambda p: m(p[None])[0, 0]  # noqa: E731
        return {"equation": torch.func.vmap(lambda p: torch.func.jacrev(torch.func.grad(own))(p).trace())(batch)}, None

    for fit in ("kfac", "kfoc", "gram", "diagonal"):
        with pytest.raises(kf.UnsupportedError, match=r"0\.weight: linear runs inside vmap"):
            kf.estimate(model, x, kf.Residuals({"equation": 1.0}), fit=fit, labels="exact", forward=bent)
