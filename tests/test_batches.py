"""Every form in which data may come, and everything that can be wrong with them."""

from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import kronfisher as kf
from kronfisher.batches import checksum, ordinary, passes_over
from tests.exact import Written

SEEDED = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 3, generator=SEEDED), torch.randint(2, (12,), generator=SEEDED)


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def dense(model, data, likelihood=None, **options):
    options = {"labels": "observed" if likelihood is None else "exact", **options}
    return kf.estimate(model, data, likelihood or kf.Categorical(), **options).to_dense()


class Custom(Mapping):
    """A mapping that is no dict, as tokenizers return."""

    def __init__(self, **items):
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


def test_forms_of_data(model):
    expected = dense(model, (X, Y))
    for data in ([(X, Y)], [[X, Y]], DataLoader(TensorDataset(X, Y), 12), iter([(X, Y)]), ((X, Y) for _ in range(1))):
        assert torch.equal(dense(model, data), expected)
    split = dense(model, DataLoader(TensorDataset(X, Y), 5))
    assert torch.allclose(split, expected, atol=1e-6)
    ones = dense(model, [(X[k : k + 1], Y[k : k + 1]) for k in range(12)])
    assert torch.allclose(ones, expected, atol=1e-6)


def test_inputs_without_targets(model):
    gaussian = kf.Gaussian()
    expected = dense(model, X, gaussian)
    for data in ([X], [(X,)], (X,), (X, None), [[X]], {"input": X}, [Custom(input=X)], [({"input": X}, None)]):
        assert torch.equal(dense(model, data, gaussian), expected)


def test_several_inputs():
    two = Written(lambda m, x, y: m.l(x * y), l=nn.Linear(3, 2))
    pair = namedtuple("pair", "x y")(X, X + 1)
    expected = dense(Written(lambda m, x: m.l(x * (x + 1)), l=two.l), (X, Y))
    for inputs in ((X, X + 1), [X, X + 1], pair):
        assert torch.equal(dense(two, (inputs, Y)), expected)
    assert torch.equal(dense(two, [(pair, Y)]), expected)


@dataclass
class Record:
    input: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True)
class Nested:
    x: dict
    scale: float


class Labelled(NamedTuple):
    labels: Tensor
    input: Tensor


@dataclass
class Answer:
    """As models of transformers return."""

    logits: Tensor
    hidden: tuple = ()


def test_labels_are_a_key_of_the_batch(model):
    expected = dense(model, (X, Y))
    forms = [
        {"input": X, "labels": Y}, {"labels": Y, "input": X}, Custom(input=X, labels=Y), Record(X, Y), Labelled(Y, X),
        ({"input": X, "labels": Y},), [Record(X, Y)], [[Record(X, Y)]], [{"input": X[:5], "labels": Y[:5]},
        {"input": X[5:], "labels": Y[5:]}],
    ]  # fmt: skip
    for data in forms:
        assert torch.allclose(dense(model, data), expected, atol=1e-6)
    gaussian = kf.Gaussian()
    without = dense(model, X, gaussian)
    for data in ({"input": X, "labels": None}, Record(X), [({"input": X}, None)]):
        assert torch.equal(dense(model, data, gaussian), without)
    # Where targets are given apart, the key is the model's.
    named = Written(lambda m, labels: m.l(labels), l=nn.Linear(3, 2))
    named.forward = lambda labels: named.l(labels)
    assert torch.equal(dense(named, ({"labels": X}, Y)), dense(named.l, (X, Y)))


def test_data_classes_inside_batches(model):
    scaled = Written(lambda m, batch: m.l(batch.x["x"] * batch.scale), l=nn.Linear(3, 2))
    with torch.inference_mode():
        made = X.clone()
    found = dense(scaled, (Nested({"x": made}, 2.0), Y))
    assert torch.equal(found, dense(scaled.l, (2 * X, Y)))
    assert torch.equal(dense(scaled, (Nested({"x": X.numpy()}, 2.0), Y)), found)


@pytest.mark.parametrize(
    "wrap", [Answer, lambda y: {"logits": y}, lambda y: Custom(logits=y), namedtuple("A", "logits")]
)
def test_logits_of_what_a_model_returns(wrap):
    model = Written(lambda m, x: wrap(m.l(x)), l=nn.Linear(3, 2))
    assert torch.equal(dense(model, (X, Y)), dense(model.l, (X, Y)))
    assert kf.coverage(model, X).complete


