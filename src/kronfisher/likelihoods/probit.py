"""The probit link: probabilities of uncertain logits in closed form."""

from collections.abc import Callable
from math import pi

import torch
from torch import Tensor

from kronfisher.likelihoods.prediction import Prediction
from kronfisher.linalg import promote

__all__ = ["probit"]


def probit(
    link: Callable[[Tensor], Tensor], outputs: Tensor, variances: Tensor, squared_slopes: Callable[[Tensor], Tensor]
) -> Prediction:
    """The prediction from logits and their marginal variances, by shrinking the logits: ``f / √(1 + π σ²/8)``.

    MacKay 1992 (Neural Computation 4:720), for several classes as in Gibbs 1997 (thesis, Cambridge). The epistemic
    variance is that of the linearised probabilities, at most all of the variance ``p(1 − p)``.

    Args:
        link: logits to probabilities of the same shape.
        outputs: logits ``[n, ...]``.
        variances: ``[n, ...]`` of the logits.
        squared_slopes: probabilities p at the unshrunk logits to ``Σ_j (∂p_i/∂f_j)² σ_j²`` ``[n, ...]``.
    """
    outputs = promote(outputs)
    logits = outputs / (1 + pi / 8 * variances).sqrt()
    mean = link(logits)
    linear, total = squared_slopes(link(outputs)), mean * (1 - mean)
    epistemic = torch.minimum(linear, total)
    return Prediction(mean, total, epistemic, total - epistemic, logits)
