"""From model and data to the matrix: scale, batching, draws, passes, budgets, and what is said about all of it."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kronfisher as kf
from kronfisher.fits import resolve
from tests.helpers.checks import SETTLED, assert_exact
from tests.helpers.close import close
from tests.helpers.networks import Written, perceptron
from tests.helpers.truth import exact_fisher

FIT_NAMES = sorted(SETTLED)
SEEDED = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 3, generator=SEEDED), torch.randint(3, (12,), generator=SEEDED)


def normalised(dtype=torch.float64, dropout=0.0):
    return perceptron(3, 4, 3, after=[nn.Dropout(dropout), nn.LayerNorm(4)], dtype=dtype)


def convolutional(size=12, channels=6):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * (size - 2) ** 2, 3),
    )  # fmt: skip


# Scale and batching ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", [name for name in FIT_NAMES if not resolve(name).by_batch])
@pytest.mark.parametrize("labels", ["exact", "sampled", "observed"])
def test_batching_changes_nothing(fit, labels):
    model, x = normalised(), X.double()
    options = {"fit": fit, "labels": labels, "samples": 3, "seed": 5}
    whole = kf.estimate(model, (x, Y), kf.Categorical(), **options)
    assert whole.count == 12 and whole.labels == labels
    size = {"exact": 5, "sampled": 7, "observed": 1}[labels]
    parts = list(zip(x.split(size), Y.split(size), strict=True))
    close(kf.estimate(model, parts, kf.Categorical(), **options), whole, 1e-12)


@pytest.mark.parametrize("fit", FIT_NAMES)
def test_sum_is_count_times_mean(fit):
    mean = kf.estimate(normalised(), X.double(), kf.Gaussian(), fit=fit)
    total = kf.estimate(normalised(), X.double(), kf.Gaussian(), fit=fit, reduction="sum")
    assert (mean.reduction, total.reduction) == ("mean", "sum")
    torch.manual_seed(0)
    model = normalised()
    mean = kf.estimate(model, X.double(), kf.Gaussian(), fit=fit)
    close(kf.estimate(model, X.double(), kf.Gaussian(), fit=fit, reduction="sum"), 12 * mean.to_dense(), 1e-12)


def test_scale_does_not_follow_a_mean_loss():
    """F is the mean over data of one datum's own gradients: doubling the data doubles nothing."""
    model = nn.Linear(3, 2).double()
    once = kf.estimate(model, X.double(), kf.Gaussian(variance=0.5), labels="exact", fit="kfac")
    close(kf.estimate(model, [X.double()] * 3, kf.Gaussian(variance=0.5), labels="exact", fit="kfac"), once, 1e-12)
    assert torch.allclose(once["weight"].B[0], 2 * torch.eye(2).double())
    assert torch.allclose(once["weight"].A[0, :3, :3], X.double().T @ X.double() / 12)


def test_same_seed_same_bits():
    model = normalised(dropout=0.5)
    x = X.double()
    first = kf.estimate(model, [(x,), (x + 1,)], kf.Gaussian(), fit="ekfac", seed=3)
    torch.rand(5)
    assert torch.equal(
        kf.estimate(model, [(x,), (x + 1,)], kf.Gaussian(), fit="ekfac", seed=3).to_dense(), first.to_dense()
    )
    other = kf.estimate(model, [(x,), (x + 1,)], kf.Gaussian(), fit="ekfac", seed=4)
    assert not torch.equal(other.to_dense(), first.to_dense())


def test_samples_average():
    """M draws estimate the same matrix as one; the more, the closer to the exact one."""
    model, x = normalised(), X.double()
    exact = kf.estimate(model, x, kf.Categorical(), fit="full", labels="exact").to_dense()
    distances = []
    for samples in (1, 16, 256):
        found = kf.estimate(model, x, kf.Categorical(), fit="full", samples=samples).to_dense()
        distances.append(float((found - exact).norm() / exact.norm()))
    assert distances[0] > 2 * distances[1] > 4 * distances[2]
    assert distances[2] < 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype):
    fisher = assert_exact(normalised(dtype), X.to(dtype), tolerance=1e-5 if dtype == torch.float32 else 1e-12)
    assert fisher.dtype == dtype


