"""Samples that a first pass keeps for later ones give the same bits as another run of the model."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.estimation import kept
from kronfisher.fits import FITS

PASSES = ["auto", "ekfac", "ekfac-kfoc", "kfoc-exact", "kl", "prototypes"]
X, Y = torch.randn(11, 2, 5, 5, generator=torch.Generator().manual_seed(1)).double(), torch.arange(11) % 3
BATCHES = [(X[:4], Y[:4]), (X[4:6], Y[4:6]), (X[6:], Y[6:])]


def network() -> nn.Module:
    parts = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(27, 3)
    return nn.Sequential(*parts).double().eval()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that K-FOC, to be exact, has to read the data again."""
    monkeypatch.setattr("kronfisher.fits.kfoc._PIECE", 2)


def times_run(model: nn.Module) -> list[int]:
    """Grows with every call of the model."""
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    return runs


def tensors(fisher: kf.Fisher) -> dict[str, torch.Tensor]:
    return {f"{name} {key}": t for name, operator in fisher.blocks.items() for key, t in operator.tensors().items()}


def test_the_fits_of_several_passes_are_these(read_again):
    several = []
    for name in FITS:
        model = network()
        runs = times_run(model)
        kf.estimate(model, BATCHES, kf.Categorical(), fit=name)
        several += [name] if len(runs) > len(BATCHES) else []
    assert sorted(several) == PASSES


@pytest.mark.parametrize("labels", ["sampled", "exact", "observed"])
@pytest.mark.parametrize("fit", PASSES)
def test_the_answer_is_that_of_another_run_to_the_bit(fit, labels, monkeypatch):
    model = network()
    runs = times_run(model)
    found = kf.estimate(model, BATCHES, kf.Categorical(), fit=fit, labels=labels)
    assert len(runs) == len(BATCHES)
    monkeypatch.setattr(kept, "ROOM", -1)
    again = kf.estimate(model, BATCHES, kf.Categorical(), fit=fit, labels=labels)
    assert len(runs) > 2 * len(BATCHES)
    ours, theirs = tensors(found), tensors(again)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for mine, other in ((found.info, again.info),):
        assert (mine.count, mine.log_likelihood, mine.outputs) == (other.count, other.log_likelihood, other.outputs)
        assert [block.rows for block in mine.blocks.values()] == [block.rows for block in other.blocks.values()]


def test_what_is_kept_is_bounded(monkeypatch):
    """By the room, whichever batch exceeds it, and by nothing at all where the caller's budget is the bound."""
    model = network()
    runs = times_run(model)
    sizes = [b[0].nbytes + 8 * len(b[0]) * (27 + 27 + 3) for b in BATCHES]  # of the layers' inputs and gradients, about
    for room, expected in ((sizes[0] // 2, 6), (sum(sizes) - 8, 6), (2 * sum(sizes), 3)):
        monkeypatch.setattr(kept, "ROOM", room)
        runs.clear()
        kf.estimate(model, iter_again(BATCHES), kf.Categorical(), fit="ekfac")
        assert len(runs) == expected, room
    runs.clear()
    kf.estimate(model, BATCHES, kf.Categorical(), fit="ekfac", memory_budget=2**30)
    assert len(runs) == 6


class iter_again:
    # Batches without a length, so that the first one does not tell how much all take.
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_a_loader_may_use_its_memory_again():
    class Loader:
        memory = torch.empty(4, 2, 5, 5).double()

        def __iter__(self):
            for k in (0, 4):
                yield self.memory.copy_(X[k : k + 4])

    model = network()
    found = kf.estimate(model, Loader(), kf.Categorical(), fit="ekfac")
    plain = kf.estimate(model, [X[:4], X[4:8]], kf.Categorical(), fit="ekfac")
    assert all(torch.equal(tensors(found)[key], t) for key, t in tensors(plain).items())


def test_batches_that_depend_on_what_the_model_draws():
    """The loader and dropout share a generator: such batches are the same only if the model runs in between."""

    class Loader:
        def __iter__(self):
            for _ in range(3):
                yield torch.randn(4, 2, 5, 5).double()

    model = network()
    runs = times_run(model)
    kf.estimate(model, Loader(), kf.Categorical(), fit="ekfac")
    assert len(runs) == 3
    runs.clear()
    model.get_submodule("3").train()
    kf.estimate(model, Loader(), kf.Categorical(), fit="ekfac")
    assert len(runs) == 6


def test_other_batches_in_a_later_pass_are_refused_all_the_same():
    class Loader:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(BATCHES[:: 1 if self.passes == 1 else -1])

    class Shrinking(Loader):
        def __iter__(self):
            self.passes += 1
            return iter(BATCHES[: len(BATCHES) + 1 - self.passes])

    class Growing(Loader):
        def __iter__(self):
            self.passes += 1
            return iter(BATCHES[: self.passes])

    with pytest.raises(kf.DataError, match="batch 0 of pass 2 differs"):
        kf.estimate(network(), Loader(), kf.Categorical(), fit="ekfac")
    for loader in (Shrinking(), Growing()):
        with pytest.raises(kf.DataError, match="Pass 2 read 2 batches"):
            kf.estimate(network(), loader, kf.Categorical(), fit="ekfac")
