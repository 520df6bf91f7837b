"""Influence functions: which training data are behind a prediction."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from kronfisher.capture.batches import Batches, Mask
from kronfisher.capture.forward import Forward
from kronfisher.errors import DataError, require_integer, require_kind
from kronfisher.estimation.progress import Progress
from kronfisher.fisher import Fisher
from kronfisher.fisher.parameters import covered, unwrapped
from kronfisher.influence.damping import DampingChoice, read_damping
from kronfisher.influence.files import RowFile
from kronfisher.influence.index import Index, Leading, write_index
from kronfisher.influence.measurements import Measurement, measured
from kronfisher.influence.preconditioned import Damped, Queries
from kronfisher.influence.provenance import asked, provenance
from kronfisher.influence.queries import query_gradients, require_order
from kronfisher.influence.readings import Network
from kronfisher.influence.refinement import refine as refined
from kronfisher.influence.scores import Scores
from kronfisher.influence.scoring import Per, Scorer, self_scores
from kronfisher.influence.streams import collect, join, load, write
from kronfisher.influence.vectors import Rows, Vectors
from kronfisher.likelihoods import Likelihood
from kronfisher.linalg import plain_arithmetic
from kronfisher.operators.owned import require_whole

__all__ = ["Influence"]

Normalization = Literal["cosine", "relative"]
_SPECTRUM = ("clamped", "absolute")  # changes after which it is still an approximation of the Fisher matrix


class Influence:
    """Scores of training data for the predictions of a trained network.

    ``scores[q, k] = ∇m_qᵀ (F + λ)⁻¹ ∇ℓ_k / N`` with the measurement m of query q, the loss ℓ of example k, and F the
    mean over N examples: to first order the change of m_q when example k gets weight 0, while the 1/N of the training
    loss and its weight decay stay (Koh & Liang 2017, arXiv:1703.04730). Positive: the measurement rises. It agrees with
    training again where F is the exact matrix of a convex problem at its minimum and λ the weight decay of the mean
    loss; with structured fits and other λ it ranks (Grosse et al. 2023, arXiv:2308.03296).

    Of a Fisher whose blocks stay with their owners (``share="owned"``) all ranks make the same calls with the same
    queries, which they solve together; each then scores training data of its own, or, where scores are refined or
    normalised and for `self_scores`, all of them the same.

    Args:
        model: that the Fisher belongs to, at the parameters of the estimate; frozen parameters and buffers are to be
            as they were, too, and are not compared.
        fisher: as estimated, mean or sum.
        likelihood: of the training data; its loss is ℓ.
        damping: λ in the units of the eigenvalues of the mean F: a number, `Share` of each block's mean eigenvalue, or
            a mapping from patterns of block names (the first match counts) to either. Default: a tenth of each block's
            mean eigenvalue.
        normalize: "cosine": in the inner product of ``(F + λ)⁻¹``; "relative": divided by the root of the example's
            self-score (Barshan et al. 2020, arXiv:2003.11630).
        refine: steps of conjugate gradients on the exact Gauss-Newton matrix, preconditioned by the Fisher; each reads
            the training data once more and takes two backward passes a query and batch.
        forward: as for `kronfisher.estimate`, of which it is the default.
        mask: likewise.

    Raises:
        DataError: the Fisher was damped or inverted, or belongs to another model.
        ValueError: a setting is out of range. TypeError: the Fisher or the likelihood is none.

    Example:
        >>> import torch, kronfisher as kf
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(60, 4), torch.randint(3, (60,))
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> fisher = kf.estimate(model, (x, y), kf.Categorical(), fit="ekfac")
        >>> influence = kf.Influence(model, fisher, kf.Categorical())
        >>> influence
        <Influence by <Fisher of 67 parameters in 2 blocks, torch.float32, mean over 60 examples>>
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
        refine: int = 0,
        forward: Forward | None = None,
        mask: Mask | None = None,
    ) -> None:
        if not isinstance(likelihood, Likelihood):
            raise TypeError(f"likelihood={likelihood!r}: pass an instance such as kf.Categorical().")
        if normalize not in (None, "cosine", "relative"):
            raise ValueError(f"normalize={normalize!r}: use 'cosine', 'relative' or None.")
        require_kind("fisher", fisher, Fisher, "pass what kf.estimate returned")
        if odd := [change for change in fisher.info.changes if not change.startswith(_SPECTRUM)]:
            raise DataError(
                f"the Fisher was changed since its estimate ({', '.join(odd)}); pass it as estimated, and what is to "
                "be added to it as damping=."
            )
        self.model, self.likelihood, self.normalize = unwrapped(model), likelihood, normalize
        self.refine = require_integer("refine", refine, 0, "the number of steps is an integer of at least 0")
        self._require_model(fisher)
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

    @staticmethod
    def load(*paths: str | Path) -> Scores:
        """The scores in the files that `scores` wrote to the path; of several parts of the training data, in order.

        So many processes can share the work: each scores a part of the data (such as a `torch.utils.data.Subset`) with
        a Fisher of all of them, to a path of its own.

        Args:
            paths: of finished files of the same model, Fisher, queries and settings.

        Raises:
            DataError: a file is missing, damaged, not finished, of others, or an index.
        """
        return load(paths)

    @property
    def damping(self) -> dict[str, float]:
        """Block name → λ.

        Example:
            >>> import torch, kronfisher as kf
            >>> x, y, model = torch.randn(20, 3), torch.randint(2, (20,)), torch.nn.Linear(3, 2)
            >>> fisher = kf.estimate(model, (x, y), kf.Categorical(), fit="ekfac")
            >>> kf.Influence(model, fisher, kf.Categorical(), damping=0.1).damping
            {'weight': 0.1}
        """
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
        at_once: int | None = None,
        path: str | Path | None = None,
        progress: Progress = False,
    ) -> Scores:
        """Score every training example for every query; the training data are read once (and once a step of `refine`).

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
            at_once: queries, about, that are in memory together; every such slice reads the training data anew.
            path: of a memory-mapped file that takes the scores batch by batch. A run that was interrupted or killed
                goes on where it was, if model, Fisher, queries, settings and batches are the same.
            progress: as for `kronfisher.estimate`.

        Returns:
            ``[Q, N]``, or with a last axis for `per`.

        Raises:
            DataError: data do not fit, are shuffled, or lack the targets that are needed; the file at `path` was
                written with other settings or batches, and is left as it is.
            UnsupportedError: examples are coupled, or `per` has no meaning for this network.
            SingularError: λ is zero where F has no inverse. IndefiniteError: a sum of products is indefinite.
            NumericalError: something is not finite; it names the batch.
            ValueError: an option makes no sense.
        """
        if per not in (None, "block", "group", "position"):
            raise ValueError(f"per={per!r}: use 'block', 'group', 'position' or None.")
        if rank is not None:
            rank = require_integer("rank", rank, 1, "use an integer of at least 1, or None")
        if per == "position" and rank is not None:
            raise ValueError("per='position' takes whole queries; leave out rank=.")
        if per == "position" and path is not None:
            raise ValueError("per='position': batches may have different positions; leave out path=.")
        if at_once is not None:
            at_once = require_integer("at_once", at_once, 1, "use an integer of at least 1, or None")
            if path is not None:
                raise ValueError(f"at_once={at_once}: only without path=, which takes all queries together.")
        require_order(train, "train")
        require_order(queries, "queries")
        options = {"per": per, "rank": rank, "normalize": self.normalize, "refine": self.refine}
        file = None
        if path is not None:
            file = RowFile(path, self._facts(options) | asked(queries, measurement, self.fisher.count))
        batches, number, found = Batches(train), 0, []
        later = self.refine or self.normalize == "cosine"  # queries themselves are needed beside solved ones
        for vectors in self._slices(queries, measurement, at_once, progress, None if later else self.damped):
            scorer, residuals = self._solved(vectors, batches, number, per, rank, progress)
            del vectors  # or its memory would stay taken while the data are read
            number += self.refine + 1
            if file is not None:
                return write(scorer, batches, number - 1, residuals, file, progress)
            found.append(collect(scorer, batches, number - 1, residuals, progress, again=at_once is not None))
        return join(found)

    def _solved(
        self, vectors: Vectors, batches: Batches, number: int, per: Per | None, rank: int | None, progress: Progress
    ) -> tuple[Scorer, Tensor | None]:
        """What scores with the queries, and how far refinement came, which reads the data from reading `number` on."""
        residuals = None
        if self.refine:
            options = self.network, self.likelihood, self.damped, vectors, batches, self.refine
            solved, residuals = refined(*options, first=number, progress=progress)
            own = vectors.inner(solved)
        elif self.normalize == "cosine":
            with plain_arithmetic(self.fisher.device):
                own, solved = self.damped.solve_(vectors), vectors
        else:
            own, solved = vectors.parts[0].new_zeros(len(vectors)), vectors
        options = Queries(solved, rank), own, self.normalize, per
        return Scorer(self.network, self.likelihood, self.damped, *options), residuals

    def index(self, train: Any, path: str | Path, *, size: int = 512) -> Index:
        """Store the leading coordinates of every training gradient, so that new queries need no reading of the data.

        ``index.scores(queries)`` then has scores and, as ``bounds``, what the coordinates left out may change.

        Args:
            train: as in `scores`.
            path: of the memory-mapped file. What it has already is kept, as in `scores`.
            size: coordinates that are kept, over all blocks.

        Raises:
            UnsupportedError: the eigenvectors of a block are no Kronecker product, and it is too large for others; or
                it stays with its owner (``share="owned"``).
            DataError, SingularError, IndefiniteError, NumericalError: as `scores`.
            ValueError: the size is not positive, or refined or normalised scores are asked for.
        """
        size = require_integer("size", size, 1, "the number of coordinates is an integer of at least 1")
        if self.refine or self.normalize:
            raise ValueError("an index holds plain scores: neither refine= nor normalize=.")
        require_whole(self.fisher.blocks.values(), "an index")
        self._require_model(self.fisher)
        require_order(train, "train")
        file = RowFile(path, self._facts({"size": size}))
        with plain_arithmetic(self.fisher.device):
            leading = Leading.of(self.damped, size)
        write_index(leading, self.network, self.likelihood, train, file)
        parts = file.open()
        return Index(leading, parts["coordinates"], parts["left"][:, 0], self._measured)

    def _measured(self, measurement: Measurement) -> tuple[Network, Likelihood]:
        """What sends the gradients of a measurement backwards, and through which network."""
        self._require_model(self.fisher)
        likelihood = measured(measurement, self.likelihood)
        own = likelihood is self.likelihood  # what counts in any other measurement is its own affair
        return (self.network if own else replace(self.network, mask=None)), likelihood

    def _require_model(self, fisher: Fisher) -> None:
        """DataError unless the model has the parameters of the estimate: it may have been trained since."""
        covered(self.model, fisher.shapes, fisher.device, fisher.info.parameters)

    def _facts(self, options: Mapping[str, Any]) -> dict[str, str]:
        """What the numbers in a file depend on, but for the batches."""
        own = provenance(self.network, self.fisher, self.likelihood, self.damped.damping)
        return own | {name: repr(value) for name, value in options.items()}

    def __repr__(self) -> str:
        return f"<Influence by {self.fisher!r}>"

    def self_scores(self, train: Any, *, progress: Progress = False) -> Tensor:
        """``∇ℓ_kᵀ (F + λ)⁻¹ ∇ℓ_k / N`` ``[N]``: how much the loss of an example rises if it is left out.

        Args:
            train: as in `scores`.
            progress: as in `scores`.

        Raises:
            DataError, UnsupportedError, SingularError, IndefiniteError, NumericalError: as `scores`.
        """
        require_order(train, "train")
        self._require_model(self.fisher)
        return self_scores(self.network, self.likelihood, self.damped, train, progress)

    def gradients(self, queries: Any, measurement: Measurement = "loss", progress: Progress = False) -> Rows:
        """``∇m`` of every query, ``{name: [Q, *shape]}``.

        Example:
            >>> import torch, kronfisher as kf
            >>> x, y, model = torch.randn(20, 3), torch.randint(2, (20,)), torch.nn.Linear(3, 2)
            >>> influence = kf.Influence(model, kf.estimate(model, (x, y), kf.Categorical()), kf.Categorical())
            >>> influence.gradients((x[:4], y[:4]), "margin")["weight"].shape
            torch.Size([4, 2, 3])
        """
        (found,) = self._slices(queries, measurement, None, progress, None)
        return found.rows()

    def _slices(
        self, queries: Any, measurement: Measurement, at_once: int | None, progress: Progress, damped: Damped | None
    ) -> Iterator[Vectors]:
        how = self.fisher, queries, at_once, progress, damped, self.damped.agree_on_queries
        return query_gradients(*self._measured(measurement), *how)
