"""One of C classes: the likelihood of softmax and cross-entropy."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kronfisher.likelihoods.draws import Draws
from kronfisher.likelihoods.likelihood import Likelihood, fail, promote, register, require_shape


@dataclass(frozen=True, eq=False)
class Categorical(Likelihood):
    """One class per position with probabilities `p = softmax(outputs)`, summed over the positions of a datum.

    Outputs are logits `[N, C]`, `[N, T, C]` or `[N, C, d1, …]`; targets are class indices of that shape without the
    classes, or class probabilities of that very shape. From three dimensions on, the shape of the indices tells which
    dimension holds the classes; say `class_dim` where it cannot. The Hessian of a position is `diag(p) - p pᵀ`, of
    rank C-1: its exact square root has C-1 columns, in closed form (Tanabe & Sagae 1992, J. R. Statist. Soc. B 54:211).

    Args:
        ignore_index: Positions with this target do not count: their vectors are zero.
        weight: Non-negative weight `[C]` of every class. The loss of a position is then `-w_y log p_y` with its
            observed target y, so that all labels need targets, and `log_prob` is this weighted sum.
        class_dim: 1 or -1, the dimension of the classes; None to decide by the shape of the targets.

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

    ignore_index: int = -100
    weight: Tensor | None = None
    class_dim: int | None = None

    def __post_init__(self) -> None:
        """Checks the settings once."""
        if self.class_dim not in (None, 1, -1):
            raise ValueError(f"class_dim={self.class_dim} must be 1 for [N, C, ...], -1 for [N, ..., C], or None")
        w = self.weight
        if w is not None and not (w.ndim == 1 and bool(((w >= 0) & torch.isfinite(w)).all())):
            raise ValueError(f"weight must be one non-negative, finite number per class, [C]; found {w}")

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`Σ w_y log p_y` over the positions of a datum, `[N]`; see the base class."""
        logits, axis = self._rows(outputs, targets)
        scale, y = self._labels(outputs, targets, axis)
        log_p = logits.log_softmax(-1)
        if y.is_floating_point():
            return (y * log_p).sum((1, 2))
        return (scale * log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)).sum(1)

    def sample(self, outputs: Tensor, draws: Draws) -> Tensor:
        """Class indices, int64, shaped like the outputs without the classes; see the base class."""
        logits, axis = self._rows(outputs.detach(), None)
        return self._draw(logits.softmax(-1), draws).reshape(_without(outputs, axis))

    def positions(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor | None:
        """Bool `[N, P]`, False where the target is `ignore_index`; None without class indices; see the base class."""
        if targets is None or targets.is_floating_point():
            return None
        return (targets.long() != self.ignore_index).unsqueeze(-1).flatten(1)

    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> int:
        """P·(C-1); see the base class."""
        axis = self._axis(outputs, targets)
        return math.prod(_without(outputs, axis)[1:]) * (outputs.shape[axis] - 1)

    def exact(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        """Yields the columns of the Cholesky factor of `w_y (diag(p) - p pᵀ)`, one position after the other.

        With tail sums `q_i = Σ_{j>i} p_j`, column i has `√(p_i q_i / q_{i-1})` at i and `-p_j/q_i` times that at j > i.
        See the base class.
        """
        logits, axis = self._rows(outputs.detach(), targets)
        scale = self._scale(outputs, targets, axis)
        p = logits.softmax(-1)
        tail = p.flip(-1).cumsum(-1).flip(-1)  # tail[i] = q_{i-1}; summing small terms alone keeps their digits
        before, after = tail[..., :-1], tail[..., 1:]
        # Where a tail underflows to zero, so do its probabilities, and the column is zero.
        pivot = (scale.unsqueeze(-1) * p[..., :-1] * (after / before.where(before > 0, 1))).sqrt()
        after = after.where(after > 0, 1)
        for t in range(p.shape[1]):
            for i in range(p.shape[2] - 1):
                vector = torch.zeros_like(p)
                vector[:, t, i] = pivot[:, t, i]
                vector[:, t, i + 1 :] = -(p[:, t, i + 1 :] / after[:, t, i, None]) * pivot[:, t, i, None]
                yield self._like(vector, outputs, axis)

    def hessian_product(self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None) -> Tensor:
        """`w_y (p ∘ u - p (p·u))` per position; see the base class."""
        logits, axis = self._rows(outputs.detach(), targets)
        scale = self._scale(outputs, targets, axis).unsqueeze(-1)
        p, u = logits.softmax(-1), promote(_to_rows(vector, axis))
        return self._like(scale * p * (u - (p * u).sum(-1, keepdim=True)), promote(vector), axis)

    def sampled(self, outputs: Tensor, targets: Tensor | None, draws: Draws) -> Tensor:
        """`√w_y (p - onehot(ỹ))` with y observed and ỹ drawn, one number per position; see the base class."""
        logits, axis = self._rows(outputs.detach(), targets)
        scale = self._scale(outputs, targets, axis).sqrt().unsqueeze(-1)
        p = logits.softmax(-1)
        return self._like(_residual(p, self._draw(p, draws)) * scale, outputs, axis)

    def observed(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`w_y (p - onehot(y))`, or `(Σ w y) p - w y` for class probabilities y; see the base class."""
        logits, axis = self._rows(outputs.detach(), targets)
        scale, y = self._labels(outputs, targets, axis)
        p, scale = logits.softmax(-1), scale.unsqueeze(-1)
        return self._like(scale * p - y if y.is_floating_point() else scale * _residual(p, y), outputs, axis)

    def check(self, outputs: Tensor, targets: Tensor | None, where: str = "batch 0", labels: str = "sampled") -> None:
        """As the base class; in addition layout, number of classes, weights, and labels in range."""
        super().check(outputs, targets, where, labels)
        if outputs.ndim < 2:
            fail(
                where,
                f"Categorical needs logits [N, C], [N, T, C] or [N, C, ...], found {list(outputs.shape)}",
                "for one logit per datum use Bernoulli",
            )
        axis = self._axis(outputs, targets, where)
        classes = outputs.shape[axis]
        if classes < 2:
            fail(
                where,
                f"Categorical needs at least two classes, found {classes} in dimension {axis} of {list(outputs.shape)}",
                "for one logit per datum use Bernoulli",
            )
        if self.weight is not None and len(self.weight) != classes:
            fail(
                where,
                f"Categorical has {len(self.weight)} class weights for {classes} classes in dimension {axis} "
                f"of outputs {list(outputs.shape)}",
                "give one weight per class",
            )
        if targets is None:
            if self.weight is not None:
                fail(
                    where,
                    "Categorical with class weights needs targets, found none",
                    "give (inputs, targets) batches, or leave out weight",
                )
            return
        if targets.is_floating_point() and targets.ndim == outputs.ndim:
            require_shape(targets, outputs.shape, "Categorical with class probabilities", where)
            error = (promote(targets).sum(axis) - 1).abs()
            if not ((targets >= 0).all() & (error < 1e-2).all()):
                fail(
                    where,
                    f"class probabilities in the targets must be non-negative and sum to one over dimension {axis}",
                    "normalise them, or give class indices",
                )
            return
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            fail(
                where,
                f"Categorical needs integer class indices, found {targets.dtype} of shape {list(targets.shape)}",
                "convert them with targets.long()",
            )
        targets = require_shape(targets, _without(outputs, axis), "Categorical", where).long()
        outside = ((targets < 0) | (targets >= classes)) & (targets != self.ignore_index)
        if outside.any():
            fail(
                where,
                f"label {int(targets[outside][0])} is out of range for {classes} classes (0 to {classes - 1})",
                f"labels start at 0; positions to skip are marked by ignore_index={self.ignore_index}",
            )

    def _axis(self, outputs: Tensor, targets: Tensor | None, where: str = "outputs") -> int:
        """The dimension of the classes."""
        if outputs.ndim == 2:
            return 1
        if self.class_dim is not None:
            return self.class_dim % outputs.ndim
        choices = {axis: _without(outputs, axis) for axis in (1, outputs.ndim - 1)}
        fits = [axis for axis, shape in choices.items() if targets is not None and tuple(targets.shape) == shape]
        if len(fits) == 1:
            return fits[0]
        found = "no targets" if targets is None else f"targets {list(targets.shape)}"
        fail(
            where,
            f"outputs {list(outputs.shape)} with {found} do not show which dimension holds the classes: class "
            f"indices would be {list(choices[1])} for class_dim=1, {list(choices[outputs.ndim - 1])} for class_dim=-1",
            "say Categorical(class_dim=1) or Categorical(class_dim=-1), or correct the targets",
        )

    def _rows(self, outputs: Tensor, targets: Tensor | None) -> tuple[Tensor, int]:
        """Logits as `[N, P, C]` in float32 or better, and the dimension that the classes came from."""
        axis = self._axis(outputs, targets)
        return promote(_to_rows(outputs, axis)), axis

    def _like(self, rows: Tensor, outputs: Tensor, axis: int) -> Tensor:
        """`[N, P, C]` in the layout and dtype of the outputs."""
        return rows.reshape(outputs.movedim(axis, -1).shape).movedim(-1, axis).to(outputs.dtype)

    def _labels(self, outputs: Tensor, targets: Tensor | None, axis: int) -> tuple[Tensor, Tensor]:
        """What multiplies the Hessian of every position `[N, P]`, and the targets as rows.

        The targets are indices `[N, P]` (0 where ignored, there the scale is 0), or weighted probabilities `[N, P, C]`.
        """
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.detach().to(outputs.device, dtype)
        if targets is not None and targets.is_floating_point():
            y = _to_rows(require_shape(targets, outputs.shape, "Categorical").detach(), axis).to(dtype)
            y = y if weight is None else y * weight
            return y.sum(-1), y
        # Widened first: compared as uint8, ignore_index=-100 would be label 156.
        y = require_shape(targets, _without(outputs, axis), "Categorical").long().unsqueeze(-1).flatten(1)
        counts = y != self.ignore_index
        y = y.where(counts, 0)
        return (counts.to(dtype) if weight is None else weight[y] * counts), y

    def _scale(self, outputs: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        """What multiplies the Hessian of every position `[N, P]`; without targets all positions count alike."""
        if targets is None and self.weight is None:
            return torch.ones_like(promote(outputs.detach()).select(axis, 0).unsqueeze(-1).flatten(1))
        return self._labels(outputs, targets, axis)[0]

    def _draw(self, p: Tensor, draws: Draws) -> Tensor:
        """Class indices `[N, P]` by inverting the distribution function at one uniform number each."""
        cumulative = p.cumsum(-1)
        uniform = draws.uniform(p.shape[:2], device=p.device, dtype=p.dtype) * cumulative[..., -1]
        return torch.searchsorted(cumulative, uniform.unsqueeze(-1)).squeeze(-1)


def _without(outputs: Tensor, axis: int) -> tuple[int, ...]:
    return (*outputs.shape[:axis], *outputs.shape[axis + 1 :])


def _to_rows(tensor: Tensor, axis: int) -> Tensor:
    last = tensor.movedim(axis, -1)
    return last.unsqueeze(1).flatten(1, -2)


def _residual(p: Tensor, y: Tensor) -> Tensor:
    """`p - onehot(y)`, its entry at y from the other entries: `p_y - 1` would lose the digits of a confident model."""
    others = p.scatter(-1, y.unsqueeze(-1), 0)
    return others.scatter(-1, y.unsqueeze(-1), -others.sum(-1, keepdim=True))


def _register(name: str, likelihood: Categorical, *shape: int) -> None:
    def example(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        outputs = torch.randn(shape, generator=generator, dtype=torch.float64)
        axis = (likelihood.class_dim or 1) % len(shape)
        targets = torch.randint(shape[axis], _without(outputs, axis), generator=generator)
        if len(shape) > 2:
            targets[:, -1] = likelihood.ignore_index
        return outputs.to(dtype), targets

    register(name, lambda: likelihood, example)


_WEIGHT = torch.tensor([0.5, 2.0, 1.0])
_register("categorical", Categorical(), 4, 3)
_register("categorical-sequence", Categorical(class_dim=-1), 3, 2, 3)
_register("categorical-images", Categorical(class_dim=1), 3, 3, 2, 2)
_register("categorical-weighted", Categorical(weight=_WEIGHT), 4, 3)
_register("categorical-weighted-sequence", Categorical(ignore_index=0, weight=_WEIGHT, class_dim=-1), 3, 2, 3)
