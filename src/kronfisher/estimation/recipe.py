"""How an estimate was asked for."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from kronfisher.capture.batches import Forward, Mask
from kronfisher.errors import DataError
from kronfisher.estimation.accumulator import Accumulator, Labels
from kronfisher.fisher.parameters import trainable
from kronfisher.fits import Choice
from kronfisher.likelihoods import Likelihood

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How an estimate was asked for, so that its error can be measured under the same labels later."""

    model: nn.Module
    likelihood: Likelihood
    labels: Labels = "sampled"
    samples: int = 1
    forward: Forward | None = None
    seed: int = 0
    memory_budget: int | None = None
    exact_limit: int = 1000
    mask: Mask | None = None

    def parameters(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """The model's trainable parameters, if they are those of the names.

        Raises:
            DataError: they are not, any more.
        """
        found = trainable(self.model)
        if odd := found.keys() ^ set(names):
            raise DataError(
                f"the trainable parameters of the model are not those of the matrix ({', '.join(sorted(odd))}): freeze "
                "and unfreeze as when it was estimated."
            )
        return found

    def accumulator(self, fit: Choice) -> Accumulator:
        """Empty states for the model's trainable parameters."""
        return Accumulator(
            self.model,
            trainable(self.model),
            self.likelihood,
            fit,
            self.labels,
            self.samples,
            self.seed,
            self.forward,
            self.memory_budget,
            self.exact_limit,
            self.mask,
        )
