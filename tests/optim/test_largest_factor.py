"""Factors whose inverses would cost more than everything else are kept as their diagonals, and the report says so."""

import pytest
import torch

import kronfisher as kf
from kronfisher.fits.shapes import MAX_DIM
from kronfisher.optim import largest_factor as module


def language_model(words=300):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(words, 8), torch.nn.Tanh(), torch.nn.Linear(8, words))


def step(optimizer, model, words=300):
    x = torch.randint(words, (4, 5), generator=torch.Generator().manual_seed(optimizer.steps))
    return optimizer.step(lambda: model(x), (x + 1) % words)


def shapes(optimizer):
    (one,) = optimizer.parts.direction.inverses
    return tuple(factor.shape[1:] for factor in (one.inverse.A, one.inverse.B))


@pytest.fixture
def dear(monkeypatch):
    monkeypatch.setattr(module, "ALWAYS", 16)


def test_a_vocabulary_is_a_diagonal_and_the_advice_keeps_it_whole(dear):
    model = language_model()
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    step(optimizer, model)
    assert shapes(optimizer) == ((9, 9), (300,))
    (note,) = (line for line in str(optimizer.report()).splitlines() if "kept as its diagonal" in line)
    assert note.startswith("2.weight: the output factor of size 300") and "fit=kf.KFAC(max_dim=300)" in note
    whole = kf.NaturalGradient(model, kf.Categorical(), fit=kf.KFAC(max_dim=300))
    step(whole, model)
    assert shapes(whole) == ((9, 9), (300, 300))
    assert "diagonal" not in str(whole.report())


def test_resumed_training_keeps_the_diagonals_whatever_its_first_batch(dear, monkeypatch):
    model, again = language_model(), language_model()
    optimizer, other = (kf.NaturalGradient(m, kf.Categorical()) for m in (model, again))
    for _ in range(3):
        step(optimizer, model)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    monkeypatch.setattr(module, "ALWAYS", MAX_DIM)
    for _ in range(3):
        assert step(optimizer, model) == step(other, again)
    assert shapes(other) == ((9, 9), (300,))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_the_preconditioner_keeps_them_too(dear):
    model = language_model()
    preconditioner = kf.Preconditioner(model, kf.Categorical(class_dim=-1))
    x = torch.randint(300, (4, 5))
    torch.nn.functional.cross_entropy(preconditioner(x).flatten(0, 1), x.flatten()).backward()
    preconditioner.step()
    assert preconditioner.statistics.cuts


def test_networks_whose_factors_are_small_are_left_alone():
    model = language_model()
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    step(optimizer, model)
    assert shapes(optimizer) == ((9, 9), (300, 300))


def test_the_bound_grows_with_the_batch():
    capture = lambda rows: [(rows, 5000, 64, False)]  # noqa: E731
    bounds = []
    for rows in (16, 512, 10**5, 10**7):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "sizes_of_weights", capture)
            largest = module.largest_factor(rows)
            bounds.append((largest.factor, largest.outputs))
    assert bounds == [(1024, 512), (2048, 512), (MAX_DIM, 2048), (MAX_DIM, MAX_DIM)]


def test_wide_outputs_of_few_rows_are_diagonals_while_inputs_as_wide_are_matrices():
    model = torch.nn.Sequential(torch.nn.Linear(3, 600), torch.nn.Tanh(), torch.nn.Linear(600, 2))
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    optimizer.step(lambda: model(torch.randn(8, 3)), torch.arange(8) % 2)
    found = [tuple(f.shape[1:] for f in (one.inverse.A, one.inverse.B)) for one in optimizer.parts.direction.inverses]
    assert found == [((4, 4), (600,)), ((601, 601), (2, 2))]
    (note,) = optimizer.parts.statistics.cuts
    assert note.startswith("0.weight: the output factor of size 600") and "fit=kf.KFAC(max_dim=600)" in note
    state = optimizer.parts.statistics.state_dict()
    assert state["largest"] == [MAX_DIM, 512]
    assert module.Largest.of(MAX_DIM) == module.Largest.of(None) == module.Largest()  # as earlier versions saved it


def test_diagonals_of_outputs_are_applied_to_gradients_where_they_lie(monkeypatch):
    monkeypatch.setattr(module, "ALWAYS_OF_OUTPUTS", 8)
    monkeypatch.setattr(module, "PASSES_OF_OUTPUTS", 0.0)
    torch.manual_seed(0)
    model = torch.nn.Linear(12, 20).double()
    x, y = torch.randn(40, 12, dtype=torch.float64), torch.randn(40, 20, dtype=torch.float64)
    optimizer = kf.NaturalGradient(model, kf.Gaussian(), labels="exact")
    optimizer.step(lambda: model(x), y)
    (one,) = optimizer.parts.direction.inverses
    A, B = one.inverse.A[0], one.inverse.B[0]
    assert A.shape == (13, 13) and B.shape == (20,)
    gradients = {"weight": torch.randn(20, 12, dtype=torch.float64), "bias": torch.randn(20, dtype=torch.float64)}
    natural = optimizer.parts.direction.apply(gradients)
    expected = B[:, None] * torch.cat([gradients["weight"], gradients["bias"][:, None]], 1) @ A
    torch.testing.assert_close(torch.cat([natural["weight"], natural["bias"][:, None]], 1), expected)
    ((_, [(_, product)]),) = optimizer.parts.direction._groups
    assert product is not None  # without copies


def test_rows_of_a_table_are_no_factor(dear):
    model = torch.nn.Sequential(torch.nn.EmbeddingBag(300, 4), torch.nn.Linear(4, 3))
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    x = torch.randint(300, (20, 5))
    optimizer.step(lambda: model(x), torch.arange(20) % 3)
    assert optimizer.parts.statistics.tables == {"0.weight"} and not optimizer.parts.statistics.cuts
