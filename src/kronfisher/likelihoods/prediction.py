"""A prediction of targets, and the prediction that draws of the outputs give under any likelihood."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Basis", "Prediction", "Predictors", "log_mean_exp", "mixture"]

Basis = Literal["variances", "covariances", "draws", "networks"]
"""The source of a predictor: the variances or the covariances of the outputs of the linearised network, draws
of these outputs, or the outputs of networks whose parameters are drawn."""

Predictors = Mapping[str, Basis]
"""Names of predictors, the default first, each with its source."""


@dataclass(frozen=True)
class Prediction:
    """The posterior prediction of the targets of n examples; ``variance = epistemic_variance + noise_variance``.

    Attributes:
        mean: ``[n, ...]`` expected targets; class probabilities for classes, where the outputs have the classes.
        variance: ``[n, ...]`` of the targets, entry by entry, in their squared units; for classes ``p(1 − p)``, the
            variance of the indicator of each class.
        epistemic_variance: the part that comes from not knowing the parameters: more data would remove it.
        noise_variance: the part that remains if they were known, averaged over the posterior.
        logits: ``[n, ...]`` of predicted probabilities, whose logarithms they hold where the probabilities themselves
            underflow or round to one; None where there are none, or the prediction was made by hand.

    Example:
        >>> import torch, kronfisher as kf
        >>> prediction = kf.Gaussian(0.5).predict_from_variances(torch.tensor([[1.0]]), torch.tensor([[0.25]]))
        >>> prediction.mean.item(), prediction.variance.item(), prediction.epistemic_variance.item()
        (1.0, 0.75, 0.25)
    """

    mean: Tensor
    variance: Tensor
    epistemic_variance: Tensor
    noise_variance: Tensor
    logits: Tensor | None = field(default=None, repr=False)


def mixture(
    mean: Callable[[Tensor], Tensor],
    noise_variance: Callable[[Tensor], Tensor],
    draws: Tensor,
    noise_factor: float = 1.0,
    logits: Tensor | None = None,
) -> Prediction:
    """The prediction from S draws of the outputs, by the law of total variance.

    Args:
        mean: ``[n, ...] -> [n, ...]``, the mean of the targets given the outputs.
        noise_variance: ``[n, ...] -> [n, ...]``, their variance given the outputs.
        draws: outputs ``[S, n, ...]``.
        noise_factor: on the noise variance.
        logits: of the mean, ``[n, ...]``, where it is probabilities.
    """
    pairs = [(mean(outputs), noise_variance(outputs)) for outputs in draws]
    means = torch.stack([one for one, _ in pairs])
    noise = torch.stack([variance for _, variance in pairs]).mean(0).to(means.dtype) * noise_factor
    total = means.mean(0)
    epistemic = (means - total).square().mean(0)
    return Prediction(total, epistemic + noise, epistemic, noise, logits)


def log_mean_exp(logs: Tensor) -> Tensor:
    """``log 1/S Σ_s exp(logs_s)`` over the first dimension, without leaving log space."""
    return logs.logsumexp(0) - math.log(len(logs))
