"""The Fisher matrix over the parameters of a model: a block-diagonal of operators behind a change of basis."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from math import inf, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from kronfisher.errors import DataError, require_integer
from kronfisher.fisher.blocks import Block
from kronfisher.fisher.info import Info
from kronfisher.fisher.interop import linear_operator
from kronfisher.fisher.layout import Blocks, block_name, gather, require_cover, scatter
from kronfisher.fisher.page import page
from kronfisher.fisher.penalty import Parameters, Penalty, anchored
from kronfisher.fisher.report import Report, report
from kronfisher.fisher.saliencies import pruned, saliencies
from kronfisher.fisher.storage import Contents, write
from kronfisher.fisher.vectors import Shapes, Vector, read
from kronfisher.linalg import stable_norm
from kronfisher.operators.algebra import Algebra, nonnegative
from kronfisher.operators.memory import require_memory
from kronfisher.operators.operator import Operator
from kronfisher.operators.owned import Owned

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

__all__ = ["Fisher"]


@dataclass(frozen=True, eq=False, repr=False)
class Fisher(Algebra["Fisher"]):
    """A symmetric matrix ``[P, P]`` over the parameters of a model; only a sum of products may make it indefinite.

    A vector is a dict by parameter name, ``{name: [*shape]}`` or ``{name: [K, *shape]}`` for K of them, or one flat
    tensor ``[P]`` or ``[P, K]`` in the order of the names; answers come back in the same form. Every operation gives a
    new Fisher and leaves this one as it was; copies with another λ share their eigenvectors.

    Attributes:
        entries: pairs of the blocks that one operator treats together, a tuple, and this operator. A single block may
            be given as it is.
        shapes: name to shape of every covered parameter, in the order of the model.
        info: how the matrix was made.
        context: what `error` and `spectrum` ask, by ``context.error(fisher, data, **options)``; `estimate` sets it, a
            file has none.

    Raises:
        DataError: blocks, operators and shapes do not fit each other.

    Example:
        >>> from kronfisher.fisher.blocks import Window
        >>> from kronfisher.operators import Diagonal
        >>> block = Block("w", "linear", Window.of("w", torch.zeros(1, 2, 2)))
        >>> fisher = Fisher([(block, Diagonal(torch.tensor([1.0, 2.0, 3.0, 4.0])))], {"w": (1, 2, 2)}, Info(count=10))
        >>> fisher @ torch.ones(4)
        tensor([1., 2., 3., 4.])
        >>> (fisher + 1.0).solve({"w": torch.ones(1, 2, 2)})["w"]
        tensor([[[0.5000, 0.3333],
                 [0.2500, 0.2000]]])
    """

    entries: tuple[tuple[Blocks, Operator], ...]
    shapes: Shapes
    info: Info
    context: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        shapes = {name: torch.Size(shape) for name, shape in self.shapes.items()}
        entries = tuple((_blocks_of(blocks), operator) for blocks, operator in self.entries)
        object.__setattr__(self, "entries", entries)
        object.__setattr__(self, "shapes", shapes)
        require_cover(entries, shapes)
        if len(self.blocks) != len(self.entries) or not self.entries:
            raise DataError("a Fisher needs at least one block, and blocks need different names")

    # Facts ------------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The covered parameters, in the order of a flat vector."""
        return tuple(self.shapes)

    @property
    def dim(self) -> int:
        """P, the number of covered parameters (numbers)."""
        return sum(prod(shape) for shape in self.shapes.values())

    @cached_property
    def blocks(self) -> Mapping[str, Operator]:
        """Block name to operator; several blocks under one operator join their names."""
        return {block_name(blocks): operator for blocks, operator in self.entries}

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of the operators."""
        return reduce(torch.promote_types, (operator.dtype for _, operator in self.entries))

    @property
    def device(self) -> torch.device:
        """Where the operators are."""
        return self.entries[0][1].device

    @property
    def bytes(self) -> int:
        """The memory of all operators."""
        return sum(operator.bytes for _, operator in self.entries)

    @property
    def count(self) -> float:
        """N, the number of examples."""
        return self.info.count

    @property
    def rows(self) -> Mapping[str, float]:
        """Block name to unmasked positions over all data."""
        return {name: block.rows for name, block in self.info.blocks.items()}

    @property
    def reduction(self) -> str:
        """``"mean"`` or ``"sum"`` over data.

        Example:
            >>> import kronfisher as kf
            >>> fisher = kf.estimate(torch.nn.Linear(3, 2), torch.randn(20, 3), kf.Gaussian(), labels="exact")
            >>> fisher.reduction, fisher.reduced("sum").reduction
            ('mean', 'sum')
        """
        return self.info.reduction

    @property
    def labels(self) -> str:
        """``"exact"``, ``"sampled"`` or ``"observed"``.

        Example:
            >>> import kronfisher as kf
            >>> fisher = kf.estimate(torch.nn.Linear(3, 2), torch.randn(20, 3), kf.Gaussian(), labels="exact")
            >>> fisher.labels
            'exact'
        """
        return self.info.labels

    def __getitem__(self, name: str) -> Operator:
        """The operator of a block, or the one that covers a parameter.

        Raises:
            KeyError: no block or parameter is called so, or several blocks share the parameter.
        """
        if name in self.blocks:
            return self.blocks[name]
        found = {block_name(bs): op for bs, op in self.entries if any(name in block.parameters for block in bs)}
        if len(found) == 1:
            return next(iter(found.values()))
        if found:
            raise KeyError(f"{name} is shared by several blocks; name one of them: {', '.join(found)}")
        raise KeyError(f"{name} is not covered; covered are {', '.join(self.names)}")

    # Operations that give a vector or a number -----------------------------------------------------------------------

    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def __matmul__(self, v: Vector) -> Any:
        return self._through(v, lambda operator, rows: operator.matvecs(rows))

    @overload
    def solve(self, v: Tensor) -> Tensor: ...
    @overload
    def solve(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def solve(self, v: Vector) -> Any:
        """``F⁻¹ v``, in the form of `v`.

        Raises:
            SingularError: a block has numerically zero eigenvalues; the message names it. Add damping first.
            IndefiniteError: a block has negative eigenvalues, as a sum of Kronecker products may.
            DataError: `v` does not fit.
        """
        return self._through(v, lambda operator, rows: operator.solves(rows))

    def sample(self, n: int, *, seed: int = 0, inverse: bool = True) -> dict[str, Tensor]:
        """Draw n parameter vectors from ``N(0, F⁻¹)``: F is read as a precision.

        Args:
            n: how many.
            seed: of a generator of its own; torch's global state is not touched.
            inverse: ``False`` draws from ``N(0, F)`` instead.

        Returns:
            ``{name: [n, *shape]}``.

        Raises:
            SingularError: as in `solve`, for ``inverse=True``.
        """
        n = require_integer("n", n, 0, "the number of draws is an integer of at least 0")
        seed = require_integer("seed", seed, -inf, "give an integer")
        generator = torch.Generator(self.device).manual_seed(seed)

        def draw(operator: Operator) -> Tensor:
            size = operator.noise_dim(inverse=inverse)
            noise = torch.randn(n, size, generator=generator, dtype=operator.dtype, device=operator.device)
            return operator.colour(noise, inverse=inverse)

        return self._scatter(n, self.dtype, draw)

    def diagonal(self) -> dict[str, Tensor]:
        """The diagonal, ``{name: [*shape]}``."""
        rows = self._scatter(1, self.dtype, lambda operator: operator.diagonal()[None])
        return {name: tensor[0] for name, tensor in rows.items()}

    def trace(self) -> Tensor:
        """The sum of the eigenvalues, a 0-dim tensor."""
        return torch.stack([operator.trace().to(self.dtype) for _, operator in self.entries]).sum()

    def logdet(self) -> Tensor:
        """``log |F|``, a 0-dim tensor; SingularError as in `solve`."""
        return torch.stack([operator.logdet().to(self.dtype) for _, operator in self.entries]).sum()

    def frobenius_norm(self) -> Tensor:
        """``√(Σ F_ij²)``, a 0-dim tensor.

        Example:
            >>> import kronfisher as kf
            >>> fisher = kf.estimate(torch.nn.Linear(3, 2), torch.randn(20, 3), kf.Gaussian(), labels="exact")
            >>> bool((fisher.frobenius_norm() - fisher.to_dense().norm()).abs() < 1e-4)
            True
        """
        norms = [operator.frobenius_norm().to(self.dtype) for _, operator in self.entries]
        return stable_norm(torch.stack(norms))

    def eigenvalues(self) -> Tensor:
        """All P eigenvalues ``[P]``, descending."""
        values = [operator.eigenvalues().to(self.dtype) for _, operator in self.entries]
        return torch.cat(values).sort(descending=True).values

    def to_dense(self) -> Tensor:
        """The matrix itself, ``[P, P]`` in the order of flat vectors.

        Raises:
            MemoryBudgetError: it does not fit the memory that is available.
        """
        size = torch.finfo(self.dtype).bits // 8
        largest = max(operator.dim for _, operator in self.entries)
        require_memory(
            (self.dim**2 + 2 * largest**2) * size,
            self.device,
            f"the dense {self.dim} x {self.dim} matrix",
            "Use products (@), solve, diagonal or trace, or one block: fisher[name].to_dense().",
        )
        dense = torch.zeros(self.dim, self.dim, dtype=self.dtype, device=self.device)
        positions, _ = read(torch.arange(self.dim, device=self.device), self.shapes)
        for blocks, operator in self.entries:
            index = gather(blocks, positions)[0]
            dense[index[:, None], index] = operator.to_dense().to(self.dtype)
        return dense

    def penalty(self, anchor: Parameters) -> Penalty:
        """``½ (θ − θ*)ᵀ F (θ − θ*)`` as a function of a model, to be added to a loss; penalties add up.

        F as it is: where it is a mean over N examples, this is to second order what the mean loss on them rises by when
        θ leaves a minimum θ*. Beside a mean loss on M other examples it counts N/M times. The gradient of the loss at
        θ* is left out, as always.

        Args:
            anchor: θ*: the model, at the parameters of the estimate, or name → tensor for any others.

        Returns:
            A function of a model or of name → tensor; the anchor is copied, so that the model may be trained on.

        Raises:
            DataError: the anchor is another model, has been trained since, or does not fit.

        Example:
            >>> import kronfisher as kf
            >>> model, x = torch.nn.Linear(3, 1), torch.randn(50, 3)
            >>> penalty = kf.estimate(model, x, kf.Gaussian(), labels="exact").penalty(model)
            >>> _ = torch.nn.init.zeros_(model.bias)
            >>> loss = model(x).square().mean() + 10.0 * penalty(model)
            >>> loss.backward()
        """
        return anchored(self, anchor, self.device, self.info.parameters)

    def saliencies(self, parameters: Parameters, *, adjusted: bool = False) -> dict[str, Tensor]:
        """What the loss rises by, to second order, when one weight is set to zero: ``½ θ_i² F_ii``, for pruning.

        Args:
            parameters: θ: the model, at the parameters of the estimate, or name → tensor.
            adjusted: the other weights of the block move to make up for it, ``½ θ_i² / (F⁻¹)_ii`` (optimal brain
                surgeon; Hassibi & Stork 1992); else they stay (optimal brain damage; LeCun, Denker & Solla 1989).

        Returns:
            ``{name: [*shape]}``, in the units of the loss that F belongs to.

        Raises:
            SingularError: for `adjusted`, as in `solve`: add damping first.
            DataError: as in `penalty`.

        Example:
            >>> import kronfisher as kf
            >>> model, x = torch.nn.Linear(3, 1), torch.randn(50, 3)
            >>> fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact")
            >>> stays, moves = fisher.saliencies(model), (fisher + 1e-6).saliencies(model, adjusted=True)
            >>> bool((moves["weight"] <= stays["weight"] + 1e-5).all())
            True
        """
        return saliencies(self, parameters, self.device, self.info.parameters, adjusted=adjusted)

    def pruned(self, parameters: Parameters, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """θ with the weights that are not kept at zero, and all others moved to make up for it.

        The loss rises least, to second order: δ minimises ``½ δᵀ F δ`` with the removed weights at zero (optimal brain
        surgeon for many weights at once), by conjugate gradients on products. Damping keeps δ small where F says
        nothing.

        Args:
            parameters: θ: the model, at the parameters of the estimate, or name → tensor.
            kept: name → booleans ``[*shape]``, True for weights that stay; parameters that are not named stay whole.

        Returns:
            ``{name: [*shape]}``, to be read with ``load_state_dict(..., strict=False)``.

        Raises:
            SingularError: as in `solve`: add damping first.
            DataError: as in `penalty`, or `kept` does not fit.

        Example:
            >>> import kronfisher as kf
            >>> model, x = torch.nn.Linear(3, 1), torch.randn(50, 3)
            >>> fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact") + 1e-3
            >>> fisher.pruned(model, {"weight": torch.tensor([[True, False, True]])})["weight"][0, 1].item()
            0.0
        """
        return pruned(self, parameters, kept, self.device, self.info.parameters)

    # Operations that give a Fisher ------------------------------------------------------------------------------------

    def mapped(self, function: Callable[[Operator], Operator], change: str) -> "Fisher":
        """A Fisher of changed blocks; `change` says in a word what was done to them.

        Example:
            >>> import kronfisher as kf
            >>> fisher = kf.estimate(torch.nn.Linear(3, 2), torch.randn(20, 3), kf.Gaussian(), labels="exact")
            >>> from kronfisher.operators import Diagonal
            >>> alone = fisher.mapped(lambda block: Diagonal(block.diagonal(), name=block.name), "diagonal alone")
            >>> bool((alone.diagonal()["bias"] == fisher.diagonal()["bias"]).all())
            True
        """
        entries = tuple((blocks, function(operator)) for blocks, operator in self.entries)
        return replace(self, entries=entries, info=self.info.changed(change) if change else self.info)

    def inverse(self) -> "Fisher":
        """``F⁻¹``; make it once and apply it often. SingularError as in `solve`."""
        return self.mapped(lambda operator: operator.inverse(), "inverse")

    def sqrt(self) -> "Fisher":
        """The symmetric positive semidefinite square root."""
        return self.mapped(lambda operator: operator.sqrt(), "sqrt")

    def inverse_sqrt(self) -> "Fisher":
        """The symmetric ``F^{-1/2}``; SingularError as in `solve`.

        Example:
            >>> import kronfisher as kf
            >>> fisher = kf.estimate(torch.nn.Linear(3, 2), torch.randn(20, 3), kf.Gaussian(), labels="exact")
            >>> root = fisher.inverse_sqrt().to_dense()
            >>> bool(((root @ root @ fisher.to_dense() - torch.eye(8)).abs() < 1e-2).all())
            True
        """
        return self.mapped(lambda operator: operator.inverse_sqrt(), "inverse sqrt")

    def shifted(self, damping: float) -> "Fisher":
        """``F + λ·1``, exact Tikhonov damping; λ in the units of F's own eigenvalues (mind the reduction).

        Raises:
            ValueError: λ is negative or not finite.

        Example:
            >>> import kronfisher as kf
            >>> fisher = kf.estimate(torch.nn.Linear(3, 2), torch.randn(20, 3), kf.Gaussian(), labels="exact")
            >>> bool((fisher.shifted(0.5).trace() - fisher.trace() - 8 * 0.5).abs() < 1e-4)  # the same as fisher + 0.5
            True
        """
        shift = nonnegative(damping, "the damping λ")
        return self.mapped(lambda operator: operator.shifted(shift), f"+ {shift:g}") if shift else self

    def scaled(self, factor: float) -> "Fisher":
        """``α·F`` for α of at least 0 (ValueError otherwise).

        Example:
            >>> import kronfisher as kf
            >>> fisher = kf.estimate(torch.nn.Linear(3, 2), torch.randn(20, 3), kf.Gaussian(), labels="exact")
            >>> bool((fisher.scaled(3.0).trace() - 3 * fisher.trace()).abs() < 1e-4)  # the same as 3.0 * fisher
            True
        """
        factor = nonnegative(factor, "the factor")
        return self.mapped(lambda operator: operator.scaled(factor), f"* {factor:g}")

    def clamped(self, floor: float = 0.0) -> "Fisher":
        """Blocks that may be indefinite with eigenvalues below `floor` raised to it; see `Operator.clamped`.

        It changes nothing in a positive semidefinite block when `floor` is zero. A clamped direction has no curvature
        left: in a posterior its variance is the prior's alone.

        Raises:
            ValueError: `floor` is negative or not finite.

        Example:
            >>> import kronfisher as kf
            >>> _ = torch.manual_seed(0)
            >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
            >>> data = 3 * torch.randn(5, 3)
            >>> fisher = kf.estimate(model, data, kf.Bernoulli(), fit=kf.KroneckerSum(2), labels="exact")
            >>> bool((fisher.clamped().eigenvalues() >= -1e-6).all())
            True
        """
        floor = nonnegative(floor, "the floor")
        return self.mapped(lambda operator: operator.clamped(floor), f"clamped at {floor:g}")

    def absolute(self) -> "Fisher":
        """Blocks with the absolute values of their eigenvalues; see `Operator.absolute`.

        Example:
            >>> import kronfisher as kf
            >>> _ = torch.manual_seed(0)
            >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
            >>> data = 3 * torch.randn(5, 3)
            >>> fisher = kf.estimate(model, data, kf.Bernoulli(), fit=kf.KroneckerSum(2), labels="exact")
            >>> bool((fisher.absolute().eigenvalues() >= -1e-6).all())
            True
        """
        return self.mapped(lambda operator: operator.absolute(), "absolute values")

    def reduced(self, reduction: Literal["mean", "sum"]) -> "Fisher":
        """The same data as a mean or as a sum over them: times or divided by `count` where that changes.

        Raises:
            DataError: the matrix is an inverse or a root, which is neither; reduce first, then invert.
            ValueError: another reduction.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r}: use 'mean' or 'sum'.")
        if reduction == self.reduction:
            return self
        if odd := {"inverse", "sqrt", "inverse sqrt"} & set(self.info.changes):
            raise DataError(
                f"this is an {' and '.join(sorted(odd))} of a Fisher, neither a mean nor a sum over data; take "
                f"fisher.reduced({reduction!r}) first and its inverse or root then."
            )
        factor = self.count if reduction == "sum" else 1 / self.count
        changed = self.mapped(lambda operator: operator.scaled(factor), "")
        return replace(changed, info=replace(self.info, reduction=reduction))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Fisher":
        """On another device or in another precision (float32 or float64)."""
        return self.mapped(lambda operator: operator.to(device, dtype), "")

    def whole(self) -> "Fisher":
        """All blocks at every rank, where each stayed with its owner (``share="owned"``); all ranks make the call.

        Raises:
            RankError: another rank failed or has ended.

        Example:
            >>> import kronfisher as kf
            >>> fisher = kf.estimate(torch.nn.Linear(3, 2), torch.randn(20, 3), kf.Gaussian())
            >>> fisher.whole() is fisher  # one process has everything
            True
        """
        if not any(isinstance(operator, Owned) for operator in self.blocks.values()):
            return self
        return self.mapped(lambda operator: operator.whole() if isinstance(operator, Owned) else operator, "")

    def _plus(self, other: object) -> "Fisher | None":
        """``F + other`` for another over the same parameters in the same blocks (DataError otherwise)."""
        if not isinstance(other, Fisher):
            return None
        # Whatever operators used the weights: one layer may be called in several forms.
        mine, theirs = ({tuple(b.key for b in blocks): (blocks, x) for blocks, x in f.entries} for f in (self, other))
        if mine.keys() != theirs.keys() or [*self.shapes.items()] != [*other.shapes.items()]:
            odd = [block_name(({**mine, **theirs})[key][0]) for key in mine.keys() ^ theirs.keys()]
            differ = f"blocks in one only: {', '.join(sorted(set(odd)))}" if odd else "the parameters differ in order"
            raise DataError(f"two Fishers add only over the same parameters in the same blocks; {differ}")
        entries = tuple((blocks, operator + theirs[key][1]) for key, (blocks, operator) in mine.items())
        context = self.context if self.context == other.context else None  # else no one truth belongs to the sum
        return replace(self, entries=entries, info=self.info.joined(other.info), context=context)

    # Reports, files, other libraries ----------------------------------------------------------------------------------

    def error(self, data: Any, **options: Any) -> Any:
        """Relative Frobenius error against the true blocks on `data`, per block and in all; `report` shows it then.

        Returns:
            The answer of the context's ``error(fisher, data, **options)``: an object with `blocks`, block name to
            error, and `relative`, that of all.

        Raises:
            DataError: the matrix was loaded from a file or made by hand, and knows no model.
        """
        measured = self._origin().error(self, data, **options)
        vars(self)["_measured"] = measured  # a cache on this very matrix: another one has another error
        return measured

    def spectrum(self, data: Any, block: str | None = None, rank: int = 8, **options: Any) -> Any:
        """The share of the true blocks on `data` that the best sums of 1, …, `rank` Kronecker products hold.

        What approximates the blocks in this matrix does not matter. Samples are kept while it is computed.

        Args:
            data: as for `kronfisher.estimate`.
            block: name of one block; None: all.
            rank: how many singular values of the rearranged block.
            **options: ``tolerance``, ``iterations``, ``memory_budget`` and ``progress``, see
                `kronfisher.estimation.spectrum.leading`.

        Returns:
            Block name to `kronfisher.estimation.spectrum.Spectrum`: `values` ``σ_r / ‖F‖``, which of them belong to
            antisymmetric pairs, and the `errors` of the best sums.

        Raises:
            DataError: the matrix was loaded from a file or made by hand, and knows no model; or there is no such block.
            MemoryBudgetError: so many samples do not fit; pass fewer data.

        Example:
            >>> import kronfisher as kf
            >>> model, data = torch.nn.Linear(3, 2), torch.randn(50, 3)
            >>> fisher = kf.estimate(model, data, kf.Gaussian(), labels="exact")
            >>> found = fisher.spectrum(data, "weight", rank=2)["weight"]
            >>> [round(value, 3) for value in found.values.tolist()]  # B is the identity: one product is everything
            [1.0, 0.0]
        """
        return self._origin().spectrum(self, data, block, rank, **options)

    def report(self) -> Report:
        """Structures, errors, memory and time of the blocks; print it."""
        measured = vars(self).get("_measured")
        if measured is None:
            return report(self.blocks, self.info)
        return report(self.blocks, self.info, measured.blocks, measured.relative)

    def save_report(self, path: str | Path, title: str = "Fisher matrix", *, spectra: bool = True) -> Path:
        """Write `report` as one HTML page with pictures, which needs no other file and no network.

        Args:
            path: of the page, such as ``"fisher.html"``.
            title: its heading.
            spectra: draw the eigenvalues of the largest blocks, which have to be computed for it.

        Returns:
            The path written.

        Raises:
            ImportError: jinja2 or matplotlib is missing; ``pip install "kronfisher[report]"``.

        Example:
            >>> import tempfile, kronfisher as kf
            >>> fisher = kf.estimate(torch.nn.Linear(3, 2), torch.randn(50, 3), kf.Gaussian())
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     text = fisher.save_report(f"{folder}/fisher.html").read_text()
            >>> text.count("<svg"), "Eigenvalues of each block" in text
            (3, True)
        """
        return page(self.blocks, self.report(), title, spectra=spectra).save(path)

    def save(self, path: str | Path) -> None:
        """Write the matrix to a safetensors file, all or nothing; read it back with `kronfisher.load(path, model)`.

        Where blocks stay with their owners (``share="owned"``) all ranks make the call: blocks go to rank 0 one after
        the other, and it writes the file.

        Raises:
            ImportError: safetensors is missing; ``pip install "kronfisher[io]"``.
            RankError: rank 0 could not write; on the other ranks.

        Example:
            >>> import kronfisher as kf
            >>> fisher = kf.estimate(torch.nn.Linear(3, 2), torch.randn(20, 3), kf.Gaussian(), labels="exact")
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     fisher.save(f"{folder}/fisher.safetensors")
            ...     kf.load(f"{folder}/fisher.safetensors")
            <Fisher of 8 parameters in 1 block, torch.float32, mean over 20 examples>
        """
        write(Contents(self.entries, self.shapes, self.info), path)

    def to_scipy(self) -> "LinearOperator":
        """The matrix as a ``scipy.sparse.linalg.LinearOperator`` on flat NumPy vectors.

        Raises:
            ImportError: SciPy is missing; ``pip install "kronfisher[scipy]"``.

        Example:
            >>> import kronfisher as kf
            >>> fisher = kf.estimate(torch.nn.Linear(3, 2), torch.randn(20, 3), kf.Gaussian(), labels="exact")
            >>> from scipy.sparse.linalg import eigsh
            >>> float(abs(eigsh(fisher.to_scipy(), k=1, which="LA")[0][0] - fisher.eigenvalues()[0].item())) < 1e-3
            True
        """
        return linear_operator(self.dim, self.dtype, self.device, lambda v: self @ v)

    def __repr__(self) -> str:
        blocks = f"{len(self.entries)} block{'s' if len(self.entries) > 1 else ''}"
        over = f"{self.reduction} over {self.count:g} examples"
        return f"<Fisher of {self.dim} parameters in {blocks}, {self.dtype}, {over}>"

    # Within -----------------------------------------------------------------------------------------------------------

    def _origin(self) -> Any:
        if self.context is None:
            raise DataError(
                "this Fisher was loaded or made by hand and knows no model; measure the error of the one that "
                "kronfisher.estimate returns"
            )
        return self.context

    def _through(self, v: Vector, apply: Callable[[Operator, Tensor], Tensor]) -> Vector:
        rows, form = read(v, self.shapes)
        for name, tensor in rows.items():
            if tensor.device != self.device:
                raise DataError(f"the Fisher is on {self.device}, the vector at {name} on {tensor.device}; move either")
            if not tensor.is_floating_point():
                raise DataError(f"the vector at {name} is {tensor.dtype}; it must be floating point")
        dtype = reduce(torch.promote_types, (t.dtype for t in rows.values()), self.dtype)
        rows = {name: tensor.to(dtype) for name, tensor in rows.items()}
        out = {name: tensor.new_empty(tensor.shape) for name, tensor in rows.items()}
        for blocks, operator in self.entries:
            scatter(blocks, apply(operator.to(dtype=dtype), gather(blocks, rows)), out)
        return form.write(out)

    def _scatter(self, count: int, dtype: torch.dtype, make: Callable[[Operator], Tensor]) -> dict[str, Tensor]:
        out = {n: torch.empty(count, *shape, dtype=dtype, device=self.device) for n, shape in self.shapes.items()}
        for blocks, operator in self.entries:
            scatter(blocks, make(operator).to(dtype), out)
        return out


def _blocks_of(given: Block | Blocks) -> Blocks:
    return (given,) if isinstance(given, Block) else tuple(given)
