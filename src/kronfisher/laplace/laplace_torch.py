"""A curvature backend for laplace-torch: its posteriors, our Fisher matrices."""

import copy
from collections.abc import MutableMapping
from importlib import import_module
from math import log, pi
from typing import Any

import torch
from torch import Tensor

from kronfisher.capture.isolation import isolate
from kronfisher.errors import DataError, UnsupportedError
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.estimation.recipe import Labels, Recipe
from kronfisher.fisher import Fisher, Info
from kronfisher.fits import Diagonal, Fit, Full, resolve
from kronfisher.likelihoods import Categorical, Gaussian
from kronfisher.linalg import plain_arithmetic

__all__ = ["laplace_backend"]


def laplace_backend(fit: Fit | str = "kfac", *, labels: Labels = "exact", samples: int = 1, seed: int = 0) -> type:
    """A class for ``laplace.Laplace(model, likelihood, hessian_structure=..., backend=...)`` of laplace-torch.

    ``hessian_structure="kron"`` takes `fit`, of which each layer must come out as one Kronecker product (K-FAC, K-FOC
    and the like); "diag" and "full" take the exact diagonal and the exact matrix. laplace-torch adds up what
    it is given batch by batch; it is given differences, so that the sum is this library's own estimate on all batches.

    Args:
        fit: of the weights, for "kron". A bias has a block of its own there, as laplace-torch wants it.
        labels: as for `kronfisher.estimate`.
        samples: as for `kronfisher.estimate`.
        seed: of the label draws.

    Returns:
        A subclass of ``laplace.curvature.GGNInterface``.

    Raises:
        ImportError: laplace-torch is missing; ``pip install "kronfisher[laplace]"``.

    Example:
        >>> from laplace import Laplace  # doctest: +SKIP
        >>> la = Laplace(model, "classification", hessian_structure="kron", backend=laplace_backend())  # doctest: +SKIP
    """
    try:
        GGNInterface = import_module("laplace.curvature").GGNInterface
        Kron = import_module("laplace.utils").Kron
    except ImportError as error:
        raise ImportError('laplace-torch is missing; pip install "kronfisher[laplace]"') from error

    chosen = resolve(fit)

    class KronfisherGGN(GGNInterface):
        """Curvature by kronfisher."""

        def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Any]:
            """Loss and Kronecker factors of a batch, or what they add to those of the batches before."""
            loss, fisher = self._add("kron", x, y, N)
            factors = [_factors(fisher, name) for name in fisher.names]
            before = self._before or [[torch.zeros_like(side) for side in sides] for sides in factors]
            changes = [
                [new - old for new, old in zip(*sides, strict=True)] for sides in zip(factors, before, strict=True)
            ]
            self._before = factors
            return loss, Kron(changes)

        def diag(self, x: Any, y: Tensor, N: int | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Loss and diagonal of a batch."""
            loss, fisher = self._add("diag", x, y, None)
            return loss, self._chosen(torch.cat([value.flatten() for value in fisher.diagonal().values()]))

        def full(self, x: Any, y: Tensor, N: int | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Loss and matrix of a batch."""
            loss, fisher = self._add("full", x, y, None)
            dense = fisher.to_dense()
            return loss, self._chosen(self._chosen(dense).mT)

        def _chosen(self, rows: Tensor) -> Tensor:
            return rows if self.subnetwork_indices is None else rows[self.subnetwork_indices]

        _run: Accumulator | None = None
        _before: list[list[Tensor]] | None = None

        def _add(self, structure: str, x: Any, y: Tensor, total: int | None) -> tuple[Tensor, Fisher]:
            """The loss of a batch, and the sum over data so far: of this batch alone if `total` is None."""
            run, begins = self._run, total is None or self._begins()
            if run is None or begins:
                run, self._before = self._fresh(structure), None
                self._run = run if total is not None else None
            run.log_likelihood, outputs = None, run.outputs
            regression = self.likelihood == "regression"
            y = y if regression else y.long()
            with isolate(self.model, seed):
                run.add(x if isinstance(x, MutableMapping) else (x, y), "the batch")
            if run.passes > 1:
                raise UnsupportedError(
                    f"{chosen!r} reads the data several times, and laplace-torch shows them once; take "
                    "kronfisher.Laplace."
                )
            with plain_arithmetic(run.device):
                entries = tuple((group.blocks, group.fit.finish(group.state)) for group in run.groups)
            shapes = {name: p.shape for name, p in run.parameters.items()}
            fisher = Fisher(entries, shapes, Info(count=float(run.count))).reduced("sum")
            assert run.log_likelihood is not None
            constant = (run.outputs - outputs) / 2 * log(2 * pi) if regression else 0.0
            return (-run.log_likelihood - constant).to(y.device, torch.float32), fisher

        def _begins(self) -> bool:
            """Whether this is the first batch of a fit, which leaves a number at the model when it begins.

            How many examples there were does not tell: loaders drop the last ones, or draw some twice.
            """
            outputs = self.model.output_size
            self.model.output_size = _Seen(outputs)
            return not isinstance(outputs, _Seen)

        def _fresh(self, structure: str) -> Accumulator:
            own = {id(p) for p in self.params}
            parameters = {name: p for name, p in self.model.named_parameters() if id(p) in own}
            fits: dict[str, Fit]
            if structure == "kron":
                alone = copy.copy(chosen)  # another fit object: what it treats gets blocks of its own
                fits = {name: alone if p.dim() == 1 else chosen for name, p in parameters.items()}
            else:
                fits = dict.fromkeys(parameters, Diagonal() if structure == "diag" else Full(across_layers=True))
            likelihood = Gaussian() if self.likelihood == "regression" else Categorical()

            def forward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
                if isinstance(batch, MutableMapping):
                    return model(batch), batch[self.dict_key_y].to(next(model.parameters()).device)
                return model(batch[0]), batch[1]

            recipe = Recipe(self.model, likelihood, labels, samples, forward, seed)
            return Accumulator(recipe, fits, parameters, score=True)

    return KronfisherGGN


class _Seen(int):
    """The number of outputs that laplace-torch notes at a model, after a batch of the fit that began with it."""


def _factors(fisher: Fisher, name: str) -> list[Tensor]:
    """The factors of a parameter as laplace-torch lists them: one matrix for a vector, output and input sides else."""
    operator, shape = fisher[name], fisher.shapes[name]
    if len(shape) == 1:
        return [operator.to_dense()]
    factors = operator.product
    if factors is None or any(factor.groups > 1 or factor.is_diagonal for factor in factors):
        raise UnsupportedError(
            f"{name} ({operator.structure}): laplace-torch knows one Kronecker product for a weight and nothing else; "
            "use a fit such as kfac, or kronfisher.Laplace, which takes any structure."
        )
    A, B = (factor.tensor[0] for factor in factors)
    if (len(B), len(A)) != (shape[0], shape[1:].numel()):
        raise DataError(f"{name} is used as a matrix of another shape than {list(shape)}; use kronfisher.Laplace.")
    return [B, A]
