import pytest
import torch

from kronfisher.errors import DataError
from kronfisher.likelihoods import along_outputs, masked_positions


def mask(n, count):
    found = torch.rand(n, count, generator=torch.Generator().manual_seed(0)) < 0.5
    found[0, 0], found[0, 1:], found[1] = True, False, False
    return found


@pytest.mark.parametrize(
    ("shape", "joint", "expected"),
    [
        ((2, 6, 3), None, (2, 6, 1)),  # features last
        ((2, 3, 6), None, (2, 1, 6)),  # channels first
        ((2, 3, 2, 5), None, (2, 3, 2, 1)),
        ((2, 5, 2, 3), None, (2, 1, 2, 3)),
        ((2, 2, 3), None, (2, 2, 3)),  # one number per position
        ((2, 6, 1), None, (2, 6, 1)),
        ((2, 1, 6), None, (2, 1, 6)),
        ((2, 6, 6), 1, (2, 1, 6)),
        ((2, 6, 6), 2, (2, 6, 1)),
        ((2, 4, 2, 3), 1, (2, 1, 2, 3)),
        ((2, 2, 3, 4), 3, (2, 2, 3, 1)),
        ((2, 3), None, (2, 1)),  # one row per example: positions are inside the model only
        ((2, 3), 1, (2, 1)),
        ((2, 6), 1, (2, 1)),
        ((2,), None, (2,)),
        ((2, 1, 5), 2, (2, 1, 1)),
    ],
)
def test_masks_along_outputs(shape, joint, expected):
    given, outputs = mask(2, 6), torch.zeros(shape)
    found = along_outputs(given, outputs, joint, "batch 7")
    truth = given if len(found.flatten()) > 2 else given.any(1)
    assert found.shape == expected and torch.equal(found.flatten(), truth.flatten())
    assert (outputs * found).shape == outputs.shape


def test_masks_of_data_fit_everything():
    for shape, joint in (((2,), None), ((2, 3), None), ((2, 3, 4), 1)):
        found = along_outputs(mask(2, 1), torch.zeros(shape), joint, "batch 7")
        assert found.shape == (2,) + (1,) * (len(shape) - 1)


@pytest.mark.parametrize(
    ("shape", "joint", "message"),
    [
        ((2, 6), None, "do not show which of their dimensions are positions, if any; return"),
        ((2, 6, 6), None, "do not show which of their dimensions are positions, if any; return"),
        ((2, 5, 3), None, r"outputs \[2, 5, 3\] have another number of them; mask positions of the outputs by ignored"),
        ((2, 5, 6), 2, "have another number of them"),
    ],
)
def test_what_cannot_be_told(shape, joint, message):
    with pytest.raises(DataError, match="^batch 7: the mask has 6 positions for each example, .*" + message):
        along_outputs(mask(2, 6), torch.zeros(shape), joint, "batch 7")


def test_masks_and_ignored_targets_both_count():
    one, other, data = (
        mask(3, 4),
        torch.tensor([[True, False, True, False]]).expand(3, 4),
        torch.tensor([[1], [0], [1]]) > 0,
    )
    assert torch.equal(masked_positions(one, other, ""), one & other)
    assert torch.equal(masked_positions(one, data, ""), one & data)
    assert torch.equal(masked_positions(data, one, ""), one & data)
    assert masked_positions(one, None, "") is one
    with pytest.raises(
        DataError, match=r"^batch 7: the mask has 4 positions for each example, the targets 2; give one mask"
    ):
        masked_positions(one, mask(3, 2), "batch 7")
