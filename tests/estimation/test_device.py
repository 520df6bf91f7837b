"""Every fit estimates on another device what it estimates on the CPU."""

import pytest
import torch

from kronfisher.fits import FITS
from tests.helpers.close import close
from tests.helpers.device.trainings import NETWORKS, estimate

# Auto makes many fits of every block: one network is enough.
CASES = [(network, fit) for network in NETWORKS for fit in FITS if fit != "auto" or network == NETWORKS[0]]


def refuses(device):
    x = torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    return (2 * x + torch.tensor(1.0)).tolist()


def test_the_simulated_device_refuses_tensors_of_the_cpu(on_device):
    assert on_device(refuses) == [3.0, 3.0, 3.0]


@pytest.mark.parametrize(("network", "fit"), CASES)
def test_estimates_are_those_of_the_cpu(on_device, network, fit):
    close(on_device(estimate, network, fit), estimate(torch.device("cpu"), network, fit))