def test_parts_of_other_precision():
    """Weights cast on the fly, both ways; the matrix has the precision of the weight, or better."""
    down = Written(lambda m, x: F.linear(x, m.w.float()), w=torch.randn(2, 3, dtype=torch.float64))
    up = Written(
        lambda m, x: (F.linear(x.double(), m.w.double()) + m.b.double()).float(), w=torch.randn(2, 3), b=torch.randn(2)
    )
    mixed = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten())
    images = Written(
        lambda m, x: F.conv1d(x.double(), m.c.weight.double(), m.c.bias.double()).float().flatten(1), c=mixed[0]
    )
    assert assert_exact(down, X).dtype == torch.float64
    assert assert_exact(up, X).dtype == torch.float32
    assert assert_exact(images, torch.randn(4, 2, 5)).dtype == torch.float32
    for fit in FIT_NAMES:
        kf.estimate(up, X, kf.Gaussian(), fit=fit).error(X)
        kf.estimate(down, X, kf.Gaussian(), fit=fit).error(X)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.BatchNorm1d(4).eval(), nn.GroupNorm(1, 4), nn.RMSNorm(4)])
def test_half_precision_models(norm):
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 2))
    exact = kf.estimate(model, X, kf.Gaussian(), fit="full", labels="exact").to_dense()
    half = kf.estimate(model.bfloat16(), X.bfloat16(), kf.Gaussian(), fit="full", labels="exact")
    assert half.dtype == torch.float32
    close(half, exact, 0.05)


def test_channels_last_changes_nothing():
    model, x = convolutional(), torch.randn(4, 3, 12, 12)
    plain = kf.estimate(model, x, kf.Gaussian(), fit={"5.*": "diagonal", "*": "ekfac"})
    last = convolutional()
    last.load_state_dict(model.state_dict())
    last = last.to(memory_format=torch.channels_last)
    found = kf.estimate(
        last, x.to(memory_format=torch.channels_last), kf.Gaussian(), fit={"5.*": "diagonal", "*": "ekfac"}
    )
    v = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    for name, product in (found @ v).items():
        assert torch.allclose(product, (plain @ v)[name], rtol=1e-3, atol=1e-5), name
    error, same = found.error(x), plain.error(x)
    assert abs(error.relative - same.relative) < 1e-3


# Several passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
def test_dropout_draws_the_same_masks_in_every_pass(samples):
    """EKFAC of one datum at a time is exact in its basis only if both passes see the same network."""
    model, x = normalised(dropout=0.5), torch.randn(1, 3).double()
    fisher = kf.estimate(model, x, kf.Gaussian(), fit="ekfac", samples=samples)
    full = kf.estimate(model, x, kf.Gaussian(), fit="full", samples=samples)
    if samples == 1:  # a single gradient: every fit is exact
        close(fisher, full, 1e-8)
    assert abs(float(fisher.trace() / full.trace()) - 1) < 1e-8
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    kf.estimate(model, [x] * 9, kf.Gaussian(), fit="ekfac", samples=samples)
    assert len(seen) == 18 and all(torch.equal(p, q) for p, q in zip(seen[:9], seen[9:], strict=True))
    assert any(not torch.equal(seen[0], other) for other in seen[1:9])


def test_the_trace_of_ekfac_is_exact_over_batches():
    model, x = normalised(), [X[:5].double(), X[5:].double()]
    ekfac = kf.estimate(model, x, kf.Categorical(), fit="ekfac", samples=2)
    diagonal = kf.estimate(model, x, kf.Categorical(), fit="diagonal", samples=2)
    for name in ekfac.blocks:
        assert torch.allclose(ekfac[name].trace(), diagonal[name].trace(), rtol=1e-10)


class Late(nn.Module):
    """Uses its second layer only where the first datum asks for it."""

    def __init__(self):
        super().__init__()
        self.early, self.late = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.early(x) + (self.late(x).tanh() if x[0, 0] > 0 else 0)


def signed(*signs):
    rows = [torch.cat([torch.tensor([[sign * 1.0, 0.3, -0.2]]), torch.randn(3, 3)]).double() for sign in signs]
    return list(torch.stack(rows))


