"""``make matrix``: the tests under the oldest and the newest torch that the metadata admit, on every Python found.

One line for each pair; what cannot be installed (an old torch has no wheels for a new Python) is named and no failure,
unless a Python or a torch is left with nothing. The metadata's floors have to be among what ran.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from environments import ROOT, Environment, require

# Rooms that depend on what torch is: the rest stands on them.
ROOMS = ("operators", "fisher", "layers", "capture", "optim", "estimation/test_estimate.py")
TESTS = tuple(f"tests/{room}" for room in ROOMS)
PACKAGES = ("numpy", "pytest>=8.2", "hypothesis>=6.100", "ninja", "setuptools", "safetensors", "scipy", "scikit-learn",
            "matplotlib", "jinja2")  # fmt: skip


def floors() -> tuple[str, str]:
    """The oldest Python and the oldest torch of the metadata."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = (d for d in project["dependencies"] if d.startswith("torch>="))
    return project["requires-python"].removeprefix(">="), torch.removeprefix("torch>=")


def pythons(oldest: str) -> dict[str, Path]:
    """Version → interpreter, of all that are on the path or installed by pyenv, from the oldest admitted on."""
    places = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    places += sorted((Path.home() / ".pyenv" / "versions").glob("*/bin"))
    found: dict[str, Path] = {}
    for place in places:
        for path in place.glob("python3*"):
            if not re.fullmatch(r"python3(\.\d+)?", path.name) or "shims" in path.parts:
                continue
            asked = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
            done = subprocess.run([path, "-c", asked], capture_output=True, text=True)
            version = done.stdout.strip()
            if done.returncode == 0 and _number(version) >= _number(oldest):
                found.setdefault(version, path)
    return dict(sorted(found.items(), key=lambda pair: _number(pair[0])))


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def main() -> None:
    """Every pair, one after the other."""
    oldest_python, oldest_torch = floors()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "matrix", help="folder of the environments")
    parser.add_argument("--python", default="", help="comma-separated versions, of those found (default: all)")
    parser.add_argument("--torch", default=f"{oldest_torch},newest", help="comma-separated versions, or newest")
    parser.add_argument("tests", nargs="*", default=TESTS, help="arguments of pytest")
    given = parser.parse_args()
    found = pythons(oldest_python)
    chosen = [version for version in found if not given.python or version in given.python.split(",")]
    print(f"found: Python {', '.join(found)}; the metadata admit {oldest_python} and torch {oldest_torch} or newer")
    outcomes: dict[tuple[str, str], str] = {}
    for version in chosen:
        for torch in given.torch.split(","):
            outcome = _tested(found[version], version, torch, given.work, given.tests)
            outcomes[version, torch] = outcome
            print(f"Python {version}, torch {torch}: {outcome}", flush=True)
    failed = [pair for pair, outcome in outcomes.items() if outcome.startswith("failed")]
    ran = [pair for pair, outcome in outcomes.items() if outcome.startswith("passed")]
    left = [
        what
        for k, names in enumerate((chosen, given.torch.split(",")))
        for what in names
        if what not in {p[k] for p in ran}
    ]
    if left:
        print(f"nothing passed with {', '.join(left)}")
    sys.exit(1 if failed or left else 0)


def _tested(python: Path, version: str, torch: str, work: Path, tests: tuple[str, ...]) -> str:
    environment = Environment(work / f"python{version}-torch{torch}", python)
    wanted = "torch" if torch == "newest" else f"torch=={torch}.*" if torch.count(".") == 1 else f"torch=={torch}"
    if environment.install(wanted, *PACKAGES).returncode:
        return f"not run: pip finds no {wanted} for it"
    require(environment.install("--no-deps", ROOT), "kronfisher cannot be installed")  # it is asked for its version
    done = environment("-c", "import torch; print(torch.__version__)")
    settings = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    result = environment(*command, cwd=ROOT, env=settings)
    last = result.stdout.strip().splitlines()[-1] if result.stdout.strip() else "no output"
    return f"{'passed' if result.returncode == 0 else 'failed'} with torch {done.stdout.strip()}: {last.strip('= ')}"


if __name__ == "__main__":
    main()
