"""A symmetric matrix with structure, positive semidefinite unless its class says otherwise.

A subclass says how large it is, what it is called and how it multiplies; everything else is derived here, once, and a
subclass replaces what it can do more cheaply. Vectors are canonical: ``[D]`` with ``D = H·O·I`` in row-major order of
``W [H, O, I]``. Operators are never written after they were made: every operation gives a new one, which may share
tensors and eigenvectors with the old.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cached_property
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from kronfisher.errors import DataError, UnsupportedError
from kronfisher.linalg import negligible, stable_norm
from kronfisher.operators.algebra import Algebra, nonnegative
from kronfisher.operators.factors import Factor
from kronfisher.operators.gradients import Gradients
from kronfisher.operators.spectrum import Spectrum

__all__ = ["DENSE_LIMIT", "Operator"]

DENSE_LIMIT = 4096  # rows up to which a matrix is formed: 64 MiB in float32, seconds to decompose


class Operator(Algebra["Operator"]):
    """A symmetric matrix ``[D, D]`` with structure.

    It is positive semidefinite unless `semidefinite` is False. What needs a positive definite matrix then raises
    `IndefiniteError` when it meets a negative eigenvalue; only `clamped` and `absolute` change the spectrum.

    A subclass is a frozen dataclass whose fields are its tensors and settings, with three members: `dim`, `structure`
    and `matvecs`. It is registered by its `kind` (``class Mine(Operator, kind="mine")``), which is how a saved file
    names it. What it does not replace forms the matrix, up to `DENSE_LIMIT` rows.

    Attributes:
        name: what the matrix belongs to, for messages.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, eq=False, repr=False)
        ... class Circulant(Operator, kind="circulant-example"):
        ...     column: Tensor
        ...     name: str = ""
        ...     dim = property(lambda self: len(self.column))
        ...     structure = property(lambda self: f"circulant {self.dim}")
        ...     def matvecs(self, rows):
        ...         spectrum = torch.fft.rfft(self.column)
        ...         return torch.fft.irfft(torch.fft.rfft(rows) * spectrum, n=self.dim)
        >>> (Circulant(torch.tensor([2.0, 1.0, 0.0, 1.0])) + 1.0).solve(torch.ones(4)).round(decimals=4)
        tensor([0.2000, 0.2000, 0.2000, 0.2000])
        >>> _ = Operator.kinds.pop("circulant-example")
    """

    kinds: ClassVar[dict[str, type["Operator"]]] = {}
    kind: ClassVar[str] = ""
    determined: ClassVar[bool] = (
        False  # X + λ is solved, and has determinant and samples, at any size without a spectrum
    )
    spans_layers: ClassVar[bool] = False  # it ties several layers together, and multiplies cheaply at any size
    remedy: ClassVar[str] = "choose another fit."  # in messages, where the matrix is too large to be formed
    name: str = ""

    def __init_subclass__(cls, kind: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind:
            cls.kind = kind
            Operator.kinds[kind] = cls

    # What a subclass must say -----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def dim(self) -> int:
        """D, the number of rows and of columns."""

    @property
    @abstractmethod
    def structure(self) -> str:
        """A few words for reports, such as ``kronecker 401x120`` (I x O)."""

    @abstractmethod
    def matvecs(self, rows: Tensor) -> Tensor:
        """Multiply K vectors ``[K, D]`` of the operator's dtype, without checks."""

    # Tensors and settings, as in files --------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that define the matrix, and nothing that can be derived from them: those among its fields."""
        parts: dict[str, Tensor] = {}
        for key, value in _fields(self):
            if isinstance(value, Tensor):
                parts[key] = value
            elif isinstance(value, Operator):
                parts |= {f"{key}.{name}": tensor for name, tensor in value.tensors().items()}
        return parts

    def settings(self) -> dict[str, Any]:
        """Everything besides the tensors that `from_tensors` takes, plain JSON: the other fields."""
        return {key: _plain(value) for key, value in _fields(self) if not isinstance(value, Tensor)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], **settings: Any) -> Self:
        """The operator that gave these `tensors` and `settings`."""
        values: dict[str, Any] = {key: tensor for key, tensor in tensors.items() if "." not in key}
        for key, value in settings.items():
            if isinstance(value, Mapping) and "kind" in value:
                own = {name.removeprefix(f"{key}."): t for name, t in tensors.items() if name.startswith(f"{key}.")}
                value = Operator.restored(own, value)
            values[key] = tuple(value) if isinstance(value, list) else value
        return cls(**values)

    @staticmethod
    def restored(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "Operator":
        """The operator of the class that ``settings["kind"]`` names; KeyError if there is none."""
        rest = {key: value for key, value in settings.items() if key != "kind"}
        return Operator.kinds[settings["kind"]].from_tensors(tensors, **rest)

    # Structure that others may use ------------------------------------------------------------------------------------

    @property
    def semidefinite(self) -> bool:
        """Whether the matrix is positive semidefinite by construction: negative eigenvalues are rounding noise."""
        return True

    @property
    def notes(self) -> str:
        """Remarks for a report, such as the convergence of a solution."""
        return ""

    @property
    def product(self) -> tuple[Factor, Factor] | None:
        """The factors A and B where the matrix is one Kronecker product a group, else None."""
        return None

    @property
    def products(self) -> tuple[tuple[Factor, Factor], ...] | None:
        """The factors of every term where the matrix is a sum of Kronecker products and nothing else, else None."""
        return None if self.product is None else (self.product,)

    @property
    def product_basis(self) -> tuple[Factor, Factor] | None:
        """``U_A, U_B`` where the eigenvectors are known to be their Kronecker product, else None."""
        return None

    @property
    def diagonal_values(self) -> Tensor | None:
        """``[D]`` where the matrix is diagonal, else None."""
        return None

    @property
    def is_small(self) -> bool:
        """Whether it has few enough rows to be formed."""
        return self.dim <= DENSE_LIMIT

    def write_out(self, wanted: str) -> "Operator":
        """The same matrix written out, for what the structure does not give; made once.

        Raises:
            UnsupportedError: it has more than `DENSE_LIMIT` rows.
        """
        if not self.is_small:
            raise UnsupportedError(
                f"{self!r}: this structure does not give {wanted}, and it is not formed above {DENSE_LIMIT} rows (it "
                f"has {self.dim}). Products work at any size: solve by conjugate gradients on them "
                f"(fisher.to_scipy() suits SciPy's solvers), or {self.remedy}"
            )
        return self._matrix

    @cached_property
    def _matrix(self) -> "Operator":
        settings = {"name": self.name, "indefinite": not self.semidefinite}
        return Operator.kinds["dense"].from_tensors({"matrix": self.to_dense()}, **settings)

    # What follows from it ---------------------------------------------------------------------------------------------

    def spectral(self) -> Spectrum["Operator"]:
        """The same matrix as eigenvectors and eigenvalues; computed once and shared by every copy with another λ."""
        return self.write_out("its spectrum").spectral()

    def trace(self) -> Tensor:
        """The sum of the eigenvalues, a 0-dim tensor."""
        return self.diagonal().sum()

    def diagonal(self) -> Tensor:
        """The diagonal ``[D]``."""
        return self.write_out("its diagonal").diagonal()

    def scaled(self, factor: float) -> "Operator":
        """``factor · X``, for a factor of at least 0 (ValueError otherwise)."""
        return self.write_out("a multiple of itself").scaled(factor)

    def quadratic(self, samples: Gradients) -> Tensor:
        """``Σ_k vec(G_k)ᵀ X vec(G_k)``, a 0-dim tensor in float64."""
        total = samples.gradients.new_zeros((), dtype=torch.float64)
        for gradients in samples.per_sample():
            rows = gradients.transpose(0, 1).flatten(1)
            total += (rows * self.matvecs(rows)).sum(dtype=torch.float64)
        return total

    def factored_damping(self, damping: float) -> "Operator":
        """Damped by `FactoredTikhonov` with λ > 0; ``X + λ·1`` where the structure has no factors to damp."""
        return self.shifted(damping)

    def normalized(self, inputs: float | Tensor, outputs: float | Tensor) -> "Operator":
        """``X / mean eigenvalue``, each factor damped by a share of its own mean eigenvalue.

        ``(B / b̄ + outputs·1) ⊗ (A / ā + inputs·1)`` for a product; ``X / x̄ + inputs·outputs·1`` where the structure
        has no factors to damp. A matrix that is zero becomes ``inputs·outputs·1``.
        """
        trace, share = self.trace(), inputs * outputs
        if isinstance(share, Tensor):  # both are waited for at once
            trace, share = torch.stack([trace, share.to(trace)]).tolist()
        mean = float(trace) / self.dim
        return self.scaled(1 / mean if mean > 0 else 0.0).shifted(share)

    def relative_to(self, diagonal: Tensor) -> "Operator":
        """``P^{-1/2} X P^{-1/2}`` for ``P = diag(diagonal)``, positive ``[D]``; UnsupportedError as in `write_out`."""
        root = diagonal.sqrt()
        matrix = self.write_out("itself relative to a diagonal matrix").to_dense() / root / root[:, None]
        return Operator.kinds["dense"].from_tensors({"matrix": matrix}, name=self.name)

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""
        return next(iter(self.tensors().values())).dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors().values())).device

    @property
    def bytes(self) -> int:
        """The memory of the defining tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def solves(self, rows: Tensor) -> Tensor:
        """``X⁻¹`` times K vectors ``[K, D]`` of the operator's dtype, without checks of the vectors."""
        return self.inverse().matvecs(rows)

    def noise_dim(self, *, inverse: bool = True) -> int:
        """The number of white numbers that `colour` takes for one draw: D, or more where terms are drawn apart."""
        return self.dim

    def colour(self, noise: Tensor, *, inverse: bool = True) -> Tensor:
        """Turn rows of white noise ``[n, noise_dim]`` into draws ``[n, D]`` from ``N(0, X⁻¹)``, or from ``N(0, X)``."""
        return (self.inverse_sqrt() if inverse else self.sqrt()).matvecs(noise)

    def solve(self, v: Tensor) -> Tensor:
        """``X⁻¹ v`` for `v` ``[D]`` or ``[D, K]``, in the same form.

        Raises:
            SingularError: X has numerically zero eigenvalues; add damping first. IndefiniteError, a kind of it: it has
                negative ones.
            DataError: `v` does not fit.
        """
        return self._through(v, lambda operator, rows: operator.solves(rows))

    def inverse(self) -> "Operator":
        """``X⁻¹`` as an operator; make it once and apply it often. SingularError as in `solve`."""
        return self.spectral().positive_map(torch.reciprocal)

    def inverse_sqrt(self) -> "Operator":
        """The symmetric ``X^{-1/2}`` as an operator. SingularError as in `solve`."""
        return self.spectral().positive_map(torch.rsqrt)

    def sqrt(self) -> "Operator":
        """The symmetric positive semidefinite square root as an operator.

        Raises:
            IndefiniteError: X has negative eigenvalues.
        """
        spectral = self.spectral().rooted()
        return spectral.map(torch.sqrt, definite=spectral.definite)

    def logdet(self) -> Tensor:
        """``log |X|``, a 0-dim tensor. SingularError as in `solve`."""
        return self.spectral().checked().values.log().sum()

    def eigenvalues(self) -> Tensor:
        """All D eigenvalues, descending."""
        return self.spectral().values.sort(descending=True).values

    def nullity(self) -> int:
        """The number of eigenvalues that cannot be told from zero."""
        values = self.eigenvalues()
        return int((values <= negligible(values.dtype) * values.amax()).sum())

    def frobenius_norm(self) -> Tensor:
        """``‖X‖ = √(Σ X_ij²)``, a 0-dim tensor."""
        return stable_norm(self.spectral().values)

    def shifted(self, damping: float) -> "Operator":
        """``X + λ·1``, exact Tikhonov damping; λ is in the units of X's own eigenvalues.

        Raises:
            ValueError: λ is negative or not finite.

        Warns:
            NumericalWarning: λ is below the rounding error of the largest eigenvalue.
        """
        return self if nonnegative(damping, "the damping λ") == 0 else self.spectral().shifted(damping)

    def clamped(self, floor: float = 0.0) -> "Operator":
        """X with eigenvalues below `floor` raised to it: ``U max(S, floor) Uᵀ``; X itself where that changes nothing.

        A direction that is clamped to zero has no curvature left at all.

        Raises:
            ValueError: `floor` is negative or not finite.
        """
        floor = nonnegative(floor, "the floor")
        if floor == 0 and self.semidefinite:
            return self
        return self.spectral().map(lambda values: values.clamp_min(floor), definite=floor > 0)

    def absolute(self) -> "Operator":
        """X with the absolute values of its eigenvalues, ``U |S| Uᵀ``; X itself if it is positive semidefinite."""
        return self if self.semidefinite else self.spectral().map(torch.abs)

    def sample(self, n: int, *, seed: int = 0, inverse: bool = True) -> Tensor:
        """Draw n vectors from ``N(0, X⁻¹)``: X is read as a precision, as in a posterior.

        Args:
            n: how many.
            seed: of the operator's own generator on its own device; torch's global state is not touched.
            inverse: ``False`` draws from ``N(0, X)`` instead.

        Returns:
            ``[n, D]``.

        Raises:
            SingularError: as in `solve`, for ``inverse=True``.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        size = self.noise_dim(inverse=inverse)
        noise = torch.randn(n, size, generator=generator, dtype=self.dtype, device=self.device)
        return self.colour(noise, inverse=inverse)

    def to_dense(self) -> Tensor:
        """The matrix itself, ``[D, D]``."""
        return self.matvecs(torch.eye(self.dim, dtype=self.dtype, device=self.device))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Operator":
        """The operator on another device or in another precision (float32 or float64); itself if nothing changes.

        Raises:
            DataError: another dtype; factorisations need float32 or better.
        """
        if dtype not in (None, torch.float32, torch.float64):
            raise DataError(f"{self.name or self.structure}: operators live in float32 or float64, not {dtype}")
        old = self.tensors()
        new = {
            key: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)  # else places
            for key, tensor in old.items()
        }
        return self if all(new[key] is old[key] for key in old) else type(self).from_tensors(new, **self.settings())

    def transposed(self, outputs: int, inputs: int) -> "Operator":
        """The same matrix over ``Wᵀ [1, I, O]`` in place of ``W [1, O, I]``, given O and I.

        Raises:
            UnsupportedError: the structure is of another kind.
        """
        raise UnsupportedError(
            f"{self!r}: this structure knows no transpose, which a weight in two roles (a table of embeddings that is "
            "the last layer too) takes. Choose another fit for it, such as 'kfac' or 'diagonal'."
        )

    def merged(self, other: "Operator") -> "Operator | None":
        """``X + other`` in one operator if that is as cheap as either, else None."""
        return None

    def __matmul__(self, v: Tensor) -> Tensor:
        return self._through(v, lambda operator, rows: operator.matvecs(rows))

    def _plus(self, other: object) -> "Operator | None":
        """``X + other`` for another operator: a sum of terms."""
        if not isinstance(other, Operator):
            return None
        return Operator.kinds["total"].from_terms((self, other))  # pyright: ignore[reportAttributeAccessIssue]

    def __repr__(self) -> str:
        return f"<{self.structure}{f' of {self.name}' if self.name else ''}, {self.dtype}>"

    def _through(self, v: Tensor, apply: Callable[["Operator", Tensor], Tensor]) -> Tensor:
        if not isinstance(v, Tensor):
            raise DataError(f"{self!r} takes a tensor, not {type(v).__name__}")
        if v.dim() not in (1, 2) or v.shape[0] != self.dim:
            raise DataError(f"{self!r} takes [{self.dim}] or [{self.dim}, K], not {list(v.shape)}")
        if not v.is_floating_point():
            raise DataError(f"{self!r} takes floating-point vectors, not {v.dtype}; convert with .to({self.dtype})")
        if v.device != self.device:
            raise DataError(f"{self!r} is on {self.device}, the vector on {v.device}; move one of them with .to(...)")
        dtype = torch.promote_types(self.dtype, v.dtype)
        operator, v = self.to(dtype=dtype), v.to(dtype)
        return apply(operator, v[None])[0] if v.dim() == 1 else apply(operator, v.mT).mT


def _fields(operator: Operator) -> list[tuple[str, Any]]:
    return [(field.name, getattr(operator, field.name)) for field in fields(cast(Any, operator))]


def _plain(value: Any) -> Any:
    if isinstance(value, Operator):
        return {"kind": value.kind, **value.settings()}
    return list(value) if isinstance(value, tuple) else value
