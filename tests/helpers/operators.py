"""One operator of every kind and shape, each with the dense matrix it stands for, built independently in float64."""

from itertools import pairwise

import torch

from kronfisher.operators import (
    Dense,
    DenseBasis,
    Diagonal,
    Eigen,
    Kronecker,
    KroneckerBasis,
    KroneckerSum,
    OuterSum,
    Prototyped,
    Tridiagonal,
)
from kronfisher.operators.rows import OuterRows, PlainRows, Rows
from tests.helpers.truth import completed

GROUPS, OUTPUTS, INPUTS = (1, 3), 2, 4


def spd(*shape, seed):
    """Symmetric positive definite, far from the identity, condition about 30."""
    g = torch.randn(*shape, shape[-1] + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return g @ g.mT + 0.3 * torch.eye(shape[-1], dtype=torch.float64)


def positive(*shape, seed):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.2


def orthogonal(*shape, seed):
    return torch.linalg.eigh(spd(*shape, seed=seed)).eigenvectors


def full(side):
    return side if side.dim() == 3 else torch.stack([row.diag() for row in side])


def kron(B, A):
    return torch.block_diag(*(torch.kron(b, a) for b, a in zip(full(B), full(A), strict=True)))


def kronecker(groups, diagonal_a=False, diagonal_b=False, seed=0, inputs=INPUTS, outputs=OUTPUTS):
    A = positive(groups, inputs, seed=seed) if diagonal_a else spd(groups, inputs, seed=seed)
    B = positive(groups, outputs, seed=seed + 1) if diagonal_b else spd(groups, outputs, seed=seed + 1)
    return Kronecker(A, B, name="layer.weight"), kron(B, A)


def eigenvalue_corrected(groups):
    UA, UB = orthogonal(groups, INPUTS, seed=2), orthogonal(groups, OUTPUTS, seed=3)
    values = positive(groups * INPUTS * OUTPUTS, seed=4)
    U = kron(UB, UA)
    return Eigen(KroneckerBasis(UA, UB), values, name="layer.weight"), U @ values.diag() @ U.T


def prototyped(groups, number=3, inputs=INPUTS, outputs=OUTPUTS):
    generator = torch.Generator().manual_seed(30)
    A, B = (torch.randn(groups, number, n, dtype=torch.float64, generator=generator) for n in (inputs, outputs))
    UA, UB = orthogonal(groups, inputs, seed=2), orthogonal(groups, outputs, seed=3)
    values, weights = positive(groups * inputs * outputs, seed=4), positive(groups, number, seed=5)
    U = kron(UB, UA)
    Z = (B[..., None] * A[:, :, None]).flatten(2)
    inner = values.diag() + torch.block_diag(*(z.mT @ w.diag() @ z for z, w in zip(Z, weights, strict=True)))
    return Prototyped(Eigen(KroneckerBasis(UA, UB), values, name="layer.weight"), A, B, weights), U @ inner @ U.T


def prototyped_inverse(groups):
    X, dense = prototyped(groups)
    return X.inverse(), torch.linalg.inv(dense)


def dense_basis():
    U, values = orthogonal(5, seed=5), positive(5, seed=6)
    return Eigen(DenseBasis(U), values), U @ values.diag() @ U.T


def dense(size=6):
    matrix = spd(size, seed=7)
    return Dense(matrix, name="all"), matrix


def diagonal(size=6):
    values = positive(size, seed=8)
    return Diagonal(values, name="scale"), values.diag()


def total(groups):
    (X, x), (Y, y), (Z, z) = kronecker(groups), kronecker(groups, seed=20), diagonal(groups * INPUTS * OUTPUTS)
    return X + Y + Z, x + y + z


def shifted(groups):
    X, x = kronecker(groups)
    return X + 0.25, x + 0.25 * torch.eye(len(x), dtype=torch.float64)


def antisymmetric(*shape, seed):
    g = torch.randn(*shape, shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (g - g.mT) / 2


def kronecker_sum(groups, rank=2, kind="positive", shift=0.0, inputs=3, outputs=2, seed=0):
    """A positive definite sum; its terms but the first are positive, indefinite, or one antisymmetric."""
    sides = {}
    for key, size, start in (("A", inputs, seed), ("B", outputs, seed + 1)):
        terms = [spd(groups, size, seed=start + 10 * r) for r in range(rank)]
        if kind != "positive":  # small enough beside the first term
            terms[1:] = [0.15 * (term - term.diagonal(dim1=1, dim2=2).mean() * torch.eye(size)) for term in terms[1:]]
        if kind == "antisymmetric":
            terms[-1] = 0.4 * antisymmetric(groups, size, seed=start + 5)
        if kind == "diagonal" and key == "A":
            terms = [positive(groups, size, seed=start + 10 * r) for r in range(rank)]
        sides[key] = torch.stack(terms)
    X = KroneckerSum(**sides, name="layer.weight", shift=shift, nonnegative=kind in ("positive", "one"))
    dense = sum(kron(B, A) for A, B in zip(sides["A"], sides["B"], strict=True))
    assert torch.linalg.eigvalsh(dense)[0] > 0.1, "the fixture is to be positive definite"
    return X, dense + shift * torch.eye(len(dense)).double()


def pair(groups, kind):
    X, dense = kronecker_sum(groups, kind=kind)
    return X.inverse(), torch.linalg.inv(dense)


def tridiagonal(inputs=(3, 2, 4), outputs=(2, 3, 1), seed=0):
    """A chain whose sides are second moments of random vectors of all layers, and its dense twin."""
    parts = {}
    for key, widths, start in (("A", inputs, seed), ("B", outputs, seed + 1)):
        matrix, ends = spd(sum(widths), seed=start), [sum(widths[:k]) for k in range(len(widths) + 1)]
        cuts = [slice(low, high) for low, high in pairwise(ends)]
        parts[key] = [matrix[cut, cut] for cut in cuts]
        parts[f"{key} links"] = [matrix[x, y] for x, y in pairwise(cuts)]
    layers = tuple(Kronecker(A[None], B[None], "layer.weight") for A, B in zip(parts["A"], parts["B"], strict=True))
    X = Tridiagonal(layers, tuple(parts["A links"]), tuple(parts["B links"]), "chain")
    diagonal = [torch.kron(B, A) for A, B in zip(parts["A"], parts["B"], strict=True)]
    links = [torch.kron(B, A) for A, B in zip(parts["A links"], parts["B links"], strict=True)]
    return X, completed(diagonal, links)


def outer_sum(number, damping, seed=40):
    """Rows written out beside rows that are outer products, two of an example."""
    generator = torch.Generator().manual_seed(seed)
    plain, a, g = (torch.randn(*size, dtype=torch.float64, generator=generator) for size in
                   ((number, 3), (number // 2, INPUTS), (number, OUTPUTS)))  # fmt: skip
    examples = torch.arange(number) % (number // 2)
    J = torch.cat([plain, (g[:, :, None] * a[examples][:, None]).flatten(1)], dim=1)
    X = OuterSum(Rows((PlainRows(plain), OuterRows(a, g, examples))), 0.5, damping, "layer.weight")
    return X, 0.5 * J.mT @ J + damping * torch.eye(J.shape[1], dtype=torch.float64)


def inverse_of(X, dense):
    return X.inverse(), torch.linalg.inv(dense)


MAKE = {
    "tridiagonal-2": lambda: tridiagonal((2, 3), (3, 2)),
    "tridiagonal-3": tridiagonal,
    "tridiagonal-4": lambda: tridiagonal((2, 1, 3, 2), (1, 2, 2, 2)),
    "tridiagonal-inverse": lambda: inverse_of(*tridiagonal()),
    **{f"kronecker-{h}": lambda h=h: kronecker(h) for h in GROUPS},
    **{f"kronecker-diagonal-A-{h}": lambda h=h: kronecker(h, diagonal_a=True) for h in GROUPS},
    **{f"kronecker-diagonal-B-{h}": lambda h=h: kronecker(h, diagonal_b=True) for h in GROUPS},
    "kronecker-diagonal-both": lambda: kronecker(3, diagonal_a=True, diagonal_b=True),
    "kronecker-tall": lambda: kronecker(1, inputs=1, outputs=5),
    "kronecker-1x1": lambda: kronecker(1, inputs=1, outputs=1),
    **{f"eigenvalue-corrected-{h}": lambda h=h: eigenvalue_corrected(h) for h in GROUPS},
    **{f"kronecker-shifted-{h}": lambda h=h: shifted(h) for h in GROUPS},
    **{f"sum-1-{h}": lambda h=h: kronecker_sum(h, 1) for h in GROUPS},
    **{
        f"sum-{kind}-{rank}-{h}": lambda h=h, rank=rank, kind=kind: kronecker_sum(h, rank, kind)
        for rank, h, kind in (
            *((2, 3, kind) for kind in ("positive", "indefinite", "antisymmetric", "diagonal")),
            *((3, 1, kind) for kind in ("positive", "indefinite", "antisymmetric", "diagonal")),
            *((4, 3, kind) for kind in ("positive", "antisymmetric")),
        )
    },
    **{
        f"sum-shifted-{kind}-{rank}": lambda rank=rank, kind=kind: kronecker_sum(2, rank, kind, shift=0.3)
        for kind in ("positive", "antisymmetric")
        for rank in (1, 2, 3)
        if (rank, kind) != (1, "antisymmetric")
    },
    "sum-tall": lambda: kronecker_sum(1, inputs=1, outputs=5),
    "sum-1x1": lambda: kronecker_sum(1, 3, inputs=1, outputs=1),
    **{f"pair-{kind}": lambda kind=kind: pair(2, kind) for kind in ("indefinite", "antisymmetric", "diagonal")},
    **{f"prototyped-{h}": lambda h=h: prototyped(h) for h in GROUPS},
    "prototyped-many": lambda: prototyped(2, number=20),
    "prototyped-inverse": lambda: prototyped_inverse(3),
    "outer-sum-wide": lambda: outer_sum(6, 0.7),
    "outer-sum-tall": lambda: outer_sum(40, 0.0),
    "outer-sum-inverse": lambda: inverse_of(*outer_sum(6, 0.7)),
    "dense-basis": dense_basis,
    "dense": dense,
    "dense-1": lambda: dense(1),
    "diagonal": diagonal,
    "diagonal-1": lambda: diagonal(1),
    **{f"total-{h}": lambda h=h: total(h) for h in GROUPS},
}
