"""Thousands of classes: memory is a small multiple of the outputs, nothing of [N, P, C, C] or [N, C, parameters]."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kronfisher as kf
from kronfisher.likelihoods import REGISTRY, Draws, Likelihood, Weighted


class Memory(TorchDispatchMode):
    """Bytes of the tensors that are made while it is on: those alive at once, and the largest."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak, self.largest = {}, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self.note(tensor, given)
        return found

    def note(self, tensor, given):
        place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if place in given and place not in self.live:
            return  # a view of something that was there before
        if place not in self.live:
            self.live[place] = 0
            self.now += size
            self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        self.live[place] += 1
        weakref.finalize(tensor, self.gone, place, size)

    def gone(self, place, size):
        self.live[place] -= 1
        if not self.live[place]:
            del self.live[place]
            self.now -= size


def test_the_measure():
    x = torch.zeros(1000)
    with Memory() as memory:
        y = x + 1
        z = (y * 2)[:10]
        del y
        z.view(-1).sum()
    assert memory.largest == 4000 and 8000 <= memory.peak < 8200 and memory.now < 4100


LIKELIHOODS = {
    "plain": (kf.Categorical(class_dim=-1), 1.5),
    "weighted": (kf.Categorical(weight=torch.rand(5000), class_dim=-1), 1.5),
    "smoothed": (kf.Categorical(label_smoothing=0.1, class_dim=-1), 1.5),
    "weights of data": (Weighted(kf.Categorical(class_dim=-1)), 2.5),  # a product with the weights comes after
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_vectors_take_a_small_multiple_of_the_outputs(name, monkeypatch):
    monkeypatch.setattr("kronfisher.likelihoods.softmax._CHUNK", 2**16)
    likelihood, allowed = LIKELIHOODS[name]
    outputs, targets = torch.randn(8, 32, 5000), torch.randint(5000, (8, 32))
    targets = (targets, torch.rand(8)) if isinstance(likelihood, Weighted) else targets
    size = outputs.nbytes

    def measured(work) -> float:
        with Memory() as memory:
            work()
        assert memory.largest <= size
        return memory.peak / size

    # The vector itself is 1.
    assert 1 <= measured(lambda: likelihood.sampled(outputs, targets, Draws(0))) < allowed
    assert 1 <= measured(lambda: likelihood.observed(outputs, targets)) < allowed
    # Square roots of all classes are prepared once; then one column at a time.
    vectors = likelihood.exact(outputs, targets)
    assert measured(lambda: next(vectors)) < allowed + 5
    assert measured(lambda: next(vectors)) < allowed


def test_checks_make_no_copies():
    outputs, targets = torch.randn(8, 32, 5000), torch.randint(5000, (8, 32))
    with Memory() as memory:
        kf.Categorical(class_dim=-1).check(outputs, targets, labels="observed")
    assert memory.peak < 0.01 * outputs.nbytes


@pytest.mark.parametrize("likelihood", [kf.Categorical(), kf.Bernoulli(), kf.Poisson()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("labels", ["sampled", "exact"])
def test_an_estimate_with_ten_thousand_outputs(likelihood: Likelihood, labels, monkeypatch):
    """All parameters of the head together are small: N·C·P would be 500 times the outputs."""
    monkeypatch.setattr("kronfisher.likelihoods.softmax._CHUNK", 2**16)
    classes, n = (10_000, 64) if labels == "sampled" else (200, 256)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, classes))
    x, size = torch.randn(n, 5), 4 * n * classes
    with Memory() as memory:
        fisher = kf.estimate(model, x, likelihood, fit="diagonal", labels=labels, exact_limit=classes)
    assert fisher.trace() > 0
    assert memory.peak < 18 * size and memory.largest <= 2 * size, (memory.peak / size, memory.largest / size)


@pytest.mark.parametrize("name", [name for name in REGISTRY if "categorical" in name])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_a_few_rows_at_a_time_give_the_same(name, soft, monkeypatch):
    factory, example, _ = REGISTRY[name]
    likelihood = factory()
    outputs, targets = example(torch.Generator().manual_seed(1), torch.float64)
    if soft:
        targets = (2 * outputs).softmax(likelihood.joint_dim(outputs, targets))

    def everything():
        return [
            likelihood.sampled(outputs, targets, Draws(0)),
            likelihood.observed(outputs, targets),
            likelihood.sample(outputs, Draws(1)).double(),
        ]

    whole = everything()
    monkeypatch.setattr("kronfisher.likelihoods.softmax._CHUNK", 2 * 3)
    for found, expected in zip(everything(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
