"""Checks raise at once, or together at the end of a block, in the order in which they were asked for."""

import re

import numpy as np
import pytest
import torch

import kronfisher as kf
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


# Options that are integers --------------------------------------------------------------------------------------------


def linear():
    return torch.nn.Linear(2, 2)


def estimated(**options):
    return kf.estimate(linear(), torch.ones(3, 2), kf.Gaussian(), **options)


def posterior():
    model = linear()
    return kf.Laplace(model, kf.estimate(model, (X, X), kf.Gaussian(), labels="exact"))


def trained(**options):
    return kf.NaturalGradient(linear(), kf.Gaussian(), **options)


X = torch.ones(3, 2)
SCORES = torch.ones(1, 4)
INTEGERS = {
    "estimate(samples)": lambda n: estimated(samples=n),
    "estimate(seed)": lambda n: estimated(seed=n),
    "compare(samples)": lambda n: kf.compare(linear(), X, kf.Gaussian(), fits=["kfac"], samples=n),
    "KFAC(max_dim)": lambda n: kf.KFAC(max_dim=n),
    "TKFAC(max_dim)": lambda n: kf.TKFAC(max_dim=n),
    "KFOC(rank_memory)": lambda n: kf.KFOC(rank_memory=n),
    "KFOC(iterations)": lambda n: kf.KFOC(iterations=n),
    "KroneckerSum(rank)": lambda n: kf.KroneckerSum(rank=n),
    "KroneckerSum(memory)": lambda n: kf.KroneckerSum(rank=1, memory=n),
    "KroneckerSum(iterations)": lambda n: kf.KroneckerSum(iterations=n),
    "KL(iterations)": lambda n: kf.KL(iterations=n),
    "Prototypes(samples)": lambda n: kf.Prototypes(samples=n),
    "Prototypes(iterations)": lambda n: kf.Prototypes(iterations=n),
    "Gram(max_rows)": lambda n: kf.Gram(max_rows=n),
    "nearest_kronecker(rank)": lambda n: kf.nearest_kronecker(torch.ones(3, 2, 2), torch.ones(3, 2, 2), n),
    "Fisher.sample(n)": lambda n: (estimated() + 1.0).sample(n),
    "Fisher.sample(seed)": lambda n: (estimated() + 1.0).sample(2, seed=n),
    "Fisher.spectrum(rank)": lambda n: estimated().spectrum(X, rank=n),
    "Fisher.spectrum(iterations)": lambda n: estimated().spectrum(X, rank=1, iterations=n),
    "Refresh(statistics)": lambda n: kf.Refresh(statistics=n),
    "Refresh(inverse)": lambda n: kf.Refresh(inverse=n),
    "Refresh(model)": lambda n: kf.Refresh(model=n),
    "LevenbergMarquardt(every)": lambda n: kf.LevenbergMarquardt(every=n),
    "LevenbergMarquardt(warmup)": lambda n: kf.LevenbergMarquardt(warmup=n),
    "batch_size_at(step)": lambda n: kf.batch_size_at(n, 1, 8, 9),
    "batch_size_at(first)": lambda n: kf.batch_size_at(1, n, 8, 9),
    "batch_size_at(last)": lambda n: kf.batch_size_at(1, 1, n, 9),
    "batch_size_at(steps)": lambda n: kf.batch_size_at(1, 1, 8, n),
    "NaturalGradient(total_steps)": lambda n: trained(total_steps=n),
    "NaturalGradient(samples)": lambda n: trained(samples=n),
    "NaturalGradient(seed)": lambda n: trained(seed=n),
    "Preconditioner(samples)": lambda n: kf.Preconditioner(linear(), kf.Gaussian(), samples=n),
    "Preconditioner(seed)": lambda n: kf.Preconditioner(linear(), kf.Gaussian(), seed=n),
    "Laplace.sample(n)": lambda n: posterior().sample(n),
    "Laplace.sample(seed)": lambda n: posterior().sample(2, seed=n),
    "Laplace.predict(samples)": lambda n: posterior().predict(X, predictor="sampled", samples=n),
    "Laplace.predict(seed)": lambda n: posterior().predict(X, predictor="sampled", seed=n),
    "Laplace.functional_samples(samples)": lambda n: posterior().functional_samples(X, n),
    "Laplace.log_predictive_density(samples)": lambda n: posterior().log_predictive_density(X, X, samples=n),
    "Laplace.log_predictive_error(samples)": lambda n: posterior().log_predictive_error(X, X, samples=n),
    "Laplace.calibrate(samples)": lambda n: posterior().calibrate((X, X), samples=n),
    "Laplace.optimize_prior(steps)": lambda n: posterior().optimize_prior(steps=n),
    "Categorical(ignore_index)": lambda n: kf.Categorical(ignore_index=n),
    "random_subsets(examples)": lambda n: kf.attribution.random_subsets(n, 2),
    "random_subsets(subsets)": lambda n: kf.attribution.random_subsets(4, n),
    "random_subsets(seed)": lambda n: kf.attribution.random_subsets(4, 2, seed=n),
    "lds(seeds)": lambda n: kf.attribution.lds(SCORES, lambda kept, seed: kept[:1].double(), subsets=2, seeds=n),
    "leave_one_out(examples)": lambda n: kf.attribution.leave_one_out(
        SCORES, lambda kept, seed: kept[:1].double(), examples=n
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", INTEGERS)
def test_an_integer_is_asked_for_by_name_where_another_thing_was_given(place):
    """Seen: True counted as one, and fractions reached torch as they were."""
    (option,) = re.findall(r"\((\w+)\)", place)
    for odd in (True, False, 2.5, "3", torch.tensor(2.5)):
        with pytest.raises((ValueError, TypeError), match=rf"\b{option}=.*integer"):
            INTEGERS[place](odd)
    INTEGERS[place](np.int64(3))


def test_integers_of_settings_are_pythons_own():
    fit = kf.KFOC(rank_memory=np.int64(3), max_dim=np.int32(7))  # pyright: ignore[reportArgumentType]
    assert fit == kf.KFOC(rank_memory=3, max_dim=7)
    assert type(fit.rank_memory) is int and type(fit.max_dim) is int
