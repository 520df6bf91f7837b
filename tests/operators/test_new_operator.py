"""An operator defined by others needs three members, and inherits everything else."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import kronfisher as kf
from kronfisher.errors import UnsupportedError
from kronfisher.fisher import Fisher
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fisher.info import Info
from kronfisher.fisher.precision import Precision
from kronfisher.layers.activations import Dense as DenseActivations
from kronfisher.layers.samples import Samples
from kronfisher.operators import Dense, Diagonal, Operator
from tests.helpers.close import close

D = 6


@pytest.fixture
def circulant() -> Iterator[type[Operator]]:
    @dataclass(frozen=True, eq=False, repr=False)
    class Circulant(Operator, kind="circulant"):
        """A circular convolution, with two settings and another operator among its fields."""

        column: Tensor
        extra: Operator
        name: str = ""
        power: int = 1
        marks: tuple[int, ...] = (1, 2)

        @property
        def dim(self) -> int:
            return len(self.column)

        @property
        def structure(self) -> str:
            return f"circulant {self.dim}"

        def matvecs(self, rows: Tensor) -> Tensor:
            spectrum = torch.fft.rfft(self.column)
            return torch.fft.irfft(torch.fft.rfft(rows) * spectrum, n=self.dim) + self.extra.matvecs(rows)

    yield Circulant
    del Operator.kinds["circulant"]


@pytest.fixture
def made(circulant) -> tuple[Operator, Tensor]:
    """The operator and its matrix, built from shifts of the column."""
    column = torch.tensor([3.0, 1.0, 0.5, 0.25, 0.5, 1.0]).double()
    values = torch.arange(1.0, 7.0).double()
    matrix = torch.stack([column.roll(k) for k in range(D)]) + values.diag()
    return circulant(column, Diagonal(values), "fc.weight", power=2, marks=(3, 4)), matrix


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.mT


def test_products_numbers_and_functions(made):
    X, M = made
    v = torch.randn(D, 3).double()
    close(X @ v, M @ v)
    close(X.solve(v), torch.linalg.solve(M, v))
    close(X.to_dense(), M)
    close(X.diagonal(), M.diagonal())
    close(X.trace(), M.trace())
    close(X.logdet(), M.logdet())
    close(X.frobenius_norm(), torch.linalg.matrix_norm(M))
    close(X.eigenvalues(), torch.linalg.eigvalsh(M).flip(0))
    assert X.nullity() == 0 and X.semidefinite and X.notes == ""
    for name, exponent in (("inverse", -1.0), ("sqrt", 0.5), ("inverse_sqrt", -0.5)):
        close(getattr(X, name)().to_dense(), power(M, exponent))


def test_arithmetic_and_damping(made):
    X, M = made
    one, v = torch.eye(D).double(), torch.randn(D).double()
    close((X + 0.3).to_dense(), M + 0.3 * one)
    close((2 * X / 4).to_dense(), M / 2)
    close((X + X).solve(v), torch.linalg.solve(2 * M, v))
    close((X + Dense(M) + Diagonal(v.square())).to_dense(), 2 * M + v.square().diag())
    close((X + kf.Tikhonov(0.2)).solve(v), torch.linalg.solve(M + 0.2 * one, v))
    close((X + kf.FactoredTikhonov(0.2)).to_dense(), M + 0.2 * one)
    close(X.clamped(4.0).to_dense(), power(M, 1.0) if torch.linalg.eigvalsh(M)[0] > 4 else clamped(M, 4.0))
    assert X.absolute() is X
    close(X.relative_to(v.square() + 1).to_dense(), M / (v.square() + 1).sqrt() / (v.square() + 1).sqrt()[:, None])


def clamped(matrix: Tensor, floor: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(floor) @ vectors.mT


def test_draws_have_the_covariance(made):
    X, M = made
    for inverse, covariance in ((True, torch.linalg.inv(M)), (False, M)):
        root = X.colour(torch.eye(X.noise_dim(inverse=inverse)).double(), inverse=inverse)
        close(root.mT @ root, covariance)
    assert X.sample(4).shape == (4, D)


def test_gradients_and_posteriors(made):
    X, M = made
    a, g = torch.randn(1, 5, 2, 3).double(), torch.randn(1, 5, 2, 2).double()
    rows = (g.mT @ a).transpose(0, 1).flatten(1)
    close(X.quadratic(Samples(DenseActivations(a), g)), ((rows @ M) * rows).sum())
    prior = torch.rand(D).double() + 0.5
    for p in (torch.tensor(2.0).double(), prior):
        precision, truth = Precision(X, 3.0, p), 3 * M + (p * torch.ones(D)).diag()
        close(precision.solves(rows), rows @ torch.linalg.inv(truth))
        close(precision.logdet(), truth.logdet())
        close(precision.inverse_diagonal(), torch.linalg.inv(truth).diagonal())


def test_files_hold_the_fields(made, tmp_path):
    X, M = made
    assert list(X.tensors()) == ["column", "extra.values"]
    settings = json.loads(json.dumps({"kind": X.kind, **X.settings()}))
    again = Operator.restored(X.tensors(), settings)
    assert type(again) is type(X) and again.settings() == X.settings() and vars(again)["marks"] == (3, 4)
    assert torch.equal(again.to_dense(), X.to_dense())
    assert X.to(dtype=torch.float32).dtype == torch.float32 and X.bytes == 2 * D * 8
    layer = torch.nn.ParameterDict({"weight": torch.zeros(1, 2, 3).double()})
    block = Block("weight", "linear", Window.of("weight", layer["weight"]))
    fisher = Fisher([(block, X)], {"weight": layer["weight"].shape}, Info(count=10))
    fisher.save(tmp_path / "own.safetensors")
    loaded = kf.load(tmp_path / "own.safetensors", layer)
    assert type(loaded["weight"]) is type(X)
    close(loaded.to_dense(), M)
    assert "circulant 6" in str(loaded.report())


def test_what_needs_the_matrix_is_refused_above_the_limit(made, monkeypatch):
    X, M = made
    monkeypatch.setattr("kronfisher.operators.operator.DENSE_LIMIT", D - 1)
    close(X @ torch.ones(D).double(), M.sum(1))
    for call in (X.spectral, X.diagonal, X.trace, X.logdet, lambda: X * 2, lambda: X.solve(torch.ones(D).double())):
        with pytest.raises(
            UnsupportedError, match=r"circulant 6 of fc.weight.*not formed above 5 rows.*choose another"
        ):
            call()
