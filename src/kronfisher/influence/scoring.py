"""Scores of one batch of training data after the other, for queries that were solved beforehand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.estimation.progress import Progress
from kronfisher.fisher.blocks import Block
from kronfisher.fisher.layout import Blocks, block_name
from kronfisher.influence.contractions import LowRank, by_position, gradient_norms, inner_products
from kronfisher.influence.preconditioned import Damped, Queries
from kronfisher.influence.readings import Network, Question, Reading, read, require_finite
from kronfisher.layers.samples import Samples
from kronfisher.likelihoods import Likelihood
from kronfisher.linalg import plain_arithmetic

__all__ = ["Part", "Per", "Scorer", "self_scores"]

Per = Literal["block", "group", "position"]


@dataclass(frozen=True)
class Part:
    """Scores of one batch.

    Attributes:
        where: the batch's name in messages.
        batch: as the loader returned it.
        names: of the blocks, where scores are by block or group.
        values: ``[n, Q]``; ``[n, Q, B]`` by block or group, ``[n, Q, T]`` by position.
        bounds: ``[n, Q]`` on what truncated queries may have changed; None: whole queries.
        fallback: parameter → why only per-example gradients cover it.
    """

    where: str
    batch: Any
    names: tuple[str, ...]
    values: Tensor
    bounds: Tensor | None
    fallback: Mapping[str, str]


@dataclass(frozen=True)
class Scorer:
    """Puts training data against solved queries.

    Attributes:
        network: the model, and how batches go through it.
        likelihood: of the training data.
        damped: F + λ.
        queries: solved.
        own: ``∇mᵀ (F + λ)⁻¹ ∇m`` ``[Q]`` where scores are cosines; else anything of that shape.
        normalize: "cosine", "relative" or None.
        per: "block", "group", "position" or None.
    """

    network: Network
    likelihood: Likelihood
    damped: Damped
    queries: Queries
    own: Tensor
    normalize: str | None = None
    per: Per | None = None

    def read(
        self,
        data: Any,
        number: int = 0,
        progress: Progress = False,
        skip: Callable[[int, Any], bool] | None = None,
        again: bool = False,
    ) -> Iterator[Part]:
        """Scores of one batch after the other; see `kronfisher.influence.readings.read`.

        Raises:
            DataError: the positions of layers differ where scores are by position, or a later batch uses other blocks.
            NumericalError: a gradient is not finite.
        """
        questions: dict[str, Question] = {"score": self._products}
        if self.queries.rank is not None:
            questions["bound"] = self._bounds
        if self.normalize:
            questions["self"] = self.damped.self_products
        together = self.damped.together if self.normalize or self.per == "group" else None
        names: tuple[str, ...] | None = None
        readings = read(
            self.network,
            self.likelihood,
            data,
            questions,
            together,
            number=number,
            again=again,
            progress=progress,
            skip=skip,
            positions_apart=self.per == "position",
            meet=self.damped.agree_on_data if self.normalize else None,
            at_most=self.damped.fisher.count,
        )
        for reading in readings:
            with plain_arithmetic(self.own.device):
                part = self._part(reading)
            if names is not None and part.names != names:
                raise DataError(
                    f"{part.where} uses {', '.join(part.names)}, earlier batches {', '.join(names)}: scores by "
                    f"{self.per} need the same blocks in all batches. Ask without per=."
                )
            names = part.names
            yield part

    def _part(self, reading: Reading) -> Part:
        if self.per == "position":
            _require_positions(reading)
        scale, values = self._scale(reading), {}
        for blocks, answer in reading.answers["score"].items():
            for name, part in self._named(blocks, answer):
                part = part.to(scale.dtype) * (scale if part.dim() == 2 else scale.unsqueeze(-1))
                values[name] = part + values[name] if name in values else part
        for part in values.values():
            require_finite(part, reading.where)
        zeros = self.own.new_zeros(reading.size, len(self.own))
        names = tuple(sorted(values)) if self.per in ("block", "group") else ()
        total = torch.stack([values[name] for name in names], dim=-1) if names else values.get("", zeros)
        bounds = None
        if "bound" in reading.answers:
            bounds = sum((answer.to(zeros.dtype) for answer in reading.answers["bound"].values()), zeros) * scale
        return Part(reading.where, reading.batch, names, total, bounds, reading.fallback)

    def _products(self, blocks: Blocks, samples: tuple[Samples, ...]) -> Tensor:
        answers = []
        for block, use in zip(blocks, samples, strict=True):
            if self.per == "position":
                queries = self.queries.of(block)
                assert isinstance(queries, Tensor)
                answers.append(by_position(use, queries).transpose(1, 2))
            else:
                answers.append(inner_products(use, self.queries.for_products(block, use)))
        if self.per == "position":  # blocks that F treats together are summed here
            _require_same({block.name: part.shape[-1] for block, part in zip(blocks, answers, strict=True)})
        return torch.stack(answers, dim=-1) if self.per == "block" else sum(answers[1:], answers[0])

    def _bounds(self, blocks: Blocks, samples: tuple[Samples, ...]) -> Tensor:
        total = samples[0].gradients.new_zeros(len(samples[0]), len(self.own))
        for block, use in zip(blocks, samples, strict=True):
            queries = self.queries.of(block)
            if isinstance(queries, LowRank):
                total = total + gradient_norms(use)[:, None] * queries.discarded.to(total)
        return total

    def _named(self, blocks: Blocks, answer: Tensor) -> Sequence[tuple[str, Tensor]]:
        if self.per == "block":
            return [(block.name, answer[..., place]) for place, block in enumerate(blocks)]
        return [(self._owner(blocks[0]) if self.per == "group" else "", answer)]

    def _owner(self, block: Block) -> str:
        """The name of the group of blocks of F that covers a block."""
        groups = [mine for mine, _ in self.damped.fisher.entries]
        same = [mine for mine in groups if any(other.key == block.key for other in mine)]
        shared = [mine for mine in groups if any(set(other.parameters) & set(block.parameters) for other in mine)]
        return block_name([*same, *shared][0])

    def _scale(self, reading: Reading) -> Tensor:
        """What products of one batch are multiplied with, ``[n, Q]`` or of one column."""
        count = self.damped.fisher.count
        if self.normalize is None:
            return self.own.new_full((1, 1), 1 / count)
        each = _self_scores(reading, self.damped).to(self.own.dtype)[:, None]  # with 1/N
        scale = torch.where(each > 0, each.rsqrt(), 0) / count
        if self.normalize == "cosine":
            scale = scale * torch.where(self.own > 0, (self.own / count).rsqrt(), 0)
        return scale


def self_scores(
    network: Network, likelihood: Likelihood, damped: Damped, data: Any, progress: Progress = False
) -> Tensor:
    """``∇ℓ_kᵀ (F + λ)⁻¹ ∇ℓ_k / N`` ``[N]``."""
    questions: dict[str, Question] = {"self": damped.self_products}
    parts = []
    how: dict[str, Any] = {"progress": progress, "meet": damped.agree_on_data, "at_most": damped.fisher.count}
    for reading in read(network, likelihood, data, questions, damped.together, **how):
        parts.append(require_finite(_self_scores(reading, damped), reading.where))
    return torch.cat(parts)


def _self_scores(reading: Reading, damped: Damped) -> Tensor:
    zeros = torch.zeros(reading.size, dtype=damped.fisher.dtype, device=damped.fisher.device)
    return sum((answer.to(zeros.dtype) for answer in reading.answers["self"].values()), zeros) / damped.fisher.count


def _require_positions(reading: Reading) -> None:
    """DataError unless all blocks have the same positions."""
    sizes = {blocks[0].name: answer.shape[-1] for blocks, answer in reading.answers["score"].items()}
    _require_same(sizes, f"{reading.where}: ", tuple(reading.fallback))


def _require_same(sizes: Mapping[str, int], where: str = "", fallback: Sequence[str] = ()) -> None:
    if len(set(sizes.values())) > 1 or fallback:
        listed = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise DataError(
            f"{where}per='position' needs the same positions in all layers; {listed}"
            + (f", and {', '.join(fallback)} has per-example gradients only" if fallback else "")
            + ". Ask without it, or freeze the other layers."
        )
