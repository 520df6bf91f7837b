"""The settings of an estimate: held in this one place, checked once, and passed whole."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from torch import Tensor, nn

from kronfisher.capture.batches import Mask
from kronfisher.capture.forward import Forward
from kronfisher.distributed import Ranks
from kronfisher.errors import DataError, keep_integer, require_kind
from kronfisher.fisher.parameters import trainable
from kronfisher.likelihoods import Likelihood

__all__ = ["Labels", "Recipe"]

Labels = Literal["exact", "sampled", "observed"]
_OF_LOSSES = {  # what is given by habit in place of a likelihood
    "BCEWithLogitsLoss": "Bernoulli",
    "CrossEntropyLoss": "Categorical",
    "GaussianNLLLoss": "HeteroscedasticGaussian",
    "MSELoss": "Gaussian",
    "PoissonNLLLoss": "Poisson",
}


@dataclass(frozen=True)
class Recipe:
    """How an estimate was asked for; its error and spectrum are measured under the same labels later.

    Attributes:
        model: unwrapped.
        likelihood: which vectors are back-propagated.
        labels: exact columns of the output Hessian's root, labels drawn from the model, or the observed ones.
        samples: label draws per example.
        forward: how a batch goes through the model, if not as `capture.forward.run` does it.
        seed: of the label draws.
        memory_budget: bytes for states and temporaries; None: what is free.
        exact_limit: backward passes per batch beyond which exact labels are refused.
        mask: which positions count, as for `estimate`.
        strict: refuse what only the fallback can treat.
        ranks: the processes that read a part of the data each; None: there is one.

    Raises:
        ValueError: `labels` or `samples` make no sense.
        TypeError: `likelihood` is no likelihood, or another option is of another kind.
    """

    model: nn.Module
    likelihood: Likelihood
    labels: Labels = "sampled"
    samples: int = 1
    forward: Forward | None = None
    seed: int = 0
    memory_budget: int | None = None
    exact_limit: int = 1000
    mask: Mask | None = None
    strict: bool = False
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        require_kind("seed", self.seed, Integral, "give an integer")
        keep_integer(self, "seed", -math.inf, "give an integer")
        require_kind("exact_limit", self.exact_limit, Real, "give a number of backward passes")
        if self.mask is not None and not callable(self.mask):
            require_kind("mask", self.mask, str, "give a function of the batch, or the name of the key that holds it")
        if self.forward is not None and not callable(self.forward):
            raise TypeError(f"forward={self.forward!r}: give forward(model, batch) -> (outputs, targets).")
        if self.labels not in ("exact", "sampled", "observed"):
            raise ValueError(f"labels={self.labels!r}: use 'exact', 'sampled' or 'observed'.")
        keep_integer(self, "samples", 1, "the number of label draws per example is an integer of at least 1")
        if not isinstance(self.likelihood, Likelihood):
            kind = _OF_LOSSES.get(type(self.likelihood).__name__)
            such = f"kf.{kind}(), which belongs to this loss" if kind else "kf.Categorical() or kf.Gaussian()"
            raise TypeError(f"likelihood={self.likelihood!r}: pass an instance such as {such}.")

    @property
    def run(self) -> Forward | None:
        """The forward pass, whose outputs are one tensor under any likelihood."""
        if type(self.likelihood).joined is Likelihood.joined:
            return self.forward
        forward = self.forward
        if forward is None:
            raise DataError(
                f"{type(self.likelihood).__name__} takes several tensors of outputs: give "
                "forward=lambda model, batch: (outputs, None)."
            )

        def joined(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
            outputs, targets = forward(model, batch)
            return self.likelihood.joined(outputs, "the batch"), targets

        return joined

    def parameters(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """The model's trainable parameters, which have to be those of the names.

        Raises:
            DataError: they no longer are.
        """
        parameters = trainable(self.model)
        if odd := parameters.keys() ^ set(names):
            raise DataError(
                f"the trainable parameters of the model are not those of the matrix ({', '.join(sorted(odd))}): freeze "
                "and unfreeze as when it was estimated."
            )
        return parameters
