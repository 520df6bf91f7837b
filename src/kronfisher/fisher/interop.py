"""A matrix as other libraries know linear operators."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

__all__ = ["linear_operator"]


def linear_operator(
    dim: int, dtype: torch.dtype, device: torch.device, multiply: Callable[[Tensor], Tensor]
) -> "LinearOperator":
    """A symmetric matrix as SciPy knows it, from its products with vectors ``[dim, K]``.

    Raises:
        ImportError: SciPy is missing; ``pip install "kronfisher[scipy]"``.
    """
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise ImportError('SciPy is missing; pip install "kronfisher[scipy]"') from error

    name = str(dtype).removeprefix("torch.")

    def product(v: Any) -> Any:
        flat = torch.from_numpy(np.array(v, dtype=name, order="C")).to(device).reshape(dim, -1)
        return multiply(flat).cpu().numpy().reshape(v.shape)

    products = {"matvec": product, "rmatvec": product, "matmat": product, "rmatmat": product}
    make: Any = LinearOperator  # its stubs describe the subclasses' constructor
    return make((dim, dim), dtype=name, **products)
