"""The Markov completion of Kronecker products: what defines it, its inverse, damping, draws, singular sides, refusals.

All that it shares with other operators is tested with these, against the dense matrix that `conftest` builds.
"""

from itertools import pairwise

import pytest
import torch

import kronfisher as kf
from kronfisher.operators import Kronecker, Operator, Tridiagonal
from kronfisher.operators.operator import DENSE_LIMIT
from tests.helpers.close import close


def ranges(X):
    ends = [0]
    for layer in X.layers:
        ends.append(ends[-1] + layer.dim)
    return [slice(low, high) for low, high in pairwise(ends)]


@pytest.mark.parametrize("damping", [None, 0.3])
def test_it_is_the_matrix_of_given_neighbours_whose_inverse_is_block_tridiagonal(chain_of, damping):
    X, _ = chain_of((2, 3, 2, 2), (3, 1, 2, 2))
    X = X if damping is None else X + kf.FactoredTikhonov(damping)
    dense, at = X.to_dense(), ranges(X)
    assert torch.equal(dense, dense.T) or (dense - dense.T).norm() < 1e-12 * dense.norm()
    for k, layer in enumerate(X.layers):
        close(dense[at[k], at[k]], torch.kron(layer.B[0], layer.A[0]))
    for k in range(3):
        close(dense[at[k], at[k + 1]], torch.kron(X.B[k], X.A[k]))
    inverse = torch.linalg.inv(dense)
    for i, j in ((0, 2), (0, 3), (1, 3)):
        assert dense[at[i], at[j]].norm() > 1e-3 * dense.norm(), "nothing to compare"
        assert inverse[at[i], at[j]].norm() < 1e-10 * inverse.norm()
    assert torch.linalg.eigvalsh(dense)[0] > 0


