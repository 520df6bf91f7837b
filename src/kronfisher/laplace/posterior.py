"""The Gaussian over the parameters: its hyper-parameters and its samples."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from kronfisher.capture.forward import Forward
from kronfisher.errors import DataError, UnsupportedError, require_integer
from kronfisher.fisher import Fisher
from kronfisher.fisher.layout import scatter
from kronfisher.fisher.owned_precision import OwnedPrecision, agree, precision_of
from kronfisher.fisher.parameters import covered, unwrapped
from kronfisher.fisher.precision import Group, Precision
from kronfisher.laplace.linearised import Linearised
from kronfisher.laplace.prior import PriorPrecision, entries, read_mean, read_prior
from kronfisher.likelihoods import Likelihood
from kronfisher.operators.algebra import nonnegative

__all__ = ["Posterior"]


class Posterior:
    """``N(θ*, Λ⁻¹)`` with ``Λ = c·F + diag(prior precision)``; `Laplace` adds evidence and predictions.

    Attributes:
        model: unwrapped.
        fisher: F.
        likelihood: of the targets.
        forward: as for `estimate`, or None.
        mean: θ*, name → tensor.
        prior_mean: name → tensor.
        precisions: blocks → their part of Λ.
        calibrated_for: the predictor that the prior precision was tuned for, if it was.
    """

    def __init__(
        self,
        model: nn.Module,
        fisher: Fisher,
        prior_precision: PriorPrecision = 1.0,
        temperature: float = 1.0,
        *,
        prior_mean: float | Mapping[str, float | Tensor] = 0.0,
        noise: float | None = None,
        likelihood: Likelihood | None = None,
        forward: Forward | None = None,
    ) -> None:
        recipe = getattr(fisher.context, "recipe", None)
        likelihood = likelihood or getattr(recipe, "likelihood", None)
        if likelihood is None:
            raise DataError(
                "this Fisher was loaded or made by hand; pass the likelihood: Laplace(..., likelihood=...)."
            )
        if fisher.info.changes:
            raise DataError(
                f"the Fisher was changed since its estimate ({', '.join(fisher.info.changes)}); pass it as estimated: "
                "Laplace adds the prior precision to it."
            )
        self.model, self.fisher, self.likelihood = unwrapped(model), fisher, likelihood
        self.forward = forward or getattr(recipe, "forward", None)
        parameters = covered(self.model, fisher.shapes, fisher.device)
        self.mean = {name: parameters[name].detach().clone() for name in fisher.shapes}
        self._versions = {name: parameters[name]._version for name in fisher.shapes}
        self.prior_mean = read_mean(prior_mean, self.mean)
        self.calibrated_for: str | None = None
        self._temperature = _positive(temperature, "temperature")
        self._noise = self._read_noise(noise)
        self._log_likelihood = fisher.info.log_likelihood, fisher.info.outputs
        self.prior_precision = prior_precision

    # Hyper-parameters -------------------------------------------------------------------------------------------------

    @property
    def prior_precision(self) -> dict[str, Tensor]:
        """Block name → δ: 0-dim, or ``[D]`` in the canonical order of the block. Set it in any form accepted."""
        return {precision.name: precision.prior for precision in self.precisions.values()}

    @prior_precision.setter
    def prior_precision(self, value: PriorPrecision) -> None:
        priors = [prior.detach() for prior in read_prior(value, self.fisher)]
        self._set_precisions(
            {
                blocks: precision_of(operator, self.scale(), prior, name)
                for (name, blocks, operator), prior in zip(entries(self.fisher), priors, strict=True)
            }
        )

    @property
    def noise(self) -> float | None:
        """Variance of the observation noise; None where the likelihood has no single one."""
        return self._noise

    @noise.setter
    def noise(self, value: float) -> None:
        self._noise = self._read_noise(value)
        self._set_precisions(
            {group: precision.with_scale(self.scale()) for group, precision in self.precisions.items()}
        )

    @property
    def temperature(self) -> float:
        """T, as given."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = _positive(value, "temperature")
        self._set_precisions(
            {group: precision.with_scale(self.scale()) for group, precision in self.precisions.items()}
        )

    @property
    def flat_directions(self) -> dict[str, int | None]:
        """Block name → directions without any curvature, where the posterior is the prior: unused rows, dead units.

        None where the structure cannot tell: sums of products of more than 4096 rows.
        """
        return {precision.name: precision.flat_directions for precision in self.precisions.values()}

    @property
    def owned(self) -> bool:
        """Whether blocks stay with their owners, so that all ranks answer together."""
        return any(isinstance(precision, OwnedPrecision) for precision in self.precisions.values())

    def _set_precisions(self, precisions: dict[Group, Precision]) -> None:
        """Replace the precision of every block; a calibration made before no longer holds."""
        agree(precisions.values(), "the prior", [(one.scale, one.prior) for one in precisions.values()])
        self.precisions, self.calibrated_for = precisions, None

    def scale(self, noise: Tensor | float | None = None) -> Any:
        """The c of ``Λ = c·F + diag(prior precision)``, for another noise if given; F holds the likelihood's own."""
        count = self.fisher.count if self.fisher.reduction == "mean" else 1.0
        noise = self._noise if noise is None else noise
        return count / self._temperature / (1.0 if noise is None else noise / self.own_noise)

    @property
    def own_noise(self) -> float:
        """The noise variance of the likelihood under which the Fisher was estimated; only where it is a single one."""
        single = self.likelihood.single_noise
        assert single is not None
        return single

    def _read_noise(self, noise: float | Tensor | None) -> float | None:
        """The noise variance as given, by default the likelihood's own.

        Raises:
            UnsupportedError: one is given, and the likelihood has no single noise that it could replace.
            ValueError: it is not positive.
        """
        if noise is None:
            return self.likelihood.single_noise
        self.require_single_noise(f"noise={noise}", "leave out noise=")
        if isinstance(noise, Tensor) and noise.numel() != 1:
            raise ValueError(
                f"noise must be one positive number, the variance of all outputs; found a tensor {list(noise.shape)}. "
                "For a variance of each output estimate the Fisher matrix under Gaussian(variance=...)."
            )
        return _positive(noise, "noise")

    def require_single_noise(self, where: str, remedy: str) -> None:
        """UnsupportedError if the likelihood has no single noise variance that could be replaced or learned."""
        if self.likelihood.single_noise is None:
            raise UnsupportedError(
                f"{where}: only the noise of a Gaussian likelihood with one variance for all outputs can be replaced "
                f"or learned; this is {self.likelihood}. Estimate the Fisher matrix anew under the noise that is "
                f"meant (Gaussian(variance) with one number, to learn it), or {remedy}."
            )

    # Parameters -----------------------------------------------------------------------------------------------------

    def sample(self, n: int, *, seed: int = 0) -> dict[str, Tensor]:
        """Draw n parameter vectors from the posterior, ``{name: [n, *shape]}``; torch's global state is not touched.

        Raises:
            SingularError: directions have neither curvature nor prior precision.
        """
        n = require_integer("n", n, 1, "the number of draws is an integer of at least 1")
        seed = require_integer("seed", seed, -math.inf, "give an integer")
        return {name: self.mean[name] + delta for name, delta in self.by_name(self.draws(n, seed)).items()}

    def variance(self) -> dict[str, Tensor]:
        """Marginal posterior variances ``{name: [*shape]}``: the diagonal of Λ⁻¹."""
        rows = {group: precision.inverse_diagonal()[None] for group, precision in self.precisions.items()}
        return {name: tensor[0] for name, tensor in self.by_name(rows).items()}

    def draws(self, n: int, seed: int, precisions: Mapping[Group, Precision] | None = None) -> dict[Group, Tensor]:
        """Draws from ``N(0, Λ⁻¹)`` as canonical rows ``[n, D]`` of every block, perhaps under other precisions."""
        generator = torch.Generator(self.fisher.device).manual_seed(seed)
        drawn = {}
        for group, precision in (precisions or self.precisions).items():
            like = precision.operator
            noise = torch.randn(n, precision.noise_dim(), generator=generator, dtype=like.dtype, device=like.device)
            drawn[group] = precision.colour(noise)
        return drawn

    def by_name(self, rows: Mapping[Group, Tensor]) -> dict[str, Tensor]:
        """Canonical rows ``[n, D]`` of every block as ``{name: [n, *shape]}``."""
        count = len(next(iter(rows.values())))
        out = {name: mean.new_empty(count, *mean.shape) for name, mean in self.mean.items()}
        for group, values in rows.items():
            scatter(group, values.to(next(iter(out.values())).dtype), out)
        return out

    def training_score(self) -> tuple[float, float]:
        """The log likelihood of the training data, and how many outputs they have.

        Raises:
            DataError: it is unknown.
        """
        log_likelihood, outputs = self._log_likelihood
        if log_likelihood is None:
            raise DataError(
                "the likelihood of the training data is unknown, as the Fisher matrix was estimated without targets; "
                "call posterior.score(train_loader) first."
            )
        return log_likelihood, outputs

    # The model --------------------------------------------------------------------------------------------------------

    def network(self) -> Linearised:
        """The network, linear in the parameters of the posterior."""
        self.check_parameters()
        return Linearised(self.model, tuple(self.mean), self.forward)

    @property
    def noise_ratio(self) -> float:
        """The noise variance over that of the likelihood."""
        return 1.0 if self._noise is None else self._noise / self.own_noise

    def check_parameters(self) -> None:
        """DataError if the model's parameters are no longer those that the posterior is around."""
        parameters = dict(self.model.named_parameters())
        for name, mean in self.mean.items():
            parameter = parameters[name]
            if parameter._version == self._versions.get(name):
                continue
            if parameter.device != mean.device or not torch.equal(parameter.detach(), mean.to(parameter.dtype)):
                raise DataError(
                    f"{name} has changed since the posterior was made around it, or was moved: estimate the Fisher "
                    "matrix again after training; posterior.to(device) follows a model that went elsewhere."
                )
            self._versions[name] = parameter._version

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the posterior to another device or precision; move the model yourself. Returns itself."""
        self.fisher = self.fisher.to(device, dtype)
        self.mean = {name: mean.to(device) for name, mean in self.mean.items()}
        self.prior_mean = {name: mean.to(device) for name, mean in self.prior_mean.items()}
        calibrated = self.calibrated_for
        self._set_precisions(
            {
                group: precision_of(
                    operator, precision.scale, precision.prior.to(operator.device, operator.dtype), precision.name
                )
                for (group, precision), operator in zip(
                    self.precisions.items(), self.fisher.blocks.values(), strict=True
                )
            }
        )
        self.calibrated_for, self._versions = calibrated, {}
        return self

    def restore(self, priors: Sequence[Tensor], calibrated_for: str | None) -> None:
        """Restore the prior precision of every block, in canonical order, and the calibration from a file."""
        self._set_precisions(
            {
                group: precision_of(precision.operator, self.scale(), prior, precision.name)
                for (group, precision), prior in zip(self.precisions.items(), priors, strict=True)
            }
        )
        self.calibrated_for = calibrated_for

    def __repr__(self) -> str:
        noise = "" if self._noise is None else f", noise variance {self._noise:.3g}"
        if self.owned:  # counting would be a collective
            flat = "held by several ranks"
        else:
            flat = sum(known for known in self.flat_directions.values() if known is not None)
            flat = f"{flat} directions without curvature"
        return (
            f"<Laplace posterior of {self.fisher.dim} parameters in {len(self.precisions)} blocks, "
            f"{self.fisher.count:g} examples{noise}; {flat}>"
        )


def _positive(value: float | Tensor, what: str) -> float:
    number = nonnegative(value, what)
    if number == 0:
        raise ValueError(f"{what} must be positive; it is {value}")
    return number
