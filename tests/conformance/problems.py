"""Tiny models with data, a likelihood and the truth about them: a registered example under a registered likelihood."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.likelihoods import REGISTRY, Likelihood
from tests.conformance.examples import EXAMPLES
from tests.conformance.taps import Tap, taps
from tests.helpers.networks import shake
from tests.helpers.truth import dense, gradients, output_vectors, positions

SEED = 5  # of label draws
DRAWS = 2


class Headed(nn.Module):
    """A module, tanh, flatten, and a fixed random head that mixes everything."""

    def __init__(self, module: nn.Module, features: int, shape: tuple[int, ...]):
        super().__init__()
        self.module, self.shape = module, shape
        self.register_buffer("head", torch.randn(features, prod(shape)) / features**0.5)

    def finish(self, hidden: Tensor) -> Tensor:
        return (hidden.tanh().flatten(1) @ self.head).unflatten(1, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.module(x))


@dataclass
class Problem:
    """A model, data, a likelihood and the truth about them."""

    model: Headed
    likelihood: Likelihood
    x: Tensor
    targets: Tensor
    averaged: Callable[[Tensor, Tensor], Sequence[Tensor]] | None = None

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.x, self.targets

    @cached_property
    def counted(self) -> Tensor:
        """Which positions count, bool ``[N, P]``."""
        with torch.no_grad():
            mask = self.likelihood.positions(self.model(self.x), self.targets)
        return torch.ones(len(self.x), 1, dtype=torch.bool) if mask is None else mask

    @property
    def count(self) -> int:
        """N: data with a position that counts."""
        return int(self.counted.any(1).sum())

    def vectors(self, labels: str) -> Tensor:
        """What is back-propagated, ``[V, N, *shape]``."""
        return self._once("vectors", labels, lambda: self._vectors(labels))

    def _vectors(self, labels: str) -> Tensor:
        return output_vectors(self.likelihood, self.model(self.x), self.targets, labels, DRAWS, SEED, self.averaged)

    def gradients(self, labels: str) -> Tensor:
        """``[V, N, P]``."""
        return self._once("gradients", labels, lambda: gradients(self.model, self.x, self.vectors(labels)))

    def truth(self, labels: str) -> Tensor:
        """The Fisher matrix of the mean over data, ``[P, P]``."""
        return self._once("truth", labels, lambda: dense(self.gradients(labels), self.count))

    def _once(self, what: str, labels: str, make: Callable[[], Any]) -> Any:
        if (what, labels) not in self._made:
            self._made[what, labels] = make()
        return self._made[what, labels]

    @cached_property
    def _made(self) -> dict[tuple[str, str], Any]:
        return {}

    def part(self, names: tuple[str, ...]) -> Tensor:
        """Places of some parameters in the flat vector."""
        places = positions(self.model)
        return torch.cat([places[name].flatten() for name in names])

    def rows(self, labels: str) -> "list[tuple[Tap, Tensor, Tensor]]":
        """For every block its tap, ``a [H, N, T, I]`` and ``g [V, H, N, T, O]``, proved to give the gradients."""
        return self._once("rows", labels, lambda: self._rows(labels))

    def _rows(self, labels: str) -> "list[tuple[Tap, Tensor, Tensor]]":
        vectors, truth = self.vectors(labels), self.gradients(labels)
        inputs, outputs, seen = [], [], []
        for k in range(len(self.x)):
            hidden, found = taps(self.model.module, self.x[k : k + 1], positions(self.model))
            f = self.model.finish(hidden)
            tensors = [tap.tensor for tap in found]
            each = [
                torch.autograd.grad(f, tensors, v[None], retain_graph=True, materialize_grads=True)
                for v in vectors[:, k]
            ]
            inputs.append([tap.a.detach() for tap in found])
            outputs.append([torch.stack([tap.rows(g[i]) for g in each]) for i, tap in enumerate(found)])
            seen = found
        answer = []
        assembled = torch.zeros_like(truth)
        for i, tap in enumerate(seen):
            a = torch.stack([datum[i] for datum in inputs], dim=1)
            g = torch.stack([datum[i] for datum in outputs], dim=2)
            assembled[..., tap.index.flatten()] = torch.einsum("vhnto,hnti->vnhoi", g, a).flatten(2)
            answer.append((tap, a, g))
        torch.testing.assert_close(assembled, truth, rtol=0, atol=1e-12)
        return answer


_PROBLEMS: dict[tuple[str, str], Problem] = {}


def problem(example: str, likelihood: str, dtype: torch.dtype = torch.float64) -> Problem:
    """A registered use under a registered likelihood, the same whoever asks; float64 ones are kept."""
    if dtype == torch.float64 and (example, likelihood) in _PROBLEMS:
        return _PROBLEMS[example, likelihood]
    with torch.random.fork_rng():
        torch.manual_seed(len(example) + 7 * len(likelihood))
        module, shape = EXAMPLES[example]()
        module = shake(module).double()
        x = torch.randn(shape, dtype=torch.float64)
        entry = REGISTRY[likelihood]
        generator = torch.Generator().manual_seed(3)
        drawn = [entry.example(generator, torch.float64) for _ in x]  # at least one datum each
        outputs, targets = (torch.cat(parts)[: len(x)] for parts in zip(*drawn, strict=True))
        model = Headed(module, module(x)[0].numel(), tuple(outputs.shape[1:])).double()
    targets = targets.to(dtype) if targets.is_floating_point() else targets
    found = Problem(model.to(dtype), entry.factory(), x.to(dtype), targets, entry.hessian_labels)
    if dtype == torch.float64:
        _PROBLEMS[example, likelihood] = found
    return found
