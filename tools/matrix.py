"""``make matrix``: the tests under the oldest and the newest packages that the metadata admit, on every Python found.

The newest run on every Python, the oldest on the oldest one: a line for each. Where one cannot be installed, or nothing
was run, the command fails: what the metadata admit is what has been run.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from environments import ROOT, Environment, require

# What depends on torch and NumPy; studies and the command line stand on it.
ROOMS = (
    "operators", "likelihoods", "fisher", "layers", "capture", "fits", "estimation", "optim", "laplace", "influence",
)  # fmt: skip
TESTS = tuple(f"tests/{room}" for room in ROOMS)
TOOLS = ("pytest", "hypothesis", "ninja", "setuptools")  # those of the tests, in their newest versions
EXTRAS = ("io", "scipy", "report", "experiments")


def admitted() -> tuple[str, list[str]]:
    """The oldest Python of the metadata, and what they ask for, with the extras that these tests use."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + [line for name in EXTRAS for line in project["optional-dependencies"][name]]
    return project["requires-python"].removeprefix(">="), [line for line in asked if not line.startswith("kronfisher")]


def packages(asked: list[str], age: str) -> list[str]:
    """What pip is asked for: of the oldest the last patch of each floor, else as the metadata say."""
    return [re.sub(r">=([\d.]+)$", r"==\1.*", line) for line in asked] if age == "oldest" else asked


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
    oldest, asked = admitted()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "matrix", help="folder of the environments")
    parser.add_argument("--only", default="", help="one of the pairs, such as python3.12-newest (default: all)")
    parser.add_argument("tests", nargs="*", default=TESTS, help="arguments of pytest")
    given = parser.parse_args()
    found = pythons(oldest)
    print(f"found: Python {', '.join(found)}; the metadata admit {oldest} or newer, {', '.join(asked)}")
    pairs = [(next(iter(found)), "oldest"), *((version, "newest") for version in found)]
    failed = oldest not in found
    if failed:
        print(f"Python {oldest} is not here, and has not been tried")
    for version, age in pairs:
        name = f"python{version}-{age}"
        if not given.only or given.only == name:
            outcome = _tested(Environment(given.work / name, found[version]), packages(asked, age), given.tests)
            failed |= not outcome.startswith("passed")
            print(f"Python {version}, {age} packages: {outcome}", flush=True)
    sys.exit(1 if failed else 0)


def _tested(environment: Environment, wanted: list[str], tests: tuple[str, ...]) -> str:
    if environment.install(*wanted, *TOOLS).returncode:
        return f"not run: pip cannot install {', '.join(wanted)}"
    require(environment.install("--no-deps", ROOT), "kronfisher cannot be installed")  # it is asked for its version
    done = environment("-c", "import torch, numpy; print(f'torch {torch.__version__}, NumPy {numpy.__version__}')")
    settings = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    result = environment(*command, cwd=ROOT, env=settings)
    last = result.stdout.strip().splitlines()[-1] if result.stdout.strip() else "no output"
    return f"{'passed' if result.returncode == 0 else 'failed'} with {done.stdout.strip()}: {last.strip('= ')}"


if __name__ == "__main__":
    main()
