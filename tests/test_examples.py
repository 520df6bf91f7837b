"""Every example runs from its first line to its last, and was run before it was committed."""

from pathlib import Path

import pytest

from tests.helpers.optional import require

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def test_there_is_an_example():
    assert NOTEBOOKS


@pytest.mark.filterwarnings("default::DeprecationWarning")  # of the notebook's machinery, not of the cells
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    """A cell that raises fails the test; one that shows something must have shown the same kind of thing before."""
    nbformat, nbclient = require("nbformat"), require("nbclient")
    committed = nbformat.read(path, as_version=4)
    nbformat.validate(committed)
    run = nbformat.from_dict(committed)
    nbclient.NotebookClient(run, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    assert [kinds(cell) for cell in run.cells] == [kinds(cell) for cell in committed.cells]
    assert any(kinds(cell) for cell in run.cells)


def kinds(cell):
    """The forms in which a cell shows what it found; messages on standard error do not count, nor in how many pieces
    printed text arrived."""
    outputs = [output for output in cell.get("outputs", ()) if output.get("name") != "stderr"]
    forms = [sorted(output.get("data", {"text": ""})) for output in outputs]
    return [form for form, before in zip(forms, [None, *forms], strict=False) if form != ["text"] or before != form]
