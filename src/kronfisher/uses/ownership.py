"""Which sample owns a row of a layer's inputs and outputs.

Most layers keep data along their first axis; some see sequence-first tensors or batch and time flattened into one axis. Shapes decide
where they can; else a probe does: multiply the back-propagated vector of datum k by k and see by which factor each row's gradient grew.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kronfisher.errors import UnsupportedError

__all__ = ["Ownership"]


@dataclass(frozen=True)
class Ownership:
    """A rule that sorts rows by the sample that owns them.

    Attributes:
        samples: n.
        axis: the leading axis along which samples lie.
        major: where that axis holds several rows of each sample: they stand together (else samples alternate).
        order: ``[R]`` row numbers sorted by sample, where no axis does it.

    Example:
        >>> rows = torch.arange(6).reshape(3, 2)  # three positions of two samples, sequence first
        >>> Ownership(2, axis=1).group(rows, 2).tolist()
        [[0, 2, 4], [1, 3, 5]]
    """

    samples: int
    axis: int = 0
    major: bool = True
    order: Tensor | None = None

    def split(self, rows: Tensor) -> Tensor:
        """``[*lead, *rest] → [n, R/n along the axis, other lead axes in their order, *rest]``."""
        rows = rows.movedim(self.axis, 0)
        if self.major:
            return rows.unflatten(0, (self.samples, -1))
        return rows.unflatten(0, (-1, self.samples)).transpose(0, 1)

    def group(self, rows: Tensor, lead: int) -> Tensor:
        """``[*lead, *rest] → [n, T, *rest]``; `lead` is the number of leading axes."""
        rest = rows.shape[lead:]
        if self.order is not None:
            return rows.flatten(0, lead - 1)[self.order].reshape(self.samples, -1, *rest)
        if self.axis == 0 and self.major:
            return rows.reshape(self.samples, -1, *rest)
        return self.split(rows).reshape(self.samples, -1, *rest)

    def owners(self, lead: tuple[int, ...]) -> Tensor:
        """The sample of every row, ``[R]``."""
        rows = self.group(torch.arange(prod(lead)).reshape(lead), len(lead))
        owners = torch.empty(prod(lead), dtype=torch.long)
        owners[rows.flatten()] = torch.arange(self.samples).repeat_interleave(rows.shape[1])
        return owners

    @classmethod
    def by_shape(cls, lead: tuple[int, ...], samples: int) -> "Ownership | None":
        """The rule that shapes alone give, or None where they do not decide."""
        if samples == 1:
            return cls(1)
        if lead and lead[0] == samples and samples not in lead[1:]:
            return cls(samples)
        return None

    @classmethod
    def by_probe(cls, plain: Tensor, scaled: Tensor, samples: int, what: str) -> "Ownership":
        """The rule that explains how each row grew when datum k was multiplied by k = 1..n.

        Args:
            plain: ``[*lead, F]`` gradients of a random combination of the outputs.
            scaled: the same with datum k's outputs multiplied by k.
            samples: n.
            what: the use, for messages.

        Raises:
            UnsupportedError: rows mix data, or belong to samples in unequal numbers.
        """
        lead = tuple(plain.shape[:-1])
        plain, scaled = plain.flatten(0, -2).double(), scaled.flatten(0, -2).double()
        energy = plain.square().sum(-1)
        alive = energy > energy.max() * 1e-10  # rows of dead units and masked positions say nothing
        if not bool(alive.any()):
            return next(iter(cls._candidates(lead, samples)), cls(1)) if prod(lead) % samples == 0 else cls(1)
        ratio = (plain * scaled).sum(-1)[alive] / energy[alive]
        residual = (scaled[alive] - ratio[:, None] * plain[alive]).norm(dim=-1) / (ratio.abs() * energy[alive].sqrt())
        owner = ratio.round()
        clean = (residual < 1e-2) & ((ratio - owner).abs() < 0.05 + 1e-3 * owner) & (owner >= 1) & (owner <= samples)
        if not bool(clean.all()):
            raise UnsupportedError(
                f"{what}: the gradients of single rows mix several data, so no per-datum gradient exists. Data are coupled "
                "(normalisation over the batch, attention across it) or the parameter acts before it meets the data. "
                "Put such layers in eval mode, or freeze the parameter with requires_grad_(False)."
            )
        owner = owner.long().cpu() - 1
        alive = alive.cpu()
        fitting = [rule for rule in cls._candidates(lead, samples) if torch.equal(rule.owners(lead)[alive], owner)]
        if fitting:
            return fitting[0]
        counts = torch.bincount(owner, minlength=samples)
        if bool(alive.all()) and bool((counts == counts[0]).all()):
            return cls(samples, order=torch.argsort(owner, stable=True).to(plain.device))
        raise UnsupportedError(
            f"{what}: rows of shape {list(lead)} belong to the {samples} data in unequal numbers or in no pattern that is "
            "known; pass padded batches, or freeze the parameter with requires_grad_(False)."
        )

    @classmethod
    def _candidates(cls, lead: tuple[int, ...], samples: int) -> "list[Ownership]":
        exact = [cls(samples, axis) for axis, size in enumerate(lead) if size == samples]
        folded = [axis for axis, size in enumerate(lead) if size > samples and size % samples == 0]
        return exact + [cls(samples, axis, major) for axis in folded for major in (True, False)]
