"""Training reports in the logs of other libraries: numbers for any logger, and a callback for transformers' `Trainer`.

transformers is imported where its callback is made (``pip install "kronfisher[transformers]"``).
"""

import math
from typing import TYPE_CHECKING, Any

from kronfisher.optim import NaturalGradient

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["log_with_trainer", "measurements"]


def measurements(optimizer: NaturalGradient, prefix: str = "kronfisher/") -> dict[str, float]:
    """The state of training as numbers by name, for any logger; what is not known yet is left out.

    Reading them waits for the device, so ask as often as a log is written, and not at every step.

    Args:
        optimizer: that trains.
        prefix: of the names.

    Returns:
        ``damping`` λ, ``step_size`` α, ``momentum`` μ, ``ratio`` (change of the loss over the predicted change),
        ``coverage`` (the share of the trained parameters that have curvature, from 0 to 1), ``seconds`` (of the
        optimiser's own work since it was made), and counts of steps that were ``undone``, ``skipped`` or ``overdue``.

    Example:
        >>> import torch, kronfisher as kf
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(50, 3), torch.randint(2, (50,))
        >>> optimizer = kf.NaturalGradient(model, kf.Categorical())
        >>> _ = optimizer.step(lambda: model(x), y)
        >>> found = measurements(optimizer)
        >>> found["kronfisher/coverage"], found["kronfisher/skipped"]
        (1.0, 0.0)
    """
    report = optimizer.report()
    sizes = {name: parameter.numel() for name, parameter in optimizer.trained().items()}
    outside = sum(size for name, size in sizes.items() if name in report.uncovered)
    found = {
        "damping": report.damping,
        "step_size": report.step_size,
        "momentum": report.momentum,
        "ratio": report.ratio,
        "coverage": 1 - outside / sum(sizes.values()),
        "seconds": sum(report.seconds.values()),
        "undone": report.rejected,
        "skipped": report.skipped,
        "overdue": report.overdue,
        "beyond": report.beyond,
    }
    return {f"{prefix}{name}": float(v) for name, v in found.items() if v is not None and math.isfinite(v)}


def log_with_trainer(trainer: "Trainer", optimizer: NaturalGradient, prefix: str = "kronfisher/") -> None:
    """Write `measurements` wherever a `Trainer` of transformers logs: its own history and every reporter of its.

    They are an entry of their own at each logging step, by ``trainer.log``, so that TensorBoard, Weights & Biases and
    whatever else ``report_to=`` names receive them as they receive the loss. The trainers of TRL are such trainers.

    Args:
        trainer: made with ``optimizers=(optimizer, scheduler)``.
        optimizer: the natural gradient optimiser that it was given.
        prefix: of the names.

    Raises:
        ImportError: transformers is missing; ``pip install "kronfisher[transformers]"``.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError('transformers is missing; pip install "kronfisher[transformers]"') from error

    class Reporting(TrainerCallback):
        """Logs when the trainer does."""

        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            if control.should_log:
                trainer.log(measurements(optimizer, prefix))
                control.should_log = True  # an entry resets it, and the trainer's own is still to come

    trainer.add_callback(Reporting())
