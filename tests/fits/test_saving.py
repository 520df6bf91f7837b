"""A state can be saved and loaded after any update, in any pass, and goes on to the same bits."""

import io
from dataclasses import replace

import pytest
import torch

import kronfisher as kf
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fits import FITS, State, resolve
from kronfisher.layers.convolution import Geometry, Patches
from kronfisher.layers.onehot import Indices
from kronfisher.layers.samples import Samples
from tests.fits.pieces import random_samples


def through_a_file(state):
    """The state as a file holds it."""
    file = io.BytesIO()
    torch.save(state.to_dict(), file)
    file.seek(0)
    return State.from_dict(torch.load(file, weights_only=True), state.blocks)


def block(samples, name="w", operator="linear"):
    groups, outputs, inputs = samples.shape
    return Block(name, operator, Window.of(name, torch.zeros(groups, outputs, inputs)))


def run(fit, batches, renew, waiting=None):
    """Every pass over batches, each a tuple of samples; `renew` is called after every update and every pass."""
    group = tuple(block(samples, f"w{place}") for place, samples in enumerate(batches[0]))
    plan = fit.plan(group, 8)
    plan = plan if waiting is None else replace(plan, waiting=waiting)
    state = last = renew(fit.init(group, plan, batches[0][0].gradients))
    while state is not None:
        for batch in batches:
            state.count = state.count + len(batch[0])
            state = renew(fit.update(state, batch))
        last, state = state, fit.next_pass(state)
        state = None if state is None else renew(state)
    last = renew(last)
    operator = fit.finish(last)
    return operator.to_dense(), fit.error(last, operator), fit.notes(last), last


def agree(fit, batches, waiting=None):
    plain = run(fit, batches, lambda state: state, waiting)
    loaded = run(fit, batches, through_a_file, waiting)
    assert torch.equal(plain[0], loaded[0]) and plain[1:3] == loaded[1:3]
    assert type(plain[3]) is type(loaded[3]) and plain[3].phase == loaded[3].phase


@pytest.mark.parametrize("waiting", [None, 0], ids=["waiting", "pieces"])
@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("fit", FITS)
def test_every_fit_goes_on_from_a_file_after_every_update(fit, positions, waiting):
    whole = random_samples(n=36, T=positions, I=4, O=3)
    agree(resolve(fit), [(whole.part(low, low + 12),) for low in (0, 12, 24)], waiting)


@pytest.mark.parametrize("fit", [kf.KroneckerSum(2), kf.KroneckerSum(2, "nonnegative"), kf.KFACCorrected(), kf.KFOC()])
def test_fits_that_merge_pieces_go_on_from_a_file_between_them(fit, monkeypatch):
    monkeypatch.setattr("kronfisher.fits.kronecker_sum.PIECE", 15)
    monkeypatch.setattr("kronfisher.fits.kfoc._PIECE", 15)
    whole = random_samples(n=60, T=2, I=4, O=3)
    agree(fit, [(whole.part(low, low + 12),) for low in range(0, 60, 12)])


def test_a_chain_goes_on_from_a_file():
    layers = random_samples(n=24, I=4, O=3), random_samples(n=24, I=3, O=2, seed=1)
    batches = [tuple(samples.part(low, low + 12) for samples in layers) for low in (0, 12)]
    agree(kf.BlockTridiagonal(), batches)


def convolution(n):
    window = Geometry((2, 2), (1, 1), ((0, 0), (1, 0)), (1, 1))
    patches = Patches(torch.randn(n, 2, 3, 3).double(), window, 2, n, True)
    return Samples(patches, torch.randn(2, n, patches.shape[2], 3).double(), mask=(torch.rand(n, 6) > 0.3).double())


def lookup(n):
    inputs = Indices(torch.randint(5, (n, 2, 2)), torch.ones(n, 2, 2).double(), 5)
    return Samples(inputs, torch.randn(1, n, 2, 3).double())


@pytest.mark.parametrize("samples", [convolution, lookup])
@pytest.mark.parametrize("fit", [kf.KFOC(), kf.KroneckerSum(2), kf.Auto(), kf.Prototypes()], ids=str)
def test_samples_that_wait_are_saved_in_their_own_form(fit, samples):
    agree(fit, [(samples(8),), (samples(8),)])


def test_a_loaded_state_has_memory_of_its_own():
    fit, samples = kf.KFAC(), random_samples(n=12)
    group = (block(samples),)
    state = fit.update(fit.init(group, fit.plan(group, 8), samples.gradients), (samples,))
    loaded = State.from_dict(state.to_dict(), group)
    before = loaded.inputs.clone()
    fit.update(state, (samples,))
    assert torch.equal(loaded.inputs, before) and not torch.equal(state.inputs, before)


def test_a_state_of_an_unknown_fit_is_refused():
    saved = {**random_state().to_dict(), "type": "Unheard"}
    with pytest.raises(ValueError, match=r"'Unheard', which is not known here; import the fit"):
        State.from_dict(saved, ())


def random_state():
    fit, samples = kf.KFAC(), random_samples(n=12)
    return fit.init((block(samples),), fit.plan((block(samples),), 8), samples.gradients)


def test_every_type_of_state_has_a_name_of_its_own():
    def descendants(kind):
        return {kind}.union(*map(descendants, kind.__subclasses__()))

    names = [kind.__name__ for kind in descendants(State) if kind.__module__.startswith("kronfisher")]
    assert len(set(names)) == len(names) > len(FITS) / 2
