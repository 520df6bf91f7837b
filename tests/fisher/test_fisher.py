"""Every operation of a Fisher against the dense matrix over the flat parameters."""

import copy
import pickle
from dataclasses import FrozenInstanceError, replace
from math import prod
from types import SimpleNamespace

import pytest
import torch

from kronfisher.errors import DataError, MemoryBudgetError, SingularError
from kronfisher.fisher import Fisher, Info
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fisher.parameters import fingerprint
from kronfisher.operators import Diagonal, Kronecker, memory
from tests.helpers.close import close
from tests.helpers.optional import require

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}


def named(flat, shapes):
    """``[P]`` or ``[P, K]`` as a dict."""
    rows = flat[None] if flat.dim() == 1 else flat.mT
    parts = rows.split([shape.numel() for shape in shapes.values()], dim=1)
    result = {n: part.reshape(len(rows), *shape) for part, (n, shape) in zip(parts, shapes.items(), strict=True)}
    return {name: part[0] for name, part in result.items()} if flat.dim() == 1 else result


def test_to_dense_follows_the_order_of_the_parameters(fisher, model):
    F, dense = fisher
    close(F.to_dense(), dense, 1e-14)
    assert F.names == tuple(name for name, p in model.named_parameters() if p.requires_grad)
    assert F.dim == len(dense) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("columns", [None, 1, 4])
def test_products_and_solutions_in_every_form(fisher, dtype, columns):
    F, dense = fisher
    F, tolerance = F.to(dtype=dtype), TOLERANCE[dtype]
    flat = torch.randn(F.dim, dtype=dtype) if columns is None else torch.randn(F.dim, columns, dtype=dtype)
    before = flat.clone()
    for multiply, matrix in (
        (F.__matmul__, dense),
        (F.solve, torch.linalg.inv(dense)),
        ((F + 0.3).solve, torch.linalg.inv(dense + 0.3 * torch.eye(len(dense)).double())),
        (F.inverse().__matmul__, torch.linalg.inv(dense)),
        (F.sqrt().sqrt().inverse().inverse().inverse_sqrt().__matmul__, torch.linalg.inv(_power(dense, 0.125))),
    ):
        truth = matrix @ flat.double()
        for _ in range(2):
            answer = multiply(flat)
            assert answer.shape == flat.shape and answer.dtype == dtype
            close(answer, truth, tolerance)
            by_name = multiply(named(flat, F.shapes))
            assert list(by_name) == list(F.names)
            for name, expected in named(truth, F.shapes).items():
                assert by_name[name].shape == expected.shape and by_name[name].dtype == dtype
                close(by_name[name], expected, 10 * tolerance)
    assert torch.equal(flat, before)


def _power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.mT


def test_a_dict_may_come_in_any_order_and_memory_format(fisher):
    F, dense = fisher
    flat = torch.randn(F.dim, 3).double()
    v = dict(reversed(named(flat, F.shapes).items()))
    v["conv.weight"] = v["conv.weight"].permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    v["transposed"] = v["transposed"].mT.contiguous().mT
    for name, expected in named(dense @ flat, F.shapes).items():
        close((F @ v)[name], expected)
    single = {name: tensor[1] for name, tensor in v.items()}
    for name, expected in named(dense @ flat[:, 1], F.shapes).items():
        close((F @ single)[name], expected)


def test_numbers(fisher):
    F, dense = fisher
    close(F.trace(), dense.trace())
    close(F.logdet(), torch.logdet(dense))
    close(F.frobenius_norm(), torch.linalg.matrix_norm(dense))
    close(F.eigenvalues(), torch.linalg.eigvalsh(dense).flip(0))
    for name, expected in named(dense.diagonal(), F.shapes).items():
        assert F.diagonal()[name].shape == F.shapes[name]
        close(F.diagonal()[name], expected)
    assert F.bytes == sum(operator.bytes for operator in F.blocks.values()) > 0


