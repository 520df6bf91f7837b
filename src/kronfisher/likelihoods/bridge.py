"""The Laplace bridge: a Dirichlet distribution of class probabilities from a Gaussian over the logits."""

import torch
from torch import Tensor

from kronfisher.likelihoods.prediction import Prediction
from kronfisher.linalg import promote

__all__ = ["bridge"]


def bridge(outputs: Tensor, covariances: Tensor, axis: int) -> Prediction:
    """The prediction of the Dirichlet distribution that fits the Gaussian (Hobbhahn et al. 2022, arXiv:2003.01227).

    Logits are first conditioned to sum to zero, as their softmax does not depend on the sum.

    Args:
        outputs: logits ``[n, ...]``.
        covariances: ``[n, C, C]`` of the C (flattened) outputs of each example; covariances between positions do not
            enter.
        axis: the dimension of the outputs that holds the classes, counted from 0.
    """
    last = promote(outputs).movedim(axis, -1)
    classes = last.shape[-1]
    places = torch.arange(outputs[0].numel(), device=outputs.device).reshape(outputs.shape[1:])
    places = places.movedim(axis - 1, -1).reshape(-1, classes)
    logits = last.reshape(len(outputs), -1, classes)
    cov = covariances[:, places[:, :, None], places[:, None, :]]  # [n, positions, classes, classes]
    rows, total = cov.sum(-1), cov.sum((-1, -2)).unsqueeze(-1)
    certain = total <= 0  # nothing to condition on
    inverse = torch.where(certain, 0.0, 1 / torch.where(certain, 1.0, total))
    logits = logits - rows * logits.sum(-1, keepdim=True) * inverse
    spread = cov.diagonal(dim1=-2, dim2=-1) - rows.square() * inverse
    spread = spread.clamp_min(torch.finfo(spread.dtype).tiny ** 0.5)
    shifted = logits.exp() * (-logits).exp().sum(-1, keepdim=True)
    alpha = (1 - 2 / classes + shifted / classes**2) / spread
    strength = alpha.sum(-1, keepdim=True)
    mean = alpha / strength

    def restore_layout(tensor: Tensor) -> Tensor:
        return tensor.reshape(last.shape).movedim(-1, axis)

    variance = mean * (1 - mean)
    epistemic = variance / (strength + 1)
    parts = (mean, variance, epistemic, variance - epistemic)
    return Prediction(*[restore_layout(part) for part in parts])
