"""K-FOC is the leading singular pair of the rearranged block, whatever the use, the route and the batches."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fits import kfoc
from kronfisher.fits.rearrangement import ROUTES, make_source, nearest_kronecker, rearrange
from tests.conformance.examples import EXAMPLES
from tests.conformance.problems import SEED, problem
from tests.fits.pieces import SHARP, best, excess, fitted, gradients_of, random_samples, rearranged_matrix, samples_of
from tests.helpers.networks import grouped_images
from tests.helpers.pairs import missing_pairs


@lru_cache(maxsize=3)
def products(example, labels):
    """Layer → the best products of its groups, ``[H·O·I, H·O·I]``, with dense and with diagonal A."""
    p = problem(example, "categorical-sequence")
    found = {}
    for tap, a, g in p.rows(labels):
        G = torch.einsum("vhnto,hnti->hvnoi", g, a).flatten(1, 2)
        found[tap.name] = [torch.block_diag(*(best(group, diagonal)[0] for group in G)) for diagonal in (False, True)]
    return found


LABELS = ("exact", "sampled", "observed")
CASES = [
    (example, route, LABELS[(i + j) % len(LABELS)])
    for i, example in enumerate(EXAMPLES)
    for j, route in enumerate((None, *ROUTES[:-1]))
]
assert not missing_pairs(CASES, EXAMPLES, (None, *ROUTES[:-1]), LABELS)


@pytest.mark.parametrize(("example", "route", "labels"), CASES)
def test_is_the_leading_pair_of_the_dense_block(example, route, labels):
    p = problem(example, "categorical-sequence")
    fisher = kf.estimate(p.model, p.batch, p.likelihood, fit="kfac", labels="exact")
    plain = [a for tap, a, _ in p.rows("exact") if fisher[tap.name].A.dim() == 3]
    options = {"fit": kf.KFOC(**SHARP, route=route), "labels": labels, "samples": 2, "seed": SEED}
    if route in ("gram", "weights") and any(a.shape[2] > 1 for a in plain):
        with pytest.raises(ValueError, match="one position per sample"):
            kf.estimate(p.model, p.batch, p.likelihood, **options)
        return
    fisher = kf.estimate(p.model, p.batch, p.likelihood, **options)
    for name, truths in products(example, labels).items():
        A, B = fisher[name].A, fisher[name].B
        truth = truths[A.dim() == 2] / p.count
        found = fisher[name].to_dense()
        assert (found - truth).norm() <= 1e-8 * truth.norm(), name
        A = A if A.dim() == 3 else torch.diag_embed(A)
        assert torch.linalg.eigvalsh(A).min() >= -1e-14 * A.norm()
        assert torch.linalg.eigvalsh(B).min() >= -1e-14 * B.norm()
        left, right = (factor.diagonal(dim1=1, dim2=2).mean(1) for factor in (A, B))
        torch.testing.assert_close(left, right)  # the scale is split evenly


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("T", "H"), [(1, 1), (1, 3), (6, 1), (4, 2)])
def test_routes_agree_and_the_error_comes_with_the_answer(T, H, dtype):
    samples = random_samples(T=T, H=H, dtype=dtype)
    truth = [best(group.double()) for group in gradients_of(samples)]
    sharp = SHARP if dtype == torch.float64 else {"tolerance": 1e-6, "iterations": 5000}
    for name in ("gram", "weights", "rows", "explicit") if T == 1 else ("rows", "explicit"):
        pair = rearrange([samples.part(0, 13), samples.part(13, 40)], name).leading(**sharp)
        for h, (matrix, S) in enumerate(truth):
            X = torch.kron(pair.B[h], pair.A[h]).double() * pair.sigma[h].double()
            assert (X - matrix).norm() <= (1e-8 if dtype == torch.float64 else 1e-4) * matrix.norm()
            assert float(pair.sigma[h]) == pytest.approx(float(S[0]), rel=1e-5 if dtype == torch.float32 else 1e-12)
    fit = kf.KFOC(**sharp)
    operator, state, _ = fitted(fit, samples)
    blocks = [torch.einsum("koi,kpj->oipj", G, G).flatten(2).flatten(0, 1) for G in gradients_of(samples).double()]
    found = fit.error(state, operator / len(samples))
    if H == 1:
        expected = (blocks[0] - operator.to_dense().double()).norm() / blocks[0].norm()
        assert found == pytest.approx(float(expected), abs=1e-3 if dtype == torch.float32 else 1e-7)
    rows = gradients_of(samples).double().transpose(0, 1).flatten(1)
    whole = rows.mT @ rows  # with the terms between groups
    assert found == pytest.approx(float((whole - operator.to_dense().double()).norm() / whole.norm()), abs=1e-3)


def test_every_half_step_tells_its_error():
    samples = random_samples(T=3)
    source, A = rearrange([samples], "rows"), torch.eye(7, dtype=torch.float64)[None]
    G = gradients_of(samples)[0]
    block = torch.einsum("koi,kpj->oipj", G, G).flatten(2).flatten(0, 1)
    before = float("inf")
    for _ in range(4):
        B = source.outputs(A) / A.norm() ** 2
        for left, right in ((B, A), (B, A := source.inputs(B) / B.norm() ** 2)):
            squared = (block - torch.kron(left[0], right[0])).norm() ** 2
            assert float(squared) == pytest.approx(float(block.norm() ** 2 - left.norm() ** 2 * right.norm() ** 2))
            assert squared <= before * (1 + 1e-12)
            before = float(squared)


@pytest.mark.parametrize(("route", "T"), [("gram", 1), ("weights", 1), ("rows", 4), ("explicit", 4)])
def test_half_steps_end_where_another_would_change_nothing(route, T):
    """The step that shows it is not taken where those before it tell; what it would show is true."""
    saved = []
    for seed in range(8):
        samples = random_samples(n=120, T=T, I=12, O=9, seed=seed)
        sizes = (torch.randn(120, 1, 1, generator=torch.Generator().manual_seed(seed)) / 2).exp().double()
        samples = samples_of(samples.activations.dense() + 0.1, samples.gradients * sizes)
        source = rearrange([samples], route)
        pair = source.leading(tolerance=1e-3)
        steps = int(pair.steps)
        again = source.leading(tolerance=0, iterations=steps)
        torch.testing.assert_close(again.A, pair.A)
        whole = rearrange([samples], "rows")
        A = whole.inputs(whole.outputs(pair.A))
        assert (A / A.norm() - pair.A).norm() <= float(pair.change) <= 1e-3
        before = source.leading(tolerance=0, iterations=steps - 1)
        saved.append(float((before.A - pair.A).norm()) > 1e-3)
        best = source.leading(tolerance=1e-12, iterations=1000)
        assert float(best.sigma[0]) * (1 - 1e-6) <= float(pair.sigma[0]) <= float(best.sigma[0]) * (1 + 1e-12)
    assert sum(saved) >= 4


@pytest.mark.parametrize("T", [1, 5])
def test_never_worse_than_other_products_and_their_rescalings(T):
    samples = random_samples(T=T)
    G = gradients_of(samples)[0]
    block = torch.einsum("koi,kpj->oipj", G, G).flatten(2).flatten(0, 1)
    error = (block - fitted(kf.KFOC(**SHARP), samples)[0].to_dense()).norm()
    for fit in (kf.KFAC(), kf.KFAC("reduce")):
        other = fitted(fit, samples)[0].to_dense()
        scale = (block * other).sum() / other.norm() ** 2
        assert error <= (block - other).norm() and error <= (block - scale * other).norm()


def test_exact_where_it_has_to_be():
    one = random_samples(n=1)  # rank one
    G = gradients_of(one).flatten()
    torch.testing.assert_close(fitted(kf.KFOC(), one)[0].to_dense(), torch.outer(G, G), rtol=1e-10, atol=0)
    copies = samples_of(one.activations.dense().expand(1, 9, 1, 7), one.gradients.expand(1, 9, 1, 5))
    torch.testing.assert_close(fitted(kf.KFOC(), copies)[0].to_dense(), 9 * torch.outer(G, G), rtol=1e-10, atol=0)
    for I, O in ((1, 5), (6, 1)):
        for T in (1, 4):
            samples = random_samples(T=T, I=I, O=O)
            rows = gradients_of(samples)[0].flatten(1)
            dense = fitted(kf.KFOC(), samples)[0].to_dense()
            torch.testing.assert_close(dense, rows.mT @ rows, rtol=1e-10, atol=1e-14)
    for zero in (torch.zeros(1, 8, 1, 5), torch.zeros(1, 8, 3, 5)):
        none = samples_of(torch.rand(1, 8, zero.shape[2], 4), zero)
        operator, state, _ = fitted(kf.KFOC(), none)
        assert not operator.to_dense().any() and kf.KFOC().error(state, operator) == 0
        assert torch.isfinite((operator + 0.1).solve(torch.ones(20))).all()


@pytest.mark.parametrize("scale", [1e-18, 1e12])
def test_any_scale_of_gradients(scale):
    samples = random_samples(dtype=torch.float32)
    tiny = samples_of(samples.activations.dense(), samples.gradients * scale)
    whole = fitted(kf.KFOC(), samples)[0].to_dense().double()
    found = fitted(kf.KFOC(), tiny)[0].to_dense().double()
    assert (found / scale**2 - whole).norm() <= 1e-3 * whole.norm()


def mean_of_factors(batches):
    """What Schnaus, Lee & Triebel call approximate: means of the batches' factors, A of norm one, the scale in B."""
    A, B = 0, 0
    for batch in batches:
        U, S, V = torch.linalg.svd(rearranged_matrix(gradients_of(batch)[0]))
        sign = V[0].view(7, 7).trace().sign()
        A, B = A + sign * V[0].view(7, 7), B + sign * S[0] * U[:, 0].view(5, 5)
    return torch.kron(B, A / len(batches))


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("route", [*ROUTES[:-1], None])
@pytest.mark.parametrize("size", [1, 10])
def test_approx_is_the_papers_mean_of_factors(T, route, size):
    """Seen: both factors of a batch shared its scale, and their product shrank with the size of the batches."""
    if T > 1 and route in ("gram", "weights"):
        return
    samples = random_samples(n=40, T=T)
    batches = [samples.part(low, low + size) for low in range(0, 40, size)]
    operator = fitted(kf.KFOC("approx", **SHARP, route=route), *batches)[0]
    torch.testing.assert_close(operator.to_dense(), mean_of_factors(batches), rtol=1e-8, atol=1e-9)
    none = replace(samples, gradients=0 * samples.gradients)
    with_zeros = fitted(kf.KFOC("approx", **SHARP, route=route), none, *batches, none)[0]
    torch.testing.assert_close(with_zeros.to_dense(), operator.to_dense())


