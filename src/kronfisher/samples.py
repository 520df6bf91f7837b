"""The canonical form of every use of a weight, and its few contractions.

A layer is ``y[k, t] = W a[k, t]`` for samples k and positions t. With inputs ``a [H, n, T, I]`` and output gradients
``g [H, n, T, O]`` the gradient of sample k is ``G_k = Σ_t g[k, t] a[k, t]ᵀ``, shape ``[O, I]``. Nothing below this file
knows what a convolution is, nothing above it what a Kronecker product is. H counts groups of a convolution and is 1
otherwise. A sample is one datum under one label draw or one column of the output Hessian's root.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

from kronfisher.errors import UnsupportedError
from kronfisher.linalg import add_symmetric_product_, mirror

__all__ = ["Activations", "Dense", "Masked", "Ones", "Samples", "add_product_", "chunks", "join", "turned"]

WORKSPACE = 2**27  # bytes of temporaries that a contraction may take unless a memory budget says less
_CACHE = 2**22  # bytes of gradients that a processor writes out at once; more is no faster and takes more memory


def chunks(total: int, bytes_each: int, workspace: int = WORKSPACE) -> Iterator[tuple[int, int]]:
    """Ranges of samples whose temporaries of `bytes_each` bytes a sample fit the workspace."""
    step = max(1, min(total, workspace // max(bytes_each, 1)))
    for low in range(0, total, step):
        yield low, min(low + step, total)


def applied(rows: Tensor, matrix: Tensor) -> Tensor:
    """``[H, m, n, D]`` times ``[H, D, R]`` as one product a group; broadcasting would copy the matrix for every m."""
    return (rows.flatten(1, 2) @ matrix).unflatten(1, rows.shape[1:3])


def turned(rows: Tensor, side: Tensor | None) -> Tensor:
    """``[H, n, T, I]`` times a side ``[H, I, I]``, or its diagonal ``[H, I]``; None: one."""
    if side is None:
        return rows
    return applied(rows, side) if side.dim() == 3 else rows * side[:, None, None]


def add_product_(total: Tensor, x: Tensor, y: Tensor) -> None:
    """``total += xᵀ y`` for ``[H, R, D]``; of it the diagonal, where `total` is one, ``[H, D]``."""
    total += x.mT @ y if total.dim() == 3 else (x * y).sum(1)


class Activations:
    """Layer inputs ``a [H, n, T, I]``, perhaps not written out: subclasses hold what they are made of.

    Attributes:
        shape: H, n, T, I; I counts the homogeneous coordinate of a bias.
    """

    shape: tuple[int, int, int, int]

    @property
    def stored(self) -> int:
        """How many numbers are held."""
        return prod(self.shape)

    def dense(self, low: int = 0, high: int | None = None) -> Tensor:
        """The inputs of samples low to high, written out: ``[H, high − low, T, I]``."""
        raise NotImplementedError

    def part(self, low: int, high: int) -> "Activations":
        """The inputs of samples low to high, in as compact a form."""
        return Dense(self.dense(low, high))

    def taken(self, index: Tensor) -> "Activations":
        """The inputs of some samples ``[m]``, in as compact a form."""
        return Dense(self.dense()[:, index])

    def times(self, matrix: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        """``a M`` of samples low to high for M ``[H, I, R]``: ``[H, high − low, T, R]``."""
        return applied(self.dense(low, high), matrix)

    def combined(self, weights: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        """``Σ_t w[k, t] a[k, t]`` of samples low to high for weights ``[H, n', T, R]``: ``[H, n', R, I]``."""
        return weights.mT @ self.dense(low, high)

    def copied(self) -> "Activations":
        """The same in memory of its own, for samples that have to outlive their batch."""
        return Dense(self.dense().clone())

    def add_covariance_(self, total: Tensor, workspace: int = WORKSPACE) -> None:
        """``total += Σ_{k,t} a aᵀ``, upper triangle of ``[H, I, I]`` only."""
        heads, n, positions, width = self.shape
        for low, high in chunks(n, heads * positions * width * total.element_size(), workspace):
            rows = self.dense(low, high).to(total.dtype)
            add_symmetric_product_(total, rows.reshape(heads, -1, width))

    def add_squares_(self, total: Tensor, workspace: int = WORKSPACE) -> None:
        """``total += Σ_{k,t} a∘²``, ``[H, I]``: the diagonal of the covariance."""
        heads, n, positions, width = self.shape
        for low, high in chunks(n, heads * positions * width * total.element_size(), workspace):
            total += self.dense(low, high).to(total.dtype).square().sum(dim=(1, 2))

    def add_weighted_(self, total: Tensor, weights: Tensor) -> None:
        """``total += Σ_k w_k a_k a_kᵀ`` for T = 1 and weights ``[H, n]`` of at least zero, upper triangle."""
        add_symmetric_product_(total, self.dense()[:, :, 0] * weights.sqrt()[..., None])

    def products(self) -> Tensor:
        """``⟨a_k, a_l⟩ [H, n, n]`` for T = 1."""
        rows = self.dense()[:, :, 0]
        return mirror(add_symmetric_product_(rows.new_zeros(len(rows), *2 * rows.shape[1:2]), rows.mT))

    def summed(self, workspace: int = WORKSPACE) -> Tensor:
        """``Σ_t a``: ``[H, n, 1, I]``."""
        heads, n, positions, width = self.shape
        ranges = chunks(n, heads * positions * width * 8, workspace)
        return torch.cat([self.dense(low, high).sum(dim=2, keepdim=True) for low, high in ranges], dim=1)

    def reduced(self, workspace: int = WORKSPACE) -> "Activations":
        """The same as inputs of T = 1."""
        return Dense(self.summed(workspace))

    def masked(self, mask: Tensor) -> "Activations":
        """Zero at positions where ``mask [n, T]`` is."""
        return Masked(self, mask)

    def scaled(self, side: Tensor) -> "Activations":
        """``a`` times a vector ``[H, I]``, elementwise."""
        return Dense(self.dense() * side[:, None, None])

    def squares(self, gradients: Tensor, workspace: int) -> Tensor | None:
        """``Σ_k (g_kᵀ a_k)∘²`` ``[H, O, I]`` where there is a shorter way than by the gradients of samples."""
        return None

    def columns(self, gradients: Tensor) -> tuple[Tensor, Tensor] | None:
        """Where the G_k have few columns that are not zero: their places ``[R]`` in I and they ``[1, R, O]``."""
        return None

    @staticmethod
    def joined(several: "list[Activations]") -> "Activations":
        """Positions of all, side by side along T."""
        kinds = {type(each) for each in several}
        together = kinds.pop().side_by_side(several) if len(kinds) == 1 else None
        return together or Dense(torch.cat([each.dense() for each in several], dim=2))

    @classmethod
    def side_by_side(cls, several: "list[Any]") -> "Activations | None":
        """As `joined`, where all are of this kind and need not be written out."""
        return None


@dataclass(frozen=True)
class Dense(Activations):
    """Inputs that are there as a tensor.

    Attributes:
        values: ``[H, n, T, I]`` without the bias coordinate.
        bias: whether a last coordinate of one belongs to them.
    """

    values: Tensor
    bias: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        heads, n, positions, width = self.values.shape
        return heads, n, positions, width + self.bias

    @property
    def stored(self) -> int:
        return self.values.numel()

    def dense(self, low: int = 0, high: int | None = None) -> Tensor:
        values = self.values[:, low:high]
        return torch.cat([values, values.new_ones(()).expand(*values.shape[:3], 1)], dim=-1) if self.bias else values

    def part(self, low: int, high: int) -> "Dense":
        return replace(self, values=self.values[:, low:high])

    def taken(self, index: Tensor) -> "Dense":
        return replace(self, values=self.values[:, index])

    def times(self, matrix: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        width = self.values.shape[-1]
        product = applied(self.values[:, low:high], matrix[:, :width])
        return product.add_(matrix[:, None, width:]) if self.bias else product  # without a copy of the rest

    def combined(self, weights: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        product = weights.mT @ self.values[:, low:high]
        return torch.cat([product, weights.sum(2).unsqueeze(-1)], dim=-1) if self.bias else product

    def copied(self) -> "Dense":
        return replace(self, values=self.values.clone())

    def add_covariance_(self, total: Tensor, workspace: int = WORKSPACE) -> None:
        rows = self.values.to(total.dtype).flatten(1, 2)
        width = rows.shape[-1]
        add_symmetric_product_(total[:, :width, :width], rows)
        if self.bias:  # the last column, without a copy of the rest
            total[:, :width, width] += rows.sum(dim=1)
            total[:, width, width] += rows.shape[1]

    def add_weighted_(self, total: Tensor, weights: Tensor) -> None:
        root, width = weights.sqrt()[..., None], self.values.shape[-1]
        rows = self.values[:, :, 0] * root
        add_symmetric_product_(total[:, :width, :width], rows)
        if self.bias:
            total[:, :width, width:] += rows.mT @ root
            total[:, width, width] += weights.sum(1)

    def products(self) -> Tensor:
        rows = self.values[:, :, 0]
        found = mirror(add_symmetric_product_(rows.new_zeros(len(rows), *2 * rows.shape[1:2]), rows.mT))
        return found.add_(1) if self.bias else found

    def summed(self, workspace: int = WORKSPACE) -> Tensor:
        values = self.values.sum(dim=2, keepdim=True)
        positions = values.new_full((), self.values.shape[2]).expand(*values.shape[:3], 1)
        return torch.cat([values, positions], dim=-1) if self.bias else values


@dataclass(frozen=True)
class Ones(Activations):
    """The constant input of a bias or of an elementwise scale: I = 1.

    Attributes:
        like: a tensor that gives dtype and device.
        sizes: H, n, T.
    """

    like: Tensor
    sizes: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (*self.sizes, 1)

    @property
    def stored(self) -> int:
        return 0

    def dense(self, low: int = 0, high: int | None = None) -> Tensor:
        heads, n, positions = self.sizes
        return self.like.new_ones(()).expand(heads, len(range(n)[low:high]), positions, 1)

    def part(self, low: int, high: int) -> "Ones":
        return replace(self, sizes=(self.sizes[0], high - low, self.sizes[2]))

    def taken(self, index: Tensor) -> "Ones":
        return replace(self, sizes=(self.sizes[0], len(index), self.sizes[2]))

    def copied(self) -> "Ones":
        return replace(self, like=self.like.new_empty(0))

    def add_covariance_(self, total: Tensor, workspace: int = WORKSPACE) -> None:
        total += self.sizes[1] * self.sizes[2]

    def add_squares_(self, total: Tensor, workspace: int = WORKSPACE) -> None:
        total += self.sizes[1] * self.sizes[2]


@dataclass(frozen=True)
class Masked(Activations):
    """Inputs of which some positions do not count: zero there, the bias coordinate too.

    Attributes:
        inner: all of them.
        mask: ``[n, T]``, one where the position counts.
    """

    inner: Activations
    mask: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.inner.shape

    def dense(self, low: int = 0, high: int | None = None) -> Tensor:
        return self.inner.dense(low, high) * self.mask[low:high, :, None]


@dataclass(frozen=True)
class Samples:
    """All that a fit sees of a block in one backward pass.

    Attributes:
        activations: ``a [H, n, T, I]``.
        gradients: ``g [H, n, T, O]`` of each datum's own negative log-likelihood.
        first: False for the second and further columns or draws of the same data: their activations were counted
            already.
        mask: ``[n, T]``, one where the position counts; None: all of them. Products of a and g are not masked: where a
            position that does not count still acts on others (through a convolution, say) its g is not zero and
            belongs to the gradient.
        workspace: bytes that temporaries may take.

    Example:
        >>> a, g = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5)
        >>> samples = Samples(Dense(a), g)
        >>> [G.shape for G in samples.per_sample()]
        [torch.Size([1, 2, 5, 4])]
        >>> samples.squares()[0, 0, 0]
        tensor(18.)
    """

    activations: Activations
    gradients: Tensor
    first: bool = True
    mask: Tensor | None = None
    workspace: int = WORKSPACE

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, O, I."""
        return self.gradients.shape[0], self.gradients.shape[-1], self.activations.shape[-1]

    @property
    def positions(self) -> int:
        return self.gradients.shape[2]

    def __len__(self) -> int:
        return self.gradients.shape[1]

    @property
    def rows(self) -> int | Tensor:
        """Positions that count, over all samples."""
        return len(self) * self.positions if self.mask is None else self.mask.sum()

    @property
    def counted(self) -> Activations:
        """The inputs, zero at positions that do not count."""
        return self.activations if self.mask is None else self.activations.masked(self.mask)

    @property
    def bytes(self) -> int:
        """Memory that the samples take while they are kept."""
        return (self.activations.stored + self.gradients.numel()) * self.gradients.element_size()

    def add_input_covariance_(self, total: Tensor) -> None:
        """``total += Σ_{k,t} a aᵀ`` over positions that count, upper triangle of ``[H, I, I]``; or its diagonal."""
        add = self.counted.add_covariance_ if total.dim() == 3 else self.counted.add_squares_
        add(total, self.workspace)

    def add_output_covariance_(self, total: Tensor) -> None:
        """``total += Σ_{k,t} g gᵀ``, upper triangle of ``[H, O, O]``, or diagonal ``[H, O]``."""
        add_symmetric_product_(total, self.gradients.to(total.dtype).flatten(1, 2))

    def add_input_products_with_(self, later: "Samples", total: Tensor) -> None:
        """``total += Σ_{k,t} a a'ᵀ`` ``[I, I']`` with the inputs of another layer, row by row; one group each."""
        pair = (self.counted, len(self)), (later.counted, len(later))
        parts = gcd(len(self), len(later))  # positions may count as samples in one of them
        size = len(self) * self.positions // max(parts, 1) * sum(total.shape) * total.element_size()
        for low, high in chunks(parts, size, self.workspace):
            left, right = (a.dense(low * n // parts, high * n // parts)[0].to(total.dtype) for a, n in pair)
            total.addmm_(left.flatten(0, 1).mT, right.flatten(0, 1))

    def add_output_products_with_(self, later: "Samples", total: Tensor) -> None:
        """``total += Σ_{k,t} g g'ᵀ`` ``[O, O']`` with the output gradients of another layer, row by row."""
        left, right = (use.gradients[0].to(total.dtype).flatten(0, 1) for use in (self, later))
        total.addmm_(left.mT, right)

    def add_output_products_(self, total: Tensor) -> None:
        """``total += Σ_k G_k G_kᵀ``, upper triangle of ``[H, O, O]`` or diagonal ``[H, O]``; rows sorted by sample."""
        heads, outputs, width = self.shape
        columns = self.activations.columns(self.gradients)
        if columns is not None:
            add_symmetric_product_(total, columns[1].to(total.dtype))
        elif self.positions == 1:
            for piece in self.pieces():
                lengths = torch.linalg.vector_norm(piece.activations.dense(), dim=-1, keepdim=True)
                add_symmetric_product_(total, (piece.gradients * lengths).to(total.dtype).flatten(1, 2))
        elif self._shorter(outputs, width, total.dim() == 2):
            for piece in self.pieces():
                a, g = piece.activations.dense(), piece.gradients
                add_product_(total, (a @ a.mT @ g).flatten(1, 2), g.flatten(1, 2))
        else:
            for gradients in self.per_sample():
                add_symmetric_product_(total, gradients.mT.reshape(heads, -1, outputs))

    def add_input_products_(self, total: Tensor) -> None:
        """``total += Σ_k G_kᵀ G_k``, upper triangle of ``[H, I, I]`` or diagonal ``[H, I]``; rows sorted by sample."""
        heads, outputs, width = self.shape
        columns = self.activations.columns(self.gradients) if total.dim() == 2 else None
        if columns is not None:
            places, rows = columns
            total.index_add_(1, places, rows.to(total.dtype).square().sum(-1))
        elif self.positions == 1:
            for piece in self.pieces():
                lengths = torch.linalg.vector_norm(piece.gradients, dim=-1, keepdim=True)
                add_symmetric_product_(total, (piece.activations.dense() * lengths).to(total.dtype).flatten(1, 2))
        elif self._shorter(width, outputs, total.dim() == 2):
            for piece in self.pieces():
                a, g = piece.activations.dense(), piece.gradients
                add_product_(total, (g @ g.mT @ a).flatten(1, 2), a.flatten(1, 2))
        else:
            for gradients in self.per_sample():
                add_symmetric_product_(total, gradients.reshape(heads, -1, width))

    def _shorter(self, kept: int, summed: int, diagonal: bool) -> bool:
        """Whether ``[T, T]`` products are cheaper than the gradients written out, by multiplications."""
        positions, last = self.positions, 1 if diagonal else kept
        return positions * (summed + kept) + last * kept < kept * summed * (1 + last / (2 * positions))

    def per_sample(self) -> Iterator[Tensor]:
        """The gradients ``G_k = g_kᵀ a_k`` ``[H, n', O, I]`` of a few samples at a time."""
        heads, outputs, width = self.shape
        size = self.gradients.element_size() * heads * width * (outputs + self.positions)
        room = min(self.workspace, _CACHE) if self.gradients.device.type == "cpu" else self.workspace
        for low, high in chunks(len(self), size, room):
            a, g = self.activations.dense(low, high), self.gradients[:, low:high]
            yield g.mT @ a if self.positions > 1 else g.squeeze(2).unsqueeze(-1) * a

    def squares(self) -> Tensor:
        """``Σ_k G_k∘²``, shape ``[H, O, I]``: the diagonal of the block."""
        shorter = self.activations.squares(self.gradients, self.workspace)
        if shorter is not None:
            return shorter
        if self.positions == 1:  # (g_o a_i)² needs no outer product per sample
            return self.gradients.squeeze(2).square().mT @ self.activations.dense().squeeze(2).square()
        heads, outputs, width = self.shape
        total = self.gradients.new_zeros(heads, outputs, width)
        for gradients in self.per_sample():
            total += gradients.square().sum(dim=1)
        return total

    def part(self, low: int, high: int) -> "Samples":
        """Samples low to high."""
        mask, gradients = None if self.mask is None else self.mask[low:high], self.gradients[:, low:high]
        return replace(self, activations=self.activations.part(low, high), gradients=gradients, mask=mask)

    def taken(self, index: Tensor) -> "Samples":
        """Some samples ``[m]``."""
        mask, gradients = None if self.mask is None else self.mask[index], self.gradients[:, index]
        return replace(self, activations=self.activations.taken(index), gradients=gradients, mask=mask)

    def copied(self) -> "Samples":
        """The same in memory of its own: the batch may be gone, or refilled, when it is used."""
        mask = None if self.mask is None else self.mask.clone()
        return replace(self, activations=self.activations.copied(), gradients=self.gradients.clone(), mask=mask)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        heads, outputs, width = self.shape
        size = self.gradients.element_size() * heads * self.positions * 2 * (width + outputs)
        return chunks(len(self), size, self.workspace)

    def pieces(self) -> Iterator["Samples"]:
        """A few samples at a time, their inputs written out."""
        for low, high in self._ranges():
            activations = Dense(self.activations.dense(low, high))
            yield replace(self, activations=activations, gradients=self.gradients[:, low:high], mask=None)

    def rotated(self, inputs: Tensor | None, outputs: Tensor | None) -> Iterator["Samples"]:
        """Samples of ``U_Bᵀ G_k U_A``, a few at a time.

        Args:
            inputs: ``U_A [H, I, I]``, or ``[H, I]`` where it is a diagonal; None: one.
            outputs: ``U_B [H, O, O]``, or ``[H, O]``; None: one.
        """
        if inputs is None or inputs.dim() == 2:  # they need not be written out
            activations = self.activations if inputs is None else self.activations.scaled(inputs)
            yield replace(self, activations=activations, gradients=turned(self.gradients, outputs), mask=None)
            return
        narrow = inputs.shape[-1] < inputs.shape[-2]  # then there may be a shorter way than to write them out
        for low, high in self._ranges():
            rows = self.activations.times(inputs, low, high) if narrow else None
            activations = Dense(turned(self.activations.dense(low, high), inputs) if rows is None else rows)
            yield replace(
                self, activations=activations, gradients=turned(self.gradients[:, low:high], outputs), mask=None
            )

    def inner(self, other: "Samples") -> Tensor:
        """``Σ_k ⟨G_k, G'_k⟩`` with the gradients G' of other samples of the same shape, in float64."""
        if self.positions == 1:
            inputs = (self.activations.dense() * other.activations.dense()).sum(-1)
            return (inputs * (self.gradients * other.gradients).sum(-1)).sum(dtype=torch.float64)
        total = self.gradients.new_zeros((), dtype=torch.float64)
        for mine, theirs in zip(self.per_sample(), other.per_sample(), strict=True):
            total += (mine * theirs).sum(dtype=torch.float64)
        return total

    def reduced(self) -> "Samples":
        """Positions summed out: ``a ← Σ_t a_t``, ``g ← (1/T_k) Σ_t g_t`` (Eschenhagen et al. 2023, K-FAC-reduce)."""
        gradients = self.gradients.sum(dim=2, keepdim=True)
        if self.mask is None:
            mask, gradients = None, gradients / self.positions
        else:
            lengths = self.mask.sum(dim=1, keepdim=True)
            mask, gradients = (lengths > 0).to(lengths.dtype), gradients / lengths.clamp_min(1)[..., None]
        return replace(self, activations=self.counted.reduced(self.workspace), gradients=gradients, mask=mask)

    def masked(self, positions: Tensor) -> "Samples":
        """Samples that know which positions count.

        Args:
            positions: bool ``[n, P]``. Where P is this use's T it holds position by position; else a sample counts with
                all its positions if any of the P does.
        """
        if positions.shape[1] != self.positions:
            positions = positions.any(dim=1, keepdim=True).expand(-1, self.positions)
        return replace(self, mask=positions.to(self.gradients.dtype))


def join(uses: list[Samples]) -> Samples:
    """Uses of one weight by the same samples as one: positions side by side along T."""
    if len(uses) == 1:
        return uses[0]
    if len({use.first for use in uses}) > 1:
        raise UnsupportedError(
            "A layer that is applied several times got its first gradients in different label draws or columns, so its "
            "inputs cannot be counted once each. Use labels='sampled' with samples=1."
        )
    mask = None
    if any(use.mask is not None for use in uses):
        every = uses[0].gradients.new_ones(()).expand
        mask = torch.cat([every(len(use), use.positions) if use.mask is None else use.mask for use in uses], dim=1)
    activations = Activations.joined([use.activations for use in uses])
    gradients = torch.cat([use.gradients for use in uses], dim=2)
    return replace(uses[0], activations=activations, gradients=gradients, mask=mask)
