"""Training takes the same steps on another device, and a plain step does not wait for it."""

import pytest
import torch

import kronfisher as kf
from kronfisher.fits import FITS, resolve
from tests.helpers.close import close
from tests.helpers.device.trainings import NETWORKS, precondition, train, train_evened

CPU = torch.device("cpu")
# Of one batch each, and cheap enough to be tried everywhere; others of several passes cannot be trained.
TRAINED = [fit for fit in FITS if resolve(fit).trains and fit not in ("kfoc-exact", "kl", "kfac-corrected")]
LONG = ("kfac", "kfoc")
# Renewals of these wait twice at most; the others make decompositions, each of which torch waits for, and choices.
FACTORS = ("kfac", "kfac-reduce", "tkfac")


def agree(there, here):
    assert all(loss == loss for loss in here.losses)
    close(torch.tensor(there.losses), torch.tensor(here.losses), 1e-6)
    close(there.weights, here.weights, 1e-6)
    assert there.renewals == here.renewals
    assert 0 in there.renewals[1:]


def plain(training):
    """What steps that renew nothing waited for."""
    steps = zip(training.waits, training.renewals, strict=True)
    return [wait for found, renewed in steps if not renewed for wait in found]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("fit", TRAINED)
def test_steps_are_those_of_the_cpu(on_device, fit, network):
    steps, options = (60, {}) if fit in LONG else (14, {"refresh": kf.Refresh()})  # with steps that renew nothing
    there = on_device(train, network, fit, steps, options)
    agree(there, train(CPU, network, fit, steps, options))
    assert plain(there) == []
    if fit in FACTORS:  # the first step examines the graph
        for found, renewed in list(zip(there.waits, there.renewals, strict=True))[1:]:
            assert len(found) <= 2 * renewed + 1, (found, renewed)  # one for the course of the loss


@pytest.mark.parametrize("fit", LONG)
@pytest.mark.parametrize("affordable", [0.5, 1e9])  # roots that serve for several steps, and for one
def test_evened_steps_are_those_of_the_cpu(on_device, fit, affordable):
    there, here = on_device(train_evened, fit, affordable, 40), train_evened(CPU, fit, affordable, 40)
    agree(there, here)
    assert plain(there) == []
    others = train(CPU, "deep", fit, 40, {})
    assert float((others.weights - here.weights).norm()) > 1e-2


@pytest.mark.parametrize("network", ["perceptron", "convolutions"])
def test_the_papers_steps_are_those_of_the_cpu(on_device, network):
    options = {"step": kf.QuadraticModel()}
    agree(on_device(train, network, "kfac", 25, options), train(CPU, network, "kfac", 25, options))


@pytest.mark.parametrize("network", NETWORKS)
def test_preconditioned_gradients_are_those_of_the_cpu(on_device, network):
    there = on_device(precondition, network, "kfac", 30)
    agree(there, precondition(CPU, network, "kfac", 30))
    assert plain(there) == []