def test_arithmetic(fisher, another_fisher, model):
    F, dense = fisher
    G, other = another_fisher(model, seed=50)
    identity = torch.eye(F.dim).double()
    for result, truth in (
        (F + 0.3, dense + 0.3 * identity),
        (0.3 + F, dense + 0.3 * identity),
        (F * 2.5, 2.5 * dense),
        (2.5 * F, 2.5 * dense),
        (F / 4, dense / 4),
        (F + G, dense + other),
        (0.5 * F + 0.5 * G + 1.0, (dense + other) / 2 + identity),
        (sum([F, G]), dense + other),
        ((F + G).inverse(), torch.linalg.inv(dense + other)),
    ):
        assert isinstance(result, Fisher)
        close(result.to_dense(), truth)
        close(result @ torch.ones(F.dim).double(), truth.sum(1))
    assert F + 0 is F
    for bad in (-1.0, float("nan")):
        for operation in (F.shifted, F.scaled):
            with pytest.raises(ValueError, match="at least 0"):
                operation(bad)
    with pytest.raises(TypeError):
        F + "text"
    with pytest.raises(TypeError):
        F * F


def test_samples(fisher):
    F, dense = fisher
    n, state = 20000, torch.get_rng_state()
    for inverse, truth in ((True, torch.linalg.inv(dense)), (False, dense)):
        draws = F.sample(n, seed=1, inverse=inverse)
        assert {name: d.shape for name, d in draws.items()} == {m: (n, *shape) for m, shape in F.shapes.items()}
        flat = torch.cat([d.flatten(1) for d in draws.values()], 1)
        scale = ((torch.outer(truth.diagonal(), truth.diagonal()) + truth**2) / n).sqrt()
        assert ((flat.T @ flat / n - truth).abs() < 6 * scale).all()  # blocks uncorrelated too
        again, different = F.sample(n, seed=1, inverse=inverse), F.sample(n, seed=2, inverse=inverse)
        assert all(torch.equal(d, again[name]) and not torch.equal(d, different[name]) for name, d in draws.items())
    assert torch.equal(state, torch.get_rng_state())


def test_blocks_by_name(fisher):
    F, _ = fisher
    assert list(F.blocks) == ["transposed", "conv.weight", "alone", "scale", "first.weight + second.weight"]
    assert F["bias"] is F["transposed"] is F.blocks["transposed"]
    assert F["second.bias"] is F["first.weight"] is F["first.weight + second.weight"]
    with pytest.raises(KeyError, match=r"frozen.*transposed"):
        F["frozen"]


def test_a_parameter_shared_by_blocks_is_asked_for_by_block():
    weight = torch.zeros(4, 2)
    upper, lower = (
        Block(f"w[{k}]", "linear", Window.of("w", weight, weight[None, 2 * k : 2 * k + 2])) for k in range(2)
    )
    F = Fisher(((upper, Diagonal(torch.ones(4))), (lower, Diagonal(2 * torch.ones(4)))), {"w": weight.shape}, Info(1))
    assert F["w[1]"].trace() == 8
    assert torch.equal(F @ torch.ones(8), torch.tensor([1.0] * 4 + [2.0] * 4))
    with pytest.raises(KeyError, match=r"w\[0\], w\[1\]"):
        F["w"]


def test_vectors_that_do_not_fit_are_refused(fisher):
    F, _ = fisher
    good = named(torch.randn(F.dim).double(), F.shapes)
    many = named(torch.randn(F.dim, 3).double(), F.shapes)
    without = {name: v for name, v in good.items() if name != "conv.bias"}
    for bad, message in (
        (without, "missing: conv.bias"),
        ({**good, "frozen": torch.ones(2)}, "unknown: frozen"),
        ({**without, "frozen": torch.ones(2)}, "missing: conv.bias; unknown: frozen"),
        ({**good, "alone": torch.ones(6)}, r"alone has shape \[6\].*\[5\]"),
        ({**many, "alone": torch.ones(5)}, r"same number.*transposed has \[3, ...\].*alone has one"),
        ({**many, "alone": torch.ones(4, 5)}, "same number"),
        ({**good, "alone": torch.ones(5, dtype=torch.int64)}, "alone is torch.int64"),
        ({**good, "alone": torch.ones(5, device="meta")}, "alone on meta"),
        (torch.ones(F.dim + 1), "flat vector"),
        (torch.ones(1, F.dim), "flat vector"),
        (torch.ones(F.dim, dtype=torch.int32), "int32"),
        ([1.0] * F.dim, "list"),
        (None, "NoneType"),
    ):
        for multiply in (F.__matmul__, F.solve):
            with pytest.raises(DataError, match=message):
                multiply(bad)


