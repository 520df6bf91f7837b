"""The checks before a release: what they find, without making an environment."""

import importlib.util
import re
import sys
from os.path import normpath

import pytest

from tests.helpers.layout import ROOT


@pytest.fixture
def tool(monkeypatch):
    """Imports a script of tools/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.delitem(sys.modules, "environments", raising=False)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_every_page_of_the_site_links_within_it_and_every_public_name_has_its_place(tool, monkeypatch):
    site = tool("documentation")
    pages = site.pages()
    assert {"index.md", "changelog.md", "gallery/pruning.md", "reference/fits.md"} <= pages.keys()
    for place, text in pages.items():
        for target in re.findall(r"\]\(([^)#\s:]+\.md)", text):
            folder = place.rpartition("/")[0]
            assert normpath(f"{folder}/{target}" if folder else target) in pages, (place, target)
    settings = (ROOT / "tools" / "mkdocs.yml").read_text()
    named = set(re.findall(r": (\S+\.md)$", settings, re.MULTILINE))
    assert named == {place for place in pages if not place.startswith("reference/")}
    monkeypatch.setitem(site.REFERENCE, "Errors", "DataError")
    with pytest.raises(SystemExit, match="IndefiniteError"):
        site.reference()


def test_a_release_needs_one_version_and_a_day(tool, monkeypatch):
    release = tool("release")
    version = release.tomllib.loads(release.read("pyproject.toml"))["project"]["version"]
    findings = dict(release.versions(version))
    assert not findings["version of the package"] and not findings["version of CITATION.cff"]
    assert not findings["first version of the changelog"]
    assert set(dict(release.versions("9.9.9")).values()) != {""}
    monkeypatch.setattr(release, "read", lambda name: f"## {version} (2026-01-31)\n")
    assert not dict(release.versions(version))["date in the changelog"]


def test_what_has_outstayed_its_deprecation_is_found(tool, monkeypatch, tmp_path):
    release = tool("release")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "old.py").write_text("# will be removed in 0.4")
    monkeypatch.setattr(release, "ROOT", tmp_path)
    assert [problem for _, problem in release.deprecations("0.3.1")] == [""]
    assert [problem for _, problem in release.deprecations("0.4.0")] == ["src/old.py: will be removed in 0.4"]


def test_the_matrix_knows_the_floors_and_finds_this_python(tool):
    matrix = tool("matrix")
    python, asked = matrix.admitted()
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert re.fullmatch(r"3\.\d+", python)
    assert here in matrix.pythons(python) and not matrix.pythons("9.0")
    floors = matrix.packages(asked, "oldest")
    assert {"torch", "numpy", "scipy", "safetensors"} <= {line.partition("==")[0] for line in floors}
    assert all(re.fullmatch(r"[\w-]+==[\d.]+\.\*", line) for line in floors)
    assert matrix.packages(asked, "newest") == asked


def test_every_extra_but_those_for_developers_is_tried_alone(tool):
    dist = tool("dist")
    text = (ROOT / "pyproject.toml").read_text()
    extras = set(
        re.findall(r"^(\w+) = \[", text.split("[project.optional-dependencies]")[1].split("\n\n")[0], re.MULTILINE)
    )
    assert set(dist.EXTRAS) | {"dev", "race"} == extras
    for code in dist.EXTRAS.values():
        compile(code, "extra", "exec")
