"""Every fit under every likelihood, exact and observed labels, on one to four ranks.

The matrices are those of one process up to rounding, searches for terms included: the samples of ranks are put together
in the order of batches.
"""

import pytest

import kronfisher as kf
from kronfisher.fits import FITS, resolve
from kronfisher.likelihoods import REGISTRY
from tests.distributed import cases
from tests.helpers.close import close
from tests.helpers.ranks import world

NAMES = [name for name in FITS if not resolve(name).by_batch]
CASES = [
    ("linear", likelihood, kf.KL(iterations=3) if fit == "kl" else fit, labels, [1] * 5)  # dealt in turn: 0 3, 1 4, 2
    for likelihood in REGISTRY
    for fit in NAMES
    for labels in ("exact", "observed")
]


@pytest.fixture(scope="module")
def truths():
    return [cases.estimate(None, *case) for case in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_fit_under_every_likelihood_is_that_of_one_process(size, tmp_path, truths):
    with world(size, tmp_path) as ranks:
        answers = ranks.call(cases.estimates, CASES, limit=900)
    assert all(len(answer) == len(truths) > 200 for answer in answers)
    for case, (truth, facts), *found in zip(CASES, truths, *answers, strict=True):
        assert cases.same_bits([blocks for blocks, _ in found])
        blocks, own = found[0]
        assert own[0] == facts[0] and own[2:] == facts[2:] and blocks.keys() == truth.keys(), case
        assert own[1] == (facts[1] if facts[1] is None else pytest.approx(facts[1], rel=1e-12))
        for name, matrix in blocks.items():
            close(matrix, truth[name], 1e-10, f"{case} {name}", vanishing=True)
