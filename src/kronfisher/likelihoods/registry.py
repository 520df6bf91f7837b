"""The registry of likelihoods, through which the conformance tests run."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kronfisher.likelihoods.likelihood import Likelihood

__all__ = ["REGISTRY", "Registered", "register"]


class Registered(NamedTuple):
    """A likelihood as the conformance tests meet it.

    Attributes:
        factory: Makes the likelihood.
        example: `(generator, dtype) -> (outputs, targets)`, a small batch on the CPU.
        labels: `outputs -> targets, targets, …` over which the mean of the Hessian of `-log_prob` is its average over
            the model's own labels; None if that Hessian does not depend on the label.
    """

    factory: Callable[[], Likelihood]
    example: Callable[[torch.Generator, torch.dtype], tuple[Tensor, Tensor]]
    labels: Callable[[Tensor], Sequence[Tensor]] | None = None

    def hessian_labels(self, outputs: Tensor, targets: Tensor) -> Sequence[Tensor]:
        """Targets over which to average the Hessian; the given ones if it does not depend on them."""
        return (targets,) if self.labels is None else self.labels(outputs)


REGISTRY: dict[str, Registered] = {}


def register(
    name: str,
    factory: Callable[[], Likelihood],
    example: Callable[[torch.Generator, torch.dtype], tuple[Tensor, Tensor]],
    labels: Callable[[Tensor], Sequence[Tensor]] | None = None,
) -> None:
    """Enters a likelihood into `REGISTRY` and thereby into every conformance test.

    Args:
        name: Unique name, shown in the tests.
        factory: Makes the likelihood.
        example: `(generator, dtype) -> (outputs, targets)`, a small batch on the CPU.
        labels: Needed if the Hessian of `-log_prob` depends on the label, see `Registered`; where it is linear in the
            label, the mean of the targets is enough.

    Raises:
        ValueError: The name is taken.
    """
    if name in REGISTRY:
        raise ValueError(f"a likelihood named {name!r} is registered already; choose another name")
    REGISTRY[name] = Registered(factory, example, labels)
