"""Distances of the leading eigenvalues of an approximation from those of the true blocks, in closed form.

With one batch of n samples a true block is ``F = Σ_k vec(G_k) vec(G_k)ᵀ / N``, so its eigenvalues are those of the
``[n, n]`` matrix of inner products ``⟨G_k, G_l⟩ / N``. A sum of Kronecker products made from these samples lives in
the span of their inputs and gradients: in orthonormal bases of the two spans its factors have at most n rows.
"""

from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from kronfisher.errors import UnsupportedError
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.estimation.recipe import Recipe
from kronfisher.fisher.blocks import Block
from kronfisher.fits import Plan, State
from kronfisher.fits.visitor import Visitor
from kronfisher.layers.samples import Samples
from kronfisher.operators import Operator

__all__ = ["Spectrum", "leading_eigenvalues", "spectra"]

WRITTEN_OUT = 600  # up to this dimension of the compressed matrix a dense eigendecomposition is faster


@dataclass(kw_only=True)
class Collected(State):
    """Inputs ``a [n, I]`` and output gradients ``g [n, O]`` of every backward pass so far."""

    a: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Collect(Visitor):
    """Keeps the inputs and gradients of layers without shared positions."""

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> Collected:
        """No samples yet."""
        return Collected(group, plan)

    def update(self, state: Collected, samples: tuple[Samples, ...]) -> Collected:
        """Keep them."""
        (use,) = samples
        if use.positions > 1 or use.shape[0] > 1:
            raise UnsupportedError(
                f"{state.name}: spectra are measured for layers without shared positions or groups, and this one has "
                f"{use.positions} positions and {use.shape[0]} groups."
            )
        state.a.append(use.activations.dense()[0, :, 0])
        state.g.append(use.gradients[0, :, 0])
        return state


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The leading eigenvalues of one true block.

    Attributes:
        a: ``[n, I]`` inputs.
        g: ``[n, O]`` gradients.
        values: the leading eigenvalues of F, descending, in float64.
    """

    a: Tensor
    g: Tensor
    values: Tensor

    @classmethod
    def of(cls, a: Tensor, g: Tensor, count: float, leading: int) -> Self:
        """At most so many `leading` eigenvalues of the mean over N = `count` examples."""
        products = (a.double() @ a.double().mT) * (g.double() @ g.double().mT) / count
        values = torch.linalg.eigvalsh(products).flip(0)[:leading]
        return cls(a, g, values.clamp_min(0))  # what is below is rounding

    def distance(self, operator: Operator) -> float:
        """``√(Σ_k (λ_k(X) − λ_k(F))²)`` over the leading eigenvalues of both, each sorted."""
        values = leading_eigenvalues(operator, len(self.values), self.a, self.g)
        return float((values - self.values).norm())

    def norm(self) -> float:
        """``√(Σ_k λ_k(F)²)``."""
        return float(self.values.norm())


def spectra(recipe: Recipe, data: Any, leading: int) -> dict[str, Spectrum]:
    """Block name → the leading eigenvalues of the true block of the mean over `data`.

    Args:
        recipe: model, likelihood and labels.
        data: as for `kronfisher.estimate`.
        leading: how many eigenvalues at most; a block has no more than there are samples.

    Raises:
        UnsupportedError: a layer has shared positions (a convolution), groups or no inputs.
    """
    run = Accumulator(recipe, Collect())
    run.read(data)
    count = float(run.count)
    states = [group.state for group in run.groups if isinstance(group.state, Collected)]
    return {state.name: Spectrum.of(torch.cat(state.a), torch.cat(state.g), count, leading) for state in states}


def leading_eigenvalues(operator: Operator, k: int, a: Tensor, g: Tensor) -> Tensor:
    """The k largest eigenvalues, descending, in float64.

    Args:
        operator: a Kronecker product, a sum of several, or any other whose eigenvalues are cheap.
        k: how many.
        a: ``[n, I]`` inputs that the input factors were made from.
        g: ``[n, O]`` gradients that the output factors were made from.
    """
    products = operator.products
    if products is None or any(A.groups > 1 or A.is_diagonal or A.width != a.shape[1] for A, _ in products):
        return operator.eigenvalues().double().topk(k).values
    inputs = _compress(torch.cat([A.tensor for A, _ in products]).double(), a.double())
    outputs = _compress(torch.cat([B.tensor for _, B in products]).double(), g.double())
    rows, columns = outputs.shape[-1], inputs.shape[-1]
    if len(inputs) == 1:
        values = torch.outer(torch.linalg.eigvalsh(outputs[0]), torch.linalg.eigvalsh(inputs[0])).flatten()
    elif rows * columns <= max(WRITTEN_OUT, 2 * k):
        values = torch.linalg.eigvalsh(sum(map(torch.kron, outputs, inputs)))
    else:
        values = _lanczos(inputs, outputs, k)
    # The compressed matrix may have fewer dimensions than there are eigenvalues asked for; all others are zero.
    return torch.cat([values, values.new_zeros(k)]).topk(k).values


def _compress(factors: Tensor, samples: Tensor) -> Tensor:
    """The same matrices in an orthonormal basis of the samples' span, ``[R, r, r]``, if they live in it."""
    if samples.shape[0] >= samples.shape[1]:
        return factors
    basis = torch.linalg.qr(samples.mT).Q
    small = basis.mT @ factors @ basis
    lost = 1 - (small.flatten(1).norm(dim=1) / factors.flatten(1).norm(dim=1).clamp_min(1e-300)).square()
    return small if bool((lost < 1e-5).all()) else factors


def _lanczos(inputs: Tensor, outputs: Tensor, k: int) -> Tensor:
    """The k algebraically largest eigenvalues of ``Σ B ⊗ A`` by implicitly restarted Lanczos."""
    try:
        from scipy.sparse.linalg import LinearOperator, eigsh
    except ImportError as error:
        raise ImportError('spectra of sums need scipy: pip install "kronfisher[experiments]"') from error
    rows, columns = outputs.shape[-1], inputs.shape[-1]

    def multiply(vector: Any) -> Any:
        matrix = torch.from_numpy(vector).reshape(rows, columns)
        return (outputs @ matrix @ inputs.mT).sum(0).flatten().numpy()

    size = rows * columns
    start = torch.ones(size, dtype=torch.float64).numpy()
    operator: Any = LinearOperator((size, size), matvec=multiply, dtype="float64")  # pyright: ignore[reportCallIssue]
    options: Any = {"which": "LA", "v0": start, "tol": 1e-6, "return_eigenvectors": False}
    return torch.from_numpy(eigsh(operator, k, **options))
