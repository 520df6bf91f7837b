"""Measures kronfisher beside other libraries, each in a fresh process, and writes a dated table and JSON to results/.

python benchmarks/run.py [--what factors solve memory scaling steps agreement kfoc influence migration distributed gram
                         small recurrent]
                         [--peers ...]
                         [--workloads ...] [--repeats N]

The first call makes an environment for all libraries, benchmarks/.venv-peers. README.md says what is measured and how.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENVIRONMENT = HERE / ".venv-peers"
PYTHON = ENVIRONMENT / "bin" / "python"
PACKAGES = {
    "kronfisher": "kronfisher",
    "kronfisher_kfoc": "kronfisher",
    "curvlinops": "curvlinops-for-pytorch",
    "laplace": "laplace-torch",
    "nngeometry": "nngeometry",
    "asdl": "asdfghjkl",
    "backpack": "backpack-for-pytorch",
    "kronfluence": "kronfluence",
}
WORKLOADS = ["autoencoder", "mlp", "gpt", "alexnet", "lenet"]
NAMES = (
    *("factors", "memory", "scaling", "steps", "agreement", "kfoc", "influence", "migration", "distributed", "gram"),
    *("small", "recurrent"),
)
WHATS = {name: [name] for name in NAMES} | {"solve": ["solve", "solve-exact"]}
TABLES = ("public", "long", "memory", "budgets")
SCORED = ("mlp", "lenet", "gpt")  # workloads of influence.py
BUDGETS = {"wide": (0.9, 1, 2, 4), "embedding": (0.9, 1, 2, 4), "convolution": (0.9, 1, 2)}


def pip(*arguments: str) -> str | None:
    """Run pip in the environment; the last line of its complaint where it fails."""
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]


def environment() -> dict[str, str]:
    """Make or reuse the environment of the libraries.

    Returns:
        Version of every package that is there; ``"skipped: reason"`` of every other.
    """
    stamp, constraints, wanted = ENVIRONMENT / "ready.json", ROOT / "constraints.txt", HERE / "requirements.txt"
    recipe = constraints.read_text() + wanted.read_text()
    if stamp.exists() and (known := json.loads(stamp.read_text()))["recipe"] == recipe:
        return known["versions"]
    print(f"making {ENVIRONMENT.relative_to(ROOT)} (some minutes)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
    # torch first and by its pin, or the first library to ask for it brings a build of its own choice.
    if complaint := pip("install", "-r", str(constraints)):
        sys.exit(f"benchmarks: torch cannot be installed: {complaint}")
    lines = [line for line in wanted.read_text().splitlines() if line and not line.startswith("#")]
    failed = {}
    for line in [*lines, "-e ."]:
        if complaint := pip("install", "-c", str(constraints), "-c", str(wanted), *line.split()):
            failed["kronfisher" if line == "-e ." else line.split("==")[0]] = complaint
    # Nothing measured needs torchvision, and one built for another torch stops whatever tries to import it.
    pip("uninstall", "-y", "torchvision")
    listing = subprocess.run([PYTHON, "-m", "pip", "list", "--format=json"], capture_output=True, text=True).stdout
    installed = {package["name"]: package["version"] for package in json.loads(listing)}
    versions = {
        name: f"skipped: {failed[package]}" if package in failed else installed[package]
        for name, package in {**PACKAGES, "torch": "torch"}.items()
    }
    stamp.write_text(json.dumps({"recipe": recipe, "versions": versions}))
    return versions


def child(script: str, *arguments: str, timeout: float, python: str | Path = PYTHON) -> dict:
    """Run one of the scripts beside this one in a fresh process and read its last line."""
    # Whether glibc keeps a freed block or returns it and pays for fresh pages next time depends on history, and decides
    # a quarter of some libraries' time. For times it keeps all; what measures memory tells it to return all by itself.
    paths = f"{ROOT / 'src'}{os.pathsep}{HERE}"  # this tree's kronfisher, wherever the environment was made
    settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": paths}
    if "memory" not in arguments and script != "budgets.py":
        settings |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "4000000000")
    command = [str(python), str(HERE / script), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"skipped": f"took longer than {timeout:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        complaint = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"skipped": f"exit code {done.returncode}: {complaint[:120]}"}
    return json.loads(lines[-1])


def kfoc(options: argparse.Namespace) -> list[dict]:
    """The measurements of K-FOC alone: beside public implementations, over many data, in memory, of large layers."""
    results = []
    for peer in ("bpnn", "curvlinops") if "public" in options.tables else ():
        for workload in ("wide", "lenet"):
            arguments = (peer, workload, "--repeats", str(max(2, options.repeats // 3)))
            if options.sources is not None:
                arguments += ("--sources", str(options.sources.resolve()))
            outcome = child("kfoc.py", *arguments, timeout=options.timeout)
            results.append({"what": "kfoc", "table": "public", "peer": peer, "workload": workload, **outcome})
    repeats = str(max(2, options.repeats // 3))
    for peer in ("kronfisher", "kronfisher_kfoc") if "long" in options.tables else ():
        arguments = (peer, "autoencoder-20k", "factors", "--repeats", repeats)
        outcome = child("measure.py", *arguments, timeout=options.timeout)
        results.append({"what": "kfoc", "table": "long", "peer": peer, "workload": "autoencoder-20k", **outcome})
    for workload in options.workloads if "memory" in options.tables else ():
        kfac, kfoc = [
            child("measure.py", peer, workload, "memory", timeout=options.timeout).get("extra")
            for peer in ("kronfisher", "kronfisher_kfoc")
        ]
        results.append({"what": "kfoc", "table": "memory", "workload": workload, "kfac": kfac, "kfoc": kfoc})
    for case, factors in BUDGETS.items() if "budgets" in options.tables else ():
        for times in factors:
            outcome = child("budgets.py", case, "--times", str(times), timeout=options.timeout)
            results.append({"what": "kfoc", "table": "budgets", "workload": case, "times": times, **outcome})
    return results


def influence(options: argparse.Namespace) -> list[dict]:
    """Scores of training data beside kronfluence, what an index answers, and how cost grows."""
    peers = [name for name in ("kronfisher", "kronfluence") if name in options.peers]
    repeats, results = ("--repeats", str(max(1, options.repeats // 3))), []

    def add(peer: str, workload: str, what: str, *more: str, **known: object) -> None:
        outcome = child("influence.py", peer, workload, what, *repeats, *more, timeout=options.timeout)
        results.append({"what": "influence", "table": what, "peer": peer, "workload": workload, **known, **outcome})
        print(what, workload, peer, outcome, file=sys.stderr)

    for workload in SCORED:
        for peer in peers:
            for rank in ("", "64"):
                more = ("--rank", rank) if rank else ()
                add(peer, workload, "time", *more, rank=rank or "full")
            add(peer, workload, "memory")
        if len(peers) > 1:
            add("kronfisher", workload, "agreement")
    add("kronfisher", "mlp", "index")
    add("kronfisher", "mlp", "growth")
    return results


def migration(options: argparse.Namespace) -> list[dict]:
    """Every page of docs/migration beside its library; kfac-pytorch is on no index and comes from a clone."""
    clone = options.sources and options.sources.resolve() / "kfac-pytorch"
    if clone and clone.exists() and (complaint := pip("install", "--no-deps", str(clone))):
        print(f"{clone} cannot be installed: {complaint}", file=sys.stderr)
    results = []
    for page in sorted((ROOT / "docs" / "migration").glob("*.md")):
        outcome = child("migration.py", page.stem, timeout=options.timeout)
        results.append({"what": "migration", "page": page.stem, **outcome})
        print("migration", page.stem, outcome, file=sys.stderr)
    return results


def distributed(options: argparse.Namespace) -> list[dict]:
    """Estimates in several processes, with the project's own interpreter, which starts the ranks."""
    arguments = ("distributed.py", "--more", "alexnet", "--repeats", str(max(2, options.repeats // 3)))
    return [{"what": "distributed", **child(*arguments, timeout=options.timeout, python=sys.executable)}]


def gram(options: argparse.Namespace) -> list[dict]:
    """The matrix in the space of samples and the tangent kernel, beside libraries that have one."""
    outcome = child("gram.py", "--repeats", str(max(2, options.repeats)), timeout=options.timeout)
    return [{"what": "gram", **row} for row in outcome.get("rows", [outcome])]


def small(options: argparse.Namespace) -> list[dict]:
    """Small networks, and a wide one in two threads."""
    arguments = ("small.py", "--repeats", str(max(2, options.repeats)))
    outcome = child(*arguments, timeout=options.timeout, python=sys.executable)
    return [{"what": "small", **row} for row in outcome.get("rows", [outcome])]


def recurrent(options: argparse.Namespace) -> list[dict]:
    """Networks with a fused recurrent kernel."""
    outcome = child("recurrent.py", "--repeats", str(max(2, options.repeats)), timeout=options.timeout)
    return [{"what": "recurrent", **row} for row in outcome.get("rows", [outcome])]


OWN = {
    "kfoc": kfoc,
    "influence": influence,
    "migration": migration,
    "distributed": distributed,
    "gram": gram,
    "small": small,
    "recurrent": recurrent,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=WHATS, default=list(WHATS), metavar="WHAT")
    parser.add_argument("--peers", nargs="+", choices=PACKAGES, default=list(PACKAGES), metavar="PEER")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS, metavar="WORKLOAD")
    parser.add_argument("--repeats", type=int, default=9, help="repeats after one round of warming up, at least 2")
    parser.add_argument(
        "--tables", nargs="+", choices=TABLES, default=list(TABLES), help="of --what kfoc", metavar="TABLE"
    )
    parser.add_argument(
        "--sources", type=Path, help="folder with clones: BPNN and curvlinops for kfoc, kfac-pytorch for migration"
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one measurement may take")
    options = parser.parse_args()
    versions = environment()
    now = datetime.now()
    target = ROOT / "results" / f"benchmark-{now:%Y-%m-%d-%H%M%S}"
    target.parent.mkdir(exist_ok=True)

    results = []
    for what in (kind for name in options.what for kind in WHATS[name]):
        if what == "agreement":
            outcome = child("agreement.py", *options.peers, timeout=options.timeout)
            if "skipped" in outcome:
                sys.exit(f"benchmarks: the comparison of matrices failed: {outcome['skipped']}")
            results += [{"what": what, **row} for row in outcome["rows"]]
            continue
        if what == "scaling":  # with the project's own interpreter, which can draw
            figure, repeats = target.with_suffix(".png"), str(max(2, options.repeats))
            arguments = (str(figure), "--repeats", repeats)
            outcome = child("scaling.py", *arguments, timeout=options.timeout, python=sys.executable)
            results += [{"what": what, **row} for row in outcome.get("rows", [outcome])]
            print(what, outcome.get("figure", outcome.get("skipped")), file=sys.stderr)
            continue
        if what in OWN:
            results += OWN[what](options)
            continue
        if what == "steps":
            for workload in [name for name in options.workloads if name in ("autoencoder", "alexnet", "gpt")]:
                for kind in ("default", "fixed", "exact"):
                    outcome = child(
                        "steps.py",
                        workload,
                        "--kind",
                        kind,
                        "--batch",
                        "128",
                        timeout=options.timeout,
                        python=sys.executable,
                    )
                    results.append({"what": what, "workload": workload, "peer": f"kronfisher, {kind}", **outcome})
                    print(what, workload, kind, outcome.get("ratio", outcome.get("skipped")), file=sys.stderr)
            continue
        for workload in options.workloads:
            for peer in (["floor"] if what == "memory" else []) + options.peers:
                version = versions.get(peer, "")
                if version.startswith("skipped: "):
                    result = {"skipped": version.removeprefix("skipped: ")}
                else:
                    arguments = (peer, workload, what, "--repeats", str(max(2, options.repeats)))
                    result = child("measure.py", *arguments, timeout=options.timeout)
                results.append({"what": what, "workload": workload, "peer": peer, **result})
                print(what, workload, report.line(results[-1]), file=sys.stderr)

    run = {"date": now.isoformat(timespec="minutes"), "versions": versions, "repeats": options.repeats}
    run |= {"machine": report.machine(), "results": results}
    target.with_suffix(".json").write_text(json.dumps(run, indent=1) + "\n")
    target.with_suffix(".md").write_text(report.markdown(run))
    print(report.markdown(run))
    print(f"written: {target.relative_to(ROOT)}.md and .json", file=sys.stderr)
    if "agreement" in options.what and (lost := report.missing(results, options.peers)):
        sys.exit(f"benchmarks: nothing was compared with {', '.join(lost)}; see the table")
    if any(report.disagrees(result) for result in results):
        sys.exit("benchmarks: some matrices differ by more than they should; see the table")
    if wrong := [r["page"] for r in results if r["what"] == "migration" and r.get("failed")]:
        sys.exit(f"benchmarks: examples failed in {', '.join(wrong)}; see the table")


if __name__ == "__main__":
    main()