def test_mixed_dtypes_promote(fisher):
    F, dense = fisher
    F = F.to(dtype=torch.float32)
    v = {name: tensor.to(torch.bfloat16) for name, tensor in named(torch.randn(F.dim), F.shapes).items()}
    assert {t.dtype for t in (F @ v).values()} == {torch.float32}
    v["alone"] = v["alone"].double()
    answer = F @ v
    assert {t.dtype for t in answer.values()} == {torch.float64}
    flat = torch.cat([v[name].double().flatten() for name in F.names])
    close(torch.cat([t.flatten() for t in answer.values()]), dense @ flat, 1e-5)


def test_derived_matrices_keep_and_extend_the_facts(fisher, another_fisher, model):
    F, dense = fisher
    F = replace(F, context="context")
    G = ((F * 2.0) + 0.5).inverse()
    assert (G.count, G.reduction, G.labels, G.rows, G.context) == (20, "mean", "sampled", {"transposed": 40}, "context")
    assert G.info.changes == ("* 2", "+ 0.5", "inverse") and not F.info.changes
    other = another_fisher(model, seed=50)[0]
    joined = F.reduced("sum") + other.reduced("sum")
    assert joined.count == 40 and joined.rows == {"transposed": 80} and joined.context is None
    close(joined.reduced("mean").to_dense(), (dense + other.to_dense()) / 2)
    total = F.reduced("sum")
    assert total.reduction == "sum" and total.count == 20
    close(total.to_dense(), 20 * dense)
    close(total.reduced("mean").to_dense(), dense)
    with pytest.raises(DataError, match="mean over its data"):
        F + total


def test_sums_of_means_stay_consistent_with_their_count(fisher, another_fisher, model):
    F, _ = fisher
    other = another_fisher(model, seed=50)[0]
    joined = F + other  # two means over 20 data each
    assert (joined.count, joined.reduction, joined.rows) == (20, "mean", {"transposed": 40})
    sums = (F.reduced("sum") + other.reduced("sum")).to_dense()
    close(joined.reduced("sum").to_dense(), sums)
    close((joined * joined.count).to_dense(), sums)
    fewer = replace(other, info=replace(other.info, count=5.0))
    with pytest.raises(DataError, match=r"means over 20 and 5 data.*reduced"):
        F + fewer
    assert (F + replace(other, info=replace(other.info, labels="exact"))).labels == "sampled + exact"


@pytest.mark.parametrize("change", ["inverse", "sqrt", "inverse_sqrt"])
def test_inverses_and_roots_are_no_sums_over_data(fisher, change):
    F, _ = fisher
    changed = getattr(F + 1.0, change)()
    assert changed.reduced("mean") is changed
    with pytest.raises(DataError, match=r"neither a mean nor a sum.*fisher.reduced\('sum'\) first"):
        changed.reduced("sum")


def test_only_the_same_blocks_add_up(fisher, model):
    F, _ = fisher
    weight = torch.zeros(1, 2, 2)
    G = Fisher(((Block("w", "linear", Window.of("w", weight)), Diagonal(torch.ones(4))),), {"w": (1, 2, 2)}, Info(1))
    with pytest.raises(DataError, match=r"blocks in one only.*alone.*w"):
        F + G
    shuffled = Fisher(F.entries, dict(reversed(F.shapes.items())), F.info)
    with pytest.raises(DataError, match="order"):
        F + shuffled
    reordered = Fisher(tuple(reversed(F.entries)), F.shapes, F.info)  # the same matrix
    close((F + reordered).to_dense(), 2 * F.to_dense())


