"""One way to compare tensors: the largest error and the norm of the error, both relative to the scale of the truth."""

import torch
from torch import Tensor

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}


def close(found, truth, tolerance=None, what="", *, vanishing=False) -> None:
    """Assert that two tensors, or matrices with ``to_dense()``, agree.

    Both ``‖found - truth‖ ≤ tolerance · ‖truth‖`` and the same for the largest element have to hold. A truth
    of nearly zero is nothing to compare with and fails, unless it is declared `vanishing`; what is compared with zero
    has to be exactly zero. The default tolerance is that of the coarser of the two dtypes.
    """
    found, truth = (value if isinstance(value, Tensor) else value.to_dense() for value in (found, truth))
    assert found.shape == truth.shape, f"{what}: {tuple(found.shape)} instead of {tuple(truth.shape)}"
    if tolerance is None:
        tolerance = max(TOLERANCES[each.dtype] for each in (found, truth))
    found, truth = found.detach().double(), truth.detach().double()
    assert vanishing or float(truth.norm()) > 1e-12, f"{what}: nothing to compare"
    for name, size in (("norm", Tensor.norm), ("largest element", lambda x: x.abs().max())):
        error, scale = float(size(found - truth)), float(size(truth))
        assert error <= tolerance * scale, (
            f"{what}: error {error:.1e} of the {name} {scale:.1e}, more than {tolerance:.0e}"
        )
