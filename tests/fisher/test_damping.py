"""How λ enters: exactly, or factor by factor."""

import copy
import warnings
from dataclasses import FrozenInstanceError

import pytest
import torch

from kronfisher.errors import NumericalWarning
from kronfisher.fisher import Fisher, Info
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fisher.damping import Damping, FactoredTikhonov, Tikhonov
from kronfisher.operators import Dense, Diagonal, Eigen, Kronecker, KroneckerBasis, Sum
from kronfisher.operators.factors import Factor


def spd(*shape, seed, rank=None):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(*shape, rank or shape[-1] + 2, dtype=torch.float64, generator=generator)
    return g @ g.mT


def factors(groups, diagonal_a=False, diagonal_b=False):
    A = torch.rand(groups, 4).double() + 0.1 if diagonal_a else spd(groups, 4, seed=0)
    B = torch.rand(groups, 3).double() * 50 if diagonal_b else 50 * spd(groups, 3, seed=1)
    return A, B


def full(side):
    return side if side.dim() == 3 else torch.diag_embed(side)


def eye(n):
    return torch.eye(n, dtype=torch.float64)


CASES = [(h, a, b) for h in (1, 3) for a in (False, True) for b in (False, True)]


@pytest.mark.parametrize(("groups", "diagonal_a", "diagonal_b"), CASES)
def test_factored_damping_is_the_formula(groups, diagonal_a, diagonal_b):
    A, B = factors(groups, diagonal_a, diagonal_b)
    X, value = Kronecker(A, B, name="fc.weight"), 0.7
    damped = X + FactoredTikhonov(value)
    blocks = []
    for a, b in zip(full(A), full(B), strict=True):
        pi = ((a.trace() / 4) / (b.trace() / 3)).sqrt()
        blocks.append(torch.kron(b + value**0.5 / pi * eye(3), a + value**0.5 * pi * eye(4)))
    truth = torch.block_diag(*blocks)
    assert isinstance(damped, Kronecker) and damped.name == "fc.weight"
    torch.testing.assert_close(damped.to_dense(), truth, rtol=1e-12, atol=1e-12)
    v = torch.randn(len(truth), 2).double()
    torch.testing.assert_close(damped.solve(v), torch.linalg.solve(truth, v), rtol=1e-10, atol=1e-10)
    # never less than exact damping
    exact = X.to_dense() + value * eye(len(truth))
    assert torch.linalg.eigvalsh(truth - exact).min() > -1e-9


@pytest.mark.parametrize("split", [1e-6, 1e-2, 3.0, 1e5])
@pytest.mark.parametrize(("groups", "diagonal_a", "diagonal_b"), CASES)
def test_factored_damping_does_not_depend_on_the_split_of_scale(groups, diagonal_a, diagonal_b, split):
    A, B = factors(groups, diagonal_a, diagonal_b)
    per_group = split ** torch.arange(1.0, groups + 1).double()
    scale_a = per_group.view(-1, *[1] * (A.dim() - 1))
    scale_b = per_group.view(-1, *[1] * (B.dim() - 1))
    reference = (Kronecker(A, B) + FactoredTikhonov(0.3)).to_dense()
    other = (Kronecker(A * scale_a, B / scale_b) + FactoredTikhonov(0.3)).to_dense()
    torch.testing.assert_close(other, reference, rtol=1e-10, atol=1e-10)


def test_factored_damping_inverts_by_cholesky(monkeypatch):
    from kronfisher.operators.factors import dense as sides

    monkeypatch.setattr(sides, "eigh", lambda *a, **k: pytest.fail("decomposed"))
    A, B = spd(1, 4, seed=0, rank=2), spd(1, 3, seed=1, rank=1)  # singular before damping
    damped = Kronecker(A, B) + FactoredTikhonov(1e-3)
    v = torch.randn(12).double()
    torch.testing.assert_close(damped.to_dense() @ damped.solve(v), v)
    torch.testing.assert_close(damped.to_dense() @ (damped.inverse() @ v), v)
    assert damped.logdet().isfinite() and damped.sample(2).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_product_becomes_the_identity_times_lambda(dtype):
    A, B = spd(3, 4, seed=0).to(dtype), spd(3, 3, seed=1).to(dtype)
    A[0], B[1] = 0, 0  # one side zero in two groups; the third stays
    diagonal = Kronecker(torch.zeros(1, 4, dtype=dtype), B[2:])
    for X, zero in ((Kronecker(A, B), 24), (Kronecker(A * 0, B * 0), 36), (diagonal, 12)):
        damped = (X + FactoredTikhonov(0.25)).to_dense()
        torch.testing.assert_close(damped[:zero, :zero], 0.25 * torch.eye(zero, dtype=dtype))
        assert (X + FactoredTikhonov(0.25)).logdet().isfinite()


