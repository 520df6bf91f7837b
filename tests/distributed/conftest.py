import pytest

from tests.helpers.ranks import world


@pytest.fixture(scope="session", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request, tmp_path_factory):
    """A process group of two ranks, and one of three."""
    with world(request.param, tmp_path_factory.mktemp("ranks")) as own:
        yield own
