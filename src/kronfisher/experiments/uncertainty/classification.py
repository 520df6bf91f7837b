"""Measures of predicted probabilities: accuracy, likelihood, calibration, and how well entropy tells data apart."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["auroc", "calibration_error", "judge"]


def judge(
    predict: Callable[[Tensor], Tensor], inside: Tensor, outside: Tensor, targets: Tensor, at_once: int = 250
) -> dict[str, float]:
    """Accuracy, negative log likelihood, calibration error, AUROC by the entropy, and the seconds of predicting.

    Args:
        predict: inputs to the logarithms of the probabilities of the classes ``[n, C]``.
        inside: inputs of the kind that the network was trained on.
        outside: others.
        targets: classes of those inside.
        at_once: inputs in one call.
    """
    start = time.process_time()
    near, far = (torch.cat([predict(part) for part in x.split(at_once)]).double() for x in (inside, outside))
    seconds = time.process_time() - start
    entropies = [torch.special.entr(logs.exp()).sum(1) for logs in (near, far)]
    return {
        "accuracy": float((near.argmax(1) == targets).double().mean()),
        "nll": -float(near.gather(1, targets[:, None]).mean()),
        "ece": calibration_error(near.exp(), targets),
        "auroc": auroc(*entropies),
        "predict": seconds,
    }


def calibration_error(p: Tensor, targets: Tensor, bins: int = 15) -> float:
    """The expected calibration error: mean difference of confidence and accuracy over bins of equal width.

    Example:
        >>> calibration_error(torch.tensor([[0.8, 0.2], [0.8, 0.2]]), torch.tensor([0, 1]))
        0.3000...
    """
    confidence, chosen = p.double().max(1)
    place = (confidence * bins).long().clamp_max(bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, (chosen == targets).double() - confidence)
    return float(gaps.abs().sum() / len(p))


def auroc(low: Tensor, high: Tensor) -> float:
    """The share of pairs in which `high` has the higher score; ties count half.

    Example:
        >>> auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    ordered = low.sort().values
    below = torch.searchsorted(ordered, high) + torch.searchsorted(ordered, high, right=True)
    return float(below.double().mean() / (2 * len(low)))
