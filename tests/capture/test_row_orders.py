"""Whose row is it: wherever the data lie, sums per datum are exact; where data are mixed, they are refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kronfisher as kf
from kronfisher.capture import inner_product
from kronfisher.errors import UnsupportedError
from kronfisher.fisher.layout import gather
from kronfisher.fisher.vectors import read
from kronfisher.layers import Probe, RowOrder
from tests.helpers.checks import assert_exact
from tests.helpers.networks import Written
from tests.helpers.truth import exact_fisher

N = 5
ORDER = torch.tensor([3, 1, 4, 0, 2])


# Layouts: data → the shape in which a layer sees them, and back.
LAYOUTS = {
    "data first": (lambda x: x, lambda y, n: y),
    "sequence first": (lambda x: x.transpose(0, 1), lambda y, n: y.transpose(0, 1)),
    "flat, data major": (lambda x: x.flatten(0, 1), lambda y, n: y.unflatten(0, (n, -1))),
    "flat, time major": (
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda y, n: y.unflatten(0, (-1, n)).transpose(0, 1),
    ),
    "groups beside data": (
        lambda x: x.transpose(0, 1).repeat_interleave(2, dim=1),
        lambda y, n: y.unflatten(1, (n, 2)).sum(2).transpose(0, 1),
    ),
    "groups around data": (
        lambda x: x.transpose(0, 1).repeat(1, 2, 1),
        lambda y, n: y.unflatten(1, (2, n)).sum(1).transpose(0, 1),
    ),
    "permuted": (lambda x: x[ORDER], lambda y, n: y[ORDER.argsort()]),
    "permuted, sequence first": (lambda x: x[ORDER].transpose(0, 1), lambda y, n: y.transpose(0, 1)[ORDER.argsort()]),
    "in the middle": (lambda x: x.unsqueeze(1).transpose(0, 2), lambda y, n: y.transpose(0, 2).squeeze(1)),
}


@pytest.mark.parametrize("positions", [3, N, 2 * N], ids=lambda t: f"T={t}")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fit", ["full", "diagonal"])
def test_layouts(layout, positions, fit):
    to, back = LAYOUTS[layout]
    model = Written(
        lambda m, x: back(m.l1(m.norm(m.l0(to(x)).tanh()) * m.gain + m.shift), len(x)).sum(1),
        l0=nn.Linear(3, 4), norm=nn.LayerNorm(4), l1=nn.Linear(4, 2), gain=torch.rand(()) + 1, shift=torch.randn(4),
    )  # fmt: skip
    assert_exact(model, torch.randn(N, positions, 3), fit=fit)


@pytest.mark.parametrize("positions", [3, N])
@pytest.mark.parametrize("layout", ["flat, data major", "flat, time major"])
def test_frames_of_a_video(layout, positions):
    to, back = LAYOUTS[layout]
    model = Written(
        lambda m, x: back(m.norm(m.c(to(x))).tanh(), len(x)).flatten(1), c=nn.Conv1d(2, 3, 2), norm=nn.GroupNorm(3, 3)
    )
    assert_exact(model, torch.randn(N, positions, 2, 3))


@pytest.mark.parametrize("tokens, channels", [(4, 6), (N, 6), (4, N), (N, N), (2 * N, N)])
def test_a_mixer_transposes_between_layers(tokens, channels):
    model = Written(
        lambda m, x: m.ch((m.tok(x.transpose(1, 2)).tanh()).transpose(1, 2)).sum(1),
        tok=nn.Linear(tokens, tokens), ch=nn.Linear(channels, 2),
    )  # fmt: skip
    assert_exact(model, torch.randn(N, tokens, channels), fit={"*.bias": "diagonal", "*": "full"})


@pytest.mark.parametrize("size", [1, 2, N, 40])
@pytest.mark.parametrize("features", [3, N, 40])
def test_batch_sizes_that_equal_other_sizes(size, features):
    model = Written(
        lambda m, x: m.l1(m.l0(x).tanh() * m.gain).sum(1),
        l0=nn.Linear(features, 4), l1=nn.Linear(4, 2), gain=torch.rand(4),
    )  # fmt: skip
    x = torch.randn(size, 3, features)
    fisher = assert_exact(model, x, fit="diagonal", tolerance=1e-4)
    parts = kf.estimate(model, [x[:1], x[1:]] if size > 1 else x, kf.Gaussian(), fit="diagonal", labels="exact")
    assert torch.allclose(parts.to_dense(), fisher.to_dense(), rtol=1e-4)


def test_tied_uses_in_different_layouts():
    """Samples of several uses are joined by datum: a mistaken order would mix strangers."""
    model = Written(
        lambda m, x: m.l(x).sum(1) + m.l(x[ORDER]).tanh().sum(1)[ORDER.argsort()] + m.l(x.transpose(0, 1)).sin().sum(0),
        l=nn.Linear(3, 2),
    )
    assert_exact(model, torch.randn(N, N, 3))
    assert_exact(model, torch.randn(N, 2, 3), fit="diagonal")


def test_across_layers_in_different_layouts():
    model = Written(
        lambda m, x: m.l2(m.l1(m.l0(x.transpose(0, 1)).tanh()).transpose(0, 1)[ORDER]).sum(1)[ORDER.argsort()],
        l0=nn.Linear(3, 3), l1=nn.Linear(3, 3), l2=nn.Linear(3, 2),
    )  # fmt: skip
    assert_exact(model, torch.randn(N, N, 3), fit=kf.Full(across_layers=True))


def test_a_datum_may_use_inputs_of_its_neighbours():
    """No row is shared: the layer is called for them again."""
    assert_exact(Written(lambda m, x: m.l(x) + m.l(x.roll(1, 0)).tanh(), l=nn.Linear(3, 2)), torch.randn(N, 3))


def test_an_order_that_changes_from_batch_to_batch():
    """Sorted by length, say: a permutation found once must not be used again."""
    model = Written(
        lambda m, x: (lambda order: (m.l(x[order]) + m.l(x).tanh()[order])[order.argsort()])(x[:, 0].argsort()),
        l=nn.Linear(3, 2),
    )
    assert_exact(model, [torch.randn(N, 3) for _ in range(3)])


def test_rules_do_not_outlive_what_they_were_found_for():
    """The same model may be used in another way the next time."""
    model = Written(
        lambda m, x: m.l1((lambda h: h - h.mean(m.axis, keepdim=True))(m.l0(x))), l0=nn.Linear(3, 3), l1=nn.Linear(3, 2)
    )
    x = torch.randn(N, 3)
    model.axis = 1
    assert_exact(model, x)
    model.axis = 0
    with pytest.raises(kf.UnsupportedError, match="several examples"):
        kf.estimate(model, x, kf.Gaussian(), fit="full")
    layer, sequences = nn.Linear(3, 2), torch.randn(N, 2 * N, 3)
    for axis in (1, 0):
        data = sequences if axis else sequences.transpose(0, 1)
        pooled = kf.estimate(
            layer,
            data,
            kf.Gaussian(),
            fit="full",
            labels="exact",
            forward=lambda m, x, a=axis: (m(x).tanh().sum(a), None),
        )
        truth = exact_fisher(Written(lambda m, x: m.l(x).tanh().sum(1), l=layer), sequences)
        assert (pooled.to_dense().double() - truth).norm() < 1e-5 * truth.norm()


def test_one_position_does_not_show_how_several_lie():
    """Flattened by time or by datum is the same for sequences of one; the next batch has longer ones."""
    to, back = LAYOUTS["flat, time major"]
    model = Written(lambda m, x: back(m.l(to(x)).tanh(), len(x)).sum(1), l=nn.Linear(3, 2))
    assert_exact(model, [torch.randn(N, 1, 3), torch.randn(N, 3, 3), torch.randn(N, N, 3), torch.randn(2, 1, 3)])


def test_no_positions_at_all():
    model = Written(lambda m, x: m.l(x).tanh().sum(1) + m.b, l=nn.Linear(3, 2), b=torch.randn(2))
    long, short = torch.randn(N, 3, 3), torch.randn(N, 0, 3)
    assert_exact(model, [short, long, short])
    for fit in ("kfac", "ekfac", "kfac-reduce", "diagonal"):
        some = kf.estimate(model, [(short,), (long,)], kf.Gaussian(), fit=fit, labels="exact")
        alone = kf.estimate(model, long, kf.Gaussian(), fit=fit, labels="exact")
        assert torch.allclose(some["l.weight"].to_dense(), alone["l.weight"].to_dense() / 2, atol=1e-5)
        assert kf.estimate(model, short, kf.Gaussian(), fit=fit)["l.weight"].trace() == 0


def test_dead_rows_say_nothing_and_do_no_harm():
    dead = Written(lambda m, x: m.l1((m.l0(x) - 1.2).relu()).sum(1), l0=nn.Linear(3, 4), l1=nn.Linear(4, 2))
    for positions in (2, 9):
        assert_exact(dead, torch.randn(9, positions, 3))
    silent = Written(lambda m, x: m.l1((m.l0(x) - 100).relu()).sum(1), l0=nn.Linear(3, 4), l1=nn.Linear(4, 2))
    fisher = assert_exact(silent, torch.randn(9, 9, 3))
    assert fisher["l0.weight"].trace() == 0 < fisher["l1.weight"].trace()


def test_a_layer_that_wakes_up_later():
    """Nothing may be concluded about the layout from a batch in which a layer was dead."""
    model = Written(lambda m, x: (m.l0(x.transpose(0, 1)) * m.open).sum(0), l0=nn.Linear(3, 2), open=torch.ones(()))
    model.function = lambda m, x: m.l0(x.transpose(0, 1)).mul(x.sum() > 0).sum(0) + m.open
    x = torch.randn(4, 4, 3)
    assert_exact(model, [x - 10, x + 10, x + 11])


def test_zero_initialised_branches():
    gated = Written(
        lambda m, x: m.l1(x + m.gate * m.l0(x)), l0=nn.Linear(3, 3), l1=nn.Linear(3, 2), gate=torch.zeros(())
    )
    fisher = assert_exact(gated, torch.randn(N, 3))
    assert fisher["l0.weight"].trace() == 0 < fisher["gate"].trace()


def coupled(kind):
    if kind == "centred":
        return lambda m, x: m.l1((lambda h: h - h.mean(0))(m.l0(x)))
    if kind == "slightly":
        return lambda m, x: m.l1((lambda h: h - 0.05 * h.mean(0))(m.l0(x)))
    if kind == "normalised":
        return lambda m, x: m.l1(F.normalize(m.l0(x), dim=0))
    if kind == "attention":
        return lambda m, x: m.l1(F.scaled_dot_product_attention(*[m.l0(x)[None]] * 3)[0])
    if kind == "rolled and added":
        return lambda m, x: m.l1((lambda h: h + h.roll(1, 0))(m.l0(x)))
    raise ValueError(kind)


KINDS = ["centred", "slightly", "normalised", "attention", "rolled and added"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit", ["kfac", "ekfac", "diagonal", "full", "kfac-reduce"])
def test_coupled_data_are_refused(kind, fit):
    model = Written(coupled(kind), l0=nn.Linear(3, 3), l1=nn.Linear(3, 2))
    x = torch.randn(N, 3)
    with pytest.raises(kf.UnsupportedError, match=r"(?s)l0\.weight \(used by linear\).*several examples"):
        kf.estimate(model, x, kf.Gaussian(), fit=fit)
    with pytest.raises(kf.UnsupportedError, match=r"(?s)l0\.weight \(used by linear\).*several examples"):
        kf.coverage(model, x, fit=fit)
    assert kf.estimate(model, x[:1], kf.Gaussian(), fit=fit).trace() >= 0  # a single datum is coupled to nobody


@pytest.mark.parametrize("rows", [N, 3])
def test_layers_that_meet_no_data_compute_weights(rows):
    """Rows of a table that is made by a layer belong to all data, yet data are not coupled."""

    def forward(m, x):
        return m.l1(x + m.l0(torch.linspace(-1, 1, 3 * rows).view(rows, 3)).mean(0))

    model = Written(forward, l0=nn.Linear(3, 3), l1=nn.Linear(3, 2))
    assert_exact(model, torch.randn(N, 3), fit=kf.Full(across_layers=True))
    assert kf.coverage(model, torch.randn(N, 3)).complete


def test_a_convolution_along_the_data():
    sums = nn.Conv1d(3, 2, 2)  # a convolution along the data
    along = Written(lambda m, x: F.pad(m.c(x.t()[None])[0].t(), (0, 0, 0, 1)), c=sums)
    with pytest.raises(kf.UnsupportedError, match=r"c\.weight \(used by conv1d\).*several examples"):
        kf.estimate(along, torch.randn(N, 3), kf.Gaussian(), fit="kfac")


def packed(m, x):
    """Sequences of lengths 1 … n in one long axis, as packed batches have them."""
    rows = m.l(torch.cat([x[k, : k + 1] for k in range(len(x))])).tanh()
    return torch.stack([part.sum(0) for part in rows.split(list(range(1, len(x) + 1)))])


def test_unequal_numbers_of_rows():
    model, x = Written(packed, l=nn.Linear(3, 2)), torch.randn(N, N, 3)
    kf.estimate(model, x, kf.Gaussian(), fit="diagonal", strict=True)
    for fit in ("diagonal", "full", kf.Full(across_layers=True)):
        assert_exact(model, x, fit=fit)
    rows = torch.cat([x[k, : k + 1] for k in range(N)])
    A = kf.estimate(model, [x, x], kf.Gaussian(), fit="kfac")["l.weight"].A[0]
    assert torch.allclose(A[:3, :3], rows.T @ rows / 15, atol=1e-5)
    without_last = torch.arange(N)[:, None] < N - 1
    A = kf.estimate(model, x, kf.Gaussian(), fit="kfac", mask=lambda batch: without_last)["l.weight"].A[0]
    assert torch.allclose(A[:3, :3], rows[:10].T @ rows[:10] / 10, atol=1e-5)
    assert torch.allclose(A[3, 3], torch.ones(()), atol=1e-5)


def routed(m, x):
    """Every row goes to the expert of its sign, and what comes of it is put back where the row was."""
    rows = x.flatten(0, 1)
    answer = torch.zeros(len(rows), 2)
    for expert, chosen in ((m.one, rows[:, 0] > 0), (m.two, rows[:, 0] <= 0)):
        answer[chosen] = expert(rows[chosen].tanh()).tanh()
    return m.last(answer).unflatten(0, x.shape[:2]).mean(1)


def images(m, x):
    """Example k has k + 1 of its images looked at."""
    kept = torch.cat([x[k, : k + 1] for k in range(len(x))])
    rows = m.up(m.norm(m.c(kept)).tanh()).flatten(1)
    return torch.stack([part.sum(0)[:2] for part in rows.split(list(range(1, len(x) + 1)))])


def words(m, x):
    """Sequences of lengths 1 … n, looked up, scaled, and contracted with a stack of matrices."""
    rows = torch.cat([m.table(x[k, : k + 1]) for k in range(len(x))])
    rows = torch.einsum("ri,hoi->rho", rows * m.scale + m.shift, m.heads).tanh().flatten(1)
    return torch.stack([part.sum(0) for part in rows.split(list(range(1, len(x) + 1)))])


def folded(m, x):
    """Sequences of lengths 1 … n in one long axis that is folded into two, so that no axis keeps examples apart."""
    rows = torch.cat([x[k, : k + 1] for k in range(len(x))])
    rows = rows if len(x) == 1 else F.pad(rows, (0, 0, 0, -len(rows) % 2)).unflatten(0, (2, -1))
    rows = m.norm(m.l(rows).tanh()).reshape(-1, 2)[: len(x) * (len(x) + 1) // 2]
    return torch.stack([part.sum(0) for part in rows.split(list(range(1, len(x) + 1)))])


UNEQUAL = {
    "folded": lambda: (Written(folded, l=nn.Linear(3, 2), norm=nn.LayerNorm(2, 0.1)), torch.randn(N, N, 3)),
    "experts": lambda: (
        Written(routed, one=nn.Linear(3, 2), two=nn.Linear(3, 2, bias=False), last=nn.Linear(2, 2)),
        torch.randn(N, 4, 3),
    ),
    "images": lambda: (
        Written(images, c=nn.Conv2d(2, 2, 2), norm=nn.GroupNorm(2, 2), up=nn.ConvTranspose2d(2, 1, 2, stride=2)),
        torch.randn(N, N, 2, 3, 3),
    ),
    "words": lambda: (
        Written(
            words,
            table=nn.Embedding(6, 3),
            scale=torch.rand(3) + 1,
            shift=torch.randn(3),
            heads=torch.randn(2, 2, 3),
        ),
        torch.randint(6, (N, N)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("labels", ["exact", "observed"])
@pytest.mark.parametrize("kind", UNEQUAL)
def test_rows_in_unequal_numbers_are_treated_by_layers(kind, labels, double):
    """With every fit, also where another batch has them in other numbers, or one example alone."""
    model, x = UNEQUAL[kind]()
    y = torch.randn(N, model(x).shape[1])
    batches = [(x[:1], y[:1]), (x[1:], y[1:])]
    fits = ["full", "diagonal", "kfac", "ekfac", "tkfac", "kfoc", "kpsvd", kf.Full(across_layers=True)]
    truth = kf.estimate(model, batches, kf.Gaussian(), fit=fits[-1], labels=labels).to_dense()
    alone = [(x[k : k + 1], y[k : k + 1]) for k in range(N)]  # each with all rows to itself
    if kind == "experts":
        torch.testing.assert_close(
            truth, kf.estimate(model, alone, kf.Gaussian(), fit=fits[-1], labels=labels).to_dense()
        )
    if labels == "exact":
        assert_exact(model, batches[1][0], fit=fits[-1])
    for fit in fits:
        fisher = kf.estimate(model, batches, kf.Gaussian(), fit=fit, labels=labels, strict=True)
        positions, _ = read(torch.arange(fisher.dim), fisher.shapes)
        error = fisher.error(batches)
        for name, (blocks, operator) in zip(fisher.blocks, fisher.entries, strict=True):
            index = gather(blocks, positions)[0]
            own = truth[index[:, None], index]
            assert error.norms[name] == pytest.approx(float(own.norm()), rel=1e-9)
            distance = float((own - operator.to_dense()).norm())
            assert error.distances[name] == pytest.approx(distance, rel=1e-6, abs=1e-9)
            if fit in ("full", fits[-1]):
                assert distance < 1e-10


def test_rows_that_no_gradient_reaches_are_left_out_where_examples_have_unequal_numbers():
    order, only = RowOrder.by_examples(torch.tensor([1, -1, 0, 1, 1]), 3, pads=True)
    assert only and order is not None and order.padded
    rows = torch.arange(10.0).reshape(5, 2)
    grouped = order.group(rows, 1)
    assert torch.equal(grouped[0], torch.tensor([[4.0, 5.0], [0.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(grouped[1], rows[[0, 3, 4]]) and not grouped[2].any()
    assert order.exists(6).sum(1).tolist() == [2, 6, 0]
    none, _ = RowOrder.by_examples(torch.full((4,), -1), 3, pads=True)
    assert none is not None and not none.exists(1).any()
    assert RowOrder.by_examples(torch.tensor([1, -1, 0, 1, 1]), 3) == (None, True)
    assert RowOrder.by_examples(torch.tensor(-1), 3, pads=True) == (None, True)  # a single row, without an axis


def test_experts_are_trained_by_layers():
    model, x = UNEQUAL["experts"]()
    optimizer = kf.NaturalGradient(model, kf.Gaussian(), fit="ekfac")
    losses = [float(optimizer.step(lambda: model(x), torch.zeros(N, 2))) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert not optimizer.report().uncovered


def test_elements_for_each_datum_are_no_parameters_of_a_model():
    model = Written(lambda m, x: x + m.p, p=torch.randn(N, 3))
    with pytest.raises(kf.UnsupportedError, match=r"p \(used by add\).*elements of its own for each example"):
        kf.estimate(model, torch.randn(N, 3), kf.Gaussian())
    table = Written(lambda m, x: x + m.p, p=torch.randn(4, 3))
    assert_exact(table, torch.randn(N, 4, 3))


def test_which_passes_are_run(read_again):
    """The probe looks once at a graph and its shapes; later batches and later estimates go by what it found."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(8, 3)
    assert inner_product._as_known()  # a pass of its own tells, once in a process

    def passes(fit, data, model=model):
        count = []
        with pytest.MonkeyPatch.context() as patch:
            for place, name in ((torch.autograd, "grad"), (inner_product, "_engine_run_backward")):
                known = getattr(place, name)
                patch.setattr(place, name, lambda *a, known=known, **k: (count.append(1), known(*a, **k))[1])
            kf.estimate(model, data, kf.Gaussian(), fit=fit)
        return len(count)

    assert passes("kfac", [x, x]) == 2 + 2
    assert passes("kfac", x) == 1
    assert passes("diagonal", [x, x, x[:3], x[:1]]) == 4 + 2 + 2  # rows are sorted now; batches of another size are new
    assert passes("ekfac", [x, x[:5], x[3:]]) == 6 + 2  # once for a size
    first = Written(lambda m, x: m.l(x.transpose(0, 1)).sum(0), l=nn.Linear(3, 2))
    sequences = torch.randn(8, 5, 3)
    assert passes("ekfac", [sequences, sequences[:3, :2]], first) == 4 + 2 + 2
    assert passes("diagonal", torch.randn(40, 3), nn.Linear(3, 2)) == 1 + 3  # two digits
    gated = Written(lambda m, x: m.a(x) + 0 * m.b(x), a=nn.Linear(3, 2), b=nn.Linear(3, 2))
    assert passes("diagonal", [x, x, x], gated) == 3 + 2  # of a silent layer the graph proves what no gradient shows
    assert passes("diagonal", [x, x], gated) == 2
    sorting = Written(lambda m, x: m.a(x)[x[:, 0].argsort()], a=nn.Linear(3, 2))
    assert passes("diagonal", [x, x, x], sorting) == 3 + 3 * 2  # an order that values decide is looked at every time


