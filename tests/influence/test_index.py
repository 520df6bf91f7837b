"""An index answers from stored coordinates, and its bounds hold against the exact scores."""

import pytest
import torch

import kronfisher as kf
from tests.helpers.close import close
from tests.helpers.networks import Tied, Transposed, images, perceptron

BUILT = {
    "perceptron": (lambda: perceptron(4, 6, 3, seed=1), (4,)),
    "convolutions": (images, (2, 4, 4)),
    "applied twice": (lambda: Tied().double(), (2, 4)),
}


def problem(name, fit, n=24, q=5):
    build, shape = BUILT[name]
    torch.manual_seed(2)
    model, x = build(), torch.randn(n + q, *shape).double()
    y = torch.randint(3, model(x).shape[:-1])
    train = [(x[k : k + 8], y[k : k + 8]) for k in range(0, n, 8)]
    fisher = kf.estimate(model, train, kf.Categorical(), fit=fit, labels="exact")
    return kf.Influence(model, fisher, kf.Categorical()), train, (x[n:], y[n:])


@pytest.mark.parametrize("fit", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("name", BUILT)
def test_all_coordinates_give_the_scores_and_some_stay_within_their_bounds(name, fit, tmp_path):
    influence, train, queries = problem(name, fit)
    exact = influence.scores(train, queries).values
    whole = influence.index(train, tmp_path / "whole", size=10**6)
    close(whole.scores(queries).values, exact, 1e-9)
    errors = []
    for size in (10, 30):
        some = influence.index(train, tmp_path / str(size), size=size)
        assert some.coordinates.shape == (24, size) and len(some) == 24
        found = some.scores(queries)
        assert bool(((found.values - exact).abs() <= found.bounds * (1 + 1e-9)).all())
        errors.append(float((found.values - exact).norm() / exact.norm()))
    assert errors[1] < errors[0] < 1
    logits = influence.scores(train, queries[0], measurement=("logit", 1)) if name != "applied twice" else None
    if logits is not None:
        close(whole.scores(queries[0], measurement=("logit", 1)).values, logits.values, 1e-9)


def test_an_index_goes_on_where_it_was_and_refuses_what_is_too_large_for_an_eigenbasis(tmp_path, monkeypatch):
    influence, train, queries = problem("perceptron", "kfac")
    path = tmp_path / "index"
    with pytest.raises(kf.NumericalError, match="batch 2"):
        influence.index([*train[:2], (train[2][0] * torch.nan, train[2][1])], path, size=30)
    before = path.read_bytes()
    index = influence.index(train, path, size=30)
    assert path.read_bytes()[: len(before)] == before and len(index) == 24
    close(
        index.scores(queries).values, influence.index(train, tmp_path / "other", size=30).scores(queries).values, 1e-12
    )
    with pytest.raises(kf.DataError, match=r"other settings \(size\)"):
        influence.index(train, path, size=31)
    monkeypatch.setattr("kronfisher.operators.operator.DENSE_LIMIT", 10)
    with pytest.raises(kf.UnsupportedError, match="choose a fit with such a basis, such as 'kfac'"):
        problem("perceptron", "full")[0].index(train, tmp_path / "full")
    with pytest.raises(ValueError, match="neither refine"):
        kf.Influence(influence.model, influence.fisher, kf.Categorical(), refine=1).index(train, path)


@pytest.mark.parametrize("fit", ["full", kf.Full(across_layers=True), "kfac", "ekfac", "kronecker-sum", "diagonal"])
def test_weights_in_two_roles_and_whole_blocks_are_stored_in_eigenvectors_that_are_written_out(fit, tmp_path):
    torch.manual_seed(4)
    model, x, y = Transposed().double(), torch.randint(6, (12, 3)), torch.randint(6, (12, 3))
    train, queries = [(x[:5], y[:5]), (x[5:], y[5:])], (x[:3], y[3:6])
    fisher = kf.estimate(model, train, kf.Categorical(), fit=fit, labels="exact")
    influence = kf.Influence(model, fisher, kf.Categorical(), damping=kf.Share(3))
    exact = influence.scores(train, queries).values
    close(influence.index(train, tmp_path / "whole", size=10**6).scores(queries).values, exact, 1e-9)
    found = influence.index(train, tmp_path / "some", size=10).scores(queries)
    assert bool(((found.values - exact).abs() <= found.bounds * (1 + 1e-9)).all())


@pytest.mark.parametrize("fit", ["kfac", "ekfac", "diagonal", "full", "gram"])
def test_a_matrix_of_zeros_has_an_index_without_coordinates(fit, tmp_path):
    model, y = torch.nn.Linear(4, 3, bias=False).double(), torch.randint(3, (7,))
    train, queries = [(torch.zeros(7, 4).double(), y)], (torch.randn(3, 4).double(), y[:3])
    fisher = kf.estimate(model, train, kf.Categorical(), fit=fit)
    influence = kf.Influence(model, fisher, kf.Categorical(), damping=0.1)
    index = influence.index(train, tmp_path / "index")
    found = index.scores(queries)
    assert index.coordinates.shape == (7, 0)
    assert torch.equal(found.values, influence.scores(train, queries).values) and not bool(found.bounds.any())
    with pytest.raises(kf.SingularError, match="Influence adds it"):
        kf.Influence(model, fisher, kf.Categorical()).index(train, tmp_path / "open").scores(queries)


def test_a_model_that_was_trained_since_is_refused_by_everything(tmp_path):
    influence, train, queries = problem("perceptron", "kfac")
    index = influence.index(train, tmp_path / "index")
    with torch.no_grad():
        next(influence.model.parameters()).add_(0.1)
    for ask in (
        lambda: influence.scores(train, queries),
        lambda: influence.self_scores(train),
        lambda: influence.gradients(queries),
        lambda: influence.index(train, tmp_path / "other"),
        lambda: index.scores(queries),
    ):
        with pytest.raises(kf.DataError, match="at other parameters than the model has now"):
            ask()
    assert not (tmp_path / "other").exists()
