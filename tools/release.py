"""``make release``: what can be checked before a release, and then what a person has to do.

Nothing is published, tagged or changed. ``--quick`` leaves out what takes longer than seconds.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator

from environments import ROOT

Finding = tuple[str, str]  # what was checked; what is wrong, empty if nothing is


def read(name: str) -> str:
    """A file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def versions(version: str) -> Iterator[Finding]:
    """The version is the same wherever it stands, and the changelog has it."""
    yield (
        "version of the package",
        "" if f'__version__ = "{version}"' in read("src/kronfisher/__init__.py") else "differs",
    )
    yield "version of CITATION.cff", "" if f"\nversion: {version}\n" in read("CITATION.cff") else "differs"
    first = re.search(r"^## (\S+)(.*)$", read("CHANGELOG.md"), re.MULTILINE)
    latest = first[1] if first else "none"
    yield "first version of the changelog", "" if latest == version else f"is {latest}"
    dated = first is not None and re.search(r"\d{4}-\d{2}-\d{2}", first[2])
    yield "date in the changelog", "" if dated else f"write the day of the release behind ## {version}"


def deprecations(version: str) -> Iterator[Finding]:
    """What was to be removed by this version is gone."""
    now = tuple(map(int, version.split(".")[:2]))
    late = []
    for path in (ROOT / "src").rglob("*.py"):
        for found in re.finditer(r"will be removed in (\d+)\.(\d+)", path.read_text(encoding="utf-8")):
            if (int(found[1]), int(found[2])) <= now:
                late.append(f"{path.relative_to(ROOT)}: {found[0]}")
    yield "deprecated names past their time", "; ".join(late)


def repository() -> Iterator[Finding]:
    """Everything is committed."""
    state = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    changed = state.stdout.strip().splitlines()
    yield (
        "uncommitted files",
        "" if not changed and not state.returncode else f"{len(changed)}: {', '.join(changed[:3])}",
    )


def targets(quick: bool) -> Iterator[Finding]:
    """The checks that have targets of their own."""
    for name in ("check",) if quick else ("check", "test", "docs", "dist", "matrix"):
        done = subprocess.run(["make", name], cwd=ROOT, capture_output=True, text=True)
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        yield f"make {name}", "" if done.returncode == 0 else f"failed: {''.join(last)}"


PERSON = """
What a person has to do for {version}:
  1. Read `git log` since the last tag beside CHANGELOG.md: is everything in it that a user notices?
  2. Write the day of the release into CHANGELOG.md, commit.
  3. git tag -s v{version} -m "kronfisher {version}"; git push --follow-tags
  4. Look at dist/ as `make dist` made it, then upload it: python -m twine upload dist/kronfisher-{version}*
  5. In an empty environment: pip install kronfisher=={version}, and the first lines of the README.
  6. Archive the tag where it gets a DOI, and write the DOI into CITATION.cff.
  7. Raise the version in pyproject.toml, src/kronfisher/__init__.py and CITATION.cff, and open the next section of
     CHANGELOG.md."""


def main() -> None:
    """Print every finding; exit code 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only what takes seconds, and make check")
    given = parser.parse_args()
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    wrong = 0
    for findings in (versions(version), deprecations(version), repository(), targets(given.quick)):
        for what, problem in findings:
            wrong += bool(problem)
            print(f"{'wrong' if problem else 'good '}  {what}{f': {problem}' if problem else ''}", flush=True)
    print(PERSON.format(version=version))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