# The rules by themselves ----------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=60)
def test_the_rule_that_owners_show(data):
    samples = data.draw(st.integers(1, 6))
    lead = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, samples, 2 * samples]), min_size=1, max_size=3)))
    rules = RowOrder.candidates(lead, samples)
    if not rules:
        return
    rule = data.draw(st.sampled_from(rules))
    examples = rule.examples(lead)
    assert sorted(examples.flatten().tolist()) == sorted([k for k in range(samples)] * (examples.numel() // samples))
    found, sure = RowOrder.by_examples(examples, samples)
    assert torch.equal(found.examples(lead), examples)
    hidden = examples.masked_fill(torch.rand(lead) < 0.5, -1)
    found, sure = RowOrder.by_examples(hidden, samples)
    known = hidden >= 0
    assert torch.equal(found.examples(lead)[known], examples[known])
    if sure and not torch.equal(found.examples(lead), examples):
        raise AssertionError("sure, and wrong")
    rows = torch.arange(examples.numel() * 2).reshape(*lead, 2)
    grouped = rule.group(rows, len(lead))
    assert grouped.shape == (samples, examples.numel() // samples, 2)
    for k in range(samples):
        assert set(grouped[k].flatten().tolist()) == set(rows[examples == k].flatten().tolist())


@given(st.integers(1, 5000), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
@settings(max_examples=40)
def test_the_probe_reads_every_number(samples, dtype):
    probe = Probe(samples, {dtype})
    factors = probe.factors().to(dtype)
    assert torch.isfinite(factors).all() and (factors > 0).all()
    plain = torch.randn(samples, 3, dtype=dtype)
    passes = [probe.project((plain * factor[:, None]).float()) for factor in factors]
    assert probe.examples(passes).tolist() == list(range(samples))


def test_the_probe_sees_mixtures_and_silence():
    probe = Probe(4, {torch.float32})
    factors, plain = probe.factors(), torch.randn(4, 7)
    passes = [probe.project(plain * factor[:, None]) for factor in factors]
    assert probe.examples(passes).tolist() == [0, 1, 2, 3]
    quiet = [rows * torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None] for rows in passes]
    assert probe.examples(quiet).tolist() == [0, -1, 2, 3]
    assert probe.examples([rows * 0 for rows in passes]).tolist() == [-1] * 4
    mixed = plain + 0.02 * plain.roll(1, 0)
    scaled = [plain * f[:, None] + 0.02 * (plain * f[:, None]).roll(1, 0) for f in factors]
    assert torch.allclose(scaled[0], mixed)
    assert probe.examples([probe.project(rows) for rows in scaled]) is None


WEAK = [(share, torch.float64) for share in (1e-2, 1e-6, 2e-8, 1e-10, 1e-12)]
WEAK += [(share, torch.float32) for share in (1e-2, 8e-4, 2e-4)]


@pytest.mark.parametrize("fit", ["kfac", "kfoc", "full"])
@pytest.mark.parametrize("share, dtype", WEAK)
def test_a_weak_coupling_is_one(share, dtype, fit):
    """What others contribute is seen down to some hundred roundings of a row's gradient, since doubling is exact."""

    def network(share):
        model = Written(
            lambda m, x: m.o((h := m.l(x).tanh()) + share * h.roll(1, 0)), l=nn.Linear(3, 3), o=nn.Linear(3, 2)
        )
        return model.to(dtype)

    x = torch.randn(5, 3, dtype=dtype)
    with pytest.raises(UnsupportedError, match="mixes several examples"):
        kf.estimate(network(share), x, kf.Gaussian(), fit=fit)
    kf.estimate(network(0.0), x, kf.Gaussian(), fit=fit)


@pytest.mark.parametrize("weight", [1e-3, 1e-8, 1e-11])
def test_attention_that_hardly_looks_at_another_example_mixes_them(weight, double):
    def forward(m, x):
        h, far = m.l(x), torch.eye(len(x)).log2().clamp_min(math.log(weight))
        return far.softmax(-1) @ h

    model, x = Written(forward, l=nn.Linear(3, 2)), torch.randn(4, 3)
    for fit in ("full", kf.Full(across_layers=True), "kfac", {"*": "diagonal"}):
        with pytest.raises(UnsupportedError, match="mixes several examples"):
            kf.estimate(model, x, kf.Gaussian(), fit=fit)
    with pytest.raises(UnsupportedError, match="examples"):  # nor by the way of functions that are not understood
        kf.estimate(
            Written(lambda m, x: forward(m, x).mul(m.p.cumsum(0)), l=model.l, p=torch.rand(2)), x, kf.Gaussian()
        )


def test_examples_that_are_apart_stay_so_whatever_the_size_of_their_gradients(double):
    """Rounding is no coupling: where gradients cancel, span hundreds of decades, or are nothing but rounding errors."""
    x = torch.randn(N, 4, 3)
    far = Written(lambda m, x: m.l(x).mul(torch.logspace(-150, 0, 5)[: len(x), None, None]).sum(1), l=nn.Linear(3, 2))
    sums = Written(
        lambda m, x: m.l1(m.l0(x) * 1e8 - (m.l0(x) * (1e8 - 1))).sum(1), l0=nn.Linear(3, 3), l1=nn.Linear(3, 2)
    )
    shifted = Written(lambda m, x: m.o(m.a(m.q(x), m.k(x), m.v(x))).sum(1), q=nn.Linear(3, 3), k=nn.Linear(3, 3))
    shifted.a, shifted.v, shifted.o = F.scaled_dot_product_attention, nn.Linear(3, 3), nn.Linear(3, 2)
    normed = Written(lambda m, x: m.o(m.n(m.l(x))).sum(1), l=nn.Linear(3, 1), n=nn.LayerNorm(1), o=nn.Linear(1, 2))
    for model in (far, sums, shifted, normed):
        for dtype in (torch.float64, torch.float32):
            kf.estimate(model.to(dtype), x.to(dtype), kf.Gaussian(), fit="full", labels="exact")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["data first", "sequence first", "flat, time major"])
def test_half_precision_tells_large_batches_apart(dtype, layout):
    to, back = LAYOUTS[layout]
    model = Written(
        lambda m, x: back(m.l1(m.norm(m.l0(to(x)).tanh())), len(x)).sum(1),
        l0=nn.Linear(3, 4), norm=nn.LayerNorm(4), l1=nn.Linear(4, 2),
    ).to(dtype)  # fmt: skip
    x = torch.randn(300, 2, 3, dtype=dtype)
    found = kf.estimate(model, x, kf.Gaussian(), fit="diagonal", labels="exact")
    exact = kf.estimate(model.double(), x.double(), kf.Gaussian(), fit="diagonal", labels="exact")
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-10 if dtype == torch.float64 else 0.03
    assert (found.to_dense().double() - exact.to_dense()).norm() < tolerance * exact.to_dense().norm()


@pytest.mark.parametrize("way", ["outputs are cast", "a part is cast", "autocast"])
@pytest.mark.parametrize("fit", ["kfac", "diagonal", kf.Full(across_layers=True)], ids=str)
def test_a_network_may_compute_in_half_precision_and_end_in_another(way, fit):
    """As language models do, whose logits are cast: factors of the probe have to stay within the narrowest range."""
    half, x = torch.float16, torch.randn(40, 2, 3)
    inner = half if way == "outputs are cast" else torch.float32

    def forward(m, x):
        with torch.autocast("cpu", half, enabled=way == "autocast"):
            h = m.l0(x.to(inner)).tanh()
            h = h.to(half).sin().to(h) if way == "a part is cast" else h
            return m.l1(m.norm(h)).mean(1).float()

    def exact(m, x):
        return m.l1(m.norm(m.l0(x).tanh() if way != "a part is cast" else m.l0(x).tanh().sin())).mean(1)

    model = Written(forward, l0=nn.Linear(3, 4), norm=nn.LayerNorm(4), l1=nn.Linear(4, 2)).to(inner)
    found = kf.estimate(model, x, kf.Categorical(), fit=fit, labels="exact")
    model.function = exact
    true = kf.estimate(model.double(), x.double(), kf.Categorical(), fit=fit, labels="exact").to_dense()
    assert (found.to_dense() - true).norm() < 0.01 * true.norm()


def test_data_sorted_inside_the_model():
    """A batch that happens to come in order says nothing about the next one."""

    def by_length(m, x):
        order = x[:, 0].argsort()
        return m.b(m.a(x[order]).tanh())[order.argsort()]

    model = Written(by_length, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    x = torch.randn(N, 3)
    ordered = x[x[:, 0].argsort()]
    both = kf.estimate(model, [(ordered,), (x,)], kf.Gaussian(), fit="full", labels="exact").to_dense()
    alone = kf.estimate(model, x, kf.Gaussian(), fit="full", labels="exact").to_dense()
    assert (both - alone).norm() < 1e-5 * alone.norm()  # the same data, whatever their order
