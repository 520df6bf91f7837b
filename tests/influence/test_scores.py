"""Scores against the dense matrix: ``∇mᵀ (F + λ)⁻¹ ∇ℓ / N`` with every gradient by automatic differentiation."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.fisher.layout import gather
from kronfisher.fisher.vectors import read
from kronfisher.fits import FITS
from kronfisher.influence.contractions import Apart
from kronfisher.influence.preconditioned import Queries
from kronfisher.influence.vectors import Vectors
from kronfisher.layers.activations import Dense
from kronfisher.layers.samples import Samples
from tests.conformance.examples import EXAMPLES
from tests.conformance.problems import problem
from tests.helpers.close import close
from tests.helpers.networks import Tied, Transposed, Written, images, normalised, perceptron
from tests.helpers.truth import gradients

BUILT = {
    "perceptron": (lambda: perceptron(4, 5, 3, seed=1), (4,)),
    "convolutions": (images, (2, 4, 4)),
    "normalised": (lambda: normalised().double(), (4,)),
    "applied twice, positions": (lambda: Tied().double(), (2, 4)),
    "looked up, positions": (lambda: looked_up().double(), (4,)),
}


def looked_up():
    """Tokens, whose sum over positions gives a lookup a factor that is no diagonal (`kfac-reduce`)."""
    table, head = nn.Embedding(6, 4), nn.Linear(4, 3)
    return Written(lambda m, x: m.head(m.table((9 * x.abs()).long() % 6).tanh().mean(1)), table=table, head=head)


def made(name, n=9, q=3):
    build, shape = BUILT[name]
    torch.manual_seed(2)
    model, x = build(), torch.randn(n + q, *shape).double()
    y = torch.randint(3, model(x).shape[:-1])
    return model, (x[:n], y[:n]), (x[n:], y[n:])


def losses(model, batch, likelihood=None):
    """``∇ℓ [N, P]``."""
    x, y = batch
    vectors = (likelihood or kf.Categorical()).observed(model(x).detach(), y)
    return gradients(model, x, vectors[None])[0]


def damped(fisher, values):
    """``F + λ`` written out, λ by the name of the block."""
    total = fisher.reduced("mean").to_dense()
    places, _ = read(torch.arange(fisher.dim), fisher.shapes)
    for (blocks, _), value in zip(fisher.entries, values.values(), strict=True):
        index = gather(blocks, places)[0]
        total[index, index] += value
    return total


def truth(model, fisher, influence, train, queries):
    rows = losses(model, queries)
    return rows @ torch.linalg.solve(damped(fisher, influence.damping), losses(model, train).T) / fisher.count


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("name", BUILT)
def test_scores_are_those_of_the_dense_matrix_and_indefinite_sums_are_refused(name, fit):
    model, train, queries = made(name)
    fisher = kf.estimate(model, [train], kf.Categorical(), fit=fit, labels="exact")
    influence = kf.Influence(model, fisher, kf.Categorical())
    batches = [tuple(t[:5] for t in train), tuple(t[5:] for t in train)]
    if torch.linalg.eigvalsh(damped(fisher, influence.damping))[0] < 0:
        assert fit in ("kronecker-sum", "kfac-corrected")
        with pytest.raises(kf.IndefiniteError, match="indefinite"):
            influence.scores(batches, queries)
        with pytest.raises(kf.IndefiniteError, match="indefinite"):
            influence.self_scores(batches)
        influence = kf.Influence(model, fisher, kf.Categorical(), damping=kf.Share(3))  # as the message advises
    expected = truth(model, fisher, influence, train, queries)
    assert expected.abs().max() > 1e-4
    close(influence.scores(batches, [queries]).values, expected, 1e-10)
    rows = losses(model, train)
    own = (rows * torch.linalg.solve(damped(fisher, influence.damping), rows.T).T).sum(1) / fisher.count
    close(influence.self_scores(batches), own, 1e-10)


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_use_of_a_weight_is_scored(example):
    p = problem(example, "gaussian-variances")
    fisher = kf.estimate(p.model, p.batch, p.likelihood, fit="kfac", labels="exact")
    influence = kf.Influence(p.model, fisher, p.likelihood, damping=0.1)
    rows = p.gradients("observed")[0]
    expected = rows @ torch.linalg.solve(damped(fisher, influence.damping), rows.T) / fisher.count
    close(influence.scores(p.batch, p.batch).values, expected, 1e-10)
    close(influence.self_scores(p.batch), expected.diagonal(), 1e-10)


def exact(model, train, likelihood=None, **options):
    likelihood = likelihood or kf.Categorical()
    fisher = kf.estimate(model, [train], likelihood, fit="ekfac", labels="exact")
    return fisher, kf.Influence(model, fisher, likelihood, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_sum_gives_the_scores_of_the_mean(reduction):
    model, train, queries = made("perceptron")
    fisher = kf.estimate(model, [train], kf.Categorical(), labels="exact", reduction=reduction)
    influence = kf.Influence(model, fisher, kf.Categorical(), damping=0.01)
    close(influence.scores(train, queries).values, truth(model, fisher, influence, train, queries))


def margin(outputs, targets):
    others = outputs.softmax(-1).gather(-1, targets[:, None])[:, 0]
    return (others / (1 - others)).log()


MEASURES = {
    "margin": ("margin", margin),
    "logit": ("logit", lambda outputs, targets: outputs.gather(-1, targets[:, None])[:, 0]),
    "logit of a class": (("logit", 2), lambda outputs, targets: outputs[:, 2]),
    "function": (lambda outputs, targets: outputs.sin().sum(-1), lambda outputs, targets: outputs.sin().sum(-1)),
    "in place": (lambda outputs, targets: outputs.sin_().sum(-1), lambda outputs, targets: outputs.sin().sum(-1)),
}


@pytest.mark.parametrize("name", MEASURES)
def test_measurements_of_the_outputs(name):
    measurement, function = MEASURES[name]
    model, train, queries = made("perceptron")
    fisher, influence = exact(model, train)
    outputs = model(queries[0]).detach().requires_grad_()
    (vectors,) = torch.autograd.grad(function(outputs, queries[1]).sum(), outputs)
    rows = gradients(model, queries[0], vectors[None])[0]
    expected = rows @ torch.linalg.solve(damped(fisher, influence.damping), losses(model, train).T) / fisher.count
    close(influence.scores(train, queries, measurement=measurement).values, expected)
    if name in ("margin", "logit"):
        with pytest.raises(kf.DataError, match="needs the targets"):
            influence.scores(train, queries[0], measurement=measurement)
    else:
        close(influence.scores(train, queries[0], measurement=measurement).values, expected)


@pytest.mark.parametrize("measurement", ["margin", "logit"])
def test_measurements_of_binary_targets(measurement):
    model, x = perceptron(4, 5, 1, seed=1), torch.randn(9, 4).double()
    y = (torch.rand(9, 1) > 0.5).double()
    _, influence = exact(model, (x, y), kf.Bernoulli())

    def function(outputs, targets):
        return (outputs * (2 * targets - 1 if measurement == "margin" else targets)).sum(1)

    found = influence.scores((x, y), (x, y), measurement=measurement).values
    close(found, influence.scores((x, y), (x, y), measurement=function).values)


def test_a_measurement_that_is_none_is_refused():
    model, train, queries = made("perceptron")
    _, influence = exact(model, train)
    with pytest.raises(ValueError, match="use 'loss'"):
        influence.scores(train, queries, measurement="accuracy")
    with pytest.raises(kf.DataError, match="one number for each of the 3 queries"):
        influence.scores(train, queries, measurement=lambda outputs, targets: outputs)
    with pytest.raises(ValueError, match=r"\(outputs\): it is called with \(outputs, targets\)"):
        influence.scores(train, queries, measurement=lambda outputs: outputs.sum(1))
    with pytest.raises(kf.DataError, match="has 3 of them"):
        influence.scores(train, queries, measurement=("logit", 3))
    with pytest.raises(kf.DataError, match="does not depend on the outputs"):
        influence.scores(train, queries, measurement=lambda outputs, targets: torch.ones(len(outputs)).requires_grad_())
    with pytest.raises(kf.DataError, match="not by operators that have a derivative"):
        influence.scores(train, queries, measurement=lambda outputs, targets: (outputs.argmax(-1) == targets).double())
    with pytest.raises(kf.DataError, match="mixes the queries of a batch"):
        influence.scores(train, queries, measurement=lambda outputs, targets: outputs[:, 0] / outputs.norm())
    numbers = perceptron(4, 5, 3, seed=1)
    _, other = exact(numbers, (train[0], torch.randn(9, 3).double()), kf.Gaussian())
    with pytest.raises(kf.UnsupportedError, match="Gaussian has no classes"):
        other.scores((train[0], torch.randn(9, 3).double()), queries, measurement="margin")


def test_damping_is_a_number_a_share_or_either_by_block():
    model, train, _ = made("perceptron")
    fisher, influence = exact(model, train)
    means = {name: float(operator.trace()) / operator.dim for name, operator in fisher.blocks.items()}
    assert influence.damping == pytest.approx({name: 0.1 * mean for name, mean in means.items()})
    _, influence = exact(model, train, damping={"0.*": 0.5, "*": kf.Share(2)})
    assert influence.damping == pytest.approx({"0.weight": 0.5, "2.weight": 2 * means["2.weight"]})
    for damping, message in (
        (-1.0, "at least 0"),
        ({"0.*": 1.0}, "no pattern matches 2.weight"),
        ({"*": 1.0, "9.*": 1.0}, r"\['9.\*'\] match no block"),
    ):
        with pytest.raises(ValueError, match=message):
            exact(model, train, damping=damping)
    _, undamped = exact(model, train, damping=0.0)
    for ask in (undamped.scores, lambda *data: undamped.self_scores(data[0])):
        with pytest.raises(kf.SingularError, match=r"Add damping.*λ was 0 here; give damping=\{'[02].weight': λ"):
            ask(train, train)


def test_normalised_scores_are_cosines_or_relative_to_the_self_scores():
    model, train, queries = made("applied twice, positions")
    fisher, influence = exact(model, train)
    inner = torch.linalg.inv(damped(fisher, influence.damping)) / fisher.count
    rows, asked = losses(model, train), losses(model, queries)
    mine, theirs = ((each @ inner * each).sum(1).sqrt() for each in (rows, asked))
    plain = asked @ inner @ rows.T
    cosine = exact(model, train, normalize="cosine")[1]
    close(cosine.scores(train, queries).values, plain / mine / theirs[:, None])
    close(cosine.scores(train, train).values.diagonal(), torch.ones(9).double())
    close(exact(model, train, normalize="relative")[1].scores(train, queries).values, plain / mine)


def test_parts_of_scores_by_block_group_and_position_add_up():
    model, train, queries = made("applied twice, positions")
    fisher = kf.estimate(model, [train], kf.Categorical(), fit=kf.Full(across_layers=True), labels="exact")
    influence = kf.Influence(model, fisher, kf.Categorical())
    plain = influence.scores(train, queries)
    by_block = influence.scores(train, queries, per="block")
    assert by_block.names == ("head.weight", "layer.weight") and by_block.values.shape == (3, 9, 2)
    close(by_block.total, plain.values)
    by_group = influence.scores(train, queries, per="group")
    assert by_group.names == tuple(fisher.blocks) and by_group.values.shape == (3, 9, 1)
    close(by_group.total, plain.values)
    solved = torch.linalg.solve(damped(fisher, influence.damping), losses(model, queries).T).T / fisher.count
    kept = torch.cat([torch.full((p.numel(),), name.startswith("head")) for name, p in model.named_parameters()])
    close(by_block.values[..., 0], (solved * kept) @ losses(model, train).T)


def test_positions_of_training_examples():
    build = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 7, 4).double(), torch.randint(3, (6, 7))
    y[1:, 5:] = -100
    _, influence = exact(build, (x, y))
    scores = influence.scores([(x[:2], y[:2]), (x[2:, :6], y[2:, :6])], (x[:3], y[:3]), per="position")
    assert scores.values.shape == (3, 6, 7)
    close(scores.total, influence.scores((x, y), (x[:3], y[:3])).values)
    assert not scores.values[:, 1:, 5:].any()  # ignored: here positions do not act on each other
    alone = y.clone()
    alone[:, :2] = alone[:, 3:] = -100  # one position is all that is left
    close(scores.values[:, :, 2], influence.scores((x, alone), (x[:3], y[:3])).values)
    pooled, train, queries = made("convolutions")
    with pytest.raises(kf.DataError, match="needs the same positions in all layers"):
        exact(pooled, train)[1].scores(train, queries, per="position")
    fisher = kf.estimate(pooled, [train], kf.Categorical(), fit=kf.Full(across_layers=True), labels="exact")
    for normalize in (None, "cosine"):  # blocks that F treats together are read together
        influence = kf.Influence(pooled, fisher, kf.Categorical(), normalize=normalize)
        with pytest.raises(kf.DataError, match="needs the same positions in all layers"):
            influence.scores(train, queries, per="position")


class Mixed(nn.Module):
    """Layers, a normalisation, a scale and a table by position; positions act on each other."""

    def __init__(self):
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(3, 5))
        self.gain, self.shift, self.slope = (nn.Parameter(torch.randn(5)) for _ in range(3))
        self.table = nn.Parameter(torch.randn(9, 5))
        self.double()

    def forward(self, x):
        inner = (x @ self.weight.T + self.table[1 : 1 + x.shape[1]]).cumsum(1)
        inner = torch.nn.functional.layer_norm(inner, (5,), self.gain, self.shift)
        return (torch.nn.functional.linear(inner.tanh() * self.slope, self.out)).flip(1).cumsum(1)

    def apart(self, x, own):
        """The outputs of one example ``[T, I]`` if every position had parameters of its own ``[T, ...]``."""
        rows = torch.stack([table[1 + t] for t, table in enumerate(own["table"])])
        inner = (torch.einsum("ti,toi->to", x, own["weight"]) + rows).cumsum(0)
        inner = torch.nn.functional.layer_norm(inner, (5,)) * own["gain"] + own["shift"]
        return torch.einsum("ti,toi->to", inner.tanh() * own["slope"], own["out"]).flip(0).cumsum(0)


@pytest.mark.parametrize("normalize", [None, "cosine", "relative"])
def test_positions_of_normalisations_and_scales_are_those_of_parameters_of_their_own(normalize):
    torch.manual_seed(5)
    model, x, y = Mixed(), torch.randn(6, 7, 4).double(), torch.randint(3, (6, 7))
    queries = x[:3], y[:3]
    fisher = kf.estimate(model, [(x, y)], kf.Categorical(), fit=kf.Full(across_layers=False), labels="exact")
    influence = kf.Influence(model, fisher, kf.Categorical(), normalize=normalize)
    scores = influence.scores([(x[:4], y[:4]), (x[4:], y[4:])], queries, per="position")
    assert scores.values.shape == (3, 6, 7) and not scores.fallback
    close(scores.total, influence.scores((x, y), queries).values)
    if normalize:
        return
    solved = torch.linalg.solve(damped(fisher, influence.damping), losses(model, queries).T).T / fisher.count
    own = {name: p.detach().expand(7, *p.shape) for name, p in model.named_parameters()}
    for k in range(6):
        loss = lambda own, k=k: nn.functional.cross_entropy(model.apart(x[k], own), y[k], reduction="sum")  # noqa: E731
        found = torch.func.grad(loss)(own)
        rows = torch.cat([found[name].flatten(1) for name in fisher.shapes], dim=1)  # [T, P]
        close(scores.values[:, k], solved @ rows.T)


def test_ignored_positions_and_masks_give_the_gradient_of_what_counts():
    model, (x, y), queries = made("applied twice, positions")
    y[:4, 1] = -100
    y[5] = -100
    fisher, influence = exact(model, (x, y))
    assert fisher.count == 8
    close(influence.scores((x, y), queries).values, truth(model, fisher, influence, (x, y), queries))
    assert not influence.scores((x, y), queries).values[:, 5].any()
    mask, full = y != -100, y.clamp_min(0)
    masked = kf.estimate(
        model, [(x, full)], kf.Categorical(), fit="ekfac", labels="exact", mask=lambda batch: batch[1] < 3
    )
    by_mask = kf.Influence(model, masked, kf.Categorical(), damping=0.1, mask=lambda batch: mask)
    plain = kf.Influence(model, masked, kf.Categorical(), damping=0.1)
    close(
        by_mask.scores((x, full), queries, measurement=("logit", 1)).values,
        plain.scores((x, y), queries, measurement=("logit", 1)).values,
    )


def test_a_sum_whose_spectrum_was_changed_on_request_is_scored():
    model, train, queries = made("perceptron", n=40)
    fit = {"0.*": kf.KroneckerSum(2), "*": "kfac"}
    fisher = kf.estimate(model, [train], kf.Categorical(), fit=fit, labels="exact").clamped()
    influence = kf.Influence(model, fisher, kf.Categorical())
    close(influence.scores(train, queries).values, truth(model, fisher, influence, train, queries), 1e-9)
    with pytest.raises(kf.DataError, match=r"changed since its estimate \(\+ 1\)"):
        kf.Influence(model, fisher + 1.0, kf.Categorical())


@pytest.mark.parametrize("fit", ["kfac", "full", "diagonal"])
def test_a_weight_in_two_roles_needs_no_per_example_gradients(fit):
    model, x, y = Transposed().double(), torch.randint(6, (7, 3)), torch.randint(6, (7, 3))
    fisher = kf.estimate(model, [(x, y)], kf.Categorical(), fit=fit, labels="exact")
    influence = kf.Influence(model, fisher, kf.Categorical())
    scores = influence.scores((x, y), (x[:2], y[:2]))
    close(scores.values, truth(model, fisher, influence, (x, y), (x[:2], y[:2])))
    assert not scores.fallback
    rows = losses(model, (x, y))
    own = (rows * torch.linalg.solve(damped(fisher, influence.damping), rows.T).T).sum(1) / fisher.count
    close(influence.self_scores((x, y)), own)


@pytest.mark.parametrize("fit", ["kfac", "gram", "block-tridiagonal", kf.Full(across_layers=True)])
def test_gradients_and_refined_scores_under_operators_of_one_block_and_of_several(fit):
    model, train, queries = made("perceptron", n=40)
    fisher = kf.estimate(model, [train], kf.Categorical(), fit=fit, labels="exact")
    influence = kf.Influence(model, fisher, kf.Categorical(), damping=0.1, refine=fisher.dim)
    found = influence.gradients(queries)
    rows = torch.cat([found[name].flatten(1) for name, _ in model.named_parameters()], dim=1)
    close(rows, losses(model, queries))
    exact = kf.estimate(model, [train], kf.Categorical(), fit=kf.Full(across_layers=True), labels="exact")
    scores = influence.scores([train], queries)
    close(scores.values, truth(model, exact, kf.Influence(model, exact, kf.Categorical(), damping=0.1), train, queries))
    assert scores.residuals.max() < 1e-8


class Unknown(torch.nn.Module):
    """A weight made of a weight."""

    def __init__(self):
        super().__init__()
        self.first, self.weight = torch.nn.Linear(4, 4), torch.nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return self.first(x).tanh() @ self.weight.sin().T


def test_what_falls_back_is_scored_and_named():
    model, x, y = Unknown().double(), torch.randn(7, 4).double(), torch.randint(3, (7,))
    fisher, influence = exact(model, (x, y))
    scores = influence.scores([(x[:4], y[:4]), (x[4:], y[4:])], (x[:2], y[:2]))
    close(scores.values, truth(model, fisher, influence, (x, y), (x[:2], y[:2])))
    assert set(scores.fallback) == {"weight"}


def test_coupled_examples_are_refused_and_leave_the_model_as_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 4).double(), torch.randint(3, (7,))
    fisher, influence = exact(model.eval(), (x, y))
    close(influence.scores((x, y), (x, y)).values, truth(model, fisher, influence, (x, y), (x, y)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(kf.UnsupportedError, match="couples the examples"):
        kf.Influence(model.train(), fisher, kf.Categorical()).scores((x, y), (x, y))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("fit", ["kfac", "ekfac", "diagonal", "full", "gram"])
@pytest.mark.parametrize("positions", [(), (3,)])
def test_a_weight_that_is_never_moved_takes_no_part(tmp_path, fit, positions):
    """A layer of dead units has a block of zeros, and so is a share of it."""
    torch.manual_seed(4)
    model = Written(
        lambda m, x: m.o((m.dead(x) - 99).relu() + m.live(x).tanh()),
        dead=nn.Linear(3, 4), live=nn.Linear(3, 4), o=nn.Linear(4, 2),
    ).double()  # fmt: skip
    batch = torch.randn(8, *positions, 3).double(), torch.randint(2, (8, *positions))
    fisher = kf.estimate(model, [batch], kf.Categorical(), fit=fit, labels="exact")
    influence, rows = kf.Influence(model, fisher, kf.Categorical()), losses(model, batch)
    matrix = damped(fisher, influence.damping)
    inner = rows @ torch.linalg.pinv(matrix, rtol=1e-12, hermitian=True) @ rows.T / fisher.count
    close(influence.scores(batch, batch).values, inner, 1e-9)
    close(influence.self_scores(batch), inner.diagonal(), 1e-9)
    for name, scale in (("cosine", inner.diagonal()[:, None].sqrt()), ("relative", 1.0)):
        found = kf.Influence(model, fisher, kf.Categorical(), normalize=name).scores(batch, batch).values
        close(found, inner / inner.diagonal().sqrt() / scale, 1e-9)
    if fit != "gram":
        close(influence.index([batch], tmp_path / "index", size=200).scores(batch).values, inner, 1e-6)


@pytest.mark.parametrize("fit", [kf.Full(across_layers=True), "block-tridiagonal", "kfac"])
def test_parameters_that_the_training_data_do_not_use_are_tied_to_others(fit):
    """One operator covers both branches; data that take one of them have gradients of zero in the other."""
    torch.manual_seed(3)
    model = Written(
        lambda m, x: m.o((m.a if x[0, 0] > 0 else m.b)(x).tanh()),
        a=nn.Linear(3, 3), b=nn.Linear(3, 3), o=nn.Linear(3, 2),
    ).double()  # fmt: skip
    batches = [(torch.randn(6, 3).double(), torch.randint(2, (6,))) for _ in range(2)]
    for (x, _), sign in zip(batches, (1, -1), strict=True):
        x[:, 0] = sign * x[:, 0].abs()
    if fit == "block-tridiagonal":
        with pytest.raises(kf.UnsupportedError):
            kf.estimate(model, batches, kf.Categorical(), fit=fit)
        return
    fisher = kf.estimate(model, batches, kf.Categorical(), fit=fit, labels="exact")
    influence = kf.Influence(model, fisher, kf.Categorical())
    for batch in batches:
        rows = losses(model, batch)
        expected = (rows * torch.linalg.solve(damped(fisher, influence.damping), rows.T).T).sum(1) / fisher.count
        close(influence.self_scores([batch]), expected, 1e-10)


@pytest.mark.parametrize("fit", ["ekfac", "full", kf.Full(across_layers=True)])
def test_queries_are_found_whatever_the_batches_and_blocks_before_needed(fit):
    """Products with written out gradients rearrange queries in place; one position does not, nor do other blocks."""
    torch.manual_seed(6)

    def forward(m, x):
        other = x.sin() @ m.l.weight if x[0, 0, 0] < 0 else 0
        inner = m.l(x).tanh() + other
        if x[0, 0, 1] < 0:
            inner = torch.cat([nn.functional.linear(x, m.l.weight[k : k + 2], m.l.bias[k : k + 2]) for k in (0, 2)], -1)
        return m.o(inner.tanh())

    model = Written(forward, l=nn.Linear(4, 4), o=nn.Linear(4, 3)).double()
    forms = {"whole": (1, 1), "two roles": (-1, 1), "slices": (1, -1)}
    batches = {
        (form, length): (torch.randn(4, length, 4).double(), torch.randint(3, (4, length)))
        for form in forms
        for length in (5, 1)
    }
    for (form, _), (x, _) in batches.items():
        x[:, 0, :2] = x[:, 0, :2].abs() * torch.tensor(forms[form])
    queries = batches["whole", 5]
    fisher = kf.estimate(model, [queries], kf.Categorical(), fit=fit, labels="exact")
    influence = kf.Influence(model, fisher, kf.Categorical(), damping=0.1)
    for form in forms:
        data = [batches[form, length] for length in (5, 1, 5)]
        expected = torch.cat([truth(model, fisher, influence, batch, queries) for batch in data], dim=1)
        for options in ({}, {"per": "block"}, {"rank": 5}):
            close(influence.scores(data, queries, **options).total, expected, 1e-10)
    other = kf.estimate(model, [batches["two roles", 5]], kf.Categorical(), fit="diagonal")
    vectors = Vectors.of_rows(fisher, influence.gradients(queries))
    solved, plain = Queries(vectors), Queries(Vectors.of_rows(fisher, influence.gradients(queries)))
    uses = Samples(Dense(torch.randn(1, 3, 5, 4).double(), bias=True), torch.randn(1, 3, 5, 4).double())
    mine = next(block for blocks, _ in fisher.entries for block in blocks if block.name == "l.weight")
    assert isinstance(solved.for_products(mine, uses), Apart)
    for (block,), _ in other.entries:
        close(solved.of(block), plain.of(block))
