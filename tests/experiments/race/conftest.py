import pytest

from tests.experiments.race.racing import TINY


@pytest.fixture(scope="module")
def task():
    return TINY.load()
