"""``make site``: the documentation as a site, built strictly: a warning is an error.

Pages are those of docs/, with README.md in front, and a reference of every public name from its docstring.
mkdocs-material and mkdocstrings live in an environment of their own.
"""

import argparse
import ast
import os
import re
import shutil
import sys
from pathlib import Path, PurePosixPath

from browse import browse
from environments import ROOT, Environment, require

PACKAGES = ("mkdocs-material>=9.6", "mkdocstrings[python]>=0.29", "ruff>=0.12")
# Files outside of docs/ → their place in the site.
OTHERS = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/kronecker-sums.ipynb": "kronecker-sums.ipynb",
    "LICENSE": "LICENSE.txt",
    "CITATION.cff": "CITATION.cff",
}
# Page of the reference → the public names on it.
REFERENCE = {
    "Matrices": """estimate Fisher load compare Comparison coverage Coverage kernel Distance Tikhonov FactoredTikhonov
        merge Penalty nearest_kronecker shard""",
    "Fits": """Fit KFAC KFACCorrected EKFAC KFOC KPSVD TKFAC KL KroneckerSum BlockTridiagonal Prototypes Diagonal Full
        Gram Auto""",
    "Likelihoods": """Likelihood Categorical Gaussian HeteroscedasticGaussian Bernoulli Poisson Residuals Weighted
    derivatives Derivatives""",
    "Training": """NaturalGradient LayerwiseStep QuadraticModel Preconditioner Refresh IterateAverage Constant
        LevenbergMarquardt Schedule batch_size_at named_state load_named_state""",
    "Uncertainty": "Laplace Prediction laplace_backend",
    "Influence": "Influence Scores Share attribution",
    "Errors": """DataError IndefiniteError MemoryBudgetError NumericalError NumericalWarning RankError SingularError
        UnsupportedError""",
}


def public_names() -> set[str]:
    """``kronfisher.__all__``, without importing it."""
    tree = ast.parse((ROOT / "src" / "kronfisher" / "__init__.py").read_text(encoding="utf-8"))
    (names,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return set(ast.literal_eval(names))


def pages() -> dict[str, str]:
    """Place in the site → text of every page, with links that lead within the site."""
    places = {f"docs/{path.relative_to(ROOT / 'docs').as_posix()}": path.relative_to(ROOT / "docs").as_posix()
              for path in (ROOT / "docs").rglob("*") if path.is_file()} | OTHERS  # fmt: skip
    found = {}
    for source, place in places.items():
        if source.endswith(".md"):
            found[place] = _linked((ROOT / source).read_text(encoding="utf-8"), source, place, places)
    return found | reference()


def _linked(text: str, source: str, place: str, places: dict[str, str]) -> str:
    def target(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        if re.match(r"[a-z]+:", path) or not path:
            return match[0]
        inside = os.path.normpath(PurePosixPath(source).parent / path)
        if inside not in places:
            sys.exit(f"failed: {source} links to {path}, which is not in the site")
        return f"]({os.path.relpath(places[inside], PurePosixPath(place).parent)}{anchor})"

    return re.sub(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", target, text)


def reference() -> dict[str, str]:
    """A page for each group of public names."""
    listed = [name for names in REFERENCE.values() for name in names.split()]
    if odd := public_names() ^ set(listed):
        sys.exit(f"failed: the reference and kronfisher.__all__ differ in {', '.join(sorted(odd))}")
    found = {}
    for title, names in REFERENCE.items():
        body = "\n\n".join(f"::: kronfisher.{name}" for name in names.split())
        found[f"reference/{title.lower()}.md"] = f"# {title}\n\n{body}\n"
    return found


def main() -> None:
    """Write the pages, build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "site", help="folder of pages, HTML and environment"
    )
    parser.add_argument(
        "--environment", type=Path, help="where mkdocs-material is or is to be (default: in the folder)"
    )
    parser.add_argument("--browse", action="store_true", help="then open every page in a headless Chromium")
    given = parser.parse_args()
    docs = given.work / "docs"
    shutil.rmtree(docs, ignore_errors=True)
    shutil.copytree(ROOT / "docs", docs, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for source, place in OTHERS.items():
        shutil.copy(ROOT / source, docs / place)
    for place, text in pages().items():
        (docs / place).parent.mkdir(parents=True, exist_ok=True)
        (docs / place).write_text(text, encoding="utf-8")
    entries = "\n".join(f"      - {title}: reference/{title.lower()}.md" for title in REFERENCE)
    settings = (ROOT / "tools" / "mkdocs.yml").read_text(encoding="utf-8")
    settings = settings.replace("Reference: []", f"Reference:\n{entries}")
    settings = settings.replace("        python:\n", f"        python:\n          paths: [{ROOT / 'src'}]\n")
    settings = settings.replace("[docstrings.py]", f"[{ROOT / 'tools' / 'docstrings.py'}]")
    (given.work / "mkdocs.yml").write_text(settings, encoding="utf-8")
    environment = Environment(given.environment or given.work / "environment")
    require(environment.install(*PACKAGES), "mkdocs-material cannot be installed")
    require(environment("-m", "mkdocs", "build", "--strict", "-f", given.work / "mkdocs.yml"), "the site has warnings")
    print(f"built: {given.work / 'html' / 'index.html'}")
    if given.browse:
        browse(given.work / "html")


if __name__ == "__main__":
    main()
