"""Runs one page of docs/migration beside the library that it is about; prints one line of JSON. Run by run.py."""

import argparse
import doctest
import json
from importlib.util import find_spec
from pathlib import Path

import torch

PAGES = Path(__file__).resolve().parent.parent / "docs" / "migration"
# Page → what it imports, and what that is installed as.
LIBRARIES = {
    "curvlinops": ("curvlinops", "curvlinops-for-pytorch"),
    "laplace-torch": ("laplace", "laplace-torch"),
    "backpack": ("backpack", "backpack-for-pytorch"),
    "nngeometry": ("nngeometry", "nngeometry"),
    "asdl": ("asdl", "asdfghjkl"),
    "kfac-pytorch": ("kfac", "a clone in --sources"),
    "kronfluence": ("kronfluence", "kronfluence"),
}


def run(page: str) -> dict[str, int | str]:
    """How many examples of a page there are, and how many of them gave something else; the rest goes to stderr."""
    package, source = LIBRARIES[page]
    if find_spec(package) is None:
        return {"skipped": f"{package} is not installed ({source})"}
    messages: list[str] = []
    examples = doctest.DocTestParser().get_doctest((PAGES / f"{page}.md").read_text(), {}, page, f"{page}.md", 0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    failed, attempted = runner.run(examples, out=messages.append)
    return {"examples": attempted, "failed": failed, "messages": "".join(messages)[:2000]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", choices=LIBRARIES)
    torch.set_num_threads(1)
    print(json.dumps(run(parser.parse_args().page)))
