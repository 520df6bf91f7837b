import resource
from pathlib import Path

import pytest
import torch

from kronfisher.errors import NumericalError, NumericalWarning, SingularError
from kronfisher.linalg import (
    add_symmetric_product_,
    cholesky,
    complete_,
    eigh,
    full_precision,
    mirror,
    multiply_symmetric,
    promote,
    unwritten_zeros,
)
from kronfisher.operators import Factor
from tests.helpers.close import close

# Below, at and above the sizes where products are split and triangles are copied tile by tile.
WIDTHS = (1, 7, 95, 96, 129, 193, 300, 512, 1009, 1100)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def spd(*shape, dtype=torch.float64):
    """Symmetric positive definite, far from the identity."""
    root = torch.randn(*shape, shape[-1], dtype=dtype)
    return root @ root.mT + 0.1 * torch.eye(shape[-1], dtype=dtype)


# Symmetric products ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [3, 700])
@pytest.mark.parametrize("by_columns", [False, True])
@dtypes
def test_symmetric_product_adds_the_upper_triangle(width, rows, by_columns, dtype):
    x, start = torch.randn(rows, width, dtype=dtype), torch.randn(width, width, dtype=dtype)
    x = x.mT.contiguous().mT if by_columns else x
    total = start.clone()
    assert add_symmetric_product_(total, x) is total
    truth = (start.double() + x.double().T @ x.double()).triu()
    close(total.double().triu(), truth, TOLERANCE[dtype])


@pytest.mark.parametrize("width", [7, 193, 1009])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("by_columns", [False, True])
def test_products_that_are_symmetric_or_antisymmetric_by_what_is_between(width, groups, sign, by_columns):
    x, middle = torch.randn(groups, 300, width, dtype=torch.float64), torch.randn(300, 300, dtype=torch.float64)
    y = (middle + sign * middle.T) @ x
    x, y = (side.mT.contiguous().mT if by_columns else side for side in (x, y))
    total = add_symmetric_product_(torch.zeros(groups, width, width, dtype=torch.float64), x, y)
    close(complete_(total, odd=sign < 0), x.mT @ y, 1e-13)  # narrow ones are whole already
    if width > 96:
        assert torch.equal(total.triu(1), sign * total.mT.triu(1))
    diagonal = torch.ones(groups, width, dtype=torch.float64)
    Factor.of(diagonal).add_product_(x, y)
    close(diagonal, 1 + (x * y).sum(1), 1e-13)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("width", [5, 130])
def test_symmetric_product_of_groups_into_a_window(groups, width):
    x = torch.randn(groups, 600, width, dtype=torch.float64)
    total = torch.full((groups, width + 2, width + 2), 7.0, dtype=torch.float64)
    add_symmetric_product_(total[:, :width, :width], x)
    close(total[:, :width, :width].triu(), (7 + x.mT @ x).triu(), 1e-13)
    assert (total[:, :, width:] == 7).all() and (total[:, width:] == 7).all()


def test_second_moments_on_a_diagonal_are_summed_some_rows_at_a_time(monkeypatch):
    x, y = torch.randn(2, 9, 3).double(), torch.randn(2, 9, 3).double()
    for piece in (1, 7, 13, 2**22):
        monkeypatch.setattr("kronfisher.operators.factors.diagonal._PIECE", piece)
        for other in (None, y):
            total = torch.ones(2, 3).double()
            Factor.of(total).add_product_(x, other)
            close(total, 1 + (x * (x if other is None else other)).sum(1), 1e-14)


@pytest.mark.parametrize("width", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25, "tensor"])
def test_mirror_reads_the_upper_triangle_only(width, lead, scale):
    scale = torch.tensor(0.25, dtype=torch.float64) if scale == "tensor" else scale
    upper = torch.randn(*lead, width, width)
    truth = (upper.triu() + upper.triu(1).mT) * float(scale)
    before = upper.clone()
    found = mirror(upper, scale)
    assert torch.equal(found, truth) and torch.equal(found, found.mT)
    assert torch.equal(upper, before) and found.dtype == torch.float32