def test_narrow_weights_take_their_optimum_over_two_thousand_samples_with_its_error():
    samples = random_samples(n=2000, I=30, O=20)
    batches = [samples.part(low, low + 400) for low in range(0, 2000, 400)]
    fit = kf.KFOC()
    operator, state, passes = fitted(fit, *batches)
    assert passes == 1 and "by weights" in fit.notes(state) and "pieces" not in fit.notes(state)
    assert excess(operator, samples) <= 1e-6
    rows = gradients_of(samples)[0].flatten(1)
    block = rows.mT @ rows
    measured = float((block - operator.to_dense()).norm() / block.norm())
    assert fit.error(state, operator * (1 / state.count)) == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("T", [1, 4])
def test_memory_is_close_to_the_optimum_in_one_pass_and_exact_reaches_it(T, monkeypatch):
    monkeypatch.setattr(kfoc, "_PIECE", 64)
    samples = random_samples(n=960, T=T)
    batches = [samples.part(low, low + 40) for low in range(0, 960, 40)]
    matrix, _ = best(gradients_of(samples)[0])
    found = {rank: fitted(kf.KFOC(rank_memory=rank), *batches) for rank in (1, 4)}
    assert excess(found[4][0], samples) <= 0.002 and excess(found[1][0], samples) <= 0.01 and found[4][2] == 1
    assert float(found[4][1].sums["pieces"]) > 3
    operator, _, passes = fitted(kf.KFOC("exact", tolerance=1e-12, iterations=500), *batches)
    assert passes > 2 and (operator.to_dense() - matrix).norm() <= 1e-8 * matrix.norm()
    assert abs(excess(fitted(kf.KFOC("running"), *batches)[0], samples)) <= 0.02
    approx = fitted(kf.KFOC("approx", **SHARP), *batches)[0]
    assert excess(approx, samples) <= 0.1
    torch.testing.assert_close(approx.to_dense(), mean_of_factors(batches), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tail", [0.0, 1.5])
@pytest.mark.parametrize("workspace", [2**27, 2**12])
def test_other_terms_from_the_largest_samples_of_a_piece_stay_close_to_the_optimum(dtype, tail, workspace):
    samples = random_samples(n=1024, T=4, dtype=dtype)
    sizes = (tail * torch.randn(1024, 1, 1, generator=torch.Generator().manual_seed(3))).exp().to(dtype)
    samples = replace(samples, gradients=samples.gradients * sizes, workspace=workspace)
    batches = [samples.part(low, low + 128) for low in range(0, 1024, 128)]
    for route in ("explicit", "rows"):
        fit, block = kf.KFOC(route=route), Block("w", "linear", Window.of("w", torch.zeros(1, 5, 7)))
        state = fit.init((block,), replace(fit.plan((block,), 8), waiting=0), samples.gradients)
        for batch in batches:
            state = fit.update(state, (batch,))
        assert float(state.sums["pieces"]) == 8
        state.count = 1.0
        assert excess(fit.finish(state), samples) <= 0.002


@pytest.mark.parametrize("scale", [1e-140, 1e160])
def test_gradients_whose_squares_leave_float64_are_told(scale):
    samples = random_samples()
    far = samples_of(samples.activations.dense(), samples.gradients * scale)
    if scale > 1:
        with pytest.raises(kf.NumericalError, match="w: "):
            fitted(kf.KFOC(), far)
    else:
        assert torch.isfinite(fitted(kf.KFOC(), far)[0].to_dense()).all()


def test_more_memory_never_means_less():
    def terms(outputs, inputs, rank):
        block = Block("w", "linear", Window.of("w", torch.empty(outputs, inputs)).reshaped(1, outputs, inputs), None)
        return kf.KFOC(rank_memory=rank)._terms(block)

    assert [terms(300, 300, rank) for rank in (1, 3, 4, 8, 20)] == [1, 3, 4, 5, 5]
    assert [terms(600, 300, rank) for rank in (2, 4, 8)] == [2, 1, 1]


def test_running_is_the_best_product_for_the_last_one_and_the_new_batch():
    samples = random_samples(n=60)
    first, second = samples.part(0, 25), samples.part(25, 60)
    one = best(gradients_of(first)[0])[0]
    B, A = one.view(5, 7, 5, 7).diagonal(dim1=1, dim2=3).sum(-1), one.view(5, 7, 5, 7).diagonal(dim1=0, dim2=2).sum(-1)
    A, B = A.flatten(), B.flatten()
    product = torch.outer(B, A) * one.norm() / (A.norm() * B.norm())
    U, S, V = torch.linalg.svd(product + rearranged_matrix(gradients_of(second)[0]))
    truth = S[0] * torch.kron(U[:, 0].view(5, 5), V[0].view(7, 7))
    found = fitted(kf.KFOC("running", **SHARP), first, second)[0].to_dense()
    torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("route", ["rows", "explicit"])
def test_half_steps_keep_the_sign_of_antisymmetric_matrices(route):
    samples = random_samples(n=6, T=3)
    G, source = gradients_of(samples)[0], rearrange([samples], route)
    generator = torch.Generator().manual_seed(2)
    for odd in (False, True):
        A, B = (torch.randn(size, size, generator=generator, dtype=torch.float64) for size in (7, 5))
        A, B = (X - X.T if odd else X + X.T for X in (A, B))
        torch.testing.assert_close(source.outputs(A[None], odd)[0], (G @ A @ G.mT).sum(0))
        torch.testing.assert_close(source.inputs(B[None], odd)[0], (G.mT @ B @ G).sum(0))


@pytest.mark.parametrize(
    ("route", "n", "T"), [("gram", 90, 1), ("weights", 90, 1), ("rows", 160, 3), ("explicit", 160, 3)]
)
@pytest.mark.parametrize(("dtype", "scale"), [("float64", 1.0), ("float64", 1e-9), ("float64", 1e9), ("float32", 1e5)])
@pytest.mark.parametrize("groups", [1, 2])
def test_terms_of_a_piece_are_its_block_behind_a_projection_and_close_to_the_best(route, n, T, dtype, scale, groups):
    samples = random_samples(n=n, T=T, H=groups, dtype=getattr(torch, dtype))
    samples = samples_of(samples.activations.dense(), samples.gradients * scale)
    close = 1e-6 if dtype == "float64" else 1e-4
    _, *factors = rearrange([samples], route).leading_terms(4, tolerance=close / 10)
    A, B = (factor.double() for factor in factors)
    for h in range(groups):
        truth = rearranged_matrix(gradients_of(samples)[h].double())
        found = B[:, h].flatten(1).T @ A[:, h].flatten(1)
        torch.testing.assert_close((found * truth).sum(), found.square().sum(), rtol=close, atol=0)
        sigma = torch.linalg.svdvals(truth)
        left = (truth - found).square().sum()
        assert left <= sigma[4:].square().sum() + 0.01 * truth.square().sum()
        assert left <= 0.7 * sigma[1:].square().sum()
        if route == "gram":
            sizes = [factor[:, h].flatten(1) @ factor[:, h].flatten(1).T for factor in (A, B)]
            for gram in sizes:
                torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=close * float(gram.max()))
                assert (gram.diagonal().diff() <= 0).all()
            torch.testing.assert_close(*(gram.diagonal() for gram in sizes), rtol=10 * close, atol=0)
            assert (A[:, h].diagonal(dim1=1, dim2=2).sum(1) >= 0).all()


