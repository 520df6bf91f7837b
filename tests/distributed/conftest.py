import contextlib

import pytest

from tests.helpers.ranks import world

SIZES = 2, 3, 4
collect_ignore = ["restarted.py", "whole_day.py"]  # scripts, which torchrun gives arguments


def pytest_generate_tests(metafunc):
    """Tests of `ranks` run with two, three and four of them; all but the numbers that they call usual are slow."""
    given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "ranks" not in metafunc.fixturenames or any("ranks" in names for names in given):
        return
    usual = set(metafunc.definition.get_closest_marker("usual_ranks").args)
    assert usual and usual <= set(SIZES)
    marks = {size: () if size in usual else pytest.mark.slow for size in SIZES}
    sizes = [pytest.param(size, id=f"{size} ranks", marks=marks[size]) for size in SIZES]
    metafunc.parametrize("ranks", sizes, indirect=True)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """Makes process groups by their numbers of ranks; each starts when it is first needed, and serves all tests."""
    found = {}
    with contextlib.ExitStack() as stack:

        def of(size):
            if size not in found:
                found[size] = stack.enter_context(world(size, tmp_path_factory.mktemp("ranks")))
            return found[size]

        yield of


@pytest.fixture
def ranks(request, worlds):
    """A process group."""
    return worlds(request.param)
