"""Uses of weights that are computed from weights: samples of the weight that a layer used become those of a parameter.

With the gradient ``G_k = Σ_t g aᵀ`` of the computed weight, the gradient of θ in ``W = L θ R`` is ``Σ_t (Lᵀ g)(R a)ᵀ``,
which is a use in canonical form again; that of a diagonal θ is ``Σ_t (Lᵀ g) ∘ (R a)``; and that of a vector from which
a vector is computed in any way is the vector-Jacobian product.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kronfisher.layers.activations import Activations, Dense, Ones
from kronfisher.layers.row_order import RowOrder
from kronfisher.layers.use import Use

__all__ = ["DiagonalUse", "FactorUse", "MappedUse", "NumberUse", "RowsUse", "VectorUse"]

_SMALL = 2.0**-20  # a power of two changes no digit


@dataclass
class Through(Use):
    """A use by way of the use of a computed weight.

    Attributes:
        inner: that use, whose windows are on the computed weight.
    """

    inner: Use

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reads_data = self.inner.reads_data

    def lead(self, output: tuple[int, ...]) -> tuple[int, ...]:
        return self.inner.lead(output)

    def rows(self, gradient: Tensor) -> Tensor:
        return self.inner.rows(gradient)

    def mask(self, order: RowOrder) -> Tensor | None:
        return self.inner.mask(order)

    def forget(self) -> None:
        super().forget()
        self.inner.forget()


@dataclass
class MappedUse(Through):
    """A use whose output is not that of the call: its gradients come from the call's by a linear map."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.summing, self.pads = self.inner.summing, self.inner.pads

    def _mapped(self, gradient: Tensor) -> Tensor:
        """The gradient of the use's own output."""
        raise NotImplementedError

    def rows(self, gradient: Tensor) -> Tensor:
        self.inner.dtype = self.dtype
        return self.inner.rows(self._mapped(gradient))

    def gradients(self, order: RowOrder, gradient: Tensor) -> Tensor:
        self.inner.dtype = self.dtype
        return self.inner.gradients(order, self._mapped(gradient))

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        self.inner.dtype = self.dtype
        return self.inner.activations(order, self._mapped(gradient), weight, bias)


@dataclass
class Factors(Through):
    """A use of a matrix θ in ``W = L₁ L₂ … θ … R₂ R₁``.

    Attributes:
        left: what output gradients meet, the outermost first: numbers, diagonals ``[O]`` or matrices ``[O, O']``.
        right: what inputs meet, the outermost first: diagonals ``[I]`` or matrices ``[I', I]``.
    """

    left: Sequence[Tensor] = ()
    right: Sequence[Tensor] = ()

    def _outputs(self, order: RowOrder, gradient: Tensor) -> Tensor:
        """``Lᵀ g [1, n, T, O']``."""
        self.inner.dtype = self.dtype
        rows = self.inner.gradients(order, gradient)
        for factor in self.left:
            own = factor.to(rows)
            rows = rows @ own if own.dim() == 2 else rows * own
        return rows

    def _inputs(self, order: RowOrder, gradient: Tensor) -> Activations:
        """``R a [1, n, T, I']``."""
        self.inner.dtype = self.dtype
        inputs = self.inner.activations(order, gradient, True, False)
        for factor in self.right:
            own = factor.to(gradient)
            inputs = Dense(inputs.times(own.mT[None])) if own.dim() == 2 else inputs.scale(own[None])
        return inputs


