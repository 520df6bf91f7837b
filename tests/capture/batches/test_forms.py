"""Every form in which data may come."""

from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import kronfisher as kf
from kronfisher.capture.batches import checksum
from tests.capture.batches.data import X, Y, dense
from tests.helpers.networks import Written


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

    with pytest.raises(kf.DataError, match="batch 0 of pass 2 differs from that of the first pass"):
        dense(model, Changing(), fit="ekfac")
    bad = x.copy()
    bad[3, 1] = float("nan")
    with pytest.raises(kf.NumericalError, match="batch 0: the batch contains 1 values that are NaN"):
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


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with a single core
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
            kf.DataError, match=r"holds single examples; pass torch.utils.data.DataLoader\(data, batch_size=N"
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
    with pytest.raises(kf.DataError, match="batch 0: forward returned list as outputs, not a tensor"):
        dense(model, data, forward=lambda m, b: ([m(b.inputs)], b.labels))
    for wrong in (lambda m, b: m(b.inputs), lambda m, b: (m(b.inputs), b.labels, 0)):
        with pytest.raises(kf.DataError, match=r"batch 0: forward must return \(outputs, targets\)"):
            dense(model, data, forward=wrong)
