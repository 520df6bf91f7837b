"""Checks raise at once, or together at the end of a block, in the order in which they were asked for."""

import pytest
import torch

from kronfisher.errors import DataError, NumericalError, NumericalWarning, read, require, together

BAD, GOOD = torch.tensor(False), torch.tensor(True)


def test_a_check_raises_at_once():
    require(GOOD, lambda: DataError("not made"))
    with pytest.raises(DataError, match="first"):
        require(BAD, lambda: DataError("first"))


def test_checks_of_a_block_are_read_at_its_end_and_the_first_one_raises():
    reached = []
    with pytest.raises(NumericalError, match="first"), together():
        require(GOOD, lambda: DataError("good"))
        require(BAD, lambda: NumericalError("first"))
        with together():
            require(BAD, lambda: DataError("second"))
        reached.append(True)
    assert reached
    require(GOOD, lambda: DataError("the block is over"))


def test_what_fails_because_of_a_value_that_a_check_refuses_is_that_check():
    with pytest.raises(DataError, match="label") as caught, together():
        require(BAD, lambda: DataError("label"))
        raise IndexError("out of range")
    assert isinstance(caught.value.__cause__, IndexError)
    with pytest.raises(IndexError), together():
        require(GOOD, lambda: DataError("label"))
        raise IndexError("out of range")


def test_a_block_may_warn_or_think_better_of_it():
    with pytest.warns(NumericalWarning, match="raised"), pytest.raises(DataError), together():
        require(BAD, lambda: None)
        require(BAD, lambda: NumericalWarning("raised"))
        require(BAD, lambda: DataError("last"))


@pytest.mark.parametrize("nested", [False, True])
def test_a_block_answers_what_it_is_asked(nested):
    with together() if nested else pytest.MonkeyPatch.context(), together() as answers:
        require(GOOD, lambda: DataError("not made"))
        answers += [BAD, True, GOOD]
    assert answers == [False, True, True] == read([BAD, True, GOOD])


def counted(device):
    from tests.helpers.device.simulated import waits

    flags = torch.ones(5, dtype=torch.bool, device=device)
    with waits() as found, together():
        for flag in flags:
            require(flag, lambda: DataError("not made"))
        assert not found
    return len(found)


def test_the_host_waits_once_for_a_block(on_device):
    assert on_device(counted) == 1
