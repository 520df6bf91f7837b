"""Influence functions: which training data are behind a prediction."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from kronfisher.capture.batches import Mask
from kronfisher.capture.forward import Forward
from kronfisher.errors import DataError, NumericalError
from kronfisher.estimation.progress import Progress
from kronfisher.fisher import Fisher
from kronfisher.fisher.blocks import Block
from kronfisher.fisher.layout import Blocks, block_name
from kronfisher.fisher.parameters import unwrapped
from kronfisher.influence.contractions import LowRank, by_position, gradient_norms, inner_products
from kronfisher.influence.damping import DampingChoice, read_damping
from kronfisher.influence.measurements import Measurement, measured
from kronfisher.influence.preconditioned import Damped, Queries, Rows, add_gradients_, written_out
from kronfisher.influence.readings import Network, Question, Reading, read
from kronfisher.influence.scores import Scores
from kronfisher.layers.samples import Samples
from kronfisher.likelihoods import Likelihood
from kronfisher.linalg import plain_arithmetic

__all__ = ["Influence"]

Per = Literal["block", "group", "position"]
Normalization = Literal["cosine", "relative"]
_SPECTRUM = ("clamped", "absolute")  # changes after which it is still an approximation of the Fisher matrix


class Influence:
    """Scores of training data for the predictions of a trained network.

    ``scores[q, k] = ∇m_qᵀ (F + λ)⁻¹ ∇ℓ_k / N`` with the measurement m of query q, the loss ℓ of example k, and F the
    mean over N examples: to first order the change of m_q when example k gets weight 0, while the 1/N of the training
    loss and its weight decay stay (Koh & Liang 2017, arXiv:1703.04730). Positive: the measurement rises. It agrees with
    training again where F is the exact matrix of a convex problem at its minimum and λ the weight decay of the mean
    loss; with structured fits and other λ it ranks (Grosse et al. 2023, arXiv:2308.03296).

    Args:
        model: that the Fisher belongs to, at the parameters of the estimate.
        fisher: as estimated, mean or sum.
        likelihood: of the training data; its loss is ℓ.
        damping: λ in the units of the eigenvalues of the mean F: a number, `Share` of each block's mean eigenvalue, or
            a mapping from patterns of block names (the first match counts) to either. Default: a tenth of each block's
            mean eigenvalue.
        normalize: "cosine": in the inner product of ``(F + λ)⁻¹``; "relative": divided by the root of the example's
            self-score (Barshan et al. 2020, arXiv:2003.11630).
        forward: as for `kronfisher.estimate`, of which it is the default.
        mask: likewise.

    Raises:
        DataError: the Fisher was damped or inverted, or belongs to another model.
        ValueError: a setting is out of range.

    Example:
        >>> import torch, kronfisher as kf
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(60, 4), torch.randint(3, (60,))
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> fisher = kf.estimate(model, (x, y), kf.Categorical(), fit="ekfac")
        >>> influence = kf.Influence(model, fisher, kf.Categorical())
        >>> scores = influence.scores([(x, y)], (x[:2], y[:2]))
        >>> scores
        <Scores of 2 queries and 60 examples>
        >>> scores.top(3).indices.shape
        torch.Size([2, 3])
        >>> influence.self_scores((x, y)).shape
        torch.Size([60])
    """

    def __init__(
        self,
        model: nn.Module,
        fisher: Fisher,
        likelihood: Likelihood,
        *,
        damping: DampingChoice | None = None,
        normalize: Normalization | None = None,
        forward: Forward | None = None,
        mask: Mask | None = None,
    ) -> None:
        if not isinstance(likelihood, Likelihood):
            raise TypeError(f"likelihood={likelihood!r}: pass an instance such as kf.Categorical().")
        if normalize not in (None, "cosine", "relative"):
            raise ValueError(f"normalize={normalize!r}: use 'cosine', 'relative' or None.")
        if odd := [change for change in fisher.info.changes if not change.startswith(_SPECTRUM)]:
            raise DataError(
                f"the Fisher was changed since its estimate ({', '.join(odd)}); pass it as estimated, and what is to "
                "be added to it as damping=."
            )
        self.model, self.likelihood, self.normalize = unwrapped(model), likelihood, normalize
        parameters = dict(self.model.named_parameters())
        for name, shape in fisher.shapes.items():
            if name not in parameters or parameters[name].shape != shape:
                raise DataError(f"{name} {list(shape)} of the Fisher is no parameter of this model.")
            if parameters[name].device != fisher.device:
                raise DataError(
                    f"{name} is on {parameters[name].device}, the Fisher on {fisher.device}; move one of them."
                )
        self.fisher = fisher.reduced("mean")
        self.damped = Damped(self.fisher, read_damping(damping, self.fisher))
        recipe = getattr(fisher.context, "recipe", None)
        self.network = Network(
            self.model,
            fisher.names,
            forward or getattr(recipe, "forward", None),
            mask if mask is not None else getattr(recipe, "mask", None),
            fisher.info.seed,
        )

    @property
    def damping(self) -> dict[str, float]:
        """Block name → λ."""
        return dict(zip(self.fisher.blocks, self.damped.damping, strict=True))

    # Scores -----------------------------------------------------------------------------------------------------------

    def scores(
        self,
        train: Any,
        queries: Any,
        *,
        measurement: Measurement = "loss",
        per: Per | None = None,
        rank: int | None = None,
        progress: Progress = False,
    ) -> Scores:
        """Score every training example for every query; the training data are read once.

        Args:
            train: batches of inputs and targets in a fixed order, as for `kronfisher.estimate`.
            queries: likewise, with targets where the measurement needs them.
            measurement: what is asked of a query's outputs: ``"loss"``; ``"margin"``, the target's logit less the
                log-sum-exp of the others; ``"logit"`` of the target, ``("logit", c)`` of a class or token; or any
                differentiable function of (outputs, targets) that gives one number for each example.
            per: "block" or "group" (blocks that one operator of the Fisher treats together) gives the parts of the sum
                by block, "position" by position of the training example.
            rank: truncates the matrix of every preconditioned query in every block, so that no gradient of a training
                example is formed; ``scores.bounds`` says what that may change.
            progress: as for `kronfisher.estimate`.

        Returns:
            ``[Q, N]``, or with a last axis for `per`.

        Raises:
            DataError: data do not fit, are shuffled, or lack the targets that are needed.
            UnsupportedError: examples are coupled, or `per` has no meaning for this network.
            SingularError: λ is zero where F has no inverse. IndefiniteError: a sum of products is indefinite.
            NumericalError: something is not finite; it names the batch.
            ValueError: an option makes no sense.
        """
        if per not in (None, "block", "group", "position"):
            raise ValueError(f"per={per!r}: use 'block', 'group', 'position' or None.")
        if rank is not None and (not isinstance(rank, int) or rank < 1):
            raise ValueError(f"rank={rank!r}: use an integer of at least 1, or None.")
        if per == "position" and rank is not None:
            raise ValueError("per='position' takes whole queries; leave out rank=.")
        _require_order(train, "train")
        solved, own = self.preconditioned(queries, measurement, progress)
        asked = Queries(solved, rank)
        parts = [part for part, _ in self._parts(train, asked, own, per, rank, progress)]
        names = tuple(dict.fromkeys(name for part in parts for name in part.values))
        values = _join([_stack(part.values, names, per) for part in parts])
        bounds = torch.cat([part.bounds for part in parts]) if rank is not None else None
        return Scores(
            values.transpose(0, 1),
            per,
            names if per in ("block", "group") else (),
            None if bounds is None else bounds.mT,
            parts[-1].fallback,
        )

    def self_scores(self, train: Any, *, progress: Progress = False) -> Tensor:
        """``∇ℓ_kᵀ (F + λ)⁻¹ ∇ℓ_k / N`` ``[N]``: how much the loss of an example rises if it is left out.

        Args:
            train: as in `scores`.
            progress: as in `scores`.

        Raises:
            DataError, UnsupportedError, SingularError, IndefiniteError, NumericalError: as `scores`.
        """
        _require_order(train, "train")
        questions: dict[str, Question] = {"self": self.damped.self_products}
        readings = read(self.network, self.likelihood, train, questions, self.damped.together, progress=progress)
        parts = []
        for reading in readings:
            parts.append(_require_finite(self._self_scores(reading), reading.where))
        return torch.cat(parts)

    def preconditioned(
        self, queries: Any, measurement: Measurement = "loss", progress: Progress = False
    ) -> tuple[Rows, Tensor]:
        """``(F + λ)⁻¹ ∇m`` of every query, ``{name: [Q, *shape]}``, and ``∇mᵀ (F + λ)⁻¹ ∇m`` ``[Q]``.

        Raises:
            DataError, UnsupportedError, SingularError, IndefiniteError, NumericalError: as `scores`.
        """
        gradients = self.gradients(queries, measurement, progress)
        with plain_arithmetic(self.fisher.device):
            solved = self.damped.solve(gradients)
            return solved, self.damped.inner(gradients, solved)

    def gradients(self, queries: Any, measurement: Measurement = "loss", progress: Progress = False) -> Rows:
        """``∇m`` of every query, ``{name: [Q, *shape]}``."""
        _require_order(queries, "queries")
        questions: dict[str, Question] = {"gradient": lambda _, samples: written_out(samples[0])}
        likelihood = measured(measurement, self.likelihood)
        own = likelihood is self.likelihood  # what counts in any other measurement is its own affair
        network = self.network if own else replace(self.network, mask=None)
        found: list[Rows] = []
        parameters = dict(self.model.named_parameters())
        for reading in read(network, likelihood, queries, questions, what="query batch", progress=progress):
            wide = torch.promote_types(self.fisher.dtype, torch.float32)
            rows = {
                name: torch.zeros(reading.size, *shape, dtype=wide, device=parameters[name].device)
                for name, shape in self.fisher.shapes.items()
            }
            with plain_arithmetic(self.fisher.device):
                for blocks, answer in reading.answers["gradient"].items():
                    add_gradients_(rows, blocks[0], _require_finite(answer, reading.where))
            found.append(rows)
        return {name: torch.cat([rows[name] for rows in found]) for name in self.fisher.shapes}

    # One batch of training data ---------------------------------------------------------------------------------------

    def _parts(
        self, train: Any, asked: Queries, own: Tensor, per: Per | None, rank: int | None, progress: Progress
    ) -> "Iterator[tuple[_Part, Reading]]":
        """Scores of one batch after the other."""
        owners = self._owners()

        def products(blocks: Blocks, samples: tuple[Samples, ...]) -> Tensor:
            answers = []
            for block, use in zip(blocks, samples, strict=True):
                queries = asked.of(block)
                if per == "position":
                    assert isinstance(queries, Tensor)
                    answers.append(by_position(use, queries).transpose(1, 2))
                else:
                    answers.append(inner_products(use, queries))
            return torch.stack(answers, dim=-1) if per == "block" else sum(answers[1:], answers[0])

        def bounds(blocks: Blocks, samples: tuple[Samples, ...]) -> Tensor:
            total = None
            for block, use in zip(blocks, samples, strict=True):
                queries = asked.of(block)
                if isinstance(queries, LowRank):
                    bound = gradient_norms(use)[:, None] * queries.discarded.to(use.gradients)
                    total = bound if total is None else total + bound
            return samples[0].gradients.new_zeros(len(samples[0]), len(own)) if total is None else total

        questions: dict[str, Question] = {"score": products}
        if rank is not None:
            questions["bound"] = bounds
        if self.normalize:
            questions["self"] = self.damped.self_products
        together = self.damped.together if self.normalize or per == "group" else None
        for reading in read(self.network, self.likelihood, train, questions, together, progress=progress):
            with plain_arithmetic(self.fisher.device):
                if per == "position":
                    _require_positions(reading)
                scale = self._scale(reading, own)
                values: dict[str, Tensor] = {}
                for blocks, answer in reading.answers["score"].items():
                    for name, part in _named(blocks, answer, per, owners):
                        part = part * (scale if part.dim() == 2 else scale.unsqueeze(-1))
                        values[name] = part + values[name] if name in values else part
                if not values:
                    values[""] = own.new_zeros(reading.size, len(own))
                for part in values.values():
                    _require_finite(part, reading.where)
                bound = own.new_zeros(reading.size, len(own))
                for answer in reading.answers.get("bound", {}).values():
                    bound += answer.to(bound.dtype)
                yield _Part(values, bound * scale, reading.fallback), reading

    def _scale(self, reading: Reading, own: Tensor) -> Tensor:
        """What products of one batch are multiplied with, ``[n, Q]`` or of one column."""
        count = self.fisher.count
        if self.normalize is None:
            return own.new_full((1, 1), 1 / count)
        each = self._self_scores(reading).to(own.dtype)[:, None]  # with 1/N
        scale = torch.where(each > 0, each.rsqrt(), 0) / count
        if self.normalize == "cosine":
            scale = scale * torch.where(own > 0, (own / count).rsqrt(), 0)
        return scale

    def _self_scores(self, reading: Reading) -> Tensor:
        total = None
        for answer in reading.answers["self"].values():
            total = answer if total is None else total + answer.to(total.dtype)
        if total is None:
            total = torch.zeros(reading.size, dtype=self.fisher.dtype, device=self.fisher.device)
        return total / self.fisher.count

    def _owners(self) -> dict[Any, str]:
        """Key of a block, or parameter → the name of the group of blocks that covers it."""
        owners: dict[Any, str] = {}
        for blocks, _ in self.fisher.entries:
            for block in blocks:
                owners[block.key] = block_name(blocks)
                owners |= {name: block_name(blocks) for name in block.parameters if name not in owners}
        return owners


class _Part:
    """Scores of one batch: name → ``[n, Q]`` (or ``[n, Q, T]``), bounds ``[n, Q]``."""

    def __init__(self, values: dict[str, Tensor], bounds: Tensor, fallback: Any) -> None:
        self.values, self.bounds, self.fallback = values, bounds, fallback


def _named(blocks: Blocks, answer: Tensor, per: Per | None, owners: dict[Any, str]) -> Sequence[tuple[str, Tensor]]:
    if per == "block":
        return [(block.name, answer[..., place]) for place, block in enumerate(blocks)]
    if per == "group":
        return [(_owner(blocks[0], owners), answer)]
    return [("", answer)]


def _owner(block: Block, owners: dict[Any, str]) -> str:
    return owners.get(block.key) or owners[block.parameters[0]]


def _stack(values: dict[str, Tensor], names: Sequence[str], per: Per | None) -> Tensor:
    if per in ("block", "group"):
        like = next(iter(values.values()))
        return torch.stack([values.get(name, torch.zeros_like(like)) for name in names], dim=-1)
    return values[""]


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Batches one after the other; where they have fewer positions, the rest is zero."""
    if parts[0].dim() == 3:
        longest = max(part.shape[2] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, longest - part.shape[2])) for part in parts]
    return torch.cat(list(parts))


def _require_positions(reading: Reading) -> None:
    """DataError unless all blocks have the same positions."""
    sizes = {blocks[0].name: answer.shape[-1] for blocks, answer in reading.answers["score"].items()}
    if len(set(sizes.values())) > 1 or reading.fallback:
        listed = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise DataError(
            f"{reading.where}: per='position' needs the same positions in all layers; {listed}"
            + (f", and {', '.join(reading.fallback)} has per-example gradients only" if reading.fallback else "")
            + ". Ask without it, or freeze the other layers."
        )


def _require_finite(values: Tensor, where: str) -> Tensor:
    if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
        raise NumericalError(f"{where}: a gradient holds NaN or Inf; drop the example, or look at the weights.")
    return values


def _require_order(data: Any, what: str) -> None:
    """DataError for loaders whose order is anybody's guess, or that never end."""
    if isinstance(getattr(data, "sampler", None), RandomSampler):
        raise DataError(
            f"{what} comes from a loader that shuffles, so that nobody knows whose scores they are: make it with "
            "shuffle=False."
        )
    if isinstance(data, cycle):
        raise DataError(f"{what} never ends: pass a loader that reads every example once.")
