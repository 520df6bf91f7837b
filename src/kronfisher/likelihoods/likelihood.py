"""The contract of a likelihood: the vectors that are sent backwards for a Fisher matrix, and predictions."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from kronfisher.errors import UnsupportedError
from kronfisher.likelihoods.checks import check_outputs, check_targets, require_shape
from kronfisher.likelihoods.draws import Draws
from kronfisher.likelihoods.prediction import Prediction, Predictors, log_mean_exp, mixture
from kronfisher.linalg import promote


class Likelihood(ABC):
    """A distribution `p(targets | outputs)`, and the square roots of its Hessian with respect to the outputs.

    Outputs are `[N, ...]`, examples first, and every example has its own likelihood. All vectors are shaped like the
    outputs and are derivatives of one example's own negative log-likelihood, summed over its positions and never
    divided by N. They come back detached, in the outputs' dtype, computed in float32 or better.

    The Hessian meant is the one averaged over labels drawn from the model, that is, the Fisher matrix of the outputs.
    For outputs that are natural parameters (logits, means of known variance, logarithms of Poisson rates) it does not
    depend on the label and is the Hessian of the generalised Gauss-Newton matrix (Martens 2020, arXiv:1412.1193).

    A likelihood of one's own needs `log_prob` and `sample`; that is enough for sampled and for observed labels. It may
    define more:

    - exact labels: `root` if the entries of the outputs are independent, else `columns` and `exact`;
    - predictions of a posterior from draws: `mean` and `noise_variance`;
    - predictions in closed form: `predict_from_variances` or `predict_from_covariances`, named in `predictors`;
    - the density of such predictions, where it is not the mean over draws: `log_predictive_density`;
    - a noise that a posterior may learn: `single_noise`;
    - weights per position: `log_probs`, and `log_predictive_densities` in predictions;
    - positions that do not count: `positions`, and zeros there in `sampled` and `exact`;
    - how far a loss can fall: `excess`, beyond which training makes no step.

    Examples:
        Lifetimes with the logarithm of their rate as the output; the mean of the Hessian is one:

        >>> class Exponential(Likelihood):
        ...     def log_prob(self, outputs, targets):
        ...         return (outputs - targets * outputs.exp()).flatten(1).sum(1)
        ...     def sample(self, outputs, draws):
        ...         uniform = draws.uniform(outputs.shape, device=outputs.device, dtype=outputs.dtype)
        ...         return -uniform.log() / outputs.detach().exp()
        ...     def root(self, outputs, targets=None):
        ...         return torch.ones_like(outputs)
        >>> Exponential().observed(torch.zeros(2, 1), torch.tensor([[3.0], [1.0]]))
        tensor([[2.],
                [0.]])
        >>> [v.tolist() for v in Exponential().exact(torch.zeros(1, 2))]
        [[[1.0, 0.0]], [[0.0, 1.0]]]
    """

    predictors: ClassVar[Predictors] = {"mc": "draws", "sampled": "networks"}
    """Names of the predictors that a posterior has under this likelihood, the default first, and from what each is
    computed: "variances" calls `predict_from_variances`, "covariances" calls `predict_from_covariances`, "draws" and
    "networks" call `predict_from_draws`."""

    def joined(self, outputs: Any, where: str) -> Any:
        """What a forward pass returned, as one tensor of outputs; itself but for likelihoods of several tensors."""
        return outputs

    def count(self, outputs: Tensor) -> float:
        """The examples that outputs ``[N, ...]`` count for: N."""
        return float(len(outputs))

    @abstractmethod
    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log-probability of every example's targets, with all normalising constants.

        Args:
            outputs: `[N, ...]`.
            targets: The labels, as `sample` makes them.

        Returns:
            `[N]`, summed over positions and entries, differentiable with respect to the outputs.
        """

    def where_all_count(self) -> "Likelihood":
        """The same for targets of which `positions` leaves none out, so that it need not look for those again."""
        return self

    def labelled(self, targets: Tensor | None) -> bool:
        """Whether these targets hold labels, of which there is a log likelihood."""
        return targets is not None

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`Σ log_prob` over examples, 0-dim in float64: the term of the data in the marginal likelihood."""
        return self.log_prob(outputs, targets).sum(dtype=torch.float64)

    def excess(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """By how much the loss of every example exceeds the least that any outputs could have, or a bound below that.

        Training makes no step that promises more; None, the default, says that nothing is known.

        Args:
            outputs: `[N, ...]`.
            targets: The labels, as `sample` makes them.

        Returns:
            `[N]`, detached, not negative.
        """
        return None

    @abstractmethod
    def sample(self, outputs: Tensor, draws: Draws) -> Tensor:
        """Labels drawn from the model.

        Args:
            outputs: `[N, ...]`.
            draws: Source of random numbers; ask it for shapes that begin with N, so that batching changes nothing.

        Returns:
            Targets, detached, as `log_prob` takes them.
        """

    def log_probs(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log-probability of every position, whose sum over an example is `log_prob`; weights per position need it.

        Args:
            outputs: `[N, ...]`.
            targets: The labels, as `sample` makes them.

        Returns:
            The shape of the outputs, without their `joint_dim`.

        Raises:
            UnsupportedError: The likelihood does not define it.
        """
        raise self._undefined("log_probs", "weights per position")

    def joint_dim(self, outputs: Tensor, targets: Tensor | None = None) -> int | None:
        """The dimension of the outputs whose entries describe one target together, such as the classes.

        None where every entry of the outputs has a target of its own.
        """
        return None

    def with_layout(self, outputs: Tensor, targets: Tensor) -> "Likelihood":
        """This likelihood with the layout of the outputs that these targets show, for predictions, which have none."""
        return self

    def mean(self, outputs: Tensor) -> Tensor:
        """Mean of the targets under the model: the inverse link. Predictions need it, Fisher matrices do not.

        Args:
            outputs: `[N, ...]`.

        Returns:
            `E[targets]` in float32 or better, differentiable with respect to the outputs; for classes their
            probabilities, with the classes where the outputs have them.

        Raises:
            UnsupportedError: The likelihood does not define it.
        """
        raise self._undefined("mean")

    def noise_variance(self, outputs: Tensor) -> Tensor:
        """Variance of the targets around their `mean`, entry by entry, for certain outputs.

        Args:
            outputs: `[N, ...]`.

        Returns:
            Like the `mean`, in squared units of the targets; for classes the variance p(1-p) of their indicators.

        Raises:
            UnsupportedError: The likelihood does not define it.
        """
        raise self._undefined("noise_variance")

    @property
    def single_noise(self) -> float | None:
        """σ² where all targets have independent Gaussian noise of this one variance around the outputs, else None.

        A posterior can replace such a noise by another, or learn it from the residuals of the training data.
        """
        return None

    def predict_from_variances(self, outputs: Tensor, variances: Tensor, noise_factor: float = 1.0) -> Prediction:
        """The prediction of the targets in closed form from independent Gaussian outputs.

        Args:
            outputs: `[n, ...]`, the means of the Gaussian.
            variances: `[n, ...]`, of the outputs.
            noise_factor: On the noise variance; one unless the likelihood has a `single_noise`.

        Returns:
            Mean and variances `[n, ...]` of the targets.

        Raises:
            UnsupportedError: The likelihood does not define it.
        """
        raise self._undefined("predict_from_variances")

    def predict_from_covariances(self, outputs: Tensor, covariances: Tensor) -> Prediction:
        """The prediction of the targets in closed form from jointly Gaussian outputs of every example.

        Args:
            outputs: `[n, ...]`, the means of the Gaussian.
            covariances: `[n, C, C]`, of the C (flattened) outputs of every example.

        Returns:
            Mean and variances `[n, ...]` of the targets.

        Raises:
            UnsupportedError: The likelihood does not define it.
        """
        raise self._undefined("predict_from_covariances")

    def predict_from_draws(self, outputs: Tensor, noise_factor: float = 1.0) -> Prediction:
        """The prediction of the targets from draws of the outputs, by `mean` and `noise_variance`.

        Args:
            outputs: `[S, n, ...]`, S draws.
            noise_factor: On the noise variance; one unless the likelihood has a `single_noise`.

        Returns:
            Mean and variances `[n, ...]` of the targets.

        Raises:
            UnsupportedError: The likelihood has no `mean` or no `noise_variance`.
        """
        return mixture(self.mean, self.noise_variance, outputs, noise_factor)

    def log_predictive_density(self, prediction: Prediction, targets: Tensor) -> Tensor:
        """`log p(targets)` under a prediction, as if its entries were independent; `calibrate` maximises it.

        Args:
            prediction: Mean and variances `[n, ...]`.
            targets: The labels, as `sample` makes them; those that do not count are left out.

        Returns:
            `[n]`, summed over the positions of every example.

        Raises:
            UnsupportedError: The likelihood does not say which distribution has this mean and variance.
        """
        error = self._undefined("log_predictive_density", "the density of a prediction")
        drawn = [name for name, basis in self.predictors.items() if basis in ("draws", "networks")]
        if drawn:
            error = UnsupportedError(
                f"{error}, or let the posterior average over draws: its calibrate and log_predictive_density with "
                + " or ".join(f"predictor={name!r}" for name in drawn)
            )
        raise error

    def log_predictive_densities(self, prediction: Prediction, targets: Tensor) -> Tensor:
        """`log p` of every position under a prediction, where they are independent: weights per position need it.

        Args:
            prediction: Mean and variances `[n, ...]`.
            targets: The labels, as `sample` makes them.

        Returns:
            The shape of `log_probs`; its sum over an example is `log_predictive_density`.

        Raises:
            UnsupportedError: The likelihood does not define it.
        """
        raise self._undefined("log_predictive_densities", "the density of a prediction with weights per position")

    def log_density_from_draws(self, outputs: Tensor, targets: Tensor, noise_factor: float = 1.0) -> Tensor:
        """`log p(targets)` from draws of the outputs.

        The `log_predictive_density` of their prediction, where the likelihood defines it. Else the Monte-Carlo mean
        `log 1/S Σ_s p(targets | f_s)`, for each example jointly over its positions. Its standard error is the standard
        deviation of the `p_s` over their mean and `√S`, and as a logarithm it is too low by half the square of that.

        Args:
            outputs: `[S, n, ...]`, S draws.
            targets: The labels, as `sample` makes them; those that do not count are left out.
            noise_factor: On the noise variance; one unless the likelihood has a `single_noise`.

        Returns:
            `[n]`.

        Raises:
            UnsupportedError: The likelihood has a `log_predictive_density`, but no prediction from draws.
        """
        if not self.averages_over_draws:
            return self.log_predictive_density(self.predict_from_draws(outputs, noise_factor), targets)
        if noise_factor == 1 or self.single_noise is None:
            return log_mean_exp(torch.stack([self.log_prob(promote(draw), targets) for draw in outputs]))
        noise = self.single_noise * noise_factor  # around the outputs, as single_noise promises
        squares = (require_shape(targets, outputs.shape[1:], type(self).__name__) - promote(outputs)).square()
        terms = squares / noise + math.log(2 * math.pi * noise)
        return log_mean_exp(-0.5 * terms.unsqueeze(-1).flatten(2).sum(2))

    @property
    def averages_over_draws(self) -> bool:
        """Whether the density of predictions is the mean over draws, for want of one by mean and variance."""
        return type(self).log_predictive_density is Likelihood.log_predictive_density

    def _undefined(self, method: str, purpose: str = "predictions") -> UnsupportedError:
        name = type(self).__name__
        return UnsupportedError(f"{purpose}: {name} does not say what its {method} is; define {name}.{method}")

    def root(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Square root of the Hessian of one example where it is diagonal: entries of the outputs are independent.

        Args:
            outputs: `[N, ...]`.
            targets: The observed labels, for likelihoods whose scale depends on them.

        Returns:
            Like the outputs, in float32 or better.

        Raises:
            UnsupportedError: The likelihood defines neither `root` nor `exact`.
        """
        name = type(self).__name__
        raise UnsupportedError(
            f'labels="exact": {name} does not say what the square root of its Hessian is; define {name}.root if the '
            f'outputs are independent, {name}.columns and {name}.exact if not, or ask for labels="sampled"'
        )

    def positions(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor | None:
        """Which positions count, bool `[N, P]` with P positions per example; None where all of them do."""
        return None

    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> int:
        """The number of vectors that `exact` yields: V, the number of columns of one example's square root."""
        return math.prod(outputs.shape[1:])

    def exact(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        """Yields the columns of a square root of every example's Hessian, one at a time.

        Args:
            outputs: `[N, ...]`.
            targets: The observed labels, where masks or weights depend on them.

        Yields:
            `columns(outputs, targets)` vectors v like the outputs; for one example `Σ v vᵀ` is its Hessian.

        Raises:
            UnsupportedError: The likelihood defines neither `root` nor `exact`.
        """
        root = self.root(promote(outputs.detach()), targets).to(outputs.dtype).unsqueeze(-1).flatten(1)
        for c in range(root.shape[1]):
            vector = torch.zeros_like(root)
            vector[:, c] = root[:, c]
            yield vector.reshape(outputs.shape)

    def hessian_product(self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None) -> Tensor:
        """Every example's Hessian, averaged over labels drawn from the model, times a vector like the outputs.

        Args:
            outputs: `[N, ...]`.
            vector: Like the outputs.
            targets: The observed labels, where masks or weights depend on them.

        Returns:
            Like the outputs, in float32 or better.

        Raises:
            UnsupportedError: As `root` or `exact`.
        """
        vector = promote(vector)
        if type(self).exact is Likelihood.exact:
            return self.root(promote(outputs.detach()), targets).to(vector.dtype).square() * vector
        total = torch.zeros_like(vector)
        for column in self.exact(outputs, targets):
            column = column.to(vector.dtype)
            inner = (column * vector).flatten(1).sum(1)
            total += column * inner.reshape(-1, *[1] * (vector.dim() - 1))
        return total

    def sampled(self, outputs: Tensor, targets: Tensor | None, draws: Draws) -> Tensor:
        """Gradient of the negative log-probability of one label per position drawn from the model.

        Args:
            outputs: `[N, ...]`.
            targets: The observed labels, where masks or weights depend on them; otherwise unused.
            draws: Source of random numbers, one stream for each Monte-Carlo draw.

        Returns:
            v like the outputs with `E[v vᵀ]` the Hessian of every example; M draws are scaled by 1/√M by the caller.
        """
        wide = promote(outputs.detach())
        return self.observed(wide, self.sample(wide, draws)).to(outputs.dtype)

    def observed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of the negative log-probability of the observed targets, for the empirical Fisher.

        Args:
            outputs: `[N, ...]`.
            targets: The observed labels.

        Returns:
            Like the outputs; not divided by N.
        """
        with torch.enable_grad():
            leaf = promote(outputs.detach()).requires_grad_()
            (gradient,) = torch.autograd.grad(-self.log_prob(leaf, targets).sum(), leaf)
        return gradient.to(outputs.dtype)

    def check(self, outputs: Tensor, targets: Tensor | None, where: str = "batch 0", labels: str = "sampled") -> None:
        """Refuses outputs and targets that do not fit, before any work; reads values, so once per batch.

        Args:
            outputs: Anything that the model returned.
            targets: Anything that the data gave, None if nothing.
            where: Name of the batch in the message.
            labels: "exact", "sampled" or "observed"; the last needs targets.

        Raises:
            DataError: Wrong type, dtype, shape, device or value.
            NumericalError: The outputs are not finite.
        """
        check_outputs(outputs, type(self).__name__, where)
        check_targets(targets, outputs, type(self).__name__, where, labels)