def test_factored_damping_is_that_of_each_layer(chain_of):
    X, _ = chain_of()
    rule = kf.FactoredTikhonov(0.2)
    damped = X + rule
    assert isinstance(damped, Tridiagonal) and damped.definite and not X.definite
    for old, new in zip(X.layers, damped.layers, strict=True):
        close(new.to_dense(), rule(old).to_dense(), 1e-14)
    v = torch.randn(X.dim, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dense = damped.to_dense()
    close(damped.solve(v), torch.linalg.solve(dense, v))
    close(damped.inverse() @ v, torch.linalg.solve(dense, v))
    close(damped.inverse().diagonal(), torch.linalg.inv(dense).diagonal())
    close(damped.logdet(), torch.logdet(dense))


def test_how_a_scale_is_split_between_the_sides_does_not_matter(chain_of):
    X, dense = chain_of()
    c = (4.0, 0.25, 9.0)
    layers = tuple(Kronecker(x.A * s, x.B / s, x.name) for x, s in zip(X.layers, c, strict=True))
    roots = [(c[k] * c[k + 1]) ** 0.5 for k in range(2)]
    Y = Tridiagonal(
        layers,
        tuple(A * r for A, r in zip(X.A, roots, strict=True)),
        tuple(B / r for B, r in zip(X.B, roots, strict=True)),
    )
    close(Y.to_dense(), dense)
    close((Y + kf.FactoredTikhonov(0.1)).to_dense(), (X + kf.FactoredTikhonov(0.1)).to_dense())


def test_exact_damping_is_that_of_the_matrix(chain_of):
    X, dense = chain_of()
    shifted, identity = X + 0.5, torch.eye(X.dim, dtype=torch.float64)
    close(shifted.to_dense(), dense + 0.5 * identity)
    v = torch.randn(X.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(shifted.solve(v), torch.linalg.solve(dense + 0.5 * identity, v))


@pytest.mark.parametrize("inverse", [False, True])
def test_draws_have_its_covariance(chain_of, inverse):
    X, dense = chain_of()
    truth = torch.linalg.inv(dense) if inverse else dense
    maps = X.colour(torch.eye(X.dim, dtype=torch.float64), inverse=inverse)  # rows: what each white number does
    close(maps.T @ maps, truth)


def singular(chain_of):
    """Sides that lack directions, as those of dead inputs do, in all three layers."""
    (X, _), g = chain_of(), torch.Generator().manual_seed(1)
    parts = {}
    for key, layers in (("A", [x.A[0] for x in X.layers]), ("B", [x.B[0] for x in X.layers])):
        rows = torch.randn(2, sum(len(side) for side in layers), dtype=torch.float64, generator=g)
        split = rows.split([len(side) for side in layers], dim=1)
        parts[key] = [x.T @ x for x in split], [x.T @ y for x, y in pairwise(split)]
    layers = tuple(Kronecker(A[None], B[None], "dead") for A, B in zip(parts["A"][0], parts["B"][0], strict=True))
    return Tridiagonal(layers, tuple(parts["A"][1]), tuple(parts["B"][1]), "dead")


def test_without_damping_singular_sides_are_the_limit_of_small_damping_and_have_no_inverse(chain_of):
    X = singular(chain_of)
    dense = X.to_dense()
    near = (X + kf.FactoredTikhonov(1e-14)).to_dense()
    close(dense, near, 1e-5)
    assert torch.linalg.eigvalsh(dense)[0] > -1e-12 * dense.norm()
    close(X.frobenius_norm(), dense.norm())
    maps = X.colour(torch.eye(X.dim, dtype=torch.float64), inverse=False)
    close(maps.T @ maps, dense, 1e-7)
    for wanted in (lambda: X.solve(torch.ones(X.dim).double()), X.inverse, X.logdet):
        with pytest.raises(kf.SingularError, match="dead"):
            wanted()


def test_a_layer_that_the_next_determines_is_singular_until_it_is_damped():
    one = torch.eye(2, dtype=torch.float64)
    X = Tridiagonal((Kronecker(one[None], one[None]),) * 2, (one,), (one,), "twins")
    with pytest.raises(kf.SingularError, match="twins"):
        X.solve(torch.ones(8, dtype=torch.float64))
    damped = X + kf.FactoredTikhonov(1e-3)
    close(damped.solve(torch.ones(8).double()), torch.linalg.solve(damped.to_dense(), torch.ones(8).double()))


def test_damping_below_the_precision_of_a_link_is_told():
    one = torch.eye(2, dtype=torch.float32)
    twin = Kronecker(one[None], one[None] * (1 + 1e-7), definite=True)
    X = Tridiagonal((twin, twin), (one,), (one,), "twins")
    with pytest.warns(kf.NumericalWarning, match="twins"):
        assert torch.isfinite(X.solve(torch.ones(8))).all()


def test_single_precision_follows_double(chain_of):
    X, _ = chain_of((4, 5, 3), (3, 4, 5))
    narrow = X.to(dtype=torch.float32)
    assert narrow.dtype == torch.float32
    rule, v = kf.FactoredTikhonov(1e-2), torch.ones(X.dim)
    close((narrow + rule).solve(v).double(), (X + rule).solve(v.double()), 1e-4)
    close(narrow.to_dense().double(), X.to_dense(), 1e-5)


def test_what_it_has_no_structure_for_is_refused_above_a_size(chain_of, monkeypatch):
    X, dense = chain_of()
    close(X.eigenvalues(), torch.linalg.eigvalsh(dense).flip(0))
    monkeypatch.setattr("kronfisher.operators.operator.DENSE_LIMIT", X.dim - 1)
    X, _ = chain_of()
    for wanted in (X.eigenvalues, X.sqrt, lambda: X + 0.1, X.inverse().eigenvalues):
        with pytest.raises(kf.UnsupportedError, match=r"FactoredTikhonov"):
            wanted()
    (X + kf.FactoredTikhonov(0.1)).solve(torch.ones(X.dim).double())
    assert DENSE_LIMIT == 4096


def test_it_comes_back_from_its_tensors(chain_of):
    X, _ = chain_of()
    for operator in (X, X.inverse(), X + kf.FactoredTikhonov(0.1)):
        back = Operator.restored(operator.tensors(), {"kind": operator.kind, **operator.settings()})
        assert torch.equal(back.to_dense(), operator.to_dense()) and type(back) is type(operator)
        assert back.name == "chain"


def test_sides_that_do_not_fit_are_refused(chain_of):
    X, _ = chain_of()
    for layers, A, B in (
        (X.layers[:1], (), ()),
        (X.layers, X.A[:1], X.B[:1]),
        (X.layers, X.A[::-1], X.B),
        (X.layers, X.A, tuple(B.float() for B in X.B)),
    ):
        with pytest.raises(kf.DataError):
            Tridiagonal(layers, A, B)
