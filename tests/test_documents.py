"""The documentation: what a gallery's page shows, which pages the benchmarks run, and examples of public names."""

import ast
import re
from functools import cached_property
from types import FunctionType

import pytest

import kronfisher as kf
from tests.helpers.layout import ROOT

GALLERY = sorted((ROOT / "docs" / "gallery").glob("*.md"))
MIGRATION = {path.stem for path in (ROOT / "docs" / "migration").glob("*.md")}
# Lines that `make test` and `make docs` run.
EXAMPLES = "\n".join(
    line
    for pattern in ("src/**/*.py", "docs/**/*.md", "README.md")
    for path in ROOT.glob(pattern)
    for line in path.read_text(encoding="utf-8").splitlines()
    if line.lstrip().startswith((">>> ", "... "))
)
# Classes whose methods are for users; those of the others are for who adds one of a kind.
USED = (
    kf.Comparison, kf.Coverage, kf.Distance, kf.Fisher, kf.Influence, kf.IterateAverage, kf.Laplace, kf.NaturalGradient,
    kf.Preconditioner, kf.Scores,
)  # fmt: skip


def assigned(path, name):
    """What a file assigns to a name, a literal, without importing the file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    (value,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )
    return ast.literal_eval(value)


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_a_page_of_the_gallery_shows_what_it_draws(path):
    text = path.read_text(encoding="utf-8")
    shown = dict(re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text))
    drawn = re.findall(r'savefig\("([^"]+)"\)', text)
    assert drawn and sorted(shown.values()) == sorted(drawn)
    assert all(len(description) > 40 for description in shown)
    assert all((path.parent / name).stat().st_size < 300_000 for name in drawn)


def test_the_gallery_has_no_pictures_of_pages_that_are_gone():
    assert len(GALLERY) >= 12
    drawn = {name for path in GALLERY for name in re.findall(r'savefig\("([^"]+)"\)', path.read_text())}
    assert drawn == {path.name for path in (ROOT / "docs" / "gallery").glob("*.png")}


def test_every_page_about_a_library_is_run_beside_it_and_the_overview_leads_to_it():
    beside = assigned("benchmarks/migration.py", "LIBRARIES")
    assert beside.keys() == MIGRATION
    trainers = assigned("tools/trainers.py", "TRAINERS")
    assert trainers.keys() == {path.stem for path in (ROOT / "docs" / "trainers").glob("*.md")}
    run = {f"migration/{page}": package for page, (package, _) in beside.items()}
    run |= {f"trainers/{page}": package for page, package in trainers.items()}
    assert assigned("docs/conftest.py", "LIBRARIES").items() <= run.items()
    text = (ROOT / "docs" / "migration.md").read_text()
    assert set(re.findall(r"\(migration/([\w-]+)\.md\)", text)) == MIGRATION
    for page in MIGRATION:
        text = (ROOT / "docs" / "migration" / f"{page}.md").read_text()
        assert re.search(r"^>>> .*(allclose|all\().*\nTrue$", text, re.MULTILINE), f"{page} compares nothing"
        assert "| there | here |" in text


@pytest.mark.parametrize("name", kf.__all__)
def test_every_public_name_has_an_example_that_runs(name):
    assert ">>> " in (getattr(kf, name).__doc__ or "")


@pytest.mark.parametrize("kind", USED)
def test_every_method_for_users_is_in_an_example(kind):
    kinds = FunctionType | property | cached_property | staticmethod | classmethod
    members = [name for name, what in vars(kind).items() if not name.startswith("_") and isinstance(what, kinds)]
    assert members
    assert [name for name in members if not re.search(rf"\.{name}\b", EXAMPLES)] == []


def test_the_readme_lists_every_fit_and_which_fit_says_what_for():
    (listed,) = re.findall(r"- \*\*Fits\*\*: (.+?)\n- ", (ROOT / "README.md").read_text(), re.DOTALL)
    (table,) = re.findall(r"## In short\n(.+?)\n## ", (ROOT / "docs" / "which-fit.md").read_text(), re.DOTALL)
    public = {name: getattr(kf, name) for name in kf.__all__}
    fits = {name for name, kind in public.items() if isinstance(kind, type) and issubclass(kind, kf.Fit)} - {"Fit"}
    assert set(re.findall(r"`(\w+)`", listed)) == fits
    assert fits <= set(re.findall(r"\b(\w+)\(", table))