@pytest.mark.parametrize("fit", [*FIT_NAMES, {"late.*": "ekfac", "*": "kfac"}, {"late.*": "kfac", "*": "ekfac"}])
@pytest.mark.parametrize("signs", [(-1, 1, -1), (1, -1), (-1, -1, 1)])
def test_a_parameter_used_in_some_batches_only(fit, signs):
    model, data = Late().double(), signed(*signs)
    fisher = kf.estimate(model, data, kf.Gaussian(), fit=fit, labels="exact")
    truth = exact_fisher(model, data)
    if fit == "gram":  # of all layers together
        return close(fisher, truth, 1e-10)
    assert list(fisher.blocks) == ["early.weight", "late.weight"]
    exact = ("full", "diagonal", "ekfac")
    for k, name in enumerate(fisher.blocks):
        part = truth[8 * k : 8 * k + 8, 8 * k : 8 * k + 8]
        chosen = fit if isinstance(fit, str) else fit.get("late.*" if k else "*")
        if chosen == "full":
            assert (fisher.to_dense() - torch.block_diag(truth[:8, :8], truth[8:, 8:])).norm() < 1e-12 * truth.norm()
        if chosen in exact:
            assert torch.allclose(fisher[name].trace(), part.trace(), rtol=1e-10)


def test_a_matrix_across_layers_needs_all_of_them_at_once():
    model, fit = Late().double(), kf.Full(across_layers=True)
    with pytest.raises(
        kf.UnsupportedError, match=r"batch 1: late\.weight is used here for the first time.*across_layers"
    ):
        kf.estimate(model, iter(signed(-1, 1)), kf.Gaussian(), fit=fit)
    for data in (signed(1, -1, 1), signed(-1, 1), signed(-1, -1, 1)):  # read again where they can be
        fisher = kf.estimate(model, data, kf.Gaussian(), fit=fit, labels="exact")
        close(fisher, exact_fisher(model, data), 1e-12)


def test_unused_parameters_are_zero_and_said_to_be_unused():
    model = Late().double()
    fisher = kf.estimate(model, signed(-1, -1), kf.Gaussian())
    assert fisher["late.weight"].trace() == fisher["late.bias"].trace() == 0
    assert fisher.info.blocks["late.weight"].method == "unused: zero"
    assert (fisher + 1.0).solve({n: torch.ones_like(p) for n, p in model.named_parameters()})["late.bias"].tolist() == [
        1,
        1,
    ]
    assert [row.method for row in fisher.report().rows][1:] == ["unused: zero"] * 2


# Budgets --------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The bytes of the largest new tensor."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("fit", FIT_NAMES)
def test_a_tiny_budget_gives_the_same_in_little_room(fit, monkeypatch):
    """Temporaries of a fit's updates are chunked to what the budget leaves; here one sample's worth."""
    torch.manual_seed(1)
    model, x = convolutional().double(), torch.randn(16, 3, 12, 12).double()
    fit = {"5.*": "kfac", "*": fit}
    largest = {}

    def watched(update):
        def run(self, state, samples):
            with Largest() as watch:
                state = update(self, state, samples)
            if state.blocks[0].operator == "conv2d":
                largest[current] = max(largest.get(current, 0), watch.bytes)
            return state

        return run

    for kind in (kf.KFAC, kf.EKFAC, kf.Diagonal, kf.Full, kf.TKFAC, kf.KL):
        monkeypatch.setattr(kind, "update", watched(kind.update))
    current = "free"
    free = kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact")
    with pytest.raises(
        kf.MemoryBudgetError, match=r"needs ([\d,]+) bytes .*more than the memory_budget of 1,000 bytes"
    ) as e:
        kf.estimate(model, x, kf.Gaussian(), fit=fit, memory_budget=1000)
    needed = int(str(e.value).split("needs ")[1].split(" bytes")[0].replace(",", ""))
    assert needed >= free.bytes
    current = "tight"
    tight = kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact", memory_budget=needed)
    close(tight, free, 1e-10)
    matrices = 8 * max(54 * 54 + 27, 216 * 216 // 4) * 4
    one = 8 * 12 * 12 * max(27 + 1, 54 + 1) * 2  # bytes of a sample's patches and gradients
    if largest:  # the others take many samples at once
        assert largest["tight"] <= max(one * 3, matrices), (largest, one)
        assert largest["tight"] < largest["free"]


def test_budgets_that_do_not_suffice_are_refused_before_any_matrix_is_made(monkeypatch):
    monkeypatch.setattr(kf.KFAC, "init", lambda *a: pytest.fail("a state was made"))
    with pytest.raises(kf.MemoryBudgetError, match="memory_budget of 10 bytes"):
        kf.estimate(normalised(), X.double(), kf.Gaussian(), memory_budget=10)
    monkeypatch.setattr("kronfisher.estimation.groups.available_memory", lambda device: 20)
    with pytest.raises(kf.MemoryBudgetError, match="more than the free memory of 20 bytes"):
        kf.estimate(normalised(), X.double(), kf.Gaussian())


def test_samples_are_dropped_as_they_are_used(monkeypatch):
    """Of the samples of all layers only one layer's are alive at any time."""
    import weakref

    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.Tanh())])
    alive, most = [], []
    update = kf.Diagonal.update

    def watched(self, state, samples):
        most.append(sum(g() is not None for g in alive))
        alive.append(weakref.ref(samples[0].gradients))
        return update(self, state, samples)

    monkeypatch.setattr(kf.Diagonal, "update", watched)
    kf.estimate(model, torch.randn(16, 8), kf.Gaussian(), fit="diagonal")
    assert len(most) == 6 and max(most) <= 1