@pytest.mark.parametrize("route", ["rows", "explicit"])
@pytest.mark.parametrize("workspace", [2**27, 2**12])
def test_a_few_heavy_samples_are_among_those_that_tell_the_other_terms(route, workspace):
    samples = random_samples(n=256, T=3, I=12, O=9)
    heavy = torch.ones(256, 1, 1, dtype=torch.float64)
    heavy[1::32] = 6
    samples = replace(samples, gradients=samples.gradients * heavy, workspace=workspace)
    _, A, B = rearrange([samples], route).leading_terms(4, tolerance=1e-10)
    truth = rearranged_matrix(gradients_of(samples)[0])
    left = (truth - B.flatten(1).T @ A.flatten(1)).square().sum() - torch.linalg.svdvals(truth)[4:].square().sum()
    assert left <= 0.03 * truth.square().sum()  # .008 with the largest, .05 with every fourth


@pytest.mark.parametrize("n", [1, 2, 3])
def test_other_terms_are_found_from_few_samples_too(n):
    samples = random_samples(n=n, T=3)
    _, A, B = rearrange([samples], "explicit").leading_terms(4, tolerance=1e-10)
    truth = rearranged_matrix(gradients_of(samples)[0])
    even = (truth.view(5, 5, -1) + truth.view(5, 5, -1).transpose(0, 1)).view_as(truth) / 2  # the rest is in no term
    left, sigma = (even - B.flatten(1).T @ A.flatten(1)).square().sum(), torch.linalg.svdvals(even)
    assert left <= sigma[4:].square().sum() + 0.02 * truth.square().sum() <= 0.7 * sigma[1:].square().sum()


