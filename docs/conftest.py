"""Pages run in a folder of their own, where they save their pictures; ``--pictures`` keeps those beside the pages."""

import os
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("MKL_CBWR", "COMPATIBLE")  # before torch: the same numbers wherever matrices lie in memory
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)  # as in the tests

# About libraries that nothing else here needs: `make bench ARGS="--what migration"` and `make trainers` have them.
LIBRARIES = {
    "migration/nngeometry": "nngeometry",
    "migration/asdl": "asdl",
    "migration/kfac-pytorch": "kfac",
    "migration/kronfluence": "kronfluence",
    "trainers/lightning": "lightning",
    "trainers/trl": "trl",
}
collect_ignore = [f"{page}.md" for page, package in LIBRARIES.items() if find_spec(package) is None]


def pytest_addoption(parser):
    """``--pictures``, for `make gallery`."""
    parser.addoption("--pictures", action="store_true", help="keep the pictures of the gallery's pages")


@pytest.fixture(autouse=True)
def folder(request, tmp_path, monkeypatch):
    """The current folder of a page."""
    keep = request.config.getoption("--pictures") and request.path.parent.name == "gallery"
    monkeypatch.chdir(Path(request.path).parent if keep else tmp_path)
