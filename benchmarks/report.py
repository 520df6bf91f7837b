"""Turns results into tables."""

import os
import platform
from collections.abc import Callable
from pathlib import Path

TOLERANCE = 1e-5
PROMISED = (("kronfluence", "GPT"), ("curvlinops", "ViT"))  # that a library fell over must not look like agreement

PARTS = ("read", "sum", "share")  # of an estimate in several processes

TITLES = {
    "factors": "K-FAC factors: time over (forward and backward + bare products)",
    "solve": "Factored damping: factorise, invert, one product",
    "solve-exact": "Exact damping: factorise, one solve",
    "memory": "Peak extra memory of computing the factors",
}
COLUMNS = {
    "factors": [
        "/ (fb + gemm)",
        "quartiles",
        "seconds",
        "fb",
        "gemm",
        "first call / later",
        "least",
        "/ K-FAC",
        "calls",
        "calls of fb",
    ],
    "solve": ["/ bare Cholesky", "quartiles", "seconds", "bare"],
    "solve-exact": ["/ bare Cholesky", "quartiles", "seconds", "bare"],
    "memory": ["MiB"],
}


def machine() -> str:
    """The processor, the cores and how busy they were."""
    model = next(
        (
            text.split(":")[1].strip()
            for text in Path("/proc/cpuinfo").read_text().splitlines()
            if text.startswith("model name")
        )
        if Path("/proc/cpuinfo").exists()
        else iter(()),
        platform.processor(),
    )
    return f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"


def cells(result: dict) -> list[str]:
    """The columns of one row, after its name."""
    what = result["what"]
    if "skipped" in result:
        return [f"skipped: {result['skipped']}", *[""] * (len(COLUMNS[what]) - 1)]
    if what == "memory":
        return [f"{result['extra']:.0f}"]
    ratio, own = result["ratio"], result["own"]
    row = [f"{ratio['median']:.2f}", f"{ratio['low']:.2f}–{ratio['high']:.2f}", f"{own['median']:.4f}"]
    row += [f"{result[floor]['median']:.4f}" for floor in ("fb", "gemm", "bare") if floor in result]
    if what == "factors":
        row += [
            f"{result['first'] / own['median']:.1f}",
            *(f"{result[name]['median']:.2f}" if name in result else "–" for name in ("least", "over K-FAC")),
            *(f"{number:,}" if (number := result["calls"][name]) is not None else "–" for name in ("own", "fb")),
        ]
    return row


def in_sample_space(results: list[dict]) -> list[str]:
    """One row for each network of gram.py, and one for each way to its tangent kernel."""
    if "skipped" in results[0]:
        return [f"skipped: {results[0]['skipped']}"]
    forms = {"fb": ".4f", "gram": ".4f", "gram / fb": ".2f"}
    rows = [
        [r["network"], f"{r['samples']:,}", *(format(r[key], form) for key, form in forms.items())] for r in results
    ]
    lines = table(["network", "samples", *forms], rows)
    forms = {"kernel": ".2f", "seconds": ".2f", "ratio": ".1f", "difference": ".0e"}
    kernels = []
    for name, row in ((r["network"], row) for r in results for row in r.get("kernels", [])):
        numbers = [format(row[key], form) for key, form in forms.items() if key in row]
        kernels.append([name, row["outputs"], row["peer"], *(numbers or [f"skipped: {row['skipped']}", "", "", ""])])
    header = ["network", "outputs", "by", "kf.kernel", "theirs", "theirs / kf.kernel", "difference"]
    return [*lines, "", *table(header, kernels)]