@pytest.mark.parametrize("aggregation", ["memory", "exact", "running", "approx"])
@pytest.mark.parametrize("labels", ["exact", "sampled", "observed"])
def test_every_damping_logdet_and_sample_works(aggregation, labels):
    model, loader = (
        grouped_images(seed=5, dtype=torch.float32),
        [(torch.randn(8, 2, 6, 6), torch.randint(3, (8,))) for _ in range(3)],
    )
    fisher = kf.estimate(model, loader, kf.Categorical(), fit=kf.KFOC(aggregation), labels=labels)
    for damped in (fisher + 1e-2, fisher + kf.Tikhonov(1e-2), fisher + kf.FactoredTikhonov(1e-2)):
        v = torch.randn(fisher.dim)
        torch.testing.assert_close(damped @ damped.solve(v), v, rtol=1e-3, atol=1e-3)
        assert (
            torch.isfinite(damped.logdet())
            and torch.isfinite(torch.cat([*map(torch.flatten, damped.sample(2).values())])).all()
        )
    error = fisher.error(loader)
    other = kf.estimate(model, loader, kf.Categorical(), fit="kfac", labels=labels).error(loader)
    if aggregation in ("memory", "exact"):
        assert all(error.blocks[name] <= other.blocks[name] + 1e-4 for name in error.blocks)
    for name, row in zip(error.blocks, fisher.report().rows, strict=True):
        if row.error is not None and aggregation == "memory":
            assert row.error == pytest.approx(error.blocks[name], abs=2e-3)
        assert "by " in row.notes


