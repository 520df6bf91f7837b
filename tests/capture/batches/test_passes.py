"""Data that are read several times have to be the same."""

from collections import namedtuple
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronfisher as kf
from kronfisher.capture.batches import as_batches, checksum
from kronfisher.capture.containers import without_inference_tensors
from tests.capture.batches.data import X, Y, dense
from tests.helpers.networks import Written


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
    with pytest.raises(kf.DataError, match=r"batch 0 of pass 2 differs from .* first pass.*generator of its own"):
        dense(model, own, fit=fit)
    whole = DataLoader(TensorDataset(X, Y), 12, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(kf.DataError, match="batch 0 of pass 2"):  # the same data in one batch, in another order
        dense(model, whole, fit=fit)


def test_loaders_that_change(model):
    with pytest.raises(kf.DataError, match="batch 0 of pass 2 differs from that of the first pass"):
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
    assert checksum(object()).shape == (0,)
    for texts in (["a", "b"], {"x": X, "texts": ("a", 2)}, np.array(["a", "b"])):
        other = {"x": X, "texts": ("a", 3)} if isinstance(texts, dict) else texts[::-1]
        assert torch.equal(checksum(texts), checksum(deepcopy(texts)))
        assert not torch.equal(checksum(texts), checksum(other))


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
        found = without_inference_tensors(value)
        assert isinstance(found, type(value))
        first = next(iter(found.values())) if isinstance(found, dict) else found if value is made else found[0]
        assert not first.is_inference() and torch.equal(first, X)
    assert without_inference_tensors((made, X))[1] is X
    plain = (X, {"y": Y})
    assert without_inference_tensors(plain) is plain


def test_what_is_one_batch_and_what_are_many():
    assert as_batches(X) == ([X], True)
    assert as_batches((X, Y)) == ([(X, Y)], True)
    both = [X, Y[:2]]
    assert as_batches(both)[0] is both
    loader = DataLoader(TensorDataset(X))
    assert as_batches(loader) == (loader, True)
    assert as_batches(iter([X]))[1] is False
