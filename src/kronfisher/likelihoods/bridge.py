"""The Laplace bridge: a Dirichlet distribution of class probabilities from a Gaussian over the logits."""

import math

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
    # α = (1 − 2/C + exp(f) Σ exp(−f) / C²) / σ² by its logarithm: exponentials of logits overflow.
    constant = torch.full_like(logits, 1 - 2 / classes).log()
    shifted = logits + (-logits).logsumexp(-1, keepdim=True) - 2 * math.log(classes)
    log_alpha = torch.logaddexp(constant, shifted) - spread.log()
    mean = log_alpha.softmax(-1)
    strength = log_alpha.logsumexp(-1, keepdim=True).exp()

    def restore_layout(tensor: Tensor) -> Tensor:
        return tensor.reshape(last.shape).movedim(-1, axis)

    variance = mean * (1 - mean)
    epistemic = variance / (strength + 1)
    parts = (mean, variance, epistemic, variance - epistemic, log_alpha.log_softmax(-1))
    return Prediction(*[restore_layout(part) for part in parts])
