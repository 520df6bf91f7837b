"""The Fisher matrix as other libraries know linear operators."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

    from kronfisher.fisher.fisher import Fisher

__all__ = ["to_scipy"]


def to_scipy(fisher: "Fisher") -> "LinearOperator":
    """See `Fisher.to_scipy`."""
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise ImportError('SciPy is missing; pip install "kronfisher[scipy]"') from error

    dtype = str(fisher.dtype).removeprefix("torch.")

    def multiply(v: Any) -> Any:
        flat = torch.from_numpy(np.array(v, dtype=dtype, order="C")).to(fisher.device).reshape(fisher.dim, -1)
        return (fisher @ flat).cpu().numpy().reshape(v.shape)

    products = {"matvec": multiply, "rmatvec": multiply, "matmat": multiply, "rmatmat": multiply}
    make: Any = LinearOperator  # its stubs describe the subclasses' constructor
    return make((fisher.dim, fisher.dim), dtype=dtype, **products)
