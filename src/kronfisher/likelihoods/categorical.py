"""One of C classes: the likelihood of softmax and cross-entropy."""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from kronfisher.errors import keep_integer
from kronfisher.likelihoods.bridge import bridge
from kronfisher.likelihoods.checks import require_shape, sum_per_example
from kronfisher.likelihoods.class_targets import check_classes, check_logits, find_classes, is_soft
from kronfisher.likelihoods.draws import Draws
from kronfisher.likelihoods.likelihood import Likelihood
from kronfisher.likelihoods.prediction import Prediction, Predictors, log_mean_exp, mixture
from kronfisher.likelihoods.probit import probit
from kronfisher.likelihoods.registry import register
from kronfisher.likelihoods.softmax import (
    from_probabilities,
    invert_distribution,
    like,
    log_softmax,
    parts,
    softmax,
    subtract_onehot_,
    to_rows,
    without,
)
from kronfisher.linalg import promote, promoted

_COLUMNS = 2**15  # numbers of exact columns that are made at a time


@dataclass(frozen=True, eq=False)
class Categorical(Likelihood):
    """One class per position with probabilities `p = softmax(outputs)`, summed over the positions of an example.

    Outputs are logits `[N, C]`, `[N, T, C]` or `[N, C, d1, …]`; targets are class indices of that shape without the
    classes, or class probabilities of that very shape. From three dimensions on, the shape of the indices tells which
    dimension holds the classes; say `class_dim` where it cannot. The Hessian of a position is `diag(p) - p pᵀ`, of
    rank C-1: its exact square root has C-1 columns, in closed form (Tanabe & Sagae 1992, J. R. Statist. Soc. B 54:211).

    Args:
        ignore_index: Positions with this target do not count: their vectors are zero.
        weight: Non-negative weight `[C]` of every class. The loss of a position is then `-w_y log p_y` with its
            observed target y, so that all labels need targets, and `log_prob` is this weighted sum.
        class_dim: 1 or -1, the dimension of the classes; None to decide by the shape of the targets.
        label_smoothing: α in [0, 1): the observed label y counts for 1-α and every class for α/C more, as in
            `torch.nn.CrossEntropyLoss`. It changes `log_prob` and observed labels only: the Hessian of the loss does
            not depend on labels, and drawn ones come from the model's own p, whose Fisher matrix that Hessian is.
            (Smoothing drawn labels as well would give (1-α)² of it.)

    Raises:
        ValueError: A setting is out of range.

    Examples:
        >>> categorical = Categorical()
        >>> categorical.observed(torch.zeros(1, 4), torch.tensor([1]))
        tensor([[ 0.2500, -0.7500,  0.2500,  0.2500]])
        >>> root = torch.stack(list(categorical.exact(torch.zeros(1, 3))))[:, 0]
        >>> torch.allclose(root.T @ root, torch.eye(3) / 3 - 1 / 9)
        True
    """

    predictors: ClassVar[Predictors] = {
        "probit": "variances",
        "bridge": "covariances",
        "mc": "draws",
        "sampled": "networks",
    }

    _ignores = True  # whether positions may have the target `ignore_index`

    ignore_index: int = -100
    weight: Tensor | None = None
    class_dim: int | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Checks the settings once."""
        keep_integer(self, "ignore_index", -math.inf, "give a label, an integer")
        if isinstance(self.class_dim, bool) or self.class_dim not in (None, 1, -1):
            raise ValueError(f"class_dim={self.class_dim} must be 1 for [N, C, ...], -1 for [N, ..., C], or None")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be in [0, 1): the share of all classes")
        w = self.weight
        if w is not None and not (w.ndim == 1 and bool(((w >= 0) & torch.isfinite(w)).all())):
            raise ValueError(f"weight must be one non-negative, finite number per class, [C]; found {w}")

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`Σ w_y log p_y` over the positions of an example, `[N]`; smoothed where asked to; see the base class."""
        return sum_per_example(self.log_probs(outputs, targets))

    def log_probs(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`w_y log p_y` of every position, zero where it is ignored; see the base class."""
        axis = self._axis(outputs, targets)
        log_p = log_softmax(outputs, axis)
        if is_soft(targets):
            terms = (self._soft(targets, outputs, axis) * log_p).sum(-1)
        else:
            own, even, index = self._hard(targets, outputs, axis)
            terms = log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
            terms = terms if own is None else own * terms
            if self.label_smoothing:
                terms = terms + even * (log_p @ self._weights(outputs, axis))
        return terms if outputs.dim() == 2 else terms.reshape(without(outputs, axis))

    def excess(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss, `[N]`: those of classes are at least zero; see the base class."""
        return -self.log_prob(outputs.detach(), targets)

    def joint_dim(self, outputs: Tensor, targets: Tensor | None = None) -> int:
        """The dimension of the classes; see the base class."""
        return self._axis(outputs, targets)

    def with_layout(self, outputs: Tensor, targets: Tensor) -> "Categorical":
        """With the `class_dim` that the shape of the targets shows; see the base class."""
        return replace(self, class_dim=1 if self._axis(outputs, targets) == 1 else -1)

    def sample(self, outputs: Tensor, draws: Draws) -> Tensor:
        """Class indices, int64, shaped like the outputs without the classes; see the base class."""
        axis = self._axis(outputs, None)
        shape = without(outputs, axis)
        uniform = self._uniform(outputs, axis, draws)
        rows = to_rows(outputs.detach(), axis)
        drawn = [invert_distribution(softmax(rows[part]), uniform[part]) for part in parts(rows)]
        return torch.cat(drawn).reshape(shape)

    def mean(self, outputs: Tensor) -> Tensor:
        """The class probabilities `p`, in the layout of the outputs; see the base class."""
        return promote(outputs).softmax(self._axis(outputs, None))

    def noise_variance(self, outputs: Tensor) -> Tensor:
        """`p(1-p)` for every class; see the base class."""
        p = self.mean(outputs)
        return p * (1 - p)

    def predict_from_variances(self, outputs: Tensor, variances: Tensor, noise_factor: float = 1.0) -> Prediction:
        """Class probabilities by the probit link; see the base class."""
        axis = self._axis(outputs, None)

        def squared_slopes(p: Tensor) -> Tensor:
            # Rows of the softmax's Jacobian p_i (δ_ij − p_j), squared, times the variances of the logits.
            return p.square() * ((1 - 2 * p) * variances + (p.square() * variances).sum(axis, keepdim=True))

        return probit(self.mean, outputs, variances, squared_slopes)

    def predict_from_covariances(self, outputs: Tensor, covariances: Tensor) -> Prediction:
        """Class probabilities by the Laplace bridge; see the base class."""
        return bridge(outputs, covariances, self._axis(outputs, None))

    def predict_from_draws(self, outputs: Tensor, noise_factor: float = 1.0) -> Prediction:
        """The mean probabilities of the classes, with their logarithms from log space; see the base class."""
        axis = self._axis(outputs[0], None)
        logits = log_mean_exp(promote(outputs).log_softmax(axis + 1))
        return mixture(self.mean, self.noise_variance, outputs, noise_factor, logits)

    def log_predictive_density(self, prediction: Prediction, targets: Tensor) -> Tensor:
        """`Σ w_y log p_y` with the predicted p, `[n]`; see the base class."""
        return sum_per_example(self.log_predictive_densities(prediction, targets))

    def log_predictive_densities(self, prediction: Prediction, targets: Tensor) -> Tensor:
        """`w_y log p_y` of every position, zero where it is ignored; see the base class."""
        mean, logits = prediction.mean, prediction.logits
        if logits is None:  # logarithms of probabilities are logits of the same probabilities
            logits = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        return self.log_probs(logits, targets)

    def where_all_count(self) -> "Categorical":
        """Without factors of one and a search for `ignore_index`; see the base class."""
        return self._plain if self.weight is None and not self.label_smoothing else self

    @cached_property
    def _plain(self) -> "Categorical":
        other = copy(self)
        object.__setattr__(other, "_ignores", False)
        return other

    def positions(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor | None:
        """Bool `[N, P]`, False where the target is `ignore_index`; None without class indices; see the base class."""
        if targets is None or is_soft(targets) or not self._ignores:
            return None
        return (targets.long() != self.ignore_index).unsqueeze(-1).flatten(1)

    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> int:
        """P·(C-1); see the base class."""
        axis = self._axis(outputs, targets)
        return math.prod(without(outputs, axis)[1:]) * (outputs.shape[axis] - 1)

    def exact(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        """Yields the columns of the Cholesky factor of `w_y (diag(p) - p pᵀ)`, one position after the other.

        With tail sums `q_i = Σ_{j>i} p_j`, column i has `√(p_i q_i / q_{i-1})` at i and `-p_j/q_i` times that at j > i.
        See the base class.
        """
        axis = self._axis(outputs, targets)
        n, *places = without(outputs, axis)
        scale = self._scale(outputs, targets, axis).reshape(n, math.prod(places))
        p = softmax(to_rows(outputs.detach(), axis)).reshape(*scale.shape, outputs.shape[axis])
        tail = p.flip(-1).cumsum(-1).flip(-1)  # tail[i] = q_{i-1}; summing small terms alone keeps their digits
        before, after = tail[..., :-1], tail[..., 1:]
        # Where a tail underflows to zero, so do its probabilities, and the column is zero.
        pivot = (scale.unsqueeze(-1) * p[..., :-1] * (after / before.where(before > 0, 1))).sqrt()
        below = pivot / -after.where(after > 0, 1)
        several = max(_COLUMNS // max(p[:, :1].numel(), 1), 1)  # at a time: calls count where there are few numbers
        for t in range(p.shape[1]):
            for low in range(0, p.shape[2] - 1, several):
                some = slice(low, low + several)
                columns = (below[:, t, some, None] * p[:, t, None, :]).triu_(low + 1)
                columns.diagonal(low, 1, 2).copy_(pivot[:, t, some])
                for vector in columns.unbind(1):
                    if p.shape[1] > 1:
                        column, vector = vector, torch.zeros_like(p)
                        vector[:, t] = column
                    yield like(vector, outputs, axis)

    def hessian_product(self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None) -> Tensor:
        """`w_y (p ∘ u - p (p·u))` per position; see the base class."""
        axis = self._axis(outputs, targets)
        scale = self._scale(outputs, targets, axis).unsqueeze(-1)
        p, u = softmax(to_rows(outputs.detach(), axis)), promote(to_rows(vector, axis))
        return like(scale * p * (u - (p * u).sum(-1, keepdim=True)), promote(vector), axis)

    def sampled(self, outputs: Tensor, targets: Tensor | None, draws: Draws) -> Tensor:
        """`√w_y (p - onehot(ỹ))` with y observed and ỹ drawn, one number per position; see the base class."""
        axis = self._axis(outputs, targets)
        hard, roots = self.weight is None and not is_soft(targets), list[Tensor]()
        if not hard or self._ignores:
            scale = self._scale(outputs, targets, axis).unsqueeze(-1)
            roots = [scale if hard else scale.sqrt()]  # of zeros and ones

        def vector(p: Tensor, uniform: Tensor, *roots: Tensor) -> Tensor:
            residual = subtract_onehot_(p, invert_distribution(p, uniform))
            return residual.mul_(roots[0]) if roots else residual

        return from_probabilities(outputs, axis, vector, self._uniform(outputs, axis, draws), *roots)

    def observed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`w_y (p - onehot(y))`, or `(Σ w y) p - w y` for class probabilities y; see the base class."""
        axis = self._axis(outputs, targets)
        if is_soft(targets):
            y = self._soft(targets.detach(), outputs, axis)

            def soft(p: Tensor, y: Tensor) -> Tensor:
                return p.mul_(y.sum(-1, keepdim=True)).sub_(y)

            return from_probabilities(outputs, axis, soft, y)
        own, even, index = self._hard(targets, outputs, axis)
        if own is None:
            return from_probabilities(outputs, axis, subtract_onehot_, index)
        weights = self._weights(outputs, axis)

        def vector(p: Tensor, own: Tensor, index: Tensor, *even: Tensor) -> Tensor:
            # The smoothed loss adds the mean over all classes of their weighted losses.
            smooth = (p * weights.sum()).sub_(weights).mul_(even[0]) if even else None
            residual = subtract_onehot_(p, index).mul_(own)
            return residual if smooth is None else residual.add_(smooth)

        smoothed = [even.unsqueeze(-1)] if self.label_smoothing else []
        return from_probabilities(outputs, axis, vector, own.unsqueeze(-1), index, *smoothed)

    def check(self, outputs: Tensor, targets: Tensor | None, where: str = "batch 0", labels: str = "sampled") -> None:
        """As the base class; in addition layout, number of classes, weights, and labels in range."""
        super().check(outputs, targets, where, labels)
        check_logits(outputs, where)
        axis = self._axis(outputs, targets, where)
        check_classes(outputs, targets, axis, self.weight, self.ignore_index, where)

    def _axis(self, outputs: Tensor, targets: Tensor | None, where: str = "outputs") -> int:
        """The dimension of the classes."""
        return find_classes(outputs, targets, self.class_dim, where)

    def _weights(self, outputs: Tensor, axis: int) -> Tensor:
        """The weight of every class, `[C]`."""
        dtype = promoted(outputs.dtype)
        if self.weight is None:
            return torch.ones(outputs.shape[axis], device=outputs.device, dtype=dtype)
        return self.weight.detach().to(outputs.device, dtype)

    def _hard(self, targets: Tensor | None, outputs: Tensor, axis: int) -> tuple[Tensor | None, Tensor, Tensor]:
        """Of every position `[R]`: the weight of its own class, that of each class alike, and the class.

        The first two are zero where the position is ignored, and so is the class. No weight: it is one everywhere.
        """
        # Widened first: compared as uint8, ignore_index=-100 would be label 156.
        index = require_shape(targets, without(outputs, axis), "Categorical").long().flatten()
        if not self._ignores:
            return None, index, index
        counts = index != self.ignore_index
        index = index.where(counts, 0)
        smoothing = self.label_smoothing
        if self.weight is None and not smoothing:
            own = counts.to(promoted(outputs.dtype))
            return own, own.new_zeros(1), index
        weights = self._weights(outputs, axis)
        counts = counts.to(weights.dtype)
        return (1 - smoothing) * weights[index] * counts, counts * (smoothing / outputs.shape[axis]), index

    def _soft(self, targets: Tensor, outputs: Tensor, axis: int) -> Tensor:
        """Class probabilities in the targets as rows `[R, C]`, smoothed and times the weight of the class."""
        weights = self._weights(outputs, axis)
        y = to_rows(require_shape(targets, outputs.shape, "Categorical"), axis).to(weights.dtype)
        if self.label_smoothing:
            y = y * (1 - self.label_smoothing) + self.label_smoothing / y.shape[-1]
        return y if self.weight is None else y * weights

    def _scale(self, outputs: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        """The factor on the Hessian of every position `[R]`; without targets all positions count alike."""
        if self.weight is None and (targets is None or not (self._ignores or is_soft(targets))):
            dtype = promoted(outputs.dtype)
            return torch.ones(math.prod(without(outputs, axis)), device=outputs.device, dtype=dtype)
        if is_soft(targets):
            return self._soft(targets.detach(), outputs, axis).sum(-1)
        if self.weight is None:  # one where a position counts, smoothed or not
            index = require_shape(targets, without(outputs, axis), "Categorical").long().flatten()
            return (index != self.ignore_index).to(promoted(outputs.dtype))
        own, even, _ = self._hard(targets, outputs, axis)
        assert own is not None  # with weights
        return own + even * self._weights(outputs, axis).sum() if self.label_smoothing else own

    def _uniform(self, outputs: Tensor, axis: int, draws: Draws) -> Tensor:
        """One uniform number for every position, `[R]`."""
        dtype = promoted(outputs.dtype)
        return draws.uniform(without(outputs, axis), device=outputs.device, dtype=dtype).flatten()


def _register(name: str, likelihood: Categorical, *shape: int) -> None:
    def example(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        outputs = torch.randn(shape, generator=generator, dtype=torch.float64)
        axis = (likelihood.class_dim or 1) % len(shape)
        targets = torch.randint(shape[axis], without(outputs, axis), generator=generator)
        if len(shape) > 2:
            targets[:, -1] = likelihood.ignore_index
        return outputs.to(dtype), targets

    register(name, lambda: likelihood, example)


_WEIGHT = torch.tensor([0.5, 2.0, 1.0])
_register("categorical", Categorical(), 4, 3)
_register("categorical-sequence", Categorical(class_dim=-1), 3, 2, 3)
_register("categorical-smoothed", Categorical(label_smoothing=0.2, class_dim=-1), 3, 2, 3)
_register("categorical-images", Categorical(class_dim=1), 3, 3, 2, 2)
_register("categorical-weighted", Categorical(weight=_WEIGHT), 4, 3)
_register("categorical-weighted-sequence", Categorical(ignore_index=0, weight=_WEIGHT, class_dim=-1), 3, 2, 3)
