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
    assert note.startswith("2.weight: the factor of size 300") and "fit=kf.KFAC(max_dim=300)" in note
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
    for rows in (16, 512, 10**6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "sizes_of_weights", capture)
            bounds.append(module.largest_factor(rows))
    assert bounds == [1024, 2048, MAX_DIM]


def test_rows_of_a_table_are_no_factor(dear):
    model = torch.nn.Sequential(torch.nn.EmbeddingBag(300, 4), torch.nn.Linear(4, 3))
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    x = torch.randint(300, (20, 5))
    optimizer.step(lambda: model(x), torch.arange(20) % 3)
    assert optimizer.parts.statistics.tables == {"0.weight"} and not optimizer.parts.statistics.cuts