def test_arrays(model):
    x, y = X.numpy(), Y.numpy()
    expected = dense(model, (X, Y))
    frozen = x.copy()
    frozen.flags.writeable = False
    forms = [(x, y), [(x, Y)], (X, y), (x.astype("float64"), y.astype("int32")), (frozen, y), {"input": x, "labels": y},
             [(x[:5], y[:5]), (x[5:], y[5:])], ([x], y), ((x,), y), (x[::-1][::-1], y)]  # fmt: skip
    for data in forms:
        assert torch.allclose(dense(model, data), expected, atol=1e-6)
    assert torch.equal(dense(model, x, kf.Gaussian()), dense(model, X, kf.Gaussian()))
    assert torch.equal(dense(model, [x], kf.Gaussian()), dense(model, X, kf.Gaussian()))
    double = dense(model.double(), (x, y))
    assert double.dtype == torch.float64
    assert torch.equal(checksum((x, y)), checksum((X, Y)))
    batches = iter([[(x, y)], [(x + 1, y)]])

    class Changing:
        def __iter__(self):
            return iter(next(batches))

    with pytest.raises(kf.DataError, match="batch 0 of pass 2 is not the one of the first pass"):
        dense(model, Changing(), fit="ekfac")
    bad = x.copy()
    bad[3, 1] = float("nan")
    with pytest.raises(kf.NumericalError, match="batch 0: the batch holds 1 values that are NaN"):
        dense(model, (bad, y))


class Stream(IterableDataset):
    """Batches as they come, of a loader of one's own."""

    def __init__(self, size=None):
        super().__init__()
        self.size = size

    def __iter__(self):
        yield from zip(X.split(self.size or 1), Y.split(self.size or 1), strict=True)


