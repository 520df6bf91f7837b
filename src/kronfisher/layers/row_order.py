"""Which sample each row of a layer's inputs and outputs belongs to.

Most layers have examples along their first axis; some receive sequence-first tensors or batch and time flattened into
one axis, and some mix examples. Shapes are ambiguous, so a probe decides: it multiplies the back-propagated vector of
every example by its own power of two and observes by which one each row's gradient grew. Powers of two are exact, so
that even a gradient of rounding errors suffices.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

__all__ = ["Probe", "RowOrder", "irregular_rows_message", "mixed_rows_message"]

_ROUNDINGS = 512  # in a row's gradient, for which no other example is to blame


@dataclass(frozen=True)
class RowOrder:
    """A rule that sorts rows by the sample that they belong to.

    Attributes:
        samples: n.
        axis: the leading axis along which samples lie.
        folded: whether that axis holds several rows of each sample.
        major: if folded, whether the rows of a sample are contiguous (otherwise samples alternate).
        places: ``[R]`` places along the axis sorted by sample, if they follow no regular pattern. Where samples have
            unequal numbers of rows each is filled up with −1, which stands for a row of zeros.
        flat: whether all leading axes are taken as one, the first.

    Example:
        >>> rows = torch.arange(6).reshape(3, 2)  # three positions of two samples, sequence first
        >>> RowOrder(2, axis=1).group(rows, 2).tolist()
        [[0, 2, 4], [1, 3, 5]]
    """

    samples: int
    axis: int = 0
    folded: bool = False
    major: bool = True
    places: Tensor | None = None
    flat: bool = False

    def split(self, rows: Tensor) -> Tensor:
        """``[*lead, *rest] → [n, R/n along the axis, other lead axes in their order, *rest]``."""
        rows = rows.movedim(self.axis, 0)
        if self.places is not None:
            if self.padded:
                rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
            rows = rows[self.places]
        if self.major:
            return rows.unflatten(0, (self.samples, -1))
        return rows.unflatten(0, (-1, self.samples)).transpose(0, 1)

    def group(self, rows: Tensor, lead: int) -> Tensor:
        """``[*lead, *rest] → [n, T, *rest]``; `lead` is the number of leading axes."""
        rest = rows.shape[lead:]
        if self.flat:
            return self.split(rows.flatten(0, lead - 1))
        if self.axis == 0 and self.major and self.places is None:
            return rows.reshape(self.samples, -1, *rest)
        return self.split(rows).reshape(self.samples, -1, *rest)

    def stack(self, rows: Tensor, lead: int) -> Tensor:
        """As `group`, with a leading axis of one: ``[1, n, T, *rest]``."""
        if self.axis == 0 and self.major and self.places is None and not self.flat:
            return rows.reshape(1, self.samples, -1, *rows.shape[lead:])
        return self.group(rows, lead).unsqueeze(0)

    @cached_property
    def padded(self) -> bool:
        """Whether samples have unequal numbers of rows."""
        return self.places is not None and bool((self.places < 0).any())

    def exists(self, positions: int) -> Tensor | None:
        """``[n, T]``: which of so many positions of each sample exist; None: all of them."""
        if self.places is None or not self.padded:
            return None
        exist = (self.places >= 0).unflatten(0, (self.samples, -1))
        return exist.repeat_interleave(positions // exist.shape[1], dim=1)

    def examples(self, lead: tuple[int, ...]) -> Tensor:
        """The sample of every row, shaped as the leading axes."""
        rows = self.group(torch.arange(prod(lead), device="cpu").reshape(lead), len(lead))
        examples = torch.empty(prod(lead), dtype=torch.long, device="cpu")
        examples[rows.flatten()] = torch.arange(self.samples, device="cpu").repeat_interleave(rows.shape[1])
        return examples.reshape(lead)

    @staticmethod
    def candidates(lead: tuple[int, ...], samples: int) -> "list[RowOrder]":
        """The rules that the shape allows, the likeliest first."""
        exact = [RowOrder(samples, axis) for axis, size in enumerate(lead) if size == samples]
        folded = [axis for axis, size in enumerate(lead) if size > samples and size % samples == 0]
        return exact + [RowOrder(samples, axis, True, major) for axis in folded for major in (True, False)]

    @staticmethod
    def by_examples(examples: Tensor, samples: int, *, pads: bool = False) -> "tuple[RowOrder | None, bool]":
        """The rule that explains which example each row belongs to, and whether it is the only one.

        Args:
            examples: the sample of every row, shaped as the leading axes; −1 where unknown.
            samples: n.
            pads: whether samples may have unequal numbers of rows; rows of unknown samples, which no gradient reaches,
                are left out then.
        """
        lead, known = tuple(examples.shape), examples >= 0
        rules = RowOrder.candidates(lead, samples)
        fitting = [rule for rule in rules if torch.equal(rule.examples(lead)[known], examples[known])]
        if fitting:
            return fitting[0], len(fitting) == 1
        for axis in range(len(lead)):  # examples in another order, such as sorted by length
            lines = examples.movedim(axis, 0).reshape(lead[axis], -1)
            line = lines.amax(dim=1)
            counts = torch.bincount(line[line >= 0], minlength=samples)
            if not bool(((lines == line[:, None]) | (lines < 0)).all()):
                continue
            if bool((line >= 0).all() & (counts == counts[0]).all()):
                return RowOrder(samples, axis, places=torch.argsort(line, stable=True)), True
            if pads:
                return RowOrder(samples, axis, places=_padded(line, counts)), True
        if not pads or examples.dim() < 2:  # a single row has no axis to be sorted along
            return None, True
        line = examples.flatten()
        counts = torch.bincount(line[line >= 0], minlength=samples)
        return RowOrder(samples, places=_padded(line, counts), flat=True), True


def _padded(line: Tensor, counts: Tensor) -> Tensor:
    """``[n · max counts]``: places sorted by sample, each sample filled up with −1."""
    places = torch.full((len(counts), max(int(counts.max()), 1)), -1)
    order = torch.argsort(line, stable=True)[int((line < 0).sum()) :]
    places[torch.arange(places.shape[1]) < counts[:, None]] = order
    return places.flatten()


class Probe:
    """Determines from the gradients of rows which sample they belong to.

    The number of every example is written in digits; in the pass for its place, a digit d multiplies the vector by 2^d.

    Args:
        samples: n.
        dtypes: of the gradients on the way; a half precision with a small range allows fewer powers and takes more
            passes, one with few digits rounds more.
    """

    width = 4  # the number of random projections that represent a row's gradient

    def __init__(self, samples: int, dtypes: Iterable[torch.dtype]) -> None:
        kinds = [torch.finfo(dtype) for dtype in dtypes]
        self.samples, self.rounding = samples, max(kind.eps for kind in kinds)
        self.base = 4 if min(kind.max for kind in kinds) < 1e6 else 32
        self.digits = 1
        while self.base**self.digits < samples:
            self.digits += 1

    def factors(self) -> Tensor:
        """``[1 + digits, n]``: the factor of each example's vector in each pass; it is one in the first pass."""
        places = self.base ** torch.arange(self.digits, device="cpu")
        digit = torch.arange(self.samples, device="cpu") // places[:, None] % self.base
        return torch.cat([torch.ones(1, self.samples, device="cpu"), 2.0 ** (digit - self.base // 2)])

    def project(self, rows: Tensor) -> Tensor:
        """``[*lead, F] → [*lead, min(F, width)]``: project the gradient of every row onto a few directions."""
        features = rows.shape[-1]
        if features <= self.width:
            return rows.clone()  # the vector that was back-propagated may be these very rows
        generator = torch.Generator("cpu").manual_seed(features)
        return rows @ torch.randn(features, self.width, generator=generator, device="cpu").to(rows)

    def examples(self, passes: list[Tensor]) -> Tensor | None:
        """The sample of every row, −1 where its gradient is zero; None if any row belongs to several samples.

        Args:
            passes: ``[*lead, width]`` projections of each pass.
        """
        # What others contribute to a row and is let pass is an error of that size in the matrix. Doubling is exact, so
        # that of rows with one example only sums in another order (on some devices) leave anything.
        tolerance, dead = min(_ROUNDINGS * self.rounding, 1e-3), min(self.rounding**1.5, 1e-10)
        plain, *scaled = (projection.double() for projection in passes)
        if not plain.numel():
            return torch.full(plain.shape[:-1], -1, device="cpu")
        energy = plain.square().sum(-1)
        alive = energy > energy.max() * dead  # rows of dead units and masked positions carry no information
        energy, example, clean = energy.where(alive, 1), torch.zeros_like(energy), torch.ones_like(alive)
        for place, product in enumerate(scaled):
            ratio = (plain * product).sum(-1) / energy
            missed = (product - ratio.unsqueeze(-1) * plain).norm(dim=-1) / energy.sqrt()
            power = ratio.clamp_min(2.0**-40).log2()
            digit = power.round() + self.base // 2
            clean &= (missed < tolerance * ratio) & ((power - power.round()).abs() < tolerance)
            clean &= (digit >= 0) & (digit < self.base)
            example += digit * self.base**place
        if not bool((clean & (example < self.samples) | ~alive).all()):
            return None
        return example.where(alive, -1).long().cpu()


def mixed_rows_message(what: str) -> str:
    """The message for a use whose rows belong to several examples each."""
    return (
        f"{what}: the gradient of a single row mixes several examples, so per-example gradients do not exist. Either "
        "examples are coupled (normalisation over the batch, attention across it, rows that are nodes of one graph), "
        "or the parameter is used before any data enter, or it has elements of its own for each example. Put such "
        "layers in eval mode, let an example be all rows that act on each other, or freeze it with "
        "requires_grad_(False)."
    )


def irregular_rows_message(what: str, lead: tuple[int, ...], samples: int) -> str:
    """The message for a use whose rows belong to examples in no known order."""
    return (
        f"{what}: rows of shape {list(lead)} belong to the {samples} examples in unequal numbers or in no known "
        "pattern. Pad the sequences of a batch to one length, or freeze the parameter with requires_grad_(False)."
    )
