"""K vectors over the parameters, one after the other: the rows of J, written out or as outer products."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kronfisher.linalg import WORKSPACE, add_symmetric_product_, chunks, eigh, full_precision, mirror, mirror_

__all__ = ["Directions", "OuterRows", "PlainRows", "Rows"]

_PANEL = 96  # rows of a Gram matrix that are made at once


@dataclass(frozen=True, eq=False)
class PlainRows:
    """Rows ``[K, D]`` of one block, written out."""

    rows: Tensor

    @property
    def dim(self) -> int:
        """D."""
        return self.rows.shape[1]

    def panel(self, low: int, high: int) -> Tensor:
        """Rows low to high of ``J Jᵀ``, from the diagonal on: ``[high − low, K − low]``."""
        return self.rows[low:high] @ self.rows[low:].mT

    def along(self, vectors: Tensor) -> Tensor:
        """``J v`` for M vectors ``[M, D]``: ``[M, K]``."""
        return vectors @ self.rows.mT

    def back(self, weights: Tensor) -> Tensor:
        """``Jᵀ u`` for M weights ``[M, K]``: ``[M, D]``."""
        return weights @ self.rows

    def squares(self) -> Tensor:
        """``Σ_k J_k∘²`` ``[D]``."""
        return self.rows.square().sum(0)

    def lengths(self) -> Tensor:
        """``‖J_k‖²`` ``[K]``."""
        return torch.linalg.vector_norm(self.rows, dim=1).square()

    def dense(self) -> Tensor:
        """The rows."""
        return self.rows

    def tensors(self) -> dict[str, Tensor]:
        """By the name of the field."""
        return {"rows": self.rows}


@dataclass(frozen=True, eq=False)
class OuterRows:
    """Rows ``vec(g_k a_e(k)ᵀ)`` of one block that sees one position of every example; never written out as a whole.

    Attributes:
        inputs: a ``[N, I]``.
        gradients: g ``[K, O]``.
        examples: the place in a of every row's inputs, ``[K]``.
    """

    inputs: Tensor
    gradients: Tensor
    examples: Tensor

    @property
    def dim(self) -> int:
        """D = O·I."""
        return self.inputs.shape[1] * self.gradients.shape[1]

    def panel(self, low: int, high: int) -> Tensor:
        """Rows low to high of ``(a aᵀ) ∘ (g gᵀ)``, from the diagonal on: ``[high − low, K − low]``."""
        if self._one_each:
            inputs = self.inputs[low:high] @ self.inputs[low:].mT
        else:
            inputs = self._products[self.examples[low:high]][:, self.examples[low:]]
        return inputs.mul_(self.gradients[low:high] @ self.gradients[low:].mT)

    def along(self, vectors: Tensor) -> Tensor:
        """``g_kᵀ V a_k`` for M vectors."""
        parts = []
        for low, high in self._chunks(len(vectors)):
            weights = vectors[low:high].unflatten(1, (self.gradients.shape[1], -1))
            parts.append(((self.inputs @ weights.mT)[:, self.examples] * self.gradients).sum(2))
        return torch.cat(parts) if parts else vectors.new_zeros(0, len(self.gradients))

    def back(self, weights: Tensor) -> Tensor:
        """``Σ_k u_k g_k a_kᵀ`` for M weights."""
        inputs = self.inputs if self._one_each else self.inputs[self.examples]
        parts = []
        for low, high in self._chunks(len(weights)):
            parts.append(((weights[low:high, :, None] * self.gradients).mT @ inputs).flatten(1))
        return torch.cat(parts) if parts else weights.new_zeros(0, self.dim)

    def squares(self) -> Tensor:
        """``Σ_k (g_k∘²) (a_k∘²)ᵀ`` ``[D]``."""
        return (self.gradients.square().mT @ self.inputs.square()[self.examples]).flatten()

    def lengths(self) -> Tensor:
        """``‖g_k‖² ‖a_k‖²``."""
        gradients, inputs = (torch.linalg.vector_norm(x, dim=1) for x in (self.gradients, self.inputs))
        return (gradients * inputs[self.examples]).square()

    def dense(self) -> Tensor:
        """The rows written out, ``[K, D]``."""
        return (self.gradients[:, :, None] * self.inputs[self.examples][:, None]).flatten(1)

    def tensors(self) -> dict[str, Tensor]:
        """By the name of the field."""
        return {"inputs": self.inputs, "gradients": self.gradients, "examples": self.examples}

    @cached_property
    def _products(self) -> Tensor:
        """``a aᵀ`` ``[N, N]``, which columns of one example share."""
        size = len(self.inputs)
        return mirror_(add_symmetric_product_(self.inputs.new_zeros(size, size), self.inputs.mT))

    @cached_property
    def _one_each(self) -> bool:
        return len(self.inputs) == len(self.examples) and torch.equal(
            self.examples, torch.arange(len(self.examples), device=self.examples.device)
        )

    def _chunks(self, number: int) -> Iterator[tuple[int, int]]:
        return chunks(number, 2 * len(self.gradients) * self.gradients.shape[1] * self.gradients.element_size())


@dataclass(frozen=True, eq=False)
class Rows:
    """``J [K, D]``: K vectors over several blocks, one after the other.

    Attributes:
        parts: J's columns, block by block.

    Example:
        >>> rows = Rows((PlainRows(torch.ones(2, 1)), OuterRows(torch.ones(2, 3), torch.ones(2, 2), torch.arange(2))))
        >>> rows.dim, rows.gram.tolist()
        (7, [[7.0, 7.0], [7.0, 7.0]])
    """

    parts: tuple[PlainRows | OuterRows, ...]

    @cached_property
    def sizes(self) -> list[int]:
        """Columns of every part."""
        return [part.dim for part in self.parts]

    @property
    def dim(self) -> int:
        """D, columns."""
        return sum(self.sizes)

    def __len__(self) -> int:
        """K."""
        return len(self.parts[0].gradients if isinstance(self.parts[0], OuterRows) else self.parts[0].rows)

    @property
    def wide(self) -> bool:
        """Whether there are fewer rows than columns, so that ``J Jᵀ`` is the smaller side."""
        return len(self) < self.dim

    @cached_property
    def gram(self) -> Tensor:
        """``J Jᵀ`` ``[K, K]``."""
        with full_precision(self._device_type):
            number = len(self)
            total = next(iter(self.parts[0].tensors().values())).new_empty(number, number)
            # By panels that end at the diagonal and stay in the cache while all blocks are multiplied and added up.
            step = _PANEL if self._device_type == "cpu" else max(_PANEL, -(-number // 4))
            for low in range(0, number, step):
                high = min(low + step, number)
                panel = self.parts[0].panel(low, high)
                for part in self.parts[1:]:
                    panel += part.panel(low, high)
                total[low:high, low:] = panel
            return mirror_(total)

    @cached_property
    def covariance(self) -> Tensor:
        """``Jᵀ J`` ``[D, D]``."""
        with full_precision(self._device_type):
            total = next(iter(self.parts[0].tensors().values())).new_zeros(self.dim, self.dim)
            for low, high in chunks(len(self), self.dim * total.element_size(), WORKSPACE):
                add_symmetric_product_(total, self.dense(low, high))
            return mirror(total)

    @cached_property
    def small(self) -> Tensor:
        """The smaller of the two sides."""
        return self.gram if self.wide else self.covariance

    @cached_property
    def directions(self) -> "Directions":
        """Eigenvectors of ``Jᵀ J`` from the smaller side; those that rounding hides are left out where it can."""
        values, vectors = eigh(self.small, "the smaller side")
        if not self.wide:
            return Directions(self, values, vectors)
        keep = values > 10 * torch.finfo(values.dtype).eps * values[-1:]
        return Directions(self, values[keep], None, vectors[:, keep])

    @cached_property
    def singular(self) -> "Directions":
        """The same by the singular values of J itself, whose squares are known to twice as many digits."""
        vectors, values = torch.linalg.svd(self.dense().mT, full_matrices=False)[:2]
        return Directions(self, values.square(), vectors)

    def along(self, vectors: Tensor) -> Tensor:
        """``J v`` for M vectors ``[M, D]``: ``[M, K]``."""
        with full_precision(self._device_type):
            pieces = vectors.split(self.sizes, dim=1)
            return sum(part.along(piece) for part, piece in zip(self.parts, pieces, strict=True))  # pyright: ignore[reportReturnType]

    def back(self, weights: Tensor) -> Tensor:
        """``Jᵀ u`` for M weights ``[M, K]``: ``[M, D]``."""
        with full_precision(self._device_type):
            return torch.cat([part.back(weights) for part in self.parts], dim=1)

    def products(self, other: "Rows") -> Tensor:
        """``J J'ᵀ`` ``[K, K']`` with other rows over the same blocks."""
        with full_precision(self._device_type):
            total = None
            for mine, theirs in zip(self.parts, other.parts, strict=True):
                if isinstance(mine, OuterRows) and isinstance(theirs, OuterRows):
                    inputs = (mine.inputs @ theirs.inputs.mT)[mine.examples][:, theirs.examples]
                    own = inputs.mul_(mine.gradients @ theirs.gradients.mT)
                else:
                    own = mine.dense() @ theirs.dense().mT
                total = own if total is None else total + own
            assert total is not None
            return total

    def squares(self) -> Tensor:
        """``Σ_k J_k∘²`` ``[D]``."""
        with full_precision(self._device_type):
            return torch.cat([part.squares() for part in self.parts])

    def lengths(self) -> Tensor:
        """``‖J_k‖²`` ``[K]``."""
        return torch.stack([part.lengths() for part in self.parts]).sum(0)

    def dense(self, low: int = 0, high: int | None = None) -> Tensor:
        """Rows low to high written out, ``[k, D]``."""
        return torch.cat([_part(part, low, high).dense() for part in self.parts], dim=1)

    def select(self, index: Tensor) -> "Rows":
        """The rows of these numbers, in memory of their own."""
        parts = []
        for part in self.parts:
            if isinstance(part, PlainRows):
                parts.append(PlainRows(part.rows[index]))
            else:
                used, examples = part.examples[index].unique(return_inverse=True)
                parts.append(OuterRows(part.inputs[used], part.gradients[index], examples))
        return Rows(tuple(parts))

    def scaled_rows(self, factor: Tensor) -> "Rows":
        """``diag(factor) J``."""
        parts = []
        for part in self.parts:
            if isinstance(part, PlainRows):
                parts.append(PlainRows(part.rows * factor[:, None].to(part.rows)))
            else:
                gradients = part.gradients * factor[:, None].to(part.gradients)
                parts.append(OuterRows(part.inputs, gradients, part.examples))
        return Rows(tuple(parts))

    def scaled_columns(self, factor: Tensor) -> "Rows":
        """``J diag(factor)``, written out."""
        pieces = factor.split(self.sizes)
        return Rows(tuple(PlainRows(part.dense() * own) for part, own in zip(self.parts, pieces, strict=True)))

    def tensors(self) -> dict[str, Tensor]:
        """Those of the parts, by number."""
        return {f"{k}.{name}": tensor for k, part in enumerate(self.parts) for name, tensor in part.tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Rows":
        """The rows that gave these `tensors`."""
        number = 1 + max(int(key.split(".")[0]) for key in tensors)
        parts = []
        for k in range(number):
            own = {key.split(".")[1]: tensor for key, tensor in tensors.items() if key.startswith(f"{k}.")}
            parts.append(PlainRows(**own) if "rows" in own else OuterRows(**own))
        return cls(tuple(parts))

    @property
    def _device_type(self) -> str:
        return next(iter(self.parts[0].tensors().values())).device.type


@dataclass(frozen=True, eq=False)
class Directions:
    """Orthonormal eigenvectors of ``Jᵀ J``: dense, or ``Jᵀ u / √μ`` with eigenvectors u of ``J Jᵀ``.

    Attributes:
        of: J.
        values: μ ``[r]``, at least 0.
        vectors: ``[D, r]``; None: by `weights`.
        weights: u ``[K, r]``.
    """

    of: Rows
    values: Tensor
    vectors: Tensor | None
    weights: Tensor | None = None

    def along(self, vectors: Tensor) -> Tensor:
        """Coordinates of M vectors ``[M, D]``: ``[M, r]``."""
        with full_precision(vectors.device.type):
            if self.vectors is not None:
                return vectors @ self.vectors
            assert self.weights is not None
            return self.of.along(vectors) @ self.weights * self.values.rsqrt()

    def back(self, coordinates: Tensor) -> Tensor:
        """``[M, r]`` to ``[M, D]``."""
        with full_precision(coordinates.device.type):
            if self.vectors is not None:
                return coordinates @ self.vectors.mT
            assert self.weights is not None
            return self.of.back(coordinates * self.values.rsqrt() @ self.weights.mT)

    def squares(self, weights: Tensor) -> Tensor:
        """``Σ_i w_i v_i∘²`` ``[D]``."""
        total = weights.new_zeros(self.of.dim)
        for low, high in chunks(len(weights), 3 * self.of.dim * weights.element_size()):
            unit = torch.eye(len(weights), dtype=weights.dtype, device=weights.device)[low:high]
            total += (weights[low:high, None] * self.back(unit).square()).sum(0)
        return total


def _part(part: PlainRows | OuterRows, low: int, high: int | None) -> PlainRows | OuterRows:
    if isinstance(part, PlainRows):
        return PlainRows(part.rows[low:high])
    return OuterRows(part.inputs, part.gradients[low:high], part.examples[low:high])


def join(pieces: Sequence[Rows]) -> Rows:
    """Rows of several batches, one after the other; a part that is written out in one of them is so in all."""
    if len(pieces) == 1:
        return pieces[0]
    parts = []
    for own in zip(*(piece.parts for piece in pieces), strict=True):
        if all(isinstance(part, OuterRows) for part in own):
            outer = [part for part in own if isinstance(part, OuterRows)]
            offsets = torch.tensor([len(part.inputs) for part in outer]).cumsum(0).tolist()
            parts.append(
                OuterRows(
                    torch.cat([part.inputs for part in outer]),
                    torch.cat([part.gradients for part in outer]),
                    torch.cat([part.examples + start for part, start in zip(outer, [0, *offsets[:-1]], strict=True)]),
                )
            )
        else:
            parts.append(PlainRows(torch.cat([part.dense() for part in own])))
    return Rows(tuple(parts))
