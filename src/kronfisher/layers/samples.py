"""The canonical form of every use of a weight, and its few contractions.

A layer is ``y[k, t] = W a[k, t]`` for samples k and positions t. With inputs ``a [H, n, T, I]`` and output gradients
``g [H, n, T, O]`` the gradient of sample k is ``G_k = Σ_t g[k, t] a[k, t]ᵀ``, shape ``[O, I]``. Nothing below this file
knows what a convolution is, nothing above it what a Kronecker product is. H counts groups of a convolution and is 1
otherwise. A sample is one example under one label draw or one column of the output Hessian's root.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import gcd

import torch
from torch import Tensor

from kronfisher.errors import UnsupportedError
from kronfisher.layers.activations import Activations, Dense
from kronfisher.linalg import WORKSPACE, chunks
from kronfisher.operators.factors import Factor

__all__ = ["Samples", "Shared", "join"]

_CACHE = 2**22  # bytes of gradients written out at once on a CPU; more is no faster and takes more memory


@dataclass(frozen=True, eq=False)
class Shared:
    """Output gradients that several blocks have, whose second moments are then made once.

    Attributes:
        gradients: ``g [H, n, T, O]``.
        moments: shape and dtype of a total → ``Σ_{k,t} g gᵀ`` like it.
    """

    gradients: Tensor
    moments: dict[tuple[torch.Size, torch.dtype], Tensor] = field(default_factory=dict)

    def add_covariance_(self, total: Tensor) -> None:
        """See `Samples.add_output_covariance_`."""
        key = total.shape, total.dtype
        if key not in self.moments:
            self.moments[key] = torch.zeros_like(total)
            Factor.of(self.moments[key]).add_product_(self.gradients.to(total.dtype).flatten(1, 2))
        total += self.moments[key]


@dataclass(frozen=True)
class Samples:
    """The samples of a block that a fit receives from one backward pass.

    Attributes:
        activations: ``a [H, n, T, I]``.
        gradients: ``g [H, n, T, O]`` of each example's own negative log-likelihood.
        first: False for further columns or draws of the same examples, whose activations were counted already.
        mask: ``[n, T]``, one where the position counts; None: all of them. Products of a and g are not masked: where a
            position that does not count still acts on others (through a convolution, say) its g is not zero and
            belongs to the gradient.
        workspace: bytes that temporaries may take.
        shared: the gradients, if other blocks have the same.
        batch: the number of the batch that brought them, as batches were dealt to the ranks of a process group.

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
    shared: Shared | None = None
    batch: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, O, I."""
        return self.gradients.shape[0], self.gradients.shape[-1], self.activations.shape[-1]

    @property
    def positions(self) -> int:
        return self.gradients.shape[2]

    @property
    def columns(self) -> int:
        """Output gradients for each input."""
        return 1

    def __len__(self) -> int:
        return self.gradients.shape[1]

    @property
    def rows(self) -> int | Tensor:
        """Positions that count, over all samples."""
        return len(self) * self.positions if self.mask is None else self.mask.sum()

    @property
    def masked_activations(self) -> Activations:
        """The inputs, zero at positions that do not count."""
        return self.activations if self.mask is None else self.activations.apply_mask(self.mask)

    @property
    def bytes(self) -> int:
        """Memory that the samples occupy."""
        return (self.activations.numel + self.gradients.numel()) * self.gradients.element_size()

    def add_input_covariance_(self, total: Tensor) -> None:
        """``total += Σ_{k,t} a aᵀ`` over positions that count, upper triangle of ``[H, I, I]``; or its diagonal."""
        activations = self.masked_activations
        one = activations.once()
        own = total if one is None else total.new_zeros(1, *total.shape[1:])
        activations = activations if one is None else one
        add = activations.add_squares_ if Factor.of(total).is_diagonal else activations.add_covariance_
        add(own, self.workspace)
        if one is not None:
            total += own

    def add_output_covariance_(self, total: Tensor) -> None:
        """``total += Σ_{k,t} g gᵀ``, upper triangle of ``[H, O, O]``, or diagonal ``[H, O]``."""
        if self.shared is not None and self.shared.gradients is self.gradients:
            self.shared.add_covariance_(total)
        else:
            Factor.of(total).add_product_(self.gradients.to(total.dtype).flatten(1, 2))

    def add_input_products_with_(self, later: "Samples", total: Tensor) -> None:
        """``total += Σ_{k,t} a a'ᵀ`` ``[I, I']`` with the inputs of another layer, row by row; one group each."""
        pair = (self.masked_activations, len(self)), (later.masked_activations, len(later))
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
        (groups, outputs, width), factor = self.shape, Factor.of(total)
        columns = self.activations.columns(self.gradients)
        if columns is not None:
            factor.add_product_(columns[1].to(total.dtype))
        elif self.positions == 1:
            for piece in self.pieces():
                lengths = torch.linalg.vector_norm(piece.activations.dense(), dim=-1, keepdim=True)
                factor.add_product_((piece.gradients * lengths).to(total.dtype).flatten(1, 2))
        elif self._shorter(outputs, width, factor.is_diagonal):
            for piece in self.pieces():
                a, g = piece.activations.dense(), piece.gradients
                factor.add_product_((a @ a.mT @ g).flatten(1, 2), g.flatten(1, 2))
        else:
            for gradients in self.per_sample():
                factor.add_product_(gradients.mT.reshape(groups, -1, outputs))

    def add_input_products_(self, total: Tensor) -> None:
        """``total += Σ_k G_kᵀ G_k``, upper triangle of ``[H, I, I]`` or diagonal ``[H, I]``; rows sorted by sample."""
        (groups, outputs, width), factor = self.shape, Factor.of(total)
        columns = self.activations.columns(self.gradients) if factor.is_diagonal else None
        if columns is not None:
            places, rows = columns
            total.index_add_(1, places, rows.to(total.dtype).square().sum(-1))
        elif self.positions == 1:
            for piece in self.pieces():
                lengths = torch.linalg.vector_norm(piece.gradients, dim=-1, keepdim=True)
                factor.add_product_((piece.activations.dense() * lengths).to(total.dtype).flatten(1, 2))
        elif self._shorter(width, outputs, factor.is_diagonal):
            for piece in self.pieces():
                a, g = piece.activations.dense(), piece.gradients
                factor.add_product_((g @ g.mT @ a).flatten(1, 2), a.flatten(1, 2))
        else:
            for gradients in self.per_sample():
                factor.add_product_(gradients.reshape(groups, -1, width))

    def _shorter(self, kept: int, summed: int, diagonal: bool) -> bool:
        """Whether ``[T, T]`` products are cheaper than the gradients written out, by multiplications."""
        positions, last = self.positions, 1 if diagonal else kept
        return positions * (summed + kept) + last * kept < kept * summed * (1 + last / (2 * positions))

    def per_sample(self, room: int = _CACHE) -> Iterator[Tensor]:
        """The gradients ``G_k = g_kᵀ a_k`` ``[H, n', O, I]`` of a few samples at a time.

        Args:
            room: bytes that they take at a time on a CPU, about.
        """
        groups, outputs, width = self.shape
        size = self.gradients.element_size() * groups * width * (outputs + self.positions)
        room = min(self.workspace, room) if self.gradients.device.type == "cpu" else self.workspace
        for low, high in chunks(len(self), size, room):
            g = self.gradients[:, low:high]
            if self.positions > 1:
                yield self.activations.weighted_sums(g, low, high)
            else:
                yield g.squeeze(2).unsqueeze(-1) * self.activations.dense(low, high)

    def squares(self) -> Tensor:
        """``Σ_k G_k∘²``, shape ``[H, O, I]``: the diagonal of the block."""
        shorter = self.activations.squares(self.gradients, self.workspace)
        if shorter is not None:
            return shorter
        if self.positions == 1:  # (g_o a_i)² needs no outer product per sample
            return self.gradients.squeeze(2).square().mT @ self.activations.dense().squeeze(2).square()
        groups, outputs, width = self.shape
        total = self.gradients.new_zeros(groups, outputs, width)
        for gradients in self.per_sample():
            total += gradients.square().sum(dim=1)
        return total

    def part(self, low: int, high: int) -> "Samples":
        """Samples low to high."""
        mask, gradients = None if self.mask is None else self.mask[low:high], self.gradients[:, low:high]
        return replace(self, activations=self.activations.part(low, high), gradients=gradients, mask=mask)

    def select(self, index: Tensor) -> "Samples":
        """Some samples ``[m]``."""
        mask, gradients = None if self.mask is None else self.mask[index], self.gradients[:, index]
        return replace(self, activations=self.activations.select(index), gradients=gradients, mask=mask)

    def copy(self) -> "Samples":
        """A copy in separate memory: the batch may have been freed or overwritten when it is used."""
        mask = None if self.mask is None else self.mask.clone()
        return replace(self, activations=self.activations.copy(), gradients=self.gradients.clone(), mask=mask)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        groups, outputs, width = self.shape
        size = self.gradients.element_size() * groups * self.positions * 2 * (width + outputs)
        return chunks(len(self), size, self.workspace)

    def pieces(self) -> Iterator["Samples"]:
        """A few samples at a time, with their inputs written out."""
        for low, high in self._ranges():
            activations = Dense(self.activations.dense(low, high))
            yield replace(self, activations=activations, gradients=self.gradients[:, low:high], mask=None)

    def rotate(self, inputs: Tensor | None, outputs: Tensor | None) -> Iterator["Samples"]:
        """Samples of ``U_Bᵀ G_k U_A``, a few at a time.

        Args:
            inputs: ``U_A [H, I, I]``, or ``[H, I]`` where it is a diagonal; None: one.
            outputs: ``U_B [H, O, O]``, or ``[H, O]``; None: one.
        """
        A, B = (None if given is None else Factor.of(given) for given in (inputs, outputs))
        if A is None or A.is_diagonal:  # no need to write them out
            activations = self.activations if A is None else self.activations.scale(A.tensor)
            yield replace(self, activations=activations, gradients=_rotate(self.gradients, B), mask=None)
            return
        narrow = A.tensor.shape[-1] < A.tensor.shape[-2]  # then `times` may be cheaper than writing them out
        for low, high in self._ranges():
            rows = self.activations.times(A.tensor, low, high) if narrow else None
            activations = Dense(A.rotate(self.activations.dense(low, high)) if rows is None else rows)
            yield replace(self, activations=activations, gradients=_rotate(self.gradients[:, low:high], B), mask=None)

    def rotated(self, inputs: Tensor, outputs: Tensor) -> Iterator[Tensor]:
        """``U_Bᵀ G_k U_A`` ``[H, n', O, I]`` written out for a few samples at a time; arguments as for `rotate`.

        A side is rotated before positions are summed or after, whichever takes fewer multiplications.
        """
        (_, width, height), positions = self.shape, self.positions
        A, B = Factor.of(inputs), Factor.of(outputs)
        late_A, late_B = (not A.is_diagonal and positions > width), (not B.is_diagonal and positions > height)
        for piece in self.rotate(None if late_A else inputs, None if late_B else outputs):
            for gradients in piece.per_sample():
                if late_A:
                    gradients = A.rotate(gradients)
                yield B.rotate(gradients.mT).mT if late_B else gradients

    def rotated_squares(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """``Σ_k (U_Bᵀ G_k U_A)∘²`` ``[H, O, I]``."""
        if self.positions > min(self.shape[1:]) and not self.activations.onehot:
            return torch.stack([gradients.square().sum(1) for gradients in self.rotated(inputs, outputs)]).sum(0)
        return torch.stack([piece.squares() for piece in self.rotate(inputs, outputs)]).sum(0)

    def inner(self, other: "Samples") -> Tensor:
        """``Σ_k ⟨G_k, G'_k⟩`` with the gradients G' of other samples of the same shape, in float64."""
        if self.positions == 1:
            inputs = (self.activations.dense() * other.activations.dense()).sum(-1)
            return (inputs * (self.gradients * other.gradients).sum(-1)).sum(dtype=torch.float64)
        total = self.gradients.new_zeros((), dtype=torch.float64)
        for mine, theirs in zip(self.per_sample(), other.per_sample(), strict=True):
            total += (mine * theirs).sum(dtype=torch.float64)
        return total

    def reduce(self) -> "Samples":
        """Sum positions out: ``a ← Σ_t a_t``, ``g ← (1/T_k) Σ_t g_t`` (Eschenhagen et al. 2023, K-FAC-reduce)."""
        gradients = self.gradients.sum(dim=2, keepdim=True)
        if self.mask is None:
            mask, gradients = None, gradients / self.positions
        else:
            lengths = self.mask.sum(dim=1, keepdim=True)
            mask, gradients = (lengths > 0).to(lengths.dtype), gradients / lengths.clamp_min(1)[..., None]
        return replace(self, activations=self.masked_activations.reduce(self.workspace), gradients=gradients, mask=mask)

    def apply_mask(self, positions: Tensor) -> "Samples":
        """Mark the positions that count.

        Args:
            positions: bool ``[n, P]``. Where P is this use's T it holds position by position; else a sample counts with
                all its positions if any of the P does.
        """
        if positions.shape[1] != self.positions:
            positions = positions.any(dim=1, keepdim=True).expand(-1, self.positions)
        mask = positions.to(self.gradients.dtype)
        return replace(self, mask=mask if self.mask is None else mask * self.mask)


def _rotate(rows: Tensor, factor: Factor | None) -> Tensor:
    return rows if factor is None else factor.rotate(rows)


def join(uses: list[Samples]) -> Samples:
    """Join several uses of one weight by the same samples into one: positions are concatenated along T."""
    if len(uses) == 1:
        return uses[0]
    if len({use.first for use in uses}) > 1:
        raise UnsupportedError(
            "A layer that is applied several times received its first gradients in different label draws or columns, "
            "so that its inputs cannot be counted once each. Use labels='sampled' with samples=1."
        )
    mask = None
    if any(use.mask is not None for use in uses):
        every = uses[0].gradients.new_ones(()).expand
        mask = torch.cat([every(len(use), use.positions) if use.mask is None else use.mask for use in uses], dim=1)
    activations = Activations.join([use.activations for use in uses])
    gradients = torch.cat([use.gradients for use in uses], dim=2)
    return replace(uses[0], activations=activations, gradients=gradients, mask=mask)