def test_a_fisher_must_cover_its_parameters_exactly(fisher):
    F, _ = fisher
    with pytest.raises(DataError, match=r"cover.*scale"):
        Fisher(F.entries[:3] + F.entries[4:], F.shapes, F.info)
    with pytest.raises(DataError, match=r"cover.*scale"):
        Fisher((*F.entries, F.entries[3]), F.shapes, F.info)
    with pytest.raises(DataError, match="scale"):
        Fisher(F.entries, {name: shape for name, shape in F.shapes.items() if name != "scale"}, F.info)
    with pytest.raises(DataError, match="at least one block"):
        Fisher((), {}, F.info)
    with pytest.raises(DataError, match=r"transposed.*8 rows.*diagonal 3"):
        Fisher(((F.entries[0][0], Diagonal(torch.ones(3))), *F.entries[1:]), F.shapes, F.info)


def test_a_singular_block_is_named(fisher):
    F, _ = fisher
    singular = Kronecker(torch.zeros(1, 4, 4).double(), torch.eye(2)[None].double(), name="transposed")
    G = Fisher(((F.entries[0][0], singular), *F.entries[1:]), F.shapes, F.info)
    for operation in (G.inverse, G.logdet, G.inverse_sqrt, lambda: G.solve(torch.ones(G.dim)), lambda: G.sample(1)):
        with pytest.raises(SingularError, match="transposed"):
            operation()
    assert (G + 0.1).logdet().isfinite()


def test_a_dense_matrix_that_cannot_fit_is_refused_with_its_size(fisher, monkeypatch):
    F, _ = fisher
    assert memory.available_memory() > 2**20
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    needed = 8 * (F.dim**2 + 2 * 20**2)
    with pytest.raises(MemoryBudgetError, match=f"{needed:,} bytes"):
        F.to_dense()


def test_immutability(fisher):
    F, dense = fisher
    with pytest.raises(FrozenInstanceError):
        F.info = None
    for result in (F @ torch.ones(F.dim).double(), F.to_dense(), F.eigenvalues(), F.trace()):
        result.zero_()
    for tensors in (F.diagonal(), F.sample(2), F @ named(torch.ones(F.dim).double(), F.shapes)):
        for tensor in tensors.values():
            tensor.zero_()
    shapes = dict(F.shapes)
    G = Fisher(F.entries, shapes, F.info)
    shapes.clear()
    close(G.to_dense(), dense)
    close(F.to_dense(), dense)


def test_copies_and_pickles(fisher):
    F, dense = fisher
    F.solve(torch.ones(F.dim).double())
    for G in (copy.deepcopy(F), pickle.loads(pickle.dumps(F))):
        close(G.to_dense(), dense)
        assert G.info == F.info


def test_to(fisher):
    F, dense = fisher
    assert F.dtype == torch.float64 and F.to(dtype=torch.float32).dtype == torch.float32
    close(F.to(dtype=torch.float32).to_dense(), dense, 1e-5)
    assert F.to("meta").device.type == "meta"
    with pytest.raises(DataError):
        F.to(dtype=torch.float16)


@pytest.mark.filterwarnings("ignore:Calling `matvec` on:FutureWarning")  # of SciPy 1.18 and newer
def test_scipy(fisher):
    linalg = require("scipy.sparse.linalg")
    F, dense = fisher
    operator = F.to_scipy()
    assert operator.shape == (F.dim, F.dim) and operator.dtype == "float64"
    vectors = torch.randn(F.dim, 3).double()
    for result, truth in (
        (operator @ vectors[:, 0].numpy(), dense @ vectors[:, 0]),
        (operator @ vectors.numpy(), dense @ vectors),
        (operator.T @ vectors.numpy()[::, ::-1], dense @ vectors.flip(1)),
        (operator.matvec(vectors[:, :1].numpy()), dense @ vectors[:, :1]),
    ):
        close(torch.tensor(result), truth)
    top = linalg.eigsh(operator, k=2, return_eigenvectors=False)
    close(torch.tensor(sorted(top)), torch.linalg.eigvalsh(dense)[-2:], 1e-8)
    solution, status = linalg.cg(operator, vectors[:, 0].numpy(), rtol=1e-12)
    assert status == 0
    close(torch.tensor(solution), torch.linalg.solve(dense, vectors[:, 0]), 1e-8)


