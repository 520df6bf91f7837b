import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kronfisher.likelihoods import Draws


@pytest.mark.parametrize("method", ["uniform", "normal"])
@pytest.mark.parametrize("sizes", [(4, 6), (1, 1, 1, 7), (15, 16, 17), (3, 1000, 2), (0, 5)])
@pytest.mark.parametrize("datum", [(), (3,), (2, 5)])
def test_splitting_a_request_changes_nothing(method, sizes, datum):
    whole = getattr(Draws(3, 1), method)([sum(sizes), *datum])
    draws = Draws(3, 1)
    parts = [getattr(draws, method)([size, *datum]) for size in sizes]
    assert torch.equal(whole, torch.cat(parts))


def test_precision_rounds_the_same_numbers():
    double = Draws(0).uniform([100])
    single = Draws(0).uniform([100], dtype=torch.float32)
    assert torch.equal(single, double.float())
    assert Draws(0).normal([100], dtype=torch.bfloat16).dtype == torch.bfloat16


def test_numbers_depend_on_seed_and_stream_alone():
    keys = [(seed, stream) for seed in (-1, 0, 1, 2**32, 2**32 + 1, 2**63) for stream in range(20)]
    firsts = torch.stack([Draws(*key).uniform([4]) for key in keys])
    assert len(firsts.unique(dim=0)) == len(keys)
    assert torch.equal(firsts, torch.stack([Draws(*key).uniform([4]) for key in keys]))


def test_streams_are_uncorrelated():
    # 190 correlations of 4000 numbers have a standard error of 1/√4000 = .016 each; 4.5 of those for all of them.
    streams = torch.stack([Draws(0, stream).normal([4000]) for stream in range(20)])
    off_diagonal = torch.corrcoef(streams) - torch.eye(20)
    assert off_diagonal.abs().max() < 4.5 / math.sqrt(4000)


def test_distributions():
    count = 20000
    uniform = Draws(5).uniform([count]).sort().values
    normal = Draws(6).normal([count]).sort().values
    grid = (torch.arange(count) + 0.5) / count
    for numbers, cdf in ((uniform, uniform), (normal, torch.special.ndtr(normal))):
        assert (cdf - grid).abs().max() < 1.63 / math.sqrt(count), numbers  # Kolmogorov-Smirnov at 1 %


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-53])
def test_strictly_inside_the_unit_interval(dtype, extreme):
    def constant(seed):
        draws = Draws(seed)
        draws._generator = SimpleNamespace(random=lambda shape: np.full(shape, extreme))
        return draws

    uniform = constant(0).uniform([2], dtype=dtype)
    assert uniform.dtype == dtype
    assert ((uniform > 0) & (uniform < 1)).all()
    assert uniform.float().log().isfinite().all()
    if dtype in (torch.float64, torch.float32):
        assert torch.erfinv(2 * uniform - 1).isfinite().all()
    assert constant(0).normal([2], dtype=dtype).isfinite().all()


def test_global_generator_untouched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Draws(0).normal([100])
    assert torch.equal(before, torch.get_rng_state())


def test_repr_names_seed_and_stream():
    assert repr(Draws(3, stream=2)) == "Draws(seed=3, stream=2)"
