"""The state of training, as the optimiser reports it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kronfisher.optim.page import page
from kronfisher.tables import size, some, together

__all__ = ["TrainingReport"]


@dataclass(frozen=True)
class TrainingReport:
    """The state of training; printing it gives a few lines.

    Attributes:
        step: steps made, undone and skipped ones included.
        loss: of the last batch.
        damping: λ.
        step_size: α, the factor of the natural gradient in the last step.
        momentum: μ, the factor of the step before.
        ratio: change of the loss over the predicted change, at the last comparison; None before.
        rejected: steps that were undone because the loss rose against the prediction.
        skipped: steps that were left out because the loss or the gradient was not finite.
        dropped: batches whose statistics were not finite.
        seconds: by phase.
        stale: layer → steps by which its inverse is overdue.
        troubles: layer → what went wrong with its last inverse.
        uncovered: parameter → why no block covers it, so that it takes `uncovered_step` instead.
        uncovered_step: what these parameters take.
        coupled: layers whose rows mix examples (normalisation over the batch).
        cuts: where a chain of layers is cut and why, for fits that treat neighbours together; which factors are kept as
            their diagonals, because an inverse would be too dear.
        warnings: messages to the user.
        overdue: steps that ran on statistics older than promised.
        beyond: steps made after `total_steps`, at the rate that is left there.
        sent: bytes that all processes gave to each other: statistics, and natural gradients where layers have owners.
            Gradients are DDP's.
        collectives: how many calls that took.
    """

    step: int
    loss: float | None
    damping: float | None
    step_size: float
    momentum: float
    ratio: float | None
    rejected: int
    skipped: int
    dropped: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    stale: Mapping[str, int] = field(default_factory=dict)
    troubles: Mapping[str, str] = field(default_factory=dict)
    uncovered: Mapping[str, str] = field(default_factory=dict)
    uncovered_step: str = "plain momentum steps"
    coupled: tuple[str, ...] = ()
    cuts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    overdue: int = 0
    beyond: int = 0
    sent: int = 0
    collectives: int = 0

    def save_report(
        self, path: str | Path, history: Sequence["TrainingReport"] = (), title: str = "Training with natural gradients"
    ) -> Path:
        """Write the state of training as one HTML page, which needs no other file and no network.

        Args:
            path: of the page, such as ``"training.html"``.
            history: reports of earlier steps, of which curves are drawn. Asking for a report waits for the device, so
                keep one every some steps.
            title: its heading.

        Returns:
            The path written.

        Raises:
            ImportError: jinja2 or matplotlib is missing; ``pip install "kronfisher[report]"``.

        Example:
            >>> import tempfile, torch, kronfisher as kf
            >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(50, 3), torch.randint(2, (50,))
            >>> optimizer, reports = kf.NaturalGradient(model, kf.Categorical()), []
            >>> for _ in range(5):
            ...     _ = optimizer.step(lambda: model(x), y)
            ...     reports.append(optimizer.report())
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     text = reports[-1].save_report(f"{folder}/training.html", reports).read_text()
            >>> "<title>Loss of the batch</title>" in text
            True
        """
        course = sorted({each.step: each for each in [*history, self]}.values(), key=lambda each: each.step)
        facts = {
            "step": f"{self.step:,}",
            "loss": "–" if self.loss is None else f"{self.loss:.6g}",
            "steps undone": str(self.rejected),
            "steps skipped": str(self.skipped),
            "batches without statistics": str(self.dropped),
            "steps on old statistics": str(self.overdue),
            "steps after total_steps": str(self.beyond),
        }
        values = {
            "loss of the batch": [(each.step, each.loss) for each in course if each.loss is not None],
            "damping λ": [(each.step, each.damping) for each in course if each.damping is not None],
            "step size α": [(each.step, each.step_size) for each in course],
            "momentum μ": [(each.step, each.momentum) for each in course],
            "change of the loss over the predicted change": [
                (each.step, each.ratio) for each in course if each.ratio is not None
            ],
        }
        layers = [(name, f"inverse overdue by {steps} steps") for name, steps in self.stale.items()]
        layers += list(self.troubles.items())
        layers += [(name, f"{self.uncovered_step}: {why}") for name, why in self.uncovered.items()]
        layers += [(name, "examples are coupled by the batch; treated as independent") for name in self.coupled]
        notes = [*str(self).splitlines()[:1], *self.cuts, *self.warnings]
        return page(title, facts, notes, values, self.seconds, layers).save(path)

    def __str__(self) -> str:
        loss = "-" if self.loss is None else f"{self.loss:.6g}"
        damping = "-" if self.damping is None else f"{self.damping:.2e}"
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}"
        lines = [
            f"step {self.step}: loss {loss}, damping {damping}, step size {self.step_size:.3g}, momentum "
            f"{self.momentum:.3g}, model ratio {ratio}",
            f"{self.rejected} steps undone, {self.skipped} skipped, statistics of {self.dropped} batches dropped",
        ]
        if self.overdue:
            lines.append(f"{self.overdue} steps on statistics older than promised")
        if self.beyond:
            lines.append(f"{self.beyond} steps after total_steps, at the rate that is left there")
        if self.collectives:
            lines.append(
                f"of all processes, besides gradients: {size(self.sent)} sent in {self.collectives} collectives"
            )
        if self.seconds:
            lines.append("seconds: " + ", ".join(f"{phase} {spent:.2f}" for phase, spent in self.seconds.items()))
        lines += [f"{name}: inverse overdue by {steps} steps" for name, steps in self.stale.items()]
        lines += [f"{name}: {trouble}" for name, trouble in self.troubles.items()]
        reasons = [line for line in together(self.uncovered) if not any(line in told for told in self.warnings)]
        lines += [f"{self.uncovered_step}: {line}" for line in reasons]
        if self.coupled:
            lines.append(f"examples are coupled by the batch in {some(self.coupled)}; treated as independent")
        return "\n".join([*lines, *self.cuts, *self.warnings])
