"""Imports point one way, the core needs torch and numpy only, and the documents' links lead somewhere."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "kronfisher"
FILES = sorted(SOURCE.rglob("*.py"))

# A module may import from its own row and from the rows above it.
ROWS = [
    {"errors", "linalg", "models"},
    {"activations", "samples", "indices", "blocks", "operators", "likelihoods", "rearrangement"},
    {"uses", "fits", "damping"},
    {"capture", "proof"},
    {"estimate", "error", "spectrum", "coverage", "accumulate", "passes"}
    | {"stream", "chain", "claims", "batches", "isolation", "fallback", "treatment", "owners", "following", "groups"},
    {"trust", "natural_gradient", "preconditioner", "laplace"},
    {"experiments"},
    {"__init__"},
    {"cli"},
]
ROW = {module: k for k, row in enumerate(ROWS) for module in row}
EXTRAS = {"scipy", "matplotlib", "sklearn", "safetensors", "rich", "typer", "transformers", "peft"}


def top(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path, *, lazy=True):
    """Dotted names that a file imports; type-checking blocks never run, so they do not count."""

    def visit(node):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            yield node.module
            if node.module == "kronfisher":
                yield from (f"kronfisher.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return list(visit(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    assert top(path) in ROW, f"{top(path)} has no place in the order of imports: give it a row in {Path(__file__).name}"
    for name in imports(path):
        if name == "kronfisher":
            assert ROW[top(path)] >= ROW["__init__"], f"{path} imports the whole package from inside"
        elif name.startswith("kronfisher."):
            module = name.split(".")[1]
            if module in ROW:  # otherwise a name that the package itself exports
                assert ROW[module] <= ROW[top(path)], f"{path} imports {name}, which stands above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_torch_and_numpy_are_imported_eagerly(path):
    for name in imports(path, lazy=False):
        package = name.split(".")[0]
        assert package in {"torch", "numpy", "kronfisher"} or package in sys.stdlib_module_names, f"{path}: {name}"


def test_importing_the_package_loads_no_extra():
    code = (
        "import sys, torch; old = set(sys.modules); import kronfisher, kronfisher.cli; print(*set(sys.modules) - old)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "kronfisher.cli" in loaded
    assert not EXTRAS & {name.split(".")[0] for name in loaded}


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