# Limits, options, progress --------------------------------------------------------------------------------------------


def test_exact_labels_announce_themselves_and_have_a_limit(caplog):
    model = normalised()
    with caplog.at_level(logging.INFO, logger="kronfisher"):
        kf.estimate(model, X.double(), kf.Categorical(), labels="exact")
    assert "batch 0: exact labels take 2 backward passes" in caplog.text
    count = []
    model.register_forward_hook(lambda *a: count.append(1))
    with pytest.raises(
        kf.DataError, match=r"batch 0: exact labels take 3 backward passes.*limit is 2.*labels='sampled'"
    ):
        kf.estimate(model, X.double(), kf.Gaussian(), labels="exact", exact_limit=2, fit="diagonal")
    assert len(count) == 1
    kf.estimate(model, X.double(), kf.Gaussian(), labels="exact", exact_limit=3)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"samples": 0}, ValueError, "samples=0"),
        ({"seed": "a"}, TypeError, "an integer"),
        ({"mask": 3}, TypeError, "a function of the batch"),
        ({"forward": 3}, TypeError, "outputs, targets"),
        ({"exact_limit": "a"}, TypeError, "a number"),
        ({"samples": 1.5}, ValueError, "samples=1.5"),
        ({"labels": "true"}, ValueError, "labels='true': use 'exact', 'sampled' or 'observed'"),
        ({"reduction": "none"}, ValueError, "reduction='none'"),
        ({"fit": "kfaq"}, ValueError, "fit='kfaq' is not known.*ekfac"),
        ({"fit": kf.KFAC}, ValueError, "is not known; use a fit object such as KFAC"),
        ({"fit": {"0.*": "kfac"}}, ValueError, r"no pattern matches 3\.weight"),
        (
            {"fit": {"nothing*": "kfac", "*": "kfac"}},
            ValueError,
            r"patterns \['nothing\*'\] match no trainable parameter",
        ),
        ({"likelihood": kf.Gaussian}, TypeError, "likelihood=.*pass an instance such as kf.Categorical"),
        ({"likelihood": torch.nn.MSELoss()}, TypeError, r"kf\.Gaussian\(\), which belongs to this loss"),
        ({"likelihood": nn.MSELoss()}, TypeError, "pass an instance"),
    ],
)
def test_options_that_make_no_sense(options, error, message):
    options = {"likelihood": kf.Gaussian(), **options}
    with pytest.raises(error, match=message):
        kf.estimate(normalised(), X.double(), options.pop("likelihood"), **options)


