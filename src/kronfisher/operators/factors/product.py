"""Both factors of a Kronecker product at once."""

import torch
from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.linalg import full_precision
from kronfisher.operators.factors.factor import Factor

__all__ = ["check_factors", "cholesky_solve", "outer", "sandwich", "separate", "size_text", "stack"]


def check_factors(tensors: dict[str, Tensor], owner: str) -> None:
    """DataError unless these are the factors of one product."""
    for key, tensor in tensors.items():
        if tensor.dim() not in (2, 3) or (tensor.dim() == 3 and tensor.shape[1] != tensor.shape[2]):
            raise DataError(f"{owner}: {key} must be [H, n, n], or [H, n] for a diagonal, not {list(tensor.shape)}")
    kinds = {(len(t), t.dtype, t.device) for t in tensors.values()}
    if len(kinds) > 1:
        raise DataError(
            f"{owner}: {' and '.join(tensors)} differ in groups, dtype or device: {sorted(map(str, kinds))}"
        )


def sandwich(left: Factor, rows: Tensor, right: Factor) -> Tensor:
    """``left W rightᵀ`` per group, for K matrices W ``[H, O, I]`` given as rows ``[K, H·O·I]``; the answer likewise."""
    groups, outputs, inputs = left.groups, left.width, right.width
    count = len(rows)
    with full_precision(rows.device.type):
        # [H, O, K·I] then [H, O·K, I]: two products per group whatever K is, and no copy of a factor.
        matrix = left.left(_columns(rows, groups, outputs, inputs))
        matrix = right.right(matrix.reshape(groups, outputs * count, inputs))
    return _rows(matrix, count, groups, outputs, inputs)


def cholesky_solve(left: Factor, rows: Tensor, right: Factor, *, whiten: bool = False) -> Tensor:
    """``B⁻¹ W A⁻¹`` from the Cholesky factors of B and A; `whiten`: ``L_B⁻ᵀ W L_A⁻¹``, of covariance ``B⁻¹ ⊗ A⁻¹``."""
    groups, outputs, inputs = left.groups, left.width, right.width
    count = len(rows)
    matrix = left.cholesky_solve(_columns(rows, groups, outputs, inputs), whiten=whiten)
    matrix = matrix.reshape(groups, outputs * count, inputs)
    matrix = right.cholesky_solve(matrix.mT, whiten=whiten).mT
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


def separate(root: Tensor) -> tuple[Tensor, Tensor] | None:
    """``[H, O, I]`` as the product of ``[H, O]`` and ``[H, I]``, or None if it is none."""
    outputs, inputs = root[:, :, 0], root[:, 0, :] / root[:, :1, 0]
    same = torch.allclose(
        outputs[:, :, None] * inputs[:, None, :], root, rtol=100 * torch.finfo(root.dtype).eps, atol=0.0
    )
    return (outputs, inputs) if same else None


def stack(*factors: Factor) -> Tensor:
    """``[R, H, n, n]``, or ``[R, H, n]`` where all are diagonals."""
    alike = len({factor.is_diagonal for factor in factors}) == 1
    return torch.stack([factor.tensor if alike else factor.dense() for factor in factors])


def size_text(right: Factor, left: Factor) -> str:
    """``I x O`` for reports, with the groups in front and diagonals marked."""
    text = f"{right.text}x{left.text}"
    return text if right.groups == 1 else f"{right.groups} x {text}"
