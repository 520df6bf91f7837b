"""The Laplace posterior: a Gaussian around the trained parameters, with a Fisher matrix as its precision."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kronfisher.capture.batches import Forward
from kronfisher.fisher import Fisher
from kronfisher.laplace import predictive as links
from kronfisher.laplace.calibration import best_scale
from kronfisher.laplace.linearised import Linearised, covariances, directions, variances
from kronfisher.laplace.posterior import Posterior
from kronfisher.laplace.prediction import predictions
from kronfisher.laplace.predictive import Prediction
from kronfisher.laplace.storage import load, save
from kronfisher.likelihoods import Likelihood

__all__ = ["Laplace"]


class Laplace(Posterior):
    """``N(θ*, Λ⁻¹)`` over the parameters that a Fisher matrix covers, with ``Λ = N·F/T + diag(prior precision)``.

    θ* are the model's parameters as they are now; train them to the end first, with a weight decay that fits the prior.
    All of the network, its last layer or any other part is treated: whatever required a gradient when `fisher` was
    estimated. A mean over data becomes a sum by itself. Predictions linearise the network around θ* or sample networks.

    Args:
        model: the model that `fisher` was estimated for.
        fisher: of any structure, not damped.
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

    # Predictions ------------------------------------------------------------------------------------------------------

    def predict(self, x: Any, *, predictor: str | None = None, samples: int = 100, seed: int = 0) -> Prediction:
        """What the posterior says about the targets of some inputs.

        Args:
            x: inputs as the model takes them: a tensor, a tuple of arguments or a mapping; with `forward`, a batch.
            predictor: how. The network linearised around θ*, with "linearized" outputs (Gaussian, exact), by the
                "probit" link, the Laplace "bridge" (classes), or by "mc" draws of the outputs; or networks with
                "sampled" parameters. Default: what was calibrated, else the first that the likelihood has.
            samples: draws, for "mc" and "sampled".
            seed: of the draws.

        Returns:
            Means and variances. One backward pass for each output of a datum (none for "sampled"); "bridge" and "mc"
            keep the output gradients of all of them.

        Raises:
            ValueError: the likelihood has no such predictor, or `calibrate` tuned another one.
            DataError: the inputs do not fit, or the model's parameters have changed.
        """
        predictor = self._predictor(predictor)
        candidates = {group: [precision] for group, precision in self.precisions.items()}
        (prediction,) = predictions(self, self._batch(x), candidates, predictor, samples, seed)
        return prediction

    def functional_variance(self, x: Any) -> tuple[Tensor, Tensor]:
        """Outputs ``[n, ...]`` of the linearised network and their variances ``[n, ...]``."""
        candidates = {group: [precision] for group, precision in self.precisions.items()}
        outputs, found = variances(self.network(), self._batch(x), candidates)
        return outputs, found[0]

    def functional_covariance(self, x: Any) -> tuple[Tensor, Tensor]:
        """Outputs ``[n, ...]`` and the covariances ``[n, C, C]`` of the C (flattened) outputs of each datum."""
        candidates = {group: [precision] for group, precision in self.precisions.items()}
        outputs, found = covariances(self.network(), self._batch(x), candidates)
        return outputs, found[0]

    def functional_samples(self, x: Any, samples: int = 100, *, seed: int = 0) -> Tensor:
        """Outputs of linearised networks ``[samples, n, ...]``; the same seed gives the same functions everywhere."""
        outputs, changes = directions(self.network(), self._batch(x), self.draws(samples, seed))
        return outputs + changes

    def log_predictive_density(
        self, x: Any, targets: Tensor, *, predictor: str | None = None, samples: int = 100, seed: int = 0
    ) -> Tensor:
        """``log p(targets | x)`` ``[n]`` under the prediction; positions that do not count are left out."""
        prediction = self.predict(x, predictor=predictor, samples=samples, seed=seed)
        return links.log_density(self.likelihood, prediction, targets)

    def calibrate(self, data: Any, *, predictor: str | None = None, samples: int = 100, seed: int = 0) -> "Laplace":
        """Scale the prior precision so that predictions of validation data are best, in log density.

        All candidates are judged in the same pass over the data: factors from 1e-4 to 1e4, then finer ones around the
        best. What is tuned for one predictor does not suit another: `predict` refuses that until the prior is set anew.

        Args:
            data: batches of inputs and targets that the network was not trained on.
            predictor: which will be used, as in `predict`.
            samples: as in `predict`.
            seed: as in `predict`.

        Returns:
            Itself.
        """
        self.calibrated_for = None
        predictor = self._predictor(predictor)
        calibrated = best_scale(self, data, predictor, samples, seed)
        self._set({group: precision.times(calibrated) for group, precision in self.precisions.items()})
        self.calibrated_for = predictor
        return self

    def updated(self, fisher: Fisher) -> "Laplace":
        """The posterior after more data: their curvature is added to what is here, with the same hyper-parameters.

        Exact where the sum of the matrices is (diagonal and dense blocks, Kronecker products that are small enough to
        be written out); estimate on all data together where it is not. The parameters should be those of the model
        trained on all data.

        Raises:
            UnsupportedError: a block's sum has no structure that a posterior can use.
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
        posterior._set(
            {
                group: replace(precision, operator=operator, scale=posterior.scale(), checked=False)
                for (group, precision), operator in zip(self.precisions.items(), joined.blocks.values(), strict=True)
            }
        )
        return posterior

    def network(self) -> Linearised:
        """The network, linear in the parameters of the posterior."""
        self.check_parameters()
        return Linearised(self.model, tuple(self.mean), self.forward)

    def _predictor(self, predictor: str | None) -> str:
        known = links.predictors(self.likelihood)
        chosen = predictor or self.calibrated_for or known[0]
        if chosen not in known:
            raise ValueError(f"predictor={predictor!r}: {type(self.likelihood).__name__} has {', '.join(known)}.")
        if self.calibrated_for not in (None, chosen):
            raise ValueError(
                f"predictor={chosen!r}, but the prior precision was calibrated for {self.calibrated_for!r}: what suits "
                f"one does not suit the other. Call calibrate(loader, predictor={chosen!r}), or set prior_precision."
            )
        return chosen

    def _batch(self, x: Any) -> Any:
        return x if self.forward is not None else (x, None)

    # Files ------------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write everything but the model to a safetensors file; read it back with `Laplace.load`.

        Raises:
            ImportError: safetensors is missing; ``pip install "kronfisher[io]"``.
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
