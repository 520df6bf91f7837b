"""Dense linear algebra with one policy for precision, failure and fallback.

Everything that factorises or multiplies for a curvature estimate goes through here, so that precision does not depend
on global flags and a matrix that cannot be factorised is reported by the name of the block it belongs to.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from kronfisher.errors import NumericalError, NumericalWarning, SingularError, require, waiting

__all__ = [
    "WORKSPACE",
    "add_symmetric_product_",
    "all_finite",
    "cholesky",
    "chunks",
    "complete_",
    "eigh",
    "full_precision",
    "mirror",
    "mirror_",
    "multiply_rows",
    "multiply_symmetric",
    "negligible",
    "plain_arithmetic",
    "promote",
    "promoted",
    "stable_norm",
    "unwritten_zeros",
]

WORKSPACE = 2**27  # bytes of temporaries that a contraction may take unless a memory budget says less
_NARROW, _SMALL = 96, 2**16  # with fewer columns, or fewer numbers, a product is too small for splitting it to pay
_LEAF = 1008  # columns up to which panels go over all of them; wider ones no longer fit the cache
_FEW = 192  # columns of a product for narrower panels
_TILE, _CACHED = 128, 512  # of a wide matrix at once, and columns of one that fits the cache
_LARGE, _LINE = 2**17, 64  # bytes that the system gives by pages, not out of what was freed; and of a line of a cache


def full_precision(device_type: str = "cpu") -> AbstractContextManager[None]:
    """Run float32 products in float32, whatever the global matmul flags and autocast say.

    Second moments of bfloat16 or TF32 products lose the small eigenvalues that an inverse is made of.
    """
    precision, autocast = torch.get_float32_matmul_precision(), torch.is_autocast_enabled(device_type)
    if precision == "highest" and not autocast:
        return _NOTHING  # as usual: every layer of every batch asks
    return _full_precision(device_type, precision, autocast)


_NOTHING = nullcontext()


@contextmanager
def _full_precision(device_type: str, precision: str, autocast: bool) -> Iterator[None]:
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        if autocast:
            with torch.autocast(device_type, enabled=False):
                yield
        else:
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)


def promote(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better: half precisions become float32, float64 stays float64."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def all_finite(tensor: Tensor) -> Tensor:
    """Whether no number is NaN or infinite, as one flag on the tensor's device; False, too, where their sum overflows.

    One such number makes the sum one, in a quarter of the time that looking at each takes.

    Example:
        >>> all_finite(torch.tensor([1.0, float("nan")])), all_finite(torch.tensor([1.0, 2.0]))
        (tensor(False), tensor(True))
    """
    total = tensor.sum()
    return total - total == 0  # half of the calls of `isfinite`


@lru_cache(maxsize=64)
def promoted(dtype: torch.dtype) -> torch.dtype:
    """The dtype that `promote` gives: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def negligible(dtype: torch.dtype) -> float:
    """The share of the largest eigenvalue at and below which an eigenvalue cannot be told from zero."""
    return 10 * torch.finfo(dtype).eps


def stable_norm(tensor: Tensor) -> Tensor:
    """The Euclidean norm over the last axis, summed in float64: entries of 1e-30, as late in training, are not lost.

    In float32 the sum over a million entries would be wrong in the fifth digit, which is all that separates good fits.
    """
    if tensor.dtype != torch.float64:
        return torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float64).to(tensor.dtype)
    scale = tensor.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(tensor.dtype).tiny)
    return scale[..., 0] * torch.linalg.vector_norm(tensor / scale, dim=-1)


