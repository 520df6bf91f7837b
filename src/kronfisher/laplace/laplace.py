"""The Laplace posterior: a Gaussian around the trained parameters, with a Fisher matrix as its precision."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from kronfisher.capture.forward import Forward
from kronfisher.distributed import ProcessGroup, ranks_of
from kronfisher.fisher import Fisher
from kronfisher.laplace.calibration import best_scale
from kronfisher.laplace.evidence import best_factors, log_evidence, require_residuals, score_training_data
from kronfisher.laplace.linearised import covariances, directions, variances
from kronfisher.laplace.posterior import Posterior
from kronfisher.laplace.predictions import (
    choose_predictor,
    draw,
    is_drawn,
    log_densities,
    predict,
    require_draws,
    standard_error,
)
from kronfisher.laplace.prior import PriorPrecision, read_prior
from kronfisher.laplace.storage import load, save
from kronfisher.laplace.targets import Labelled, read_targets
from kronfisher.likelihoods import Likelihood, Prediction

__all__ = ["Laplace"]


class Laplace(Posterior):
    """``N(θ*, Λ⁻¹)`` over the parameters that a Fisher matrix covers, with ``Λ = N·F/T + diag(prior precision)``.

    θ* are the model's parameters as they are now; train them to the end first, with a weight decay that fits the prior.
    All of the network, its last layer or any other part is treated: whatever required a gradient when `fisher` was
    estimated. F may be a mean or a sum over examples. Predictions linearise the network around θ* or sample networks
    (MacKay 1992, Neural Computation 4:448; Immer et al. 2021, arXiv:2008.08400).

    Args:
        model: the model that `fisher` was estimated for.
        fisher: of any structure, not damped. Where blocks stay with their owners (``share="owned"``), all ranks make
            the same calls, with the same inputs.
        prior_precision: δ of the prior ``N(prior_mean, 1/δ)``: a number, one for each of ``fisher.blocks``, one for
            each parameter (flat), or a mapping from names of blocks or parameters to numbers or tensors. Within a block
            it may vary where the structure has an exact inverse for it.
        temperature: T; the likelihood counts 1/T times, so that less than one makes the posterior narrower.
        prior_mean: a number, or ``{name: tensor}`` with numbers or tensors for every parameter.
        noise: variance of the observation noise of a Gaussian likelihood; default: that of the likelihood.
        likelihood: needed only if `fisher` was loaded from a file.
        forward: as for `estimate`, of which it is the default.

    Raises:
        DataError: the Fisher was damped or inverted, belongs to another model, or names do not fit.
        UnsupportedError: the prior varies in a block whose structure has no exact inverse then.
        ValueError: a number is out of range.

    Example:
        >>> import torch, kronfisher as kf
        >>> _ = torch.manual_seed(0)
        >>> x = torch.linspace(-1, 1, 50).unsqueeze(1)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> fisher = kf.estimate(model, [(x, x.sin())], kf.Gaussian(0.01), fit="full", labels="exact")
        >>> posterior = kf.Laplace(model, fisher).optimize_prior()
        >>> inside, outside = posterior.predict(torch.tensor([[0.0], [4.0]])).epistemic_variance.flatten()
        >>> bool(outside > inside)
        True
        >>> posterior.sample(5)["0.weight"].shape
        torch.Size([5, 8, 1])
    """

    # The marginal likelihood ------------------------------------------------------------------------------------------

    def log_marginal_likelihood(
        self, prior_precision: PriorPrecision | None = None, noise: float | Tensor | None = None
    ) -> Tensor:
        """``log p(targets)`` of the training data under Laplace's approximation, 0-dim in float64, in nats.

        ``log p(y|θ*)/T − ½ (θ* − μ)ᵀ diag(δ) (θ* − μ) − ½ log |Λ| + ½ log |diag(δ)|`` (MacKay 1992; Immer et al. 2021,
        arXiv:2104.04975).

        Args:
            prior_precision: instead of the posterior's own, in any of its forms; differentiable where it is a tensor.
            noise: variance of Gaussian noise, instead of the posterior's own; differentiable where it is a tensor.

        Raises:
            DataError: the Fisher was estimated without targets; `score` reads them.
            SingularError: Λ is singular, or a prior precision is zero, for which there is no normalised prior.
            UnsupportedError: `noise` is given, and the likelihood has no single noise variance.

        Example:
            >>> import torch, kronfisher as kf
            >>> x = torch.linspace(-1, 1, 20).unsqueeze(1)
            >>> model = torch.nn.Linear(1, 1)
            >>> posterior = kf.Laplace(model, kf.estimate(model, [(x, 2 * x)], kf.Gaussian(), labels="exact"))
            >>> prior = torch.tensor(2.0, requires_grad=True)
            >>> posterior.log_marginal_likelihood(prior).backward()
            >>> prior.grad.isfinite()
            tensor(True)
        """
        if noise is not None:
            self._read_noise(noise.detach() if isinstance(noise, Tensor) else noise)
        if prior_precision is None:
            return log_evidence(self, noise=noise)
        return log_evidence(self, priors=read_prior(prior_precision, self.fisher), noise=noise)

    def score(self, data: Any, *, group: ProcessGroup = None) -> Self:
        """Read the likelihood of the training data, where the Fisher matrix was estimated without targets.

        Args:
            data: batches of inputs and targets, those of the estimate.
            group: the processes that read a part of the data each, as for `estimate`; all of them call this. Where
                blocks stay with their owners, every rank predicts the batches of all ranks, one after the other.

        Returns:
            Itself.

        Raises:
            DataError: a batch has no targets, or they do not fit.
            UnsupportedError: the Fisher matrix was estimated with a mask.

        Example:
            >>> import torch, kronfisher as kf
            >>> x = torch.linspace(-1, 1, 20).unsqueeze(1)
            >>> model = torch.nn.Linear(1, 1)
            >>> posterior = kf.Laplace(model, kf.estimate(model, x, kf.Gaussian(), labels="exact"))  # of inputs alone
            >>> posterior.score([(x, 2 * x)]).log_marginal_likelihood().isfinite()
            tensor(True)
        """
        self._log_likelihood = score_training_data(self, data, ranks_of(group))
        return self

    def optimize_prior(self, *, per_block: bool = False, noise: bool = False, steps: int = 100) -> Self:
        """Set the prior precision, and the noise if asked to, to where the marginal likelihood is largest.

        Every present prior precision is multiplied by one factor (for each block), so that its form stays as it is.

        Args:
            per_block: a factor for every block instead of one for all.
            noise: also the variance of a Gaussian likelihood's noise.
            steps: of L-BFGS, at most.

        Returns:
            Itself.

        Raises:
            DataError: the likelihood of the training data is unknown (`score` reads it), or its residuals are zero.
            UnsupportedError: `noise` is asked for, and the likelihood has no single noise variance.
            NumericalError: the marginal likelihood is not finite where the search starts.
        """
        factors, sigma = best_factors(self, per_block=per_block, noise=noise, steps=steps)
        if noise:
            self._noise = sigma
        self._set_precisions(
            {
                group: precision.times(factor).with_scale(self.scale())
                for (group, precision), factor in zip(self.precisions.items(), factors, strict=True)
            }
        )
        return self

    def fit_noise(self) -> Self:
        """Set the noise variance of a Gaussian likelihood to the mean squared residual of the training data.

        That is where the likelihood of θ* is largest; `optimize_prior(noise=True)` takes the uncertainty of the
        parameters into account, too. Returns itself.

        Raises:
            DataError: the likelihood of the training data is unknown, or their residuals are zero.
            UnsupportedError: the likelihood has no single noise variance.

        Example:
            >>> import torch, kronfisher as kf
            >>> x = torch.linspace(-1, 1, 20).unsqueeze(1)
            >>> model = torch.nn.Linear(1, 1)
            >>> posterior = kf.Laplace(model, kf.estimate(model, [(x, 2 * x)], kf.Gaussian(), labels="exact"))
            >>> noise = posterior.fit_noise().noise
            >>> bool((noise - (model(x) - 2 * x).square().mean()).abs() < 1e-5)
            True
        """
        self.require_single_noise("fit_noise", "keep the noise of the likelihood")
        self.noise = require_residuals(*self.training_score(), self.own_noise)
        return self

    # Predictions ------------------------------------------------------------------------------------------------------

    def predict(self, x: Any, *, predictor: str | None = None, samples: int = 100, seed: int = 0) -> Prediction:
        """Predict the targets of some inputs.

        Args:
            x: inputs as the model takes them: a tensor, a tuple of arguments or a mapping; with `forward`, a batch.
            predictor: how. The network linearised around θ*, with "linearized" outputs (Gaussian, exact), by the
                "probit" link, the Laplace "bridge" (classes), or by "mc" draws of the outputs; or networks with
                "sampled" parameters. Default: the calibrated one, else the first in ``likelihood.predictors``.
            samples: draws, for "mc" and "sampled".
            seed: of the draws.

        Returns:
            Means and variances. One backward pass for each output of an example (none for "sampled"); "bridge" and "mc"
            keep the output gradients of all of them.

        Raises:
            ValueError: the likelihood has no such predictor, or `calibrate` tuned another one.
            DataError: the inputs do not fit, or the model's parameters have changed.
        """
        samples, seed = require_draws(samples, seed)
        predictor = choose_predictor(self, predictor)
        candidates = {group: [precision] for group, precision in self.precisions.items()}
        (prediction,) = predict(self, self._batch(x), candidates, predictor, samples, seed)
        return prediction

    def functional_variance(self, x: Any) -> tuple[Tensor, Tensor]:
        """Outputs ``[n, ...]`` of the linearised network and their variances ``[n, ...]``.

        Example:
            >>> import torch, kronfisher as kf
            >>> x = torch.linspace(-1, 1, 20).unsqueeze(1)
            >>> model = torch.nn.Linear(1, 1)
            >>> posterior = kf.Laplace(model, kf.estimate(model, [(x, 2 * x)], kf.Gaussian(), labels="exact"))
            >>> outputs, variance = posterior.functional_variance(x[:5])
            >>> outputs.shape, variance.shape
            (torch.Size([5, 1]), torch.Size([5, 1]))
        """
        candidates = {group: [precision] for group, precision in self.precisions.items()}
        outputs, variance = variances(self.network(), self._batch(x), candidates)
        return outputs, variance[0]

    def functional_covariance(self, x: Any) -> tuple[Tensor, Tensor]:
        """Outputs ``[n, ...]`` and the covariances ``[n, C, C]`` of the C (flattened) outputs of each example.

        Example:
            >>> import torch, kronfisher as kf
            >>> x = torch.linspace(-1, 1, 20).unsqueeze(1)
            >>> model = torch.nn.Linear(1, 1)
            >>> posterior = kf.Laplace(model, kf.estimate(model, [(x, 2 * x)], kf.Gaussian(), labels="exact"))
            >>> outputs, covariance = posterior.functional_covariance(x[:5])
            >>> covariance.shape
            torch.Size([5, 1, 1])
        """
        candidates = {group: [precision] for group, precision in self.precisions.items()}
        outputs, covariance = covariances(self.network(), self._batch(x), candidates)
        return outputs, covariance[0]

    def functional_samples(self, x: Any, samples: int = 100, *, seed: int = 0) -> Tensor:
        """Outputs of linearised networks ``[samples, n, ...]``; the same seed gives the same functions everywhere.

        Example:
            >>> import torch, kronfisher as kf
            >>> x = torch.linspace(-1, 1, 20).unsqueeze(1)
            >>> model = torch.nn.Linear(1, 1)
            >>> posterior = kf.Laplace(model, kf.estimate(model, [(x, 2 * x)], kf.Gaussian(), labels="exact"))
            >>> posterior.functional_samples(x[:5], 10).shape
            torch.Size([10, 5, 1])
        """
        samples, seed = require_draws(samples, seed)
        outputs, changes = directions(self.network(), self._batch(x), self.draws(samples, seed))
        return outputs + changes

    def log_predictive_density(
        self, x: Any, targets: Any = None, *, predictor: str | None = None, samples: int = 100, seed: int = 0
    ) -> Tensor:
        """``log p(targets | x)`` ``[n]`` in nats under the prediction; positions that do not count are left out.

        Where the likelihood has no closed form for it (counts, predicted variances, likelihoods of your own without
        `log_predictive_density`), it is the Monte-Carlo mean ``log 1/S Σ_s p(targets | f_s)`` over draws of the
        outputs; `log_predictive_error` is its standard error.

        Args:
            x: as in `predict`.
            targets: as an estimate takes them; None: x is a batch of inputs and targets, as for `estimate`.
            predictor: as in `predict`.
            samples: as in `predict`.
            seed: as in `predict`.

        Raises:
            DataError: there are no targets, or they do not fit.
            UnsupportedError: the likelihood defines no `log_predictive_density`, and the predictor draws nothing.
        """
        samples, seed = require_draws(samples, seed)
        predictor = choose_predictor(self, predictor)
        batch, labels = self._labelled(x, targets)
        candidates = {group: [precision] for group, precision in self.precisions.items()}
        (density,) = log_densities(self, batch, labels, candidates, predictor, samples, seed)
        return density

    def log_predictive_error(
        self, x: Any, targets: Any = None, *, predictor: str | None = None, samples: int = 100, seed: int = 0
    ) -> Tensor:
        """The standard error of `log_predictive_density` that comes from drawing, ``[n]`` in nats.

        The jackknife over 20 groups of the draws, with the arguments of `log_predictive_density`. Zero for predictors
        in closed form, infinite for a single draw.
        """
        samples, seed = require_draws(samples, seed)
        predictor = choose_predictor(self, predictor)
        batch, labels = self._labelled(x, targets)
        candidates = {group: [precision] for group, precision in self.precisions.items()}
        if not is_drawn(self, predictor):
            (density,) = log_densities(self, batch, labels, candidates, predictor, samples, seed)
            return torch.zeros_like(density)
        (draws,) = draw(self, batch, candidates, predictor, samples, seed)
        return standard_error(labels.likelihood, draws, labels.targets, self.noise_ratio)

    def _labelled(self, x: Any, targets: Any) -> tuple[Any, Labelled]:
        """A batch for predictions, and its targets; see `log_predictive_density`."""
        batch = x if self.forward is not None or targets is None else (x, targets)
        return read_targets(self, batch, "the batch to predict", targets if self.forward is not None else None)

    def calibrate(
        self,
        data: Any,
        *,
        predictor: str | None = None,
        samples: int = 100,
        seed: int = 0,
        group: ProcessGroup = None,
    ) -> "Laplace":
        """Scale the prior precision so that predictions of validation data are best, in log density.

        All candidates are judged in the same pass over the data: factors from 1e-4 to 1e4, then finer ones around the
        best. A prior tuned for one predictor does not suit another: `predict` refuses that until it is set anew.

        Args:
            data: batches of inputs and targets, as for `estimate`, that the network was not trained on.
            predictor: which will be used, as in `predict`.
            samples: as in `predict`.
            seed: as in `predict`.
            group: the processes that read a part of the data each, as for `estimate`; all of them call this.

        Returns:
            Itself.

        Raises:
            DataError: there are no targets, or they do not fit; the posterior is as it was before.
            UnsupportedError: as `log_predictive_density`.
        """
        samples, seed = require_draws(samples, seed)
        ranks = ranks_of(group)
        before, self.calibrated_for = self.calibrated_for, None
        try:
            predictor = choose_predictor(self, predictor)
            calibrated = best_scale(self, data, predictor, samples, seed, ranks)
        except BaseException:
            self.calibrated_for = before
            raise
        self._set_precisions({group: precision.times(calibrated) for group, precision in self.precisions.items()})
        self.calibrated_for = predictor
        return self

    def updated(self, fisher: Fisher) -> "Laplace":
        """The posterior after more data: their curvature is added, and the hyper-parameters stay.

        Exact where the sum of the matrices is (diagonal and dense blocks, Kronecker products that are small enough to
        be written out); estimate on all data together where it is not. The parameters should be those of the model
        trained on all data.

        Raises:
            UnsupportedError: a block's sum has no structure that a posterior can use.

        Example:
            >>> import torch, kronfisher as kf
            >>> x = torch.linspace(-1, 1, 20).unsqueeze(1)
            >>> model = torch.nn.Linear(1, 1)
            >>> halves = [[(part, 2 * part)] for part in x.split(10)]
            >>> first, later = (kf.estimate(model, half, kf.Gaussian(), fit="full", labels="exact") for half in halves)
            >>> kf.Laplace(model, first).updated(later).fisher.count
            20.0
        """
        joined = self.fisher.reduced("sum") + fisher.reduced("sum")
        joined = replace(joined, info=replace(joined.info, changes=()), context=self.fisher.context)
        posterior = Laplace(
            self.model,
            joined,
            temperature=self._temperature,
            prior_mean=self.prior_mean,
            noise=self._noise,
            likelihood=self.likelihood,
            forward=self.forward,
        )
        posterior._set_precisions(
            {
                group: replace(precision, operator=operator, scale=posterior.scale(), checked=False)
                for (group, precision), operator in zip(self.precisions.items(), joined.blocks.values(), strict=True)
            }
        )
        return posterior

    def _batch(self, x: Any) -> Any:
        return x if self.forward is not None else (x, None)

    # Files ------------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write everything but the model to a safetensors file; read it back with `Laplace.load`.

        Raises:
            ImportError: safetensors is missing; ``pip install "kronfisher[io]"``.

        Example:
            >>> import torch, kronfisher as kf
            >>> x = torch.linspace(-1, 1, 20).unsqueeze(1)
            >>> model = torch.nn.Linear(1, 1)
            >>> posterior = kf.Laplace(model, kf.estimate(model, [(x, 2 * x)], kf.Gaussian(), labels="exact"))
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     posterior.save(f"{folder}/posterior.safetensors")
            ...     again = kf.Laplace.load(f"{folder}/posterior.safetensors", model, kf.Gaussian())
            >>> bool(again.predict(x).variance.allclose(posterior.predict(x).variance))
            True
        """
        save(self, path)

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module, likelihood: Likelihood, *, forward: Forward | None = None
    ) -> "Laplace":
        """Read a posterior that `save` wrote, for a model with the parameters that it had then.

        Raises:
            DataError: the file is damaged or of another kind, the model has other parameters, or the likelihood is
                another one.
            ImportError: safetensors is missing; ``pip install "kronfisher[io]"``.
        """
        return load(cls, path, model, likelihood, forward)