def named_tables(results: list[dict]) -> list[str]:
    """The tables of small.py or recurrent.py."""
    if "skipped" in results[0]:
        return [f"skipped: {results[0]['skipped']}"]
    lines: list[str] = []
    for name in dict.fromkeys(result["table"] for result in results):
        chosen = [result for result in results if result["table"] == name]
        rows = [{k: v for k, v in result.items() if k not in ("what", "table")} for result in chosen]
        texts = [[format(v, ".2f") if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
        lines += ["", f"{name}:", "", *table(list(rows[0]), texts)]
    return lines


def disagrees(result: dict) -> bool:
    """Whether two matrices that ought to be equal are not."""
    error = result.get("relative error", "")
    return result["what"] == "agreement" and not error.startswith("skipped") and not float(error) <= TOLERANCE


def missing(results: list[dict], peers: list[str]) -> list[str]:
    """Comparisons that were promised, and of which there is not a single number."""
    numbers = {(r["against"], r["problem"].split(", ")[1]) for r in results if r.get("relative error", "s")[0] != "s"}
    return [f"{peer} on {name}" for peer, name in PROMISED if peer in peers and (peer, name) not in numbers]


def line(result: dict) -> str:
    """One result for the terminal while others are still running."""
    return f"{result['peer']}: {'  '.join(cell for cell in cells(result) if cell)}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]


def kfoc(results: list[dict]) -> list[str]:
    """K-FOC's own tables."""

    def rows(name: str, cells: Callable[[dict], list[str]], width: int) -> list[list[str]]:
        chosen = [r for r in results if r["table"] == name]
        short = ([f"skipped: {r['skipped']}", *[""] * (width - 1)] if "skipped" in r else cells(r) for r in chosen)
        return [[r["workload"], r.get("peer", ""), *each] for r, each in zip(chosen, short, strict=True)]

    def public(r: dict) -> list[str]:
        excess = max(a - b for a, b in zip(r["our errors"], r["their errors"], strict=True))
        seconds = [f"{r['theirs'] * 1e3:.0f}", *(f"{r[name] * 1e3:.1f}" for name in ("own", "row"))]
        faster = [f"{r[name]:.0f}" for name in ("ratio", "in a row")]
        return [*seconds, *faster, f"{excess:+.0e}", r["compared on"], r["commit"]]

    def memory(r: dict) -> list[str]:
        return [f"{r['kfac']:.0f}", f"{r['kfoc']:.0f}", f"{r['kfoc'] / r['kfac']:.2f}"]

    def budget(r: dict) -> list[str]:
        sizes = [f"{r[name] / 2**20:.1f}" for name in ("matrices", "budget", "floor")]
        peak = [f"{r['peak'] / 2**20:.1f}", "yes" if r["within"] else "NO"] if "peak" in r else ["", "refused"]
        return [*sizes, *peak]

    tables = {
        "K-FOC beside public implementations, milliseconds": (
            [
                "theirs",
                "ours",
                "ours, in a row",
                "times faster",
                "in a row",
                "our error − theirs",
                "compared on",
                "commit",
            ],
            rows("public", public, 8),
        ),
        "Over 20,480 data": (
            COLUMNS["factors"],
            rows("long", lambda r: cells(r | {"what": "factors"}), len(COLUMNS["factors"])),
        ),
        "Peak extra memory, MiB": (["K-FAC", "K-FOC", "ratio"], rows("memory", memory, 3)),
        "Large layers in a memory budget, MiB": (
            ["least accepted", "budget", "the model's own", "peak", "within budget + the model's own"],
            rows("budgets", budget, 5),
        ),
    }
    lines = []
    for title, (header, body) in tables.items():
        if body:
            lines += ["", f"## {title}", "", *table(["", "", *header], body)]
    return lines


def influence(results: list[dict]) -> list[str]:
    """Scores of training data."""

    def rows(name: str, cells: Callable[[dict], list[str]]) -> list[list[str]]:
        chosen = [r for r in results if r["table"] == name]
        each = ([f"skipped: {r['skipped']}"] if "skipped" in r else cells(r) for r in chosen)
        return [[r["workload"], r["peer"], *some] for r, some in zip(chosen, each, strict=True)]

    def time(r: dict) -> list[str]:
        seconds = [f"{r[name]:.2f}" for name in ("factors", "scores", "fb", "product", "ratio")]
        return [r["rank"], *seconds]

    tables = {
        "Scores of 10,000 examples for 100 queries, seconds": (
            ["rank", "factors", "scores", "fb", "product", "scores / (fb + product)"],
            rows("time", time),
        ),
        "Peak extra memory of factors and scores, MiB": (["MiB"], rows("memory", lambda r: [f"{r['extra']:.0f}"])),
        "Correlation with the scores of kronfluence": ([""], rows("agreement", lambda r: [f"{r['correlation']:.3f}"])),
        "A new query against an index of 50,000 examples": (
            ["built, s", "query, ms", "correlation with exact scores"],
            rows("index", lambda r: [f"{r['built']:.0f}", f"{1e3 * r['query']:.1f}", f"{r['correlation']:.3f}"]),
        ),
    }
    lines = []
    for title, (header, body) in tables.items():
        if body:
            lines += ["", f"## {title}", "", *table(["", "", *header], body)]
    for grown in (r["rows"] for r in results if r["table"] == "growth" and "rows" in r):
        body = [[f"{r['examples']:,}", str(r["queries"]), f"{r['seconds']:.2f}", f"{r['extra']:.0f}"] for r in grown]
        lines += ["", "## Growth on a narrow network", ""]
        lines += table(["examples", "queries", "seconds", "peak extra memory, MiB"], body)
    return lines


def processes(results: dict) -> str:
    """Estimates in several processes, measured and simulated."""
    lines = ["## Estimates in W processes over gloo, K-FAC, 12 batches of 128", ""]
    header = [
        "workload",
        "W",
        "processor s of a rank",
        "of W = 1",
        "reading",
        "sums",
        "shares",
        "wall s",
        "sent",
        "of it sums",
    ]
    header += ["collectives"]
    rows = []
    for one in results["measured"]:
        first = next(r for r in results["measured"] if r["workload"] == one["workload"] and r["ranks"] == 1)
        seconds = [f"{one[key]:.3f}" for key in PARTS]
        rows.append([one["workload"], str(one["ranks"]), f"{one['seconds']:.3f}"])
        rows[-1] += [f"{one['seconds'] / first['seconds']:.2f}", *seconds, f"{one['wall']:.2f}"]
        rows[-1] += [f"{one['sent'] / 1e6:.1f}", f"{one['planned'] / 1e6:.1f}", f"{one['collectives']:.0f}"]
    lines += table(header, rows)
    if (check := results.get("check")) is not None:
        lines += [
            "",
            f"Simulator: fitted on {check['fit']} with two ranks ({check['multiplications']:.3g} multiplications/s, "
            f"{check['bandwidth']:.3g} bytes/s); {check['check']} with three ranks took {check['measured']:.3f} s, "
            f"predicted {check['predicted']:.3f} s ({check['predicted'] / check['measured'] - 1:+.0%}).",
        ]
    lines += ["", f"## Simulated: {results['machine']}", ""]
    header = ["network", "W", "what", "seconds", "where the time goes", "memory, GB", "kept, GB"]
    rows = []
    for one in results["simulated"]:
        parts = {k: v for k, v in one.items() if isinstance(v, float) and k not in ("seconds", "memory", "kept")}
        most = sorted(parts, key=parts.__getitem__, reverse=True)[:3]
        where = ", ".join(f"{part} {parts[part] / one['seconds']:.0%}" for part in most)
        rows.append([one["network"], str(one["ranks"]), one["kind"], f"{one['seconds']:.3g}", where])
        rows[-1] += [f"{one['memory'] / 1e9:.2f}", f"{one['kept'] / 1e9:.2f}" if "kept" in one else "–"]
    return "\n".join([*lines, *table(header, rows)])


def markdown(run: dict) -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines = [f"# Benchmark of {run['date']}", "", f"{run['machine']}; one thread; medians of {run['repeats']} repeats."]
    lines += ["", f"Versions: {versions}."]
    for what, title in TITLES.items():
        chosen = [result for result in run["results"] if result["what"] == what]
        if chosen:
            lines += ["", f"## {title}"]
        for workload in dict.fromkeys(result["workload"] for result in chosen):
            rows = [[r["peer"], r.get("likelihood", ""), *cells(r)] for r in chosen if r["workload"] == workload]
            lines += ["", f"### {workload}", "", *table(["library", "likelihood", *COLUMNS[what]], rows)]
    lines += kfoc([result for result in run["results"] if result["what"] == "kfoc"])
    lines += influence([result for result in run["results"] if result["what"] == "influence"])
    if pages := [result for result in run["results"] if result["what"] == "migration"]:
        rows = [[r["page"], r.get("skipped") or f"{r['examples']} examples, {r['failed']} failed"] for r in pages]
        lines += ["", "## Pages for those who come from another library", "", *table(["page", ""], rows)]
        lines += [f"\n{r['page']}:\n\n```\n{r['messages']}\n```" for r in pages if r.get("failed")]
    for ranks in (result for result in run["results"] if result["what"] == "distributed"):
        lines += ["", f"skipped: {ranks['skipped']}" if "skipped" in ranks else processes(ranks)]
    if grams := [result for result in run["results"] if result["what"] == "gram"]:
        lines += ["", "## The space of samples: seconds of the processor", "", *in_sample_space(grams)]
    if networks := [result for result in run["results"] if result["what"] == "small"]:
        lines += ["", "## Small networks: milliseconds of the processor; threads: seconds", *named_tables(networks)]
    if kernels := [result for result in run["results"] if result["what"] == "recurrent"]:
        lines += ["", "## Recurrent kernels: milliseconds of the processor", *named_tables(kernels)]
    if steps := [result for result in run["results"] if result["what"] == "steps"]:
        lines += [
            "",
            "A training step, amortised, over AdamW's at batch 128:",
            "",
            "| workload | | ratio |",
            "|---|---|---|",
        ]
        lines += [f"| {r['workload']} | {r['peer']} | {r.get('skipped') or format(r['ratio'], '.2f')} |" for r in steps]
    if scaling := [result for result in run["results"] if result["what"] == "scaling"]:
        lines += ["", "## One layer's factors against samples and positions (milliseconds)", ""]
        if "skipped" in scaling[0]:
            lines += [f"skipped: {scaling[0]['skipped']}"]
        else:
            rows = [
                [r["series"], f"{r['exponent']:.2f}", ", ".join(f"{size}: {time:.2f}" for size, time in r["points"])]
                for r in scaling
            ]
            lines += table(["layer and what grows", "exponent at large sizes", "measured"], rows)
            lines += ["", "The figure lies beside this table. An exponent of 1 is linear."]
    if agreement := [result for result in run["results"] if result["what"] == "agreement"]:
        skipped = sum(result["relative error"].startswith("skipped") for result in agreement)
        failed = sum(map(disagrees, agreement))
        lines += ["", "## Agreement on tiny float64 problems", ""]
        lines += [f"{len(agreement) - skipped} comparisons, {failed} beyond {TOLERANCE:.0e}; {skipped} skipped.", ""]
        header = ["problem", "matrix", "labels", "against", "scale", "relative error", "why this scale"]
        lines += table(header, [[result[column] for column in header] for result in agreement])
    return "\n".join(lines) + "\n"