def add_symmetric_product_(total: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
    """``total += xᵀ x`` where only the upper triangle of `total` has to come out right; `mirror` fills in the rest.

    Torch has no symmetric rank-k update. Panels of few rows (or columns, as the numbers lie in memory) that end at the
    diagonal, straight into the sum, take .56 to .65 of the plain product's time.

    Args:
        total: ``[D, D]`` or ``[H, D, D]``, written to; may be a strided window.
        x: ``[R, D]`` or ``[H, R, D]``, R rows of D columns, of the same dtype.
        y: likewise, for ``xᵀ y`` where that is symmetric (or antisymmetric); None: x.

    Returns:
        `total`.

    Example:
        >>> mirror(add_symmetric_product_(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])))
        tensor([[10., 14.],
                [14., 20.]])
    """
    if total.dim() == 3 and len(total) == 1:
        rows = x[0]
        _add_upper_(total[0], rows, rows if y is None else y[0])
    elif total.dim() == 3:
        total.baddbmm_(x.mT, x if y is None else y)
    else:
        _add_upper_(total, x, x if y is None else y)
    return total


def _add_upper_(total: Tensor, x: Tensor, y: Tensor) -> None:
    width = total.shape[-1]
    if width < _NARROW or x.numel() < _SMALL:
        total.addmm_(x.mT, y)
    elif width > _LEAF:
        half = (width // 2 + 23) // 48 * 48
        _add_upper_(total[:half, :half], x[:, :half], y[:, :half])
        _add_upper_(total[half:, half:], x[:, half:], y[:, half:])
        total[:half, half:].addmm_(x[:, :half].mT, y[:, half:])
    else:
        panel = _panel(x)
        for low in range(0, width, panel):
            high = min(low + panel, width)
            if y.stride(-1) == 1:
                total[low:high, low:].addmm_(x[:, low:high].mT, y[:, low:])
            else:
                total[:high, low:high].addmm_(x[:, :high].mT, y[:, low:high])


def _panel(x: Tensor) -> int:
    """Columns of a panel: a processor's registers hold 48 numbers of float32, an accelerator wants few launches."""
    width = x.shape[-1]
    if x.device.type != "cpu":
        return -(-width // 4)
    return 48 if width <= _FEW else 96


def mirror(upper: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """`scale` times the symmetric matrix ``[..., D, D]`` with the upper triangle of `upper`."""
    return mirror_(upper * scale)


def mirror_(matrices: Tensor, odd: bool = False) -> Tensor:
    """The upper triangles of ``[..., D, D]`` onto the lower ones, in place; with the other sign where `odd`."""
    width = matrices.shape[-1]
    if width <= _TILE:
        matrices.triu_()
        return matrices.sub_(matrices.triu(1).mT) if odd else matrices.add_(matrices.triu(1).mT)
    keep = torch.ones(min(_TILE, width), min(_TILE, width), dtype=torch.bool, device=matrices.device).triu()
    # Tile by tile: a large matrix that is read by columns misses the cache at every number.
    for matrix in matrices.view(-1, width, width):
        for low in range(0, width, _TILE):
            high = min(low + _TILE, width)
            if low:
                matrix[low:high, :low] = _turned(matrix[:low, low:high], odd)
            corner = matrix[low:high, low:high]
            corner.copy_(torch.where(keep[: high - low, : high - low], corner, _turned(corner, odd)))
    return matrices


def complete_(total: Tensor, odd: bool = False) -> Tensor:
    """A sum of symmetric products ``[H, D, D]`` with both triangles; narrow ones were computed whole."""
    return total if total.shape[-1] < _NARROW else mirror_(total, odd)


def _turned(matrix: Tensor, odd: bool) -> Tensor:
    return -matrix.t() if odd else matrix.t()


def _not_factorised(matrix: Tensor, name: str) -> NumericalError:
    """The error for a matrix that has no factor: singular, or not finite."""
    if bool(torch.isfinite(matrix).all()):
        mean = matrix.diagonal(dim1=-2, dim2=-1).mean().item()
        if not mean and bool(matrix.any()):  # indefinite, and not zero
            return SingularError(singular_message(name, matrix.abs().max().item(), matrix.dtype, "largest element is"))
        return SingularError(singular_message(name, mean, matrix.dtype))
    return NumericalError(
        f"{name}: the matrix to factorise holds NaN or Inf. Look for NaN or Inf in the data, the weights or the "
        "loss; nothing was changed."
    )


def eigh(matrix: Tensor, name: str = "matrix", *, semidefinite: bool = True) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric (or Hermitian) matrix, with fallbacks that are visible.

    The matrix is symmetrised; if the solver fails, it is checked for finiteness and float64 in main memory is tried.

    Args:
        matrix: ``[..., D, D]``, real or complex.
        name: what the matrix is, for messages.
        semidefinite: negative eigenvalues are rounding noise: set them to zero.

    Returns:
        ``[..., D]`` ascending eigenvalues and ``[..., D, D]`` eigenvectors in columns.

    Raises:
        NumericalError: the matrix is not finite or cannot be decomposed at all.

    Example:
        >>> eigh(torch.diag(torch.tensor([2.0, 1.0])))[0]
        tensor([1., 2.])
    """
    symmetric = (matrix + matrix.mH) / 2
    pair = _decompose(symmetric, name)
    if pair is None:
        if not bool(torch.isfinite(symmetric).all()):
            raise _not_factorised(symmetric, name)
        # Solvers trip over rows of exact zeros (dead inputs). Moving all eigenvalues by a rounding error helps and
        # costs nothing.
        shift = symmetric.diagonal(dim1=-2, dim2=-1).abs().amax(-1, keepdim=True) * torch.finfo(matrix.dtype).eps
        pair = _decompose(symmetric + torch.diag_embed(shift.expand(symmetric.shape[:-1])), name)
        pair = pair and (pair[0] - shift, pair[1])
    if pair is None:
        warnings.warn(f"{name}: eigh failed in {matrix.dtype}; redone in float64", NumericalWarning, stacklevel=2)
        wide = torch.complex128 if matrix.is_complex() else torch.float64
        pair = _decompose(symmetric.to("cpu", wide), name)
    if pair is None:
        raise NumericalError(f"{name}: no eigendecomposition even in float64. Use a diagonal fit for this layer.")
    values, vectors = pair[0].to(matrix.device, matrix.dtype.to_real()), pair[1].to(matrix)
    return (values.clamp_min(0) if semidefinite else values), vectors


def _decompose(symmetric: Tensor, name: str) -> tuple[Tensor, Tensor] | None:
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return None
    finite = torch.isfinite(values).all()
    if waiting():  # training: another try is the caller's, at the end of the block
        require(finite, lambda: NumericalError(f"{name}: eigenvalues are not finite; use more damping, or float64"))
        return values, vectors
    return (values, vectors) if bool(finite) else None


def cholesky(matrix: Tensor, name: str = "matrix") -> Tensor:
    """The lower Cholesky factor of a positive definite matrix, of which only the lower triangle is read.

    Args:
        matrix: ``[..., D, D]``.
        name: what the matrix is, for messages.

    Returns:
        ``[..., D, D]``, lower triangular, ``L Lᵀ = matrix``.

    Raises:
        NumericalError: the matrix is not finite.
        SingularError: a pivot is not positive to working precision. Rounding hides about half of all matrices that lack
            one rank only; where that matters, look at the condition of the factor (as `operators.factors` does).

    Example:
        >>> cholesky(torch.tensor([[4.0]]))
        tensor([[2.]])
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    scale = matrix.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True).clamp_min(0).sqrt()
    tiny = (pivots <= scale * matrix.shape[-1] * torch.finfo(matrix.dtype).eps).any() | ~torch.isfinite(pivots).all()
    require(~((info != 0).any() | tiny), lambda: _not_factorised(matrix, name))
    return factor


def indefinite_message(name: str, low: float, high: float) -> str:
    """The message for a block that has negative eigenvalues where none may be."""
    return (
        f"{name} is indefinite: its eigenvalues go from {low:.3g} to {high:.3g}. Add damping of more than {-low:.3g}, "
        "choose a fit whose terms are all positive semidefinite, or change its spectrum explicitly: .clamped(floor) "
        "raises small eigenvalues, .absolute() takes their size."
    )


def singular_message(name: str, size: float, dtype: torch.dtype, what: str = "mean eigenvalue is") -> str:
    """The message for a block that cannot be inverted.

    Args:
        name: of the block.
        size: of its eigenvalues.
        dtype: its precision.
        what: which of them `size` is.
    """
    if not abs(size) > torch.finfo(dtype).tiny:  # no λ is large or small beside it
        return (
            f"{name} is singular: it is zero to {dtype} precision, because nothing reached it in these data (inputs of "
            "zero, dead units, a gradient of zero). Look for the cause; or leave these parameters out "
            "(requires_grad_(False)); or add damping of any size, (fisher + λ).solve(v), which gives v / λ there."
        )
    return (
        f"{name} is singular to {dtype} precision and has no inverse. Add damping first, for example "
        f"(fisher + λ).solve(v) with λ ≥ {abs(size) * torch.finfo(dtype).eps * 10:.1e} (its {what} {size:.3g})."
    )


def unwritten_zeros(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros of the dtype and on the device of `like`, of which only what is written takes memory on a processor.

    Torch writes its zeros. The system's own, which are given to a page when it is first written, let the sums of all
    layers grow while a backward pass releases what it has saved, rather than stand beside all of that.

    Example:
        >>> unwritten_zeros(torch.ones(2, dtype=torch.float64), (1, 2))
        tensor([[0., 0.]], dtype=torch.float64)
    """
    size = prod(shape) * like.element_size()
    if size < _LARGE or like.device.type != "cpu":
        return like.new_zeros(shape)
    memory = np.zeros(size + _LINE, dtype=np.uint8)
    start = -memory.ctypes.data % _LINE  # as torch's own begin
    return torch.from_numpy(memory[start : start + size]).view(like.dtype).view(*shape)


def chunks(total: int, bytes_each: int, workspace: int = WORKSPACE) -> Iterator[tuple[int, int]]:
    """Ranges of samples whose temporaries of `bytes_each` bytes a sample fit the workspace."""
    step = max(1, min(total, workspace // max(bytes_each, 1)))
    for low in range(0, total, step):
        yield low, min(low + step, total)


def multiply_rows(rows: Tensor, matrix: Tensor) -> Tensor:
    """``[H, m, n, D]`` times ``[H, D, R]`` as one product a group; broadcasting would copy the matrix for every m."""
    return (rows.flatten(1, 2) @ matrix).unflatten(1, rows.shape[1:3])


def multiply_symmetric(upper: Tensor, v: Tensor) -> Tensor:
    """The symmetric matrix ``[H, D, D]`` with this upper triangle times ``[H, D, R]`` of few columns.

    A wide one panel by panel, each read from memory once for both triangles, without a copy.

    Example:
        >>> multiply_symmetric(torch.tensor([[[1.0, 2.0], [9.0, 3.0]]]), torch.eye(2)[None])
        tensor([[[1., 2.],
                 [2., 3.]]])
    """
    width = upper.shape[-1]
    if width <= _CACHED:
        return mirror(upper) @ v
    total = torch.zeros_like(v)
    for low in range(0, width, _TILE):
        high = min(low + _TILE, width)
        total[:, low:high] += mirror(upper[:, low:high, low:high]) @ v[:, low:high]
        if high < width:
            panel = upper[:, low:high, high:]
            total[:, low:high] += panel @ v[:, high:]
            total[:, high:] += (v[:, low:high].mT @ panel).mT
    return total


def plain_arithmetic(device: torch.device) -> AbstractContextManager[None]:
    """Ordinary tensors without graphs, in full precision, whatever the caller's modes are."""
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return _plain_arithmetic(device)
    return full_precision(device.type)  # as within a step


@contextmanager
def _plain_arithmetic(device: torch.device) -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad(), full_precision(device.type):
        yield