def test_missing_extras_are_named(fisher, monkeypatch, tmp_path, model):
    import sys

    F, _ = fisher
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"kronfisher\[scipy\]"):
        F.to_scipy()
    with pytest.raises(ImportError, match=r"kronfisher\[io\]"):
        F.save(tmp_path / "fisher.safetensors")
    assert not list(tmp_path.iterdir())


def test_report(fisher):
    F, _ = fisher
    report = (F + 0.5).report()
    assert [row.name for row in report.rows] == list(F.blocks)
    assert sum(row.parameters for row in report.rows) == report.parameters == F.dim
    assert sum(row.share for row in report.rows) == pytest.approx(1)
    assert report.bytes == (F + 0.5).bytes
    assert report.rows[0].error is None and F.report().rows[0].error == 0.25  # another matrix, another error
    assert "0.25" in str(F.report())
    text = str(report)
    assert f"100.0% of {F.dim} trainable" in text.replace("\n", " ")
    for part in (
        "transposed",
        "kronecker 4x2",
        "examples: 20",
        "mean",
        "sampled",
        "Categorical()",
        "+ 0.5",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 110


def test_error_asks_the_context_it_was_made_in(fisher):
    F, _ = fisher
    with pytest.raises(DataError, match=r"kronfisher\.estimate"):
        F.error([])

    class Context:
        def error(self, fisher, data, **options):
            return SimpleNamespace(blocks={"scale": 0.125}, relative=0.375, asked=(fisher, data, options))

    G = replace(F, context=Context())
    assert "0.375" not in str(G.report())
    assert G.error([1], samples=2).asked == (G, [1], {"samples": 2})
    assert G.report().error == 0.375 and {row.name: row.error for row in G.report().rows}["scale"] == 0.125
    assert "0.375" in str(G.report())
    damped = G + 0.1
    assert damped.context is G.context and damped.report().error is None  # another matrix, another error


@pytest.mark.parametrize("columns", [None, 1, 3])
def test_flat_vectors_over_parameters_of_any_shape(columns):
    shapes = {"number": (), "vector": (3,), "one": (1, 1), "table": (2, 2)}
    blocks = [Block(n, "add", None, Window.of(n, torch.zeros(s)).reshaped(1, prod(s))) for n, s in shapes.items()]
    values = torch.arange(1.0, 10.0, dtype=torch.float64)
    parts = values.split([block.dim for block in blocks])
    F = Fisher([(b, Diagonal(part)) for b, part in zip(blocks, parts, strict=True)], shapes, Info(count=1))
    v = torch.randn(9, dtype=torch.float64) if columns is None else torch.randn(9, columns, dtype=torch.float64)
    factors = values if columns is None else values[:, None]
    close(F @ v, v * factors, 1e-15)
    close(F.solve(v), v / factors, 1e-15)
    by_name = F @ named(v, F.shapes)
    close(by_name["number"], (v * factors)[0], 1e-15)


def test_hashes_of_parameters_do_not_depend_on_the_pieces_that_are_read(monkeypatch):
    parameters = {"w": torch.randn(5, 7), "none": torch.zeros(0), "h": torch.randn(9).half(), "c": torch.randn(3) + 1j}
    whole = fingerprint(parameters)
    monkeypatch.setattr("kronfisher.fisher.parameters._PIECE", 4)
    assert fingerprint(parameters) == whole
    swapped = {**parameters, "w": parameters["w"].flip(0)}
    assert fingerprint(swapped) != whole


def test_windows_on_whole_parameters_are_made_once():
    one, other = (Window.of("w", torch.zeros(2, 3)) for _ in range(2))
    assert one is other and one.grouped is other.grouped and one.grouped == one.reshaped(1, 2, 3)
    assert Window.of("w", torch.zeros(3, 2).t()) != one  # laid out in another order
    assert pickle.loads(pickle.dumps(one.grouped)) == one.grouped