def test_progress(capsys):
    said = []
    kf.estimate(normalised(), [X.double()] * 2, kf.Gaussian(), fit="ekfac", progress=said.append)
    assert said[0] == "pass 1/2, 1 batches, 1 backward passes" and said[-2] == "pass 2/2, 2 batches, 2 backward passes"
    assert said[-1] == ""
    assert capsys.readouterr().err == ""
    kf.estimate(normalised(), [X.double()] * 2, kf.Gaussian(), progress=True)
    shown = capsys.readouterr()
    assert "pass 1/1, 2 batches" in shown.err and shown.err.endswith("\n") and shown.out == ""
    with pytest.raises(kf.NumericalError):
        kf.estimate(normalised(), X.double() * float("nan"), kf.Gaussian(), progress=True)
    assert capsys.readouterr().err.endswith("\n")


def test_interruptions_say_what_was_lost():
    def batches():
        yield X.double()
        yield X.double()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        kf.estimate(normalised(), batches(), kf.Gaussian())
    (note,) = caught.value.__notes__
    assert "stopped after 2 batches of pass 1; no estimate was made" in note and "random state are as before" in note


def test_information():
    model = normalised()
    fisher = kf.estimate(model, (X.double(), Y), kf.Categorical(), samples=2, seed=9, fit={"4.*": "full", "*": "kfac"})
    info = fisher.info
    assert (info.count, info.labels, info.samples, info.seed, info.reduction) == (12, "sampled", 2, 9, "mean")
    assert info.trainable == sum(p.numel() for p in model.parameters()) == fisher.dim
    assert list(info.blocks) == list(fisher.blocks) and info.seconds > 0
    assert info.blocks["4.weight"].method == "Full(across_layers=False)"
    across = kf.estimate(model, X.double(), kf.Gaussian(), fit=kf.Full(across_layers=True))
    assert list(across.info.blocks) == list(across.blocks)  # the names of long groups are shortened alike
    assert fisher.rows["0.weight"] == 12


def test_blocks_come_in_the_order_of_the_model():
    model = Written(lambda m, x: m.a(m.b(m.c(x))), a=nn.Linear(2, 2), b=nn.Linear(2, 2), c=nn.Linear(3, 2))
    fisher = kf.estimate(model, X, kf.Gaussian(), fit={"a.*": "diagonal", "*": "kfac"})
    assert [name.split(".")[0] for name in fisher.blocks] == ["a", "b", "c"]
    assert fisher.names == tuple(dict(model.named_parameters()))


def test_scalar_and_odd_parameters():
    model = Written(
        lambda m, x: m.gain * m.l(x) * m.row + m.shift,
        gain=torch.randn(()), row=torch.randn(1, 2), shift=torch.randn(1), l=nn.Linear(3, 2),
    )  # fmt: skip
    for fit in FIT_NAMES:
        kf.estimate(model, X, kf.Gaussian(), fit=fit)
    assert_exact(model, X)
    assert_exact(model, X, fit=kf.Full(across_layers=True))


def test_one_output_without_an_axis_of_its_own():
    model = Written(lambda m, x: m.l(x).squeeze(1), l=nn.Linear(3, 1))
    assert_exact(model, X)
    assert_exact(model, X[:1])


def test_exact_labels_are_announced_before_the_work(caplog):
    said = []
    with caplog.at_level("INFO", logger="kronfisher"):
        kf.estimate(nn.Linear(3, 4), torch.randn(5, 3), kf.Categorical(), labels="exact", progress=said.append)
    assert said[0] == "batch 0: exact labels take 3 backward passes" == caplog.messages[0]


def test_notes_of_a_fit_are_in_the_report():
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)), torch.randn(7, 3)

    class Noted(kf.KFAC):
        def notes(self, state):
            return f"{state.count:g} data seen, converged"

    fisher = kf.estimate(model, x, kf.Gaussian(), fit={"*.weight": Noted(), "*": kf.KFAC()})
    said = {row.name: row.notes for row in fisher.report().rows}
    noted = [name for name, text in said.items() if text]
    assert noted and all(name.endswith("weight") for name in noted) and len(noted) < len(said)
    assert {said[name] for name in noted} == {f"{len(x)} data seen, converged"}
    assert f"{', '.join(noted)}: {len(x)} data seen, converged" in str(fisher.report())