def test_ekfac_in_its_basis_is_no_worse():
    model, loader = (
        grouped_images(seed=5, dtype=torch.float32),
        [(torch.randn(8, 2, 6, 6), torch.randint(3, (8,))) for _ in range(3)],
    )
    for aggregation in ("memory", "exact"):
        product = kf.estimate(model, loader, kf.Categorical(), fit=kf.KFOC(aggregation)).error(loader)
        eigen = kf.estimate(model, loader, kf.Categorical(), fit=kf.EKFAC(kf.KFOC(aggregation))).error(loader)
        assert all(eigen.blocks[name] <= product.blocks[name] + 1e-4 for name in eigen.blocks)


def test_draws_do_not_share_a_batch_with_the_next_one():
    model, loader = (
        grouped_images(seed=5, dtype=torch.float32),
        [(torch.randn(5, 2, 6, 6), torch.randint(3, (5,))) for _ in range(2)],
    )
    fisher = kf.estimate(model, loader, kf.Categorical(), fit=kf.KFOC("approx"), labels="exact")
    assert all("2 pieces" in row.notes for row in fisher.report().rows)


def test_a_loader_may_fill_one_buffer_again_and_again():
    torch.manual_seed(0)
    model, data = nn.Linear(6, 4), torch.randn(5, 3, 6)

    def refilled():
        buffer = torch.empty(3, 6)
        for batch in data:
            yield buffer.copy_(batch)

    whole = kf.estimate(model, data.flatten(0, 1), kf.Gaussian(), fit="kfoc", labels="exact").to_dense()
    torch.testing.assert_close(
        kf.estimate(model, refilled(), kf.Gaussian(), fit="kfoc", labels="exact").to_dense(), whole
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "mean"}, "aggregation='mean'"),
        ({"rank_memory": 0}, "rank_memory"),
        ({"iterations": 0}, "iterations"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"route": "fast"}, "route='fast'"),
    ],
)
def test_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        kf.KFOC(**options)


