"""What all tests share. Before torch: on some processors MKL's results depend on where in memory a matrix lies."""

import os

os.environ.setdefault("MKL_CBWR", "COMPATIBLE")  # so that the same numbers, loaded or resumed, give the same bits

import pytest
import torch
from hypothesis import settings

from tests.helpers.device.process import device_process

settings.register_profile("kronfisher", deadline=None, print_blob=True)  # time limits fail on busy machines only
settings.load_profile("kronfisher")
torch.set_num_threads(1)  # the problems are tiny: more threads cost more than they bring, and change the last bits


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same global random state, whichever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def double():
    """Tensors are in double precision where nothing else is said."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def few_rows_pay(monkeypatch):
    """Passes are captured for the rows of small networks, too, as they are for large ones."""
    monkeypatch.setattr("kronfisher.optim.row_inverse.CAPTURING", 0.0)


@pytest.fixture
def read_again(monkeypatch):
    """Every pass runs the model, also where samples are few enough to be kept from the first one."""
    monkeypatch.setattr("kronfisher.estimation.kept.ROOM", -1)


@pytest.fixture(scope="session")
def on_device():
    """Calls a function in a process that has a simulated device, which it gets first."""
    with device_process() as call:
        yield call