class Single(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


class Items(Dataset):
    """One datum at a time."""

    def __init__(self, form):
        self.form = form

    def __len__(self):
        return len(X)

    def __getitem__(self, k):
        return self.form(X[k], Y[k])


FORMS = {
    "tuple": lambda x, y: (x, y),
    "mapping": lambda x, y: {"input": x, "labels": y},
    "numbers": lambda x, y: (x.numpy(), int(y)),
    "weights": lambda x, y: (x, (y, 1.0)),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_loaders(model, form, workers):
    expected = dense(model, (X, Y), fit="ekfac")
    loader = DataLoader(Items(FORMS[form]), 5, num_workers=workers)
    likelihood = kf.Weighted(kf.Categorical()) if form == "weights" else kf.Categorical()
    found = dense(model, loader, likelihood, labels="observed", fit="ekfac")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_iterable_data_sets(model, workers):
    expected = dense(model, (X, Y), fit="ekfac")
    for data in (
        Stream(5),
        DataLoader(Stream(5), batch_size=None, num_workers=workers),
        DataLoader(Single(), 5, num_workers=workers),
    ):
        torch.testing.assert_close(dense(model, data, fit="ekfac"), expected)


def test_data_sets_that_are_no_loaders(model):
    for data in (TensorDataset(X, Y), Items(FORMS["tuple"])):
        with pytest.raises(
            kf.DataError, match=r"holds single data; pass torch.utils.data.DataLoader\(data, batch_size=N"
        ):
            kf.estimate(model, data, kf.Categorical())
    with pytest.raises((kf.DataError, kf.UnsupportedError)):
        kf.estimate(model, Single(), kf.Categorical())


def test_keyword_arguments_that_do_not_fit_are_named(model):
    with pytest.raises(TypeError) as caught:
        kf.estimate(model, {"x": X, "y": Y}, kf.Categorical())
    note = " ".join(caught.value.__notes__)
    assert "called with the keyword arguments ['x', 'y']. Targets belong under the key 'labels'" in note

    class Demanding(nn.Linear):
        def forward(self, x=None, y=None):
            raise ValueError("You have to specify ids or embeddings")

    with pytest.raises(ValueError, match="You have to") as caught:
        kf.estimate(Demanding(3, 2), {"y": Y}, kf.Categorical())
    assert "in batch 0" in caught.value.__notes__[0]


class TinyForCausalLM(nn.Module):
    """Labels come as those of the same tokens, and its own loss would shift them."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 4)

    def forward(self, x):
        return {"logits": self.l(x)}


def test_labels_of_causal_language_models_are_shifted():
    model, x, y = TinyForCausalLM().double(), torch.randn(3, 5, 3).double(), torch.randint(4, (3, 5))
    y[0, 3:] = -100
    moved = torch.cat([y[:, 1:], torch.full((3, 1), -100)], 1)
    likelihood = kf.Categorical()
    for labels in ("observed", "exact"):
        truth = kf.estimate(model.l, (x, moved), likelihood, labels=labels)
        for data in ({"x": x, "labels": y}, [{"x": x, "labels": y}], ({"x": x, "labels": y},), ({"x": x}, moved)):
            found = kf.estimate(model, data, likelihood, labels=labels)
            assert set(found.rows.values()) == set(truth.rows.values()) == {10}
            assert torch.equal(found.to_dense(), truth.to_dense())
    wrapped = Written(lambda m, x: m.m(x), m=model)
    wrapped.forward = lambda x: wrapped.m(x)
    found = kf.estimate(wrapped, {"x": x, "labels": y}, likelihood, labels="exact")
    assert torch.equal(found.to_dense(), truth.to_dense())


def test_forward_for_any_other_form(model):
    class Record:  # which is nothing that is known
        def __init__(self, inputs, labels):
            self.inputs, self.labels = inputs, labels

    def forward(model, batch):
        return model(batch.inputs), batch.labels

    data = [Record(X[:5], Y[:5]), Record(X[5:], Y[5:])]
    expected = dense(model, [(X[:5], Y[:5]), (X[5:], Y[5:])], fit="ekfac")
    assert torch.equal(dense(model, data, forward=forward, fit="ekfac"), expected)
    with pytest.raises(kf.DataError, match="batch 0: forward returned list for the outputs, not a tensor"):
        dense(model, data, forward=lambda m, b: ([m(b.inputs)], b.labels))
    for wrong in (lambda m, b: m(b.inputs), lambda m, b: (m(b.inputs), b.labels, 0)):
        with pytest.raises(kf.DataError, match=r"batch 0: forward must return \(outputs, targets\)"):
            dense(model, data, forward=wrong)


@pytest.mark.parametrize("data", [[], iter([]), DataLoader([], 3), ()], ids=["list", "iterator", "loader", "tuple"])
def test_no_data(model, data):
    with pytest.raises(kf.DataError, match=r"no batch|tuple of 0"):
        kf.estimate(model, data, kf.Gaussian())
    with pytest.raises(kf.DataError, match=r"no batch|tuple of 0"):
        kf.coverage(model, data)


@pytest.mark.parametrize("data", [None, 3, model], ids=["None", "number", "function"])
def test_what_is_no_data(model, data):
    with pytest.raises(kf.DataError, match="pass a loader"):
        kf.estimate(model, data, kf.Gaussian())


@pytest.mark.parametrize(
    "batch, message",
    [
        ((X, Y, Y), r"batch 0 is a tuple of 3 entries; pass \(inputs, targets\)"),
        ([X, Y, Y], "batch 0 is a list of 3 entries"),
        ("text", "batch 0 is a str"),
        (X[:0], r"batch 0 is empty: the outputs have shape \[0, 2\]"),
    ],
)
def test_batches_of_no_known_form(model, batch, message):
    with pytest.raises(kf.DataError, match=message):
        kf.estimate(model, [batch], kf.Gaussian())


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda m, x: (m.l(x), 0), "returned tuple, not a tensor. Give forward="),
        (lambda m, x: {"scores": m.l(x)}, r"returned dict with keys \['scores'\], not a tensor. Give forward="),
        (lambda m, x: {"logits": None}, r"returned dict with keys \['logits'\], not a tensor. Give forward="),
        (lambda m, x: None, "returned NoneType, not a tensor"),
        (lambda m, x: m.l(x).sum(), r"torch.float32 \[\].*one row per datum \(not a loss\)"),
        (lambda m, x: m.l(x).argmax(1), "torch.int64"),
    ],
)
def test_outputs_of_no_known_form(function, message):
    with pytest.raises(kf.DataError, match=rf"batch 0: the model returned .*{message}|batch 0: the model {message}"):
        kf.estimate(Written(function, l=nn.Linear(3, 2)), X, kf.Gaussian())


def test_other_devices(model):
    with pytest.raises(kf.DataError, match=r"batch 1 lies on meta, the model on cpu. Move one: batch.to\('cpu'\)"):
        kf.estimate(model, [(X, Y), (X.to("meta"), Y)], kf.Categorical())
    with pytest.raises(kf.DataError, match="batch 0: targets are on meta, outputs on cpu"):
        kf.estimate(model, (X, Y.to("meta")), kf.Categorical())
    with pytest.raises(kf.DataError, match="lies on meta"):
        kf.coverage(model, X.to("meta"))


def test_other_dtypes_and_shapes_are_said_with_the_error_of_torch(model):
    for batch, said in ((X.double(), r"torch.float64 \[12, 3\]"), (X[:, :2], r"torch.float32 \[12, 2\]")):
        with pytest.raises(RuntimeError) as caught:
            kf.estimate(model, [(X, Y), (batch, Y)], kf.Categorical())
        note = " ".join(caught.value.__notes__)
        assert "in batch 1" in note and "parameters are torch.float32 on cpu" in note
        assert said.replace("\\", "") in note
    with pytest.raises(TypeError) as caught:
        kf.estimate(model, ((X, X), Y), kf.Categorical())
    assert "in batch 0" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "likelihood, targets, labels, message",
    [
        (kf.Categorical(), Y + 2, "observed", r"batch 1: label [23] is out of range for 2 classes"),
        (kf.Categorical(), Y[:, None], "sampled", "batch 1: Categorical needs targets of shape"),
        (kf.Categorical(), Y[:7], "sampled", "batch 1: targets .* differ in the number of data"),
        (kf.Categorical(), Y.float(), "observed", "batch 1: Categorical needs integer class indices"),
        (kf.Categorical(), None, "observed", 'batch 1: labels="observed" needs targets'),
        (kf.Categorical(), [1] * 12, "observed", "batch 1: Categorical needs the targets to be a tensor, found list"),
        (kf.Gaussian(), torch.randn(12, 1), "observed", "batch 1: Gaussian needs targets of shape"),
        (kf.Gaussian(), torch.full((12, 2), torch.inf), "observed", "batch 1: Gaussian needs real, finite targets"),
        (kf.Bernoulli(), torch.full((12, 2), 1.5), "observed", "batch 1: "),
    ],
)
def test_targets_that_do_not_fit(model, likelihood, targets, labels, message):
    good = Y if isinstance(likelihood, kf.Categorical) else torch.rand(12, 2).round()
    with pytest.raises(kf.DataError, match=message):
        kf.estimate(model, [(X, good), (X, targets)], likelihood, labels=labels)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(model, bad):
    x = X.clone()
    x[3, 1] = bad
    if bad != bad:
        with pytest.raises(
            kf.NumericalError, match=r"batch 1: the batch holds 1 values that are NaN or Inf.*\[12, 3\]"
        ):
            kf.estimate(model, [(X, Y), (x, Y)], kf.Categorical())
    linear = nn.Linear(3, 2)
    with pytest.raises(kf.NumericalError, match="batch 0: the batch holds 1 values"):
        kf.estimate(linear, x, kf.Gaussian())
    linear.weight.data[0, 0] = bad
    with pytest.raises(
        kf.NumericalError, match="batch 0: the model's outputs hold NaN or Inf although the batch is finite"
    ):
        kf.estimate(linear, X, kf.Gaussian())


@pytest.mark.parametrize("fit", ["kfac", "ekfac", "diagonal", "full"])
def test_overflow_behind_finite_outputs_names_the_layer(fit):
    model = Written(
        lambda m, x: m.l1(torch.tanh(m.l0(x) * 1e30) * 1e30) * 1e-30, l0=nn.Linear(3, 3), l1=nn.Linear(3, 2)
    )
    model.l0.weight.data *= 1e-30
    model.l0.bias.data.zero_()
    with pytest.raises(kf.NumericalError, match=r"l[01]\.weight"):
        kf.estimate(model, X, kf.Gaussian(), fit=fit)


# Several passes -------------------------------------------------------------------------------------------------------


class Reading:
    """Counts how often it is read; reshuffles by a generator of its own if asked to."""

    def __init__(self, shuffle=False, shrink=False):
        self.reads, self.shuffle, self.shrink = 0, shuffle, shrink

    def __iter__(self):
        self.reads += 1
        order = torch.randperm(12, generator=torch.Generator().manual_seed(self.reads if self.shuffle else 0))
        batches = [(X[part], Y[part]) for part in order.split(5)]
        return iter(batches[: -self.reads if self.shrink else None])


def test_generators_are_for_one_pass(model):
    batches = [(X[:5], Y[:5]), (X[5:], Y[5:])]
    assert torch.equal(dense(model, (b for b in batches)), dense(model, batches))
    with pytest.raises(kf.DataError, match="a generator can be read only once"):
        dense(model, (b for b in batches), fit="ekfac")
    used = iter(batches)
    list(used)
    with pytest.raises(kf.DataError, match=r"no batch.*only once"):
        dense(model, used)


def test_passes_read_the_same(model):
    data = Reading()
    dense(model, data, fit="kfac")
    assert data.reads == 1
    dense(model, data, fit="ekfac")
    assert data.reads == 3


@pytest.mark.parametrize("fit", ["ekfac", {"0.*": "kfac", "*": "ekfac"}])
def test_loaders_that_shuffle(model, fit):
    loader = DataLoader(TensorDataset(X, Y), 5, shuffle=True)
    before = torch.get_rng_state()
    first = dense(model, loader, fit=fit, seed=2, labels="sampled")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(dense(model, loader, fit=fit, seed=2, labels="sampled"), first)
    own = DataLoader(TensorDataset(X, Y), 5, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(kf.DataError, match=r"batch 0 of pass 2 is not the one of the first pass.*generator of its own"):
        dense(model, own, fit=fit)
    whole = DataLoader(TensorDataset(X, Y), 12, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(kf.DataError, match="batch 0 of pass 2"):  # the same data in one batch, in another order
        dense(model, whole, fit=fit)


def test_loaders_that_change(model):
    with pytest.raises(kf.DataError, match="batch 0 of pass 2 is not the one of the first pass"):
        dense(model, Reading(shuffle=True), fit="ekfac")
    with pytest.raises(kf.DataError, match="Pass 2 read 1 batches, the first one 2"):
        dense(model, Reading(shrink=True), fit="ekfac")

    class Once:
        batches = iter([(X, Y)])

        def __iter__(self):
            return self.batches

    with pytest.raises(kf.DataError, match="Pass 2 read 0 batches, the first one 1"):
        dense(model, Once(), fit="ekfac")


def test_checksums():
    batch = (X, {"y": Y, "z": [torch.tensor([True, False]), torch.randn(2, dtype=torch.complex64)]})
    same = (X.clone(), {"y": Y.clone(), "z": [t.clone() for t in batch[1]["z"]]})
    assert torch.equal(checksum(batch), checksum(same))
    assert len(checksum(batch)) == 4
    for changed in (X.flip(0), X + 1e-6, X.t().contiguous().t().flip(1), X.double()):
        assert not torch.equal(checksum(changed), checksum(X))
    assert torch.equal(checksum(X.t()), checksum(X.t().contiguous()))
    strange = torch.tensor([float("nan"), float("-inf"), 0.0])  # masks are made of such numbers
    assert torch.equal(checksum(strange), checksum(strange.clone()))
    assert not torch.equal(checksum((X, Y)), checksum(X))
    assert checksum("text").shape == (0,)


def test_masks_of_infinities_are_recognised():
    model = Written(
        lambda m, x, mask: m.l((x.unsqueeze(1) @ x.unsqueeze(2)).squeeze(2).add(mask).softmax(1) * x), l=nn.Linear(3, 2)
    )
    mask = torch.tensor([0.0, float("-inf"), 0.0]).expand(12, 3)
    assert dense(model, [((X, mask), Y)], fit="ekfac").isfinite().all()


def test_inference_tensors_are_copied_and_others_are_not():
    with torch.inference_mode():
        made = X.clone()
    pair = namedtuple("pair", "x y")
    for value in (made, [made], {"x": made}, (made, X), pair(made, X)):
        found = ordinary(value)
        assert isinstance(found, type(value))
        first = next(iter(found.values())) if isinstance(found, dict) else found if value is made else found[0]
        assert not first.is_inference() and torch.equal(first, X)
    assert ordinary((made, X))[1] is X
    plain = (X, {"y": Y})
    assert ordinary(plain) is plain


def test_what_is_one_batch_and_what_are_many():
    assert passes_over(X) == ([X], True)
    assert passes_over((X, Y)) == ([(X, Y)], True)
    assert passes_over([X, Y]) == ([X, Y], True)
    loader = DataLoader(TensorDataset(X))
    assert passes_over(loader) == (loader, True)
    assert passes_over(iter([X]))[1] is False
