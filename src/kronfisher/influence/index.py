"""A store of compressed training gradients, so that new queries are answered without reading the data again.

In the eigenbasis of ``F + λ = K⁻ᵀ diag(v) K⁻¹`` a score is an inner product of coordinates ``c = vec(Kᵀ G) / √v``.
Where K is no Kronecker product (a weight in two roles, whole blocks), it is written out. The leading coordinates are
kept, those whose curvature is largest against λ: a direction that is all damping carries little of any score. By Cauchy
and Schwarz a score is off by at most ``‖c_q⊥‖ ‖c_k⊥‖ / N``, the norms of what was left out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, cast

import torch
from torch import Tensor

from kronfisher.errors import UnsupportedError
from kronfisher.fisher.layout import Blocks, block_name
from kronfisher.fits.quadratic_forms import factored
from kronfisher.influence.files import RowFile
from kronfisher.influence.preconditioned import Damped
from kronfisher.influence.queries import require_order
from kronfisher.influence.readings import Network, Reading, read, require_finite
from kronfisher.influence.scores import Scores
from kronfisher.layers.samples import Samples
from kronfisher.likelihoods import Likelihood
from kronfisher.linalg import plain_arithmetic
from kronfisher.operators import Eigen, Operator

__all__ = ["Index", "Leading", "write_index"]


@dataclass(frozen=True, eq=False)
class Leading:
    """The coordinates that are kept: of every block, places in ``vec`` of its rotated gradients.

    Attributes:
        damped: F + λ.
        places: number of an entry of F → its places, ascending; together they are R.
    """

    damped: Damped
    places: Mapping[int, Tensor]

    @classmethod
    def of(cls, damped: Damped, size: int) -> "Leading":
        """The `size` coordinates of all blocks with the largest curvature against λ.

        Raises:
            UnsupportedError: eigenvectors of a block are no Kronecker product, and it is too large for others.
        """
        ratios, owners, places = [], [], []
        for k, (_, operator) in enumerate(damped.fisher.entries):
            if not float(operator.trace()) > 0:
                continue  # nothing depends on it
            values, shift = _eigenvalues(damped, k), damped.damping[k]
            ratios.append((values - shift) / max(shift, torch.finfo(values.dtype).tiny))
            owners.append(torch.full((len(values),), k, device=values.device))
            places.append(torch.arange(len(values), device=values.device))
        if not ratios:
            return cls(damped, {})
        ratio, owner, place = (torch.cat(parts) for parts in (ratios, owners, places))
        kept = ratio.topk(min(size, len(ratio))).indices.sort().values
        return cls(damped, {k: place[kept][owner[kept] == k] for k in owner[kept].unique().tolist()})

    def entries(self, blocks: Blocks) -> list[int]:
        """The numbers of F's entries in which a group of blocks has coordinates that are kept, in order."""
        return [number for number in self.damped.tied(blocks) if number in self.places]

    def coordinates(self, blocks: Blocks, samples: tuple[Samples, ...]) -> Tensor:
        """The coordinates of one group that are kept, of one of its `entries` after the other ``[n, r]``."""
        damped, entries = self.damped, self.entries(blocks)
        if not entries:
            return samples[0].gradients.new_zeros(len(samples[0]), 0)
        (mine, _), precision = damped.fisher.entries[entries[0]], damped.precisions[entries[0]]
        same = damped.tied(blocks) == entries[:1] and [b.key for b in mine] == [b.key for b in blocks]
        own = factored(precision, blocks, samples[0]) if same else None
        if own is None:
            found = []
            for vectors in damped.written(blocks, samples):
                parts = [_coordinates(damped, k, vectors[k], self.places[k]) for k in entries]
                found.append(torch.cat([part.to(samples[0].gradients) for part in parts], dim=1))
            return torch.cat(found)
        basis, inverse = own
        chosen = self.places[entries[0]]
        root, (_, _, width) = inverse.flatten()[chosen].sqrt(), samples[0].shape
        if samples[0].positions > 1 or samples[0].shape[0] > 1:
            written = samples[0].rotated(basis.A, basis.B)
            return torch.cat([G.transpose(0, 1).flatten(1)[:, chosen] for G in written]) * root
        parts = []
        for piece in samples[0].rotate(basis.A, basis.B):
            a, g = piece.activations.dense()[0, :, 0], piece.gradients[0, :, 0]
            parts.append(g[:, chosen // width] * a[:, chosen % width])
        return torch.cat(parts) * root

    def gather(self, reading: Reading) -> tuple[Tensor, Tensor]:
        """Coordinates ``[n, R]`` of one batch, and the squared norms ``[n]`` of what is left out."""
        like = next(iter(reading.answers["self"].values()))
        answers = {k: like.new_zeros(reading.size, len(places)) for k, places in self.places.items()}
        for blocks, answer in reading.answers["coordinates"].items():
            entries = self.entries(blocks)
            sizes = [len(self.places[k]) for k in entries]
            answers |= dict(zip(entries, answer.split(sizes, dim=1), strict=True)) if entries else {}
        nothing = like.new_zeros(reading.size, 0)  # of a matrix of zeros no coordinate is kept
        parts = [nothing, *(part.to(like.dtype) for part in answers.values())]
        kept = require_finite(torch.cat(parts, dim=1), reading.where)
        whole = torch.stack([answer.to(like.dtype) for answer in reading.answers["self"].values()]).sum(0)
        noise = 10 * torch.finfo(whole.dtype).eps * whole
        return kept, (whole - kept.square().sum(1)).clamp_min(0) + noise

    def read(
        self,
        network: Network,
        likelihood: Likelihood,
        data: Any,
        what: str = "batch",
        skip: Callable[[int, Any], bool] | None = None,
        at_most: float = inf,
    ) -> Any:
        """The readings of data, with what `gather` needs."""
        questions = {"coordinates": self.coordinates, "self": self.damped.self_products}
        options = {"what": what, "skip": skip, "at_most": at_most}
        return read(network, likelihood, data, questions, self.damped.together, **options)


def _eigenvalues(damped: Damped, number: int) -> Tensor:
    """Those of an entry of F + λ, in the order of its basis.

    Raises:
        UnsupportedError: see `Leading.of`.
    """
    with damped.advice(number):
        return _checked_eigenvalues(damped, number)


def _checked_eigenvalues(damped: Damped, number: int) -> Tensor:
    precision, shift = damped.precisions[number], damped.damping[number]
    blocks, operator = damped.fisher.entries[number]
    if (own := precision.factored) is not None:
        return own[1].flatten()
    if (variances := precision.variances()) is not None:
        return 1 / variances.flatten()
    if not operator.is_small:
        raise UnsupportedError(
            f"{block_name(blocks)} ({operator.structure}): an index needs eigenvectors that are a Kronecker product, "
            "or few enough rows to write them out. Freeze it, or choose a fit with such a basis, such as 'kfac' or "
            "'diagonal'; of a weight in two roles only 'diagonal' has one."
        )
    return _eigen(operator).shifted(shift).checked().values


def _eigen(operator: Operator) -> Eigen:
    """Eigenvectors, written out, and eigenvalues; made once."""
    return cast(Eigen, operator.spectral())


def _coordinates(damped: Damped, number: int, rows: Tensor, chosen: Tensor) -> Tensor:
    """Some coordinates of rows ``[n, D]`` of an entry of F + λ."""
    precision, values = damped.precisions[number], _eigenvalues(damped, number)
    if (own := precision.factored) is not None:
        rows = own[0].rotate(rows)
    elif precision.variances() is None:
        rows = _eigen(damped.fisher.entries[number][1]).basis.rotate(rows)
    return rows[:, chosen] * values[chosen].rsqrt()


def write_index(leading: Leading, network: Network, likelihood: Likelihood, train: Any, file: RowFile) -> None:
    """Write the coordinates of every training example; an interrupted run goes on where it was."""
    for reading in leading.read(network, likelihood, train, skip=file.skip, at_most=leading.damped.fisher.count):
        with plain_arithmetic(leading.damped.fisher.device):
            kept, left = leading.gather(reading)
            file.add({"coordinates": kept, "left": left[:, None]}, {"fallback": dict(reading.fallback)})
    file.finish()


@dataclass(frozen=True, eq=False)
class Index:
    """Answers queries from the stored coordinates of N training examples.

    Attributes:
        leading: which coordinates they are.
        coordinates: ``[N, R]``, memory-mapped.
        left: squared norms of what is left out ``[N]``.
        measured: measurement → likelihood and network that give the gradients of queries.
    """

    leading: Leading
    coordinates: Tensor
    left: Tensor
    measured: Callable[[Any], tuple[Network, Likelihood]]

    def __len__(self) -> int:
        return len(self.coordinates)

    def scores(self, queries: Any, *, measurement: Any = "loss") -> Scores:
        """Scores ``[Q, N]``, with bounds on what the coordinates that are left out would change.

        Args:
            queries: as for `Influence.scores`.
            measurement: likewise.

        Raises:
            DataError, UnsupportedError, NumericalError: as `Influence.scores`.
        """
        require_order(queries, "queries")
        network, likelihood = self.measured(measurement)
        count = self.leading.damped.fisher.count
        values, bounds = [], []
        for reading in self.leading.read(network, likelihood, queries, "query batch"):
            with plain_arithmetic(self.leading.damped.fisher.device):
                kept, left = self.leading.gather(reading)
                rows = self.coordinates.to(kept.device)
                values.append(kept.to(rows.dtype) @ rows.mT / count)
                bounds.append(left.to(rows)[:, None].sqrt() * self.left.to(rows.device).sqrt() / count)
        return Scores(torch.cat(values), bounds=torch.cat(bounds))

    def __repr__(self) -> str:
        return f"<Index of {len(self):,} examples by {self.coordinates.shape[1]} coordinates>"