@pytest.mark.parametrize("groups", [1, 3])
def test_corrected_eigenvalues_are_damped_as_the_product_of_their_margins(groups):
    A, B = factors(groups)
    (a, U), (b, V) = Factor.of(A).eigh("A"), Factor.of(B).eigh("B")
    S = b[:, :, None] * a[:, None, :]
    same = Eigen(KroneckerBasis(U.tensor, V.tensor), S.flatten()) + FactoredTikhonov(0.7)
    torch.testing.assert_close(same.to_dense(), (Kronecker(A, B) + FactoredTikhonov(0.7)).to_dense())
    S = S * torch.rand(S.shape, dtype=S.dtype) ** 3
    S[:, 0] = 0  # a row that no sample of the batch has touched
    damped = Eigen(KroneckerBasis(U.tensor, V.tensor), S.flatten()) + FactoredTikhonov(0.7)
    rows, columns, total = S.sum(2, keepdim=True), S.sum(1, keepdim=True), S.sum((1, 2), keepdim=True)
    ratio = (rows.mean(1, keepdim=True) / columns.mean(2, keepdim=True)).sqrt()  # of rows and columns, balanced below
    left, right = rows / ratio / total.sqrt(), columns * ratio / total.sqrt()
    pi = (right.mean(2, keepdim=True) / left.mean(1, keepdim=True)).sqrt()
    expected = S + pi * 0.7**0.5 * left + 0.7**0.5 / pi * right + 0.7
    torch.testing.assert_close(damped.values.reshape(S.shape), expected)
    nothing = Eigen(KroneckerBasis(U.tensor, V.tensor), torch.zeros(S.numel()).double()) + FactoredTikhonov(0.7)
    torch.testing.assert_close(nothing.to_dense(), 0.7 * eye(S.numel()))


def test_one_by_one():
    X = Kronecker(torch.tensor([[[4.0]]]), torch.tensor([[[9.0]]]))
    # pi = 2/3: (4 + 2/3 √λ)(9 + 3/2 √λ)
    torch.testing.assert_close((X + FactoredTikhonov(0.09)).to_dense(), torch.tensor([[4.2 * 9.45]]))


def test_every_other_structure_is_damped_exactly():
    A, B = factors(1)
    X = Kronecker(A, B)
    others = (X + 0.1, Diagonal(torch.rand(12).double()), Dense(spd(12, seed=3)), X + X)
    assert [type(other) for other in others] == [Eigen, Diagonal, Dense, Sum]
    for other in (X, *others):
        for damping in (Tikhonov(0.4), *([] if other is X else [FactoredTikhonov(0.4)])):
            truth = other.to_dense() + 0.4 * eye(12)
            torch.testing.assert_close((other + damping).to_dense(), truth, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(damping(other).to_dense(), truth, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close((damping + other).to_dense(), truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", sorted(Damping.kinds))
def test_every_rule(kind):
    rule = Damping.kinds[kind]
    A, B = factors(3)
    X = Kronecker(A, B)
    before = X.to_dense()
    zero, small, large = (rule(value)(X) for value in (0.0, 1e-3, 10.0))
    assert zero is X
    assert torch.linalg.eigvalsh(small.to_dense() - before).min() > 0  # larger, and larger with λ
    assert torch.linalg.eigvalsh(large.to_dense() - small.to_dense()).min() > 0
    assert torch.equal(X.to_dense(), before)
    assert rule().value is None and rule().at(0.5) == rule(0.5) and rule(1).value == 1.0
    with pytest.raises(ValueError, match=r"\.at\(λ\)"):
        X + rule()
    for bad in (-1e-12, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="at least 0"):
            rule(bad)
    with pytest.raises(FrozenInstanceError):
        rule(1.0).value = 2.0
    with pytest.raises(TypeError):
        rule(1.0) + 3.0
    assert copy.deepcopy(rule(0.5)) == rule(0.5)


@pytest.mark.parametrize("kind", sorted(Damping.kinds))
def test_every_rule_on_a_fisher(kind):
    rule = Damping.kinds[kind](0.2)
    weight, scale = torch.zeros(3, 4), torch.zeros(5)
    A, B = factors(1)
    X, Y = Kronecker(A, B), Diagonal(torch.rand(5).double())
    entries = (
        (Block("w", "linear", Window.of("w", weight[None])), X),
        (Block("s", "add", None, Window.of("s", scale[None])), Y),
    )
    F = Fisher(entries, {"w": (1, 3, 4), "s": (1, 5)}, Info(count=3))
    for damped in (F + rule, rule(F), rule + F):
        assert isinstance(damped, Fisher) and damped.count == 3
        torch.testing.assert_close(damped["w"].to_dense(), (X + rule).to_dense())
        torch.testing.assert_close(damped["s"].to_dense(), (Y + rule).to_dense())
        assert damped.info.changes == (f"+ {type(rule).__name__}(0.2)",)
        assert type(rule).__name__ in str(damped.report())
    assert F.info.changes == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_the_floor_keeps_a_vanishing_damping_invertible_and_says_so(dtype, seed):
    A, B = (spd(1, n, seed=seed + k, rank=r).to(dtype) for k, (n, r) in enumerate(((40, 39), (30, 3))))
    X = Kronecker(A, B, name="fc.weight")
    with pytest.warns(NumericalWarning, match=r"fc\.weight.*raised"):
        damped = X + FactoredTikhonov(1e-40)
    v = torch.randn(X.dim, dtype=dtype)
    assert damped.solve(v).isfinite().all() and damped.logdet().isfinite()
    assert (damped.inverse_sqrt() @ v).isfinite().all()  # through eigenvectors too: damped is not singular
    floor = (10 * torch.finfo(dtype).eps * 40) ** 2 * (X.trace() / X.dim).item()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference = X + FactoredTikhonov(1.01 * floor)
    torch.testing.assert_close(damped.A, reference.A, rtol=1e-2, atol=0)


def test_exact_damping_has_no_floor():
    X = Kronecker(torch.ones(1, 2, 2), torch.ones(1, 1, 1))
    with pytest.warns(NumericalWarning, match="precision"):
        damped = X + Tikhonov(1e-12)
    torch.testing.assert_close(damped.eigenvalues(), torch.tensor([2.0, 1e-12]))
