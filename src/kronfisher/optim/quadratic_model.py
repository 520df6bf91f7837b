"""The minimum of the quadratic model of the loss along the natural gradient and the last step."""

import torch
from torch import Tensor

__all__ = ["minimum", "model_change"]


def minimum(matrix: Tensor, slopes: Tensor, most: float = 1.0) -> Tensor:
    """The coefficients c ``[K]`` at which ``slopesᵀ c + ½ cᵀ matrix c`` is least, the second in ``[0, most]``.

    The second direction is the last step: going back along it, or further than it went, only follows the noise of one
    batch.

    Example:
        >>> minimum(torch.tensor([[2.0]]), torch.tensor([-4.0]))
        tensor([2.])
        >>> minimum(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([-4.0, 5.0]))
        tensor([2., 0.])
    """
    flat = [not float(entry) > 0 for entry in matrix.diagonal()]  # a zero direction, or one whose square vanishes
    first, *rest = slopes
    if not rest:
        return torch.zeros_like(slopes) if flat[0] else -slopes / matrix[0]
    roots, cross = matrix.diagonal().sqrt(), matrix[0, 1]
    second = torch.zeros_like(first)
    if flat[0] and not flat[1]:
        second = -rest[0] / matrix[1, 1]
    elif not any(flat) and float(1 - (across := cross / roots[0] / roots[1]).abs()) > 1e-7:  # else practically parallel
        second = (across * first / roots[0] - rest[0] / roots[1]) / (1 - across.square()) / roots[1]
    second = second.clamp(0, most)
    return torch.stack([torch.zeros_like(second) if flat[0] else -(first + cross * second) / matrix[0, 0], second])


def model_change(matrix: Tensor, slopes: Tensor, coefficients: Tensor) -> Tensor:
    """``slopesᵀ c + ½ cᵀ matrix c``, the predicted change of the loss."""
    return slopes @ coefficients + coefficients @ matrix @ coefficients / 2