@pytest.mark.parametrize("shapes", [((4, 4), (3, 3)), ((2, 5), (4, 3))])
def test_nearest_kronecker_is_the_truncated_svd(shapes):
    generator = torch.Generator().manual_seed(2)
    left = torch.randn(6, *shapes[0], generator=generator, dtype=torch.float64) * 1e-9
    right = torch.randn(6, *shapes[1], generator=generator, dtype=torch.float64) * 1e7
    rows = left.flatten(1).mT @ right.flatten(1)
    U, S, V = torch.linalg.svd(rows, full_matrices=False)
    for rank in (1, 2, 6):
        B, A, sigma = nearest_kronecker(left, right, rank)
        truth = (U[:, :rank] * S[:rank]) @ V[:rank]
        torch.testing.assert_close(B.flatten(1).mT @ A.flatten(1), truth, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(sigma, S[:6], rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(B.flatten(1).norm(dim=1), A.flatten(1).norm(dim=1))
        assert (A.diagonal(dim1=1, dim2=2).sum(1) >= 0).all()
    with pytest.raises(kf.DataError, match="rank=7"):
        nearest_kronecker(left, right, 7)
    with pytest.raises(kf.DataError, match="same s"):
        nearest_kronecker(left, right[:3])


def test_directions_do_not_fade_from_piece_to_piece():
    a = torch.randn(600, 3).relu() @ torch.randn(3, 300)  # of rank three, where there are 32 directions
    samples = samples_of(a[None, :, None], torch.randn(1, 600, 1, 3) @ torch.randn(3, 280))
    source = make_source([samples], "projected")
    for _ in range(60):
        source = make_source([samples], "projected", start=(source.right, source.left))
    for factor in (source.right, source.left):
        sizes = factor.abs().amax(dim=-2)
        assert sizes.min() > 1e-12 * sizes.max()  # numbers below 1e-38 would make every product ten times slower
