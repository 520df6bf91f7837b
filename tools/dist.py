"""``make dist``: a wheel and a source archive, each installed into an environment that has torch and numpy only.

Then every extra alone: what it is for works with it, and says what to install without it. The environments are made in
a folder of their own; torch is installed once.
"""

import argparse
import sys
import tarfile
import zipfile
from pathlib import Path

from environments import ROOT, Environment, require

# What a user does with nothing but torch and numpy; the first lines of the README.
FIRST = """
import torch, kronfisher as kf
model, x = torch.nn.Linear(4, 3), torch.randn(100, 4)
fisher = kf.estimate(model, x, kf.Categorical())
assert fisher.dim == 15 and bool((fisher + 1e-3).solve(torch.ones(15)).isfinite().all())
optimizer = kf.NaturalGradient(model, kf.Categorical())
optimizer.step(lambda: model(x), torch.randint(3, (100,)))
print(kf.__version__)
"""
START = """
import torch, kronfisher as kf
fisher = kf.estimate(torch.nn.Linear(4, 3), torch.randn(100, 4), kf.Categorical())
"""

# Extra → what it is for; without the extra it raises an ImportError that names the extra.
EXTRAS = {
    "io": START + "fisher.save('fisher.safetensors'); kf.load('fisher.safetensors')",
    "scipy": START + "fisher.to_scipy()",
    "report": START + "fisher.save_report('fisher.html')",
    "laplace": "import kronfisher as kf\nkf.laplace_backend()",
    "experiments": "from kronfisher.experiments import data\ndata.load('digits')",
    "transformers": START
    + """
from kronfisher.integrations import log_with_trainer
log_with_trainer(type("Trainer", (), {"add_callback": lambda self, callback: None})(), None)
""",
    "cli": "from kronfisher.experiments.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as done:\n"
    "    if done.code:\n        raise ImportError(done.code)",
}


def build(environment: Environment, folder: Path) -> list[Path]:
    """The two archives."""
    require(environment.install("build", "hatchling>=1.24"), "the build tools cannot be installed")
    for old in folder.glob("kronfisher-*"):
        old.unlink()
    command = ("-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    require(environment(*command), "the archives cannot be built")
    return sorted(folder.glob("kronfisher-*"))


def inspect(archives: list[Path]) -> None:
    """What has to be in the archives, and what must not be."""
    (wheel,) = (path for path in archives if path.suffix == ".whl")
    (source,) = (path for path in archives if path.name.endswith(".tar.gz"))
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src" / "kronfisher").rglob("*") if p.is_file()}
    sources = {name for name in sources if "__pycache__" not in name}
    if missing := sources - names:
        sys.exit(f"failed: the wheel lacks {', '.join(sorted(missing))}")
    if odd := [name for name in names - sources if not name.startswith(f"{wheel.name.rsplit('-', 3)[0]}.dist-info/")]:
        sys.exit(f"failed: the wheel has {', '.join(sorted(odd))}")
    with tarfile.open(source) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in ("README.md", "LICENSE", "CITATION.cff", "SECURITY.md", "CODE_OF_CONDUCT.md", "tests/conftest.py"):
        if name not in inside:
            sys.exit(f"failed: the source archive lacks {name}")
    print(f"built: {wheel.name} with {len(names)} files, {source.name} with {len(inside)}")


def main() -> None:
    """Build, install, run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "dist", help="folder of the environments")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of the archives")
    parser.add_argument("--torch", default="torch", help="what to install for torch, such as torch==2.13.0")
    parser.add_argument("--extras", default=",".join(EXTRAS), help="comma-separated; empty: none")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    archives = build(Environment(given.work / "build"), given.output)
    inspect(archives)
    base = Environment(given.work / "base")
    require(base.install(given.torch, "numpy"), f"{given.torch} cannot be installed")
    for archive in archives:
        environment = Environment(given.work / archive.suffix.strip("."), base=base)
        require(environment.install("--no-deps", "--force-reinstall", archive), f"{archive.name} cannot be installed")
        done = environment("-c", FIRST)
        require(done, f"{archive.name} does not work with torch and numpy alone")
        print(f"works with torch and numpy alone: {archive.name}, which says that it is {done.stdout.strip()}")
    (wheel,) = (path for path in archives if path.suffix == ".whl")
    plain = Environment(given.work / "whl", base=base)
    for extra in filter(None, given.extras.split(",")):
        without = plain("-c", f"try:\n{_indented(EXTRAS[extra])}\nexcept ImportError as error:\n    print(error)")
        if f'"kronfisher[{extra}]"' not in without.stdout:
            sys.exit(f"failed: without the extra {extra} the message is {without.stdout.strip() or 'none'}")
        environment = Environment(given.work / extra, base=base)
        require(environment.install(f"{wheel}[{extra}]"), f"the extra {extra} cannot be installed")
        require(environment("-c", EXTRAS[extra]), f"the extra {extra} does not bring what it is for")
        print(f"works with its extra, and names it without: {extra}")


def _indented(code: str) -> str:
    return "\n".join(f"    {line}" for line in code.splitlines())


if __name__ == "__main__":
    main()