@dataclass
class FactorUse(Factors):
    """A use of a matrix θ in ``W = L θ R``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.onehot = self.inner.onehot and not self.right
        self.looked_up = self.inner.looked_up and not self.right
        self.summing = self.inner.summing
        self.pads = self.inner.pads

    def entries_apart(self) -> "FactorUse | None":
        inner = None if self.right else self.inner.entries_apart()
        if inner is None:
            return None
        use = replace(self, inner=inner)
        use.dtype = self.dtype
        return use

    def gradients(self, order: RowOrder, gradient: Tensor) -> Tensor:
        return self._outputs(order, gradient)

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        return self._inputs(order, gradient)


@dataclass
class DiagonalUse(Factors):
    """A use of ``s`` in ``W = L diag(s) R``, one number for each row or a single one.

    Attributes:
        single: s is one number.
    """

    single: bool = False
    summing = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pads = self.inner.pads

    def gradients(self, order: RowOrder, gradient: Tensor) -> Tensor:
        inputs, outputs = self._inputs(order, gradient), self._outputs(order, gradient)
        summed = (inputs.dense() * outputs).sum(dim=2, keepdim=True)
        return summed.sum(dim=-1, keepdim=True) if self.single else summed

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        return Ones(gradient, (1, order.samples, 1))

    def mask(self, order: RowOrder) -> Tensor | None:
        return None  # positions are summed out


@dataclass
class NumberUse(Factors):
    """A use of θ in ``W = L q(θ) R``, where θ enters by a number q: ``G_k ↦ ⟨Lᵀ G_k, R⟩ ∂q/∂θ``.

    Its samples are positions beside those of other uses of θ: inputs are the rows of Q, and output gradients multiples
    of the columns of P in ``∂q/∂θ = P Q``. None of them counts as a position, and P's are made so small that sums of
    output gradients alone do not see them; products of both are exact.

    Attributes:
        derivative: P ``[O', r]`` and Q ``[r, I']``.
    """

    derivative: tuple[Tensor, Tensor] = field(kw_only=True)
    summing = True

    def gradients(self, order: RowOrder, gradient: Tensor) -> Tensor:
        inputs, outputs = self._inputs(order, gradient), self._outputs(order, gradient)
        sums = (inputs.dense() * outputs).sum(dim=(2, 3))[..., None, None]  # [1, n, 1, 1]
        return sums * (self.derivative[0].mT.to(sums) * _SMALL)

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        rows = self.derivative[1].to(gradient) / _SMALL
        return Dense(rows.expand(1, order.samples, *rows.shape))

    def mask(self, order: RowOrder) -> Tensor | None:
        columns = self.derivative[0]
        return columns.new_zeros(order.samples, columns.shape[1], dtype=torch.bool)


@dataclass
class RowsUse(Factors):
    """A use of θ in ``W = L diag(q) R``, where θ enters by q, each number by its own row of θ, or its own column.

    With s the gradient by q, that by θ is ``C = diag(s) S``, or ``S diag(s)``. As in `NumberUse` the samples are
    positions that do not count: one for each column of C, or for each row where these are fewer and have a number each.
    Their inputs do not depend on s, so that they are the same for all gradients of an example.

    Attributes:
        slopes: S ``[O, I]``: ``∂q_o/∂θ_o``, or ``∂q_i/∂θ_i``.
        columns: q are of those.
    """

    slopes: Tensor = field(kw_only=True)
    columns: bool = field(default=False, kw_only=True)
    summing = True

    @property
    def _by_rows(self) -> bool:
        """Whether each position is a row of C, s_o times that of S."""
        return not self.columns and self.slopes.shape[0] <= self.slopes.shape[1]

    def gradients(self, order: RowOrder, gradient: Tensor) -> Tensor:
        inputs, outputs = self._inputs(order, gradient), self._outputs(order, gradient)
        sums = (inputs.dense() * outputs).sum(dim=2) * _SMALL
        if self._by_rows:
            return torch.diag_embed(sums)
        return self.slopes.mT.to(sums) * (sums[..., None] if self.columns else sums[..., None, :])  # columns of C

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        like = self.slopes.to(gradient)
        rows = like if self._by_rows else torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
        return Dense((rows / _SMALL).expand(1, order.samples, *rows.shape))

    def mask(self, order: RowOrder) -> Tensor | None:
        positions = self.slopes.shape[0 if self._by_rows else 1]
        return self.slopes.new_zeros(order.samples, positions, dtype=torch.bool)


@dataclass
class VectorUse(Through):
    """A use of the vector θ from which a vector was computed in any way.

    Attributes:
        result: the vector that was computed.
        origin: θ.
    """

    result: Tensor
    origin: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        self.summing = self.inner.summing
        self._edge = get_gradient_edge(self.result)  # as used here: it may be changed in place later

    def gradients(self, order: RowOrder, gradient: Tensor) -> Tensor:
        self.inner.dtype = self.dtype
        rows = self.inner.gradients(order, gradient)
        pulled = pull_back(self._edge, self.origin, rows.reshape(-1, *self.result.shape).to(self.result.dtype))
        return pulled.to(rows.dtype).reshape(*rows.shape[:3], -1)

    def activations(self, order: RowOrder, gradient: Tensor, weight: bool, bias: bool) -> Activations:
        return self.inner.activations(order, gradient, False, True)


def pull_back(result: GradientEdge, origin: Tensor, rows: Tensor) -> Tensor:
    """``Jᵀ v [R, origin.numel]`` of every row v, with J the derivative of a result by `origin`.

    Args:
        result: the edge of its graph, which is retained.
        origin: a leaf of that graph.
        rows: gradients of the result ``[R, *shape]``, in its dtype.
    """
    if not len(rows):
        return rows.new_zeros(0, origin.numel())
    options = {"retain_graph": True, "materialize_grads": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # where torch goes row by row
            found = torch.autograd.grad(result, origin, rows, is_grads_batched=True, **options)[0]
    except RuntimeError:  # a derivative that cannot be batched
        found = torch.stack([torch.autograd.grad(result, origin, row, **options)[0] for row in rows])
    return found.reshape(len(rows), -1)
