"""The examples of CONTRIBUTING.md work from files outside of the package, and the names in the documents exist."""

import importlib.util
import pkgutil
import re
import sys

import pytest

from kronfisher.experiments.data.registry import LOADERS
from kronfisher.fisher.damping import Damping
from kronfisher.fits import FITS
from kronfisher.layers import OPERATORS, REWRITES
from kronfisher.likelihoods import REGISTRY
from kronfisher.operators import Operator
from tests.helpers.layout import FLOOR, ROOT

REGISTRIES = (OPERATORS, REWRITES, FITS, REGISTRY, Damping.kinds, Operator.kinds, LOADERS)
SEAMS = {
    "A layer type",
    "A fit",
    "A likelihood",
    "A damping rule",
    "A damping schedule",
    "An operator",
    "A data set",
}
SECTIONS = re.split(r"^## (.+)$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
BLOCKS = {
    title: code
    for title, text in zip(SECTIONS[1::2], SECTIONS[2::2], strict=True)
    for code in re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
}


@pytest.fixture(autouse=True)
def restored_registries():
    """What an example registers is gone after it."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


def test_the_rooms_are_those_of_the_layout():
    rows = re.findall(r"^\| (\d+) \| (`.+?`) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert {room: int(floor) - 1 for floor, rooms in rows for room in re.findall(r"`(\w+)/?`", rooms)} == FLOOR


def test_every_seam_has_an_example():
    assert set(BLOCKS) == SEAMS


@pytest.mark.parametrize("title", BLOCKS)
def test_an_example_works_from_a_file_of_its_own(title, tmp_path, monkeypatch):
    """Each one registers what it adds, uses it through the public functions and asserts a number."""
    path = tmp_path / "mine.py"
    path.write_text(BLOCKS[title])
    spec = importlib.util.spec_from_file_location("mine", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mine", module)  # dataclasses look there
    spec.loader.exec_module(module)
    assert "assert_close" in BLOCKS[title]


NAMED = sorted(
    {
        (path.name, name)
        for path in (ROOT / "docs" / "glossary.md", ROOT / "docs" / "design.md", ROOT / "CONTRIBUTING.md")
        for name in re.findall(r"`(kronfisher(?:\.\w+)+)`", path.read_text())
    }
)


@pytest.mark.parametrize(("document", "name"), NAMED)
def test_what_a_document_names_exists(document, name):
    assert pkgutil.resolve_name(name) is not None


def test_the_glossary_has_each_word_once_and_says_where_it_is_in_the_code():
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.*?) ?\|$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    words = [word for word, _, _ in rows if word != "word"]
    assert len(words) == len(set(words)) > 50
    assert sum("`kronfisher." in where for _, _, where in rows) > 40


def test_modules_are_where_the_changelog_says():
    rows = re.findall(r"^\| (`.+?`) \| (`.+?`) \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert len(rows) > 30
    for _, new in rows:
        for name in re.findall(r"`(.+?)`", new):
            assert pkgutil.resolve_name(f"kronfisher.{name.removesuffix('.*')}") is not None
