"""``make trainers``: the pages about trainers that nothing else here needs, in an environment beside `.venv`."""

import argparse
import os
import sys
from pathlib import Path

from environments import ROOT, Environment, require

# Page of docs/trainers → what it is about, to install and to import.
TRAINERS = {"lightning": "lightning", "trl": "trl"}


def main() -> None:
    """Install the trainers where they see the packages of `.venv`, and run their pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "trainers", help="folder of the environment")
    given = parser.parse_args()
    environment = Environment(given.work, sys.executable, Environment(ROOT / ".venv"))
    require(environment.install(*TRAINERS.values()), f"{' or '.join(TRAINERS.values())} cannot be installed")
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--doctest-glob=*.md", "docs/trainers")
    done = environment(*command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})
    require(done, "a page does not run as it is written")
    print(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
