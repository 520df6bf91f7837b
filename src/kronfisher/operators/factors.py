"""The two sides of a Kronecker product: one square matrix per group ``[H, n, n]``, or only its diagonal ``[H, n]``.

A diagonal side stands for a factor too wide to be stored (a vocabulary). These few functions are the only place that
tells the two apart.
"""

import torch
from torch import Tensor

from kronfisher.errors import DataError, SingularError
from kronfisher.linalg import cholesky, eigh, full_precision, singular_message
from kronfisher.operators.operator import stable_norm
from kronfisher.operators.spectral import negligible


def check(sides: dict[str, Tensor], owner: str) -> None:
    """DataError unless these are sides of one product."""
    for key, side in sides.items():
        if side.dim() not in (2, 3) or (side.dim() == 3 and side.shape[1] != side.shape[2]):
            raise DataError(f"{owner}: {key} must be [H, n, n], or [H, n] for a diagonal, not {list(side.shape)}")
    kinds = {(len(s), s.dtype, s.device) for s in sides.values()}
    if len(kinds) > 1:
        raise DataError(f"{owner}: {' and '.join(sides)} differ in groups, dtype or device: {sorted(map(str, kinds))}")


def sandwich(left: Tensor, rows: Tensor, right: Tensor) -> Tensor:
    """``left W rightᵀ`` per group, for K matrices W ``[H, O, I]`` given as rows ``[K, H·O·I]``; the answer likewise."""
    groups, outputs, inputs = left.shape[0], left.shape[1], right.shape[1]
    count = len(rows)
    with full_precision(rows.device.type):
        # [H, O, K·I] then [H, O·K, I]: two products per group whatever K is, and no copy of a side.
        matrix = _columns(rows, groups, outputs, inputs)
        matrix = left @ matrix if left.dim() == 3 else left[..., None] * matrix
        matrix = matrix.reshape(groups, outputs * count, inputs)
        matrix = matrix @ right.mT if right.dim() == 3 else matrix * right[:, None, :]
    return _rows(matrix, count, groups, outputs, inputs)


def _columns(rows: Tensor, groups: int, outputs: int, inputs: int) -> Tensor:
    matrix = rows.reshape(len(rows), groups, outputs, inputs).permute(1, 2, 0, 3)
    return matrix.reshape(groups, outputs, len(rows) * inputs)


def _rows(matrix: Tensor, count: int, groups: int, outputs: int, inputs: int) -> Tensor:
    matrix = matrix.reshape(groups, outputs, count, inputs).permute(2, 0, 1, 3)
    return matrix.reshape(count, groups * outputs * inputs)


def outer(left: Tensor, right: Tensor) -> Tensor:
    """``[H, O]`` and ``[H, I]`` to the canonical ``[H·O·I]``."""
    return (left[:, :, None] * right[:, None, :]).reshape(-1)


def diagonal(side: Tensor) -> Tensor:
    """``[H, n]``."""
    return side.diagonal(dim1=1, dim2=2) if side.dim() == 3 else side


def dense(side: Tensor) -> Tensor:
    """``[H, n, n]``."""
    return side if side.dim() == 3 else torch.diag_embed(side)


def stacked(*several: Tensor) -> Tensor:
    """``[R, H, n, n]``, or ``[R, H, n]`` where all are diagonals."""
    alike = len({side.dim() for side in several}) == 1
    return torch.stack([side if alike else dense(side) for side in several])


def norms(side: Tensor) -> Tensor:
    """``[H]``, the Frobenius norms."""
    return stable_norm(side.flatten(1))


def decompose(side: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[H, n]`` and eigenvectors as a side; those of a diagonal are the identity, itself a diagonal."""
    return eigh(side, name) if side.dim() == 3 else (side, torch.ones_like(side))


def factor(side: Tensor, name: str, *, definite: bool = False) -> Tensor:
    """The lower Cholesky factor as a side.

    Raises:
        SingularError: an eigenvalue is numerically zero. Rounding hides that from the factorisation itself as often as
            not, so the condition is estimated too, unless `definite` says that the side was damped.
    """
    lower = cholesky(side, name) if side.dim() == 3 else side.sqrt()
    if side.dim() == 2:
        low, high = torch.aminmax(side, dim=1)
        singular = (low <= 0) if definite else low <= negligible(side.dtype) * high
    else:
        singular = torch.zeros(()) if definite else _condition(side, lower) * negligible(side.dtype) >= 1
    if bool(singular.any()):
        raise SingularError(singular_message(name, diagonal(side).mean().item(), side.dtype))
    return lower


def _condition(side: Tensor, lower: Tensor) -> Tensor:
    # [H] estimates of the largest over the smallest eigenvalue, from below and close where they are far apart: power
    # iterations on the matrix and on its inverse, at unit scale so that squares neither vanish nor overflow.
    scale = diagonal(side).amax(1)[:, None, None]
    side, lower = side / scale, lower / scale.sqrt()
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(side.shape[1], 1, generator=generator, dtype=side.dtype).to(side.device)
    high = low = probe.expand(len(side), -1, 1)
    with full_precision(side.device.type):
        for _ in range(4):
            high = side @ (high / torch.linalg.vector_norm(high, dim=1, keepdim=True))
            low = torch.cholesky_solve(low / torch.linalg.vector_norm(low, dim=1, keepdim=True), lower)
    return torch.linalg.vector_norm(high, dim=(1, 2)) * torch.linalg.vector_norm(low, dim=(1, 2))


def inverse(lower: Tensor) -> Tensor:
    """The inverse of the side whose Cholesky factor is `lower`."""
    return torch.cholesky_inverse(lower) if lower.dim() == 3 else lower.square().reciprocal()


def logdet(lower: Tensor) -> Tensor:
    """``[H]``, the log determinants of the side whose Cholesky factor is `lower`."""
    return 2 * diagonal(lower).log().sum(-1)


def solve(left: Tensor, rows: Tensor, right: Tensor, *, whiten: bool = False) -> Tensor:
    """``B⁻¹ W A⁻¹`` from the Cholesky factors of B and A; `whiten`: ``L_B⁻ᵀ W L_A⁻¹``, of covariance ``B⁻¹ ⊗ A⁻¹``."""
    groups, outputs, inputs = left.shape[0], left.shape[1], right.shape[1]
    count = len(rows)
    matrix = _solve_left(left, _columns(rows, groups, outputs, inputs), whiten)
    matrix = matrix.reshape(groups, outputs * count, inputs)
    matrix = _solve_left(right, matrix.mT, whiten).mT
    return _rows(matrix, count, groups, outputs, inputs)


def _solve_left(lower: Tensor, matrix: Tensor, whiten: bool) -> Tensor:
    if lower.dim() == 2:
        return matrix / (lower if whiten else lower.square())[..., None]
    if whiten:
        return torch.linalg.solve_triangular(lower.mT, matrix, upper=True)
    return torch.cholesky_solve(matrix, lower)


def transpose(side: Tensor) -> Tensor:
    """The transposed side."""
    return side.mT if side.dim() == 3 else side


def size(right: Tensor, left: Tensor) -> str:
    """``I x O`` for reports, with the groups in front and diagonal sides marked."""
    inputs, outputs = (f"{s.shape[1]}" if s.dim() == 3 else f"diag({s.shape[1]})" for s in (right, left))
    return f"{inputs}x{outputs}" if len(right) == 1 else f"{len(right)} x {inputs}x{outputs}"
