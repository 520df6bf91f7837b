import pytest

from tests.helpers.ranks import world

SIZES = [pytest.param(2, id="2 ranks"), pytest.param(3, id="3 ranks")]
SIZES += [pytest.param(4, id="4 ranks", marks=pytest.mark.slow)]


@pytest.fixture(scope="session", params=SIZES)
def ranks(request, tmp_path_factory):
    """A process group of two ranks, one of three, and one of four."""
    with world(request.param, tmp_path_factory.mktemp("ranks")) as own:
        yield own
