"""Who computes what, and how sums travel."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kronfisher.distributed import owners
from kronfisher.distributed.sums import Sum, buckets
from tests.distributed import cases

pytestmark = pytest.mark.usual_ranks(3)
COSTS = st.lists(st.floats(0, 1e6), min_size=0, max_size=30)


@given(COSTS, st.integers(1, 8))
def test_work_is_shared_evenly(costs, ranks):
    """No rank has more than the mean and one piece; the longest pieces first (Graham 1969)."""
    owner = owners(costs, ranks)
    loads = [sum(cost for cost, own in zip(costs, owner, strict=True) if own == rank) for rank in range(ranks)]
    assert len(owner) == len(costs) and set(owner) <= set(range(ranks))
    assert max(loads) <= (sum(costs) / ranks + max(costs, default=0.0)) * (1 + 1e-12)
    assert owner == owners(list(costs), ranks)
    if len(costs) <= ranks and all(costs):
        assert len(set(owner)) == len(costs)


@pytest.mark.parametrize("fit", ["ekfac", "kfoc"])
def test_who_owns_a_block_changes_nothing_but_the_last_bits_of_its_sum(ranks, fit):
    for blocks, others in ranks.call(cases.other_owners, fit):
        assert blocks.keys() == others.keys() and len(blocks) == 2
        for name, block in blocks.items():
            torch.testing.assert_close(others[name], block, rtol=1e-10, atol=1e-13)


def test_triangles_in_buckets_are_plain_sums(ranks):
    """Of each matrix the upper triangle, of everything else all, at the owner or at all ranks."""
    for answers in ranks.call(cases.summed, [-1, 0, ranks.size - 1]):
        assert all(answers)


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_a_triangle_takes_half_of_the_numbers(size):
    for lead in ((), (3,)):
        one = Sum(torch.randn(*lead, size, size), triangle=True)
        assert one.numel == len(one.packed()) == max(1, *lead, 1) * ((size + 1) // 2) * (size + 1)


def test_buckets_hold_everything_in_order_by_owner_and_dtype(monkeypatch):
    monkeypatch.setattr("kronfisher.distributed.sums._BUCKET", 200)
    sums = [Sum(torch.randn(8, dtype=dtype), owner) for dtype in (torch.float32, torch.float64) for owner in (0, 1, 0)]
    found = buckets(sums)
    assert {id(one) for bucket in found for one in bucket.sums} == {id(one) for one in sums}
    for bucket in found:
        assert len({(one.owner, one.tensor.dtype) for one in bucket.sums}) == 1