def test_mirror_does_not_spread_what_lies_below():
    matrix = torch.ones(4, 4).triu() + torch.full((4, 4), torch.nan).tril(-1)
    assert torch.equal(mirror(matrix), torch.ones(4, 4))


# Precision ---------------------------------------------------------------------------------------------------------


def test_promote():
    for dtype, expected in [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        assert promote(torch.ones(2, dtype=dtype)).dtype == expected
    same = torch.ones(2)
    assert promote(same) is same


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_full_precision_puts_flags_back_even_after_an_error(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(KeyError), full_precision():
                assert torch.get_float32_matmul_precision() == "highest"
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
                raise KeyError
            assert torch.get_float32_matmul_precision() == precision
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    finally:
        torch.set_float32_matmul_precision(before)


# Eigenvectors ------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("shape", [(1,), (6,), (3, 5)], ids=str)
def test_eigh(shape, dtype):
    matrix = spd(*shape, dtype=dtype)
    values, vectors = eigh(matrix)
    assert values.dtype == vectors.dtype == dtype and (values.diff() >= 0).all()
    close(vectors * values.unsqueeze(-2) @ vectors.mT, matrix, TOLERANCE[dtype])
    close(vectors.mT @ vectors, torch.eye(shape[-1], dtype=dtype).expand_as(matrix), TOLERANCE[dtype])


def test_eigh_symmetrises():
    matrix = torch.randn(5, 5, dtype=torch.float64)
    values, _ = eigh(matrix, semidefinite=False)
    close(values, torch.linalg.eigvalsh((matrix + matrix.T) / 2), 1e-12)
    assert values[0] < -0.1


def test_eigh_sets_negative_noise_to_zero_where_it_is_noise():
    row = torch.randn(1, 6, dtype=torch.float64)
    values, vectors = eigh(row.T @ row - 1e-12 * torch.eye(6))
    assert (values >= 0).all() and (values[:-1] == 0).all()
    close(vectors[:, -1].abs(), (row[0] / row.norm()).abs(), 1e-10)
    assert eigh(torch.diag(torch.tensor([-2.0, 1.0])), semidefinite=False)[0].tolist() == [-2, 1]


def failing(times, monkeypatch):
    """The first calls of torch's solver fail."""
    calls, solver = [], torch.linalg.eigh

    def stub(matrix):
        calls.append(matrix.dtype)
        if len(calls) <= times:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return solver(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", stub)
    return calls


def test_eigh_falls_back_to_float64_and_says_so(monkeypatch):
    matrix = spd(5, dtype=torch.float32)
    truth = torch.linalg.eigvalsh(matrix)
    calls = failing(2, monkeypatch)
    with pytest.warns(NumericalWarning, match=r"fc\.weight: eigh failed in torch\.float32"):
        values, vectors = eigh(matrix, "fc.weight")
    assert calls[-1] == torch.float64 and values.dtype == vectors.dtype == torch.float32
    close(values, truth, 1e-5)
    close(vectors * values @ vectors.T, matrix, 1e-5)


def test_eigh_shifts_once_before_that_without_moving_the_eigenvalues(monkeypatch):
    matrix = spd(5)
    truth = torch.linalg.eigvalsh(matrix)
    calls = failing(1, monkeypatch)
    values, _ = eigh(matrix)  # no warning: warnings are errors here
    assert len(calls) == 2
    close(values, truth, 1e-13)


def test_eigh_that_fails_for_good_names_the_matrix(monkeypatch):
    failing(9, monkeypatch)
    with pytest.warns(NumericalWarning), pytest.raises(NumericalError, match=r"fc\.weight: no eigendecomposition"):
        eigh(spd(3), "fc.weight")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("function", [eigh, cholesky])
def test_what_is_not_finite_is_named(bad, function):
    matrix = spd(4)
    matrix[1, 1] = bad
    with pytest.raises(NumericalError, match=r"fc\.weight: .*NaN or Inf") as caught:
        function(matrix, "fc.weight")
    assert not isinstance(caught.value, SingularError)  # damping would not help


# Cholesky ----------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("shape", [(1,), (6,), (3, 5)], ids=str)
def test_cholesky(shape, dtype):
    matrix = spd(*shape, dtype=dtype)
    lower = cholesky(matrix)
    close(lower @ lower.mT, matrix, TOLERANCE[dtype])
    assert torch.equal(lower, lower.tril()) and (lower.diagonal(dim1=-2, dim2=-1) > 0).all()


@dtypes
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_cholesky_refuses_singular_matrices_and_says_how_much_damping_helps(dtype, scale):
    rows = torch.randn(3, 6, dtype=dtype)
    matrix = scale * rows.T @ rows
    with pytest.raises(SingularError, match=r"fc\.weight is singular to torch\.float") as caught:
        cholesky(matrix, "fc.weight")
    damping = float(str(caught.value).partition("λ ≥ ")[2].split()[0])
    assert 0 < damping < 1e-3 * float(matrix.trace())
    factor = cholesky(matrix + 4 * damping * torch.eye(6, dtype=dtype))
    assert torch.isfinite(factor).all()


@dtypes
def test_a_matrix_of_zeros_is_called_zero_and_an_indefinite_one_of_trace_zero_is_not(dtype):
    """Seen: "λ ≥ 4.9e-323"."""
    for tiny in (0.0, torch.finfo(dtype).smallest_normal / 4):
        with pytest.raises(SingularError, match=r"fc\.weight is singular: it is zero .* damping of any size") as caught:
            cholesky(torch.full((3, 3), tiny, dtype=dtype), "fc.weight")
        assert "≥" not in str(caught.value)
    with pytest.raises(SingularError, match="largest element is 2"):
        cholesky(torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=dtype))


def test_one_singular_matrix_among_several_is_enough():
    matrices = spd(3, 4)
    matrices[1, :, 0] = matrices[1, 0, :] = 0
    with pytest.raises(SingularError):
        cholesky(matrices)


def test_cholesky_refuses_indefinite_matrices():
    with pytest.raises(SingularError):
        cholesky(torch.diag(torch.tensor([1.0, -1.0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3), (1, 1000, 1000), (3, 2**20)])
def test_unwritten_zeros_are_zeros(shape, dtype):
    zeros = unwritten_zeros(torch.empty(0, dtype=dtype), shape)
    assert zeros.shape == shape and zeros.dtype == dtype and zeros.is_contiguous() and not bool(zeros.any())
    assert zeros.data_ptr() % 64 == 0  # as torch's own: MKL's last bits depend on it
    zeros += 1
    assert bool((zeros == 1).all())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc is Linux's")
@pytest.mark.parametrize(("number", "width", "most"), [(1, 5000, 0.1), (400, 250, 0.7)])  # small ones share pages
def test_unwritten_zeros_take_no_memory(number, width, most):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    zeros = [unwritten_zeros(torch.empty(0), (1, width, width)) for _ in range(number)]
    size = sum(each.nbytes for each in zeros)
    assert resident() - before < most * size
    written = 0
    while number == 1 and resident() - before < size * 9 / 10:  # else the measure would show nothing
        zeros.append(unwritten_zeros(zeros[0], zeros[0].shape).add_(1))
        written += 1
        assert written < 20  # the first ones may lie in memory that the process holds and has freed


@pytest.mark.parametrize("width", [5, 512, 650])
def test_a_symmetric_matrix_is_multiplied_by_its_upper_triangle(width):
    matrix, v = torch.randn(2, width, width, dtype=torch.float64), torch.randn(2, width, 3, dtype=torch.float64)
    close(multiply_symmetric(matrix, v), mirror(matrix) @ v)
