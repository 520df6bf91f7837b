"""Pages: what is in them, that nothing leaves them, and what is said where a package is missing."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

import kronfisher as kf
from kronfisher.estimation.comparison import Comparison
from kronfisher.pages import Page, Section, Sheet, figure
from kronfisher.pages.figures import bars
from kronfisher.pages.page import Cell
from tests.helpers.command_line import run
from tests.helpers.optional import require

require("jinja2")
require("matplotlib")
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Reader(HTMLParser):
    """Elements in their order, with attributes; every one that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} is closed, and was not the last opened"

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def checked(path):
    """The page at a path: whole, alone, and every picture described."""
    text = path.read_text(encoding="utf-8")
    page = Reader(text)
    for _, attributes in page.found:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), attributes
    assert not re.search(r"url\((?!#)|@import|http://|https://", text)
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', text):
        assert target in ids
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 20 for svg in page.all("svg"))
    assert len(page.all("desc")) == len(page.all("svg"))
    assert all(image["alt"] for image in page.all("img"))
    return page


@pytest.fixture
def fisher():
    layers = torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.LayerNorm(6), torch.nn.Linear(6, 3)
    x = torch.randn(60, 4)
    fisher = kf.estimate(torch.nn.Sequential(*layers), x, kf.Categorical(), fit="kfac")
    fisher.error(x)
    return fisher


def test_a_matrix_as_a_page(fisher, tmp_path):
    page = checked(fisher.save_report(tmp_path / "new" / "fisher.html", "Mine & <yours>"))
    assert page.text.count("Mine & <yours>") == 2  # in its head and on top
    assert len(page.all("svg")) >= 3
    for row in fisher.report().rows:
        assert row.name in page.text and row.structure in page.text and f"{row.error:.3g}" in page.text
    keys = [cell["data-key"] for cell in page.all("td") if "data-key" in cell]
    assert repr(float(fisher.report().rows[0].parameters)) in keys
    assert "Eigenvalues" not in fisher.save_report(tmp_path / "fisher.html", spectra=False).read_text()


def test_spectra_that_cannot_be_had_are_named(tmp_path, monkeypatch):
    x = torch.randn(30, 40)
    fisher = kf.estimate(torch.nn.Linear(40, 3, bias=False), x, kf.Gaussian(), fit="kronecker-sum")
    monkeypatch.setattr("kronfisher.operators.operator.DENSE_LIMIT", 10)
    page = checked(fisher.save_report(tmp_path / "fisher.html"))
    assert "weight: no spectrum is drawn" in page.text


def test_a_comparison_as_a_page_also_from_its_json(tmp_path):
    x = torch.randn(40, 4)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    found = kf.compare(model, x, kf.Categorical(), fits=["kfac", "diagonal", "full"])
    page = checked(found.save_report(tmp_path / "comparison.html"))
    again = Comparison.from_json(found.to_json())
    assert checked(again.save_report(tmp_path / "again.html")).text == page.text
    assert str(again) == str(found)
    for row in found.rows:
        assert f"{row.error:.3f}" in page.text
    with pytest.raises(kf.DataError, match="no comparison"):
        Comparison.from_json(json.dumps({"rows": [{}]}))


def test_a_training_run_as_a_page(tmp_path):
    x, y = torch.randn(60, 4), torch.randint(3, (60,))
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    optimizer, reports = kf.NaturalGradient(model, kf.Categorical(), step=kf.QuadraticModel()), []
    for _ in range(6):
        optimizer.step(lambda: model(x), y)
        reports.append(optimizer.report())
    page = checked(reports[-1].save_report(tmp_path / "training.html", reports))
    assert "Loss of the batch" in page.text and "Seconds by phase" in page.text
    alone = checked(reports[-1].save_report(tmp_path / "training.html"))
    assert "Loss of the batch" not in alone.text


def test_the_command_reads_files_of_both_kinds(fisher, tmp_path, capsys):
    require("safetensors")
    fisher.save(tmp_path / "fisher.safetensors")
    code, out, _ = run(capsys, "report", tmp_path / "fisher.safetensors", "--title", "A matrix")
    assert code == 0 and str(tmp_path / "fisher.html") in out
    assert "A matrix" in checked(tmp_path / "fisher.html").text
    row = {"fit": "kfac", "seconds": None, "bytes": 8, "count": 3, "relative_error": 0.5, "trace_ratio": 1.0}
    settings = {"labels": "exact", "parameters": 4}
    whole = {"finished": True, "settings": settings, "rows": [row | {"blocks": {"w": 0.5}, "failure": None}]}
    (tmp_path / "found.json").write_text(json.dumps(whole))
    code, out, _ = run(capsys, "report", tmp_path / "found.json", "--output", tmp_path / "page.html")
    assert code == 0 and "0.500" in checked(tmp_path / "page.html").text
    for name, text in (("broken.json", "[1]"), ("broken.safetensors", "nothing")):
        (tmp_path / name).write_text(text)
        code, _, error = run(capsys, "report", tmp_path / name)
        assert code == 1 and error.count("\n") == 1
    code, _, error = run(capsys, "report", tmp_path / "missing.json")
    assert code == 1 and "no such file" in error


def test_a_missing_package_is_named(fisher, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"kronfisher\[report\]"):
        fisher.save_report(tmp_path / "fisher.html")
    assert not (tmp_path / "fisher.html").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"kronfisher\[report\]"):
        figure(bars(["a"], [1.0], "b"), "title", "alt")


def test_names_of_two_pictures_do_not_meet_and_rows_fit():
    drawn = [figure(bars(["a <b>"], [1.0], "b"), title, "One bar of length 1.") for title in ("First", "Second")]
    page = Reader(Page("Both", {}, [Section("Two", figures=drawn)]).html())
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids)) > 10 and "a <b>" in page.text
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        Sheet("Wrong", ("a", "b"), [[Cell("1")]])


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_shows_it_without_a_complaint_and_sorts_its_table(fisher, tmp_path):
    text = fisher.save_report(tmp_path / "fisher.html").read_text(encoding="utf-8")
    asks = """<script>
    const body = document.querySelector("tbody"), button = document.querySelectorAll("th button")[1];
    const column = () => Array.from(body.rows).map(row => Number(row.cells[1].dataset.key)).join(" ");
    button.click(); const up = column(); button.click();
    const wide = Array.from(document.querySelectorAll("svg")).filter(svg => svg.getBoundingClientRect().width > 100);
    document.title = [up, column(), wide.length, performance.getEntriesByType("resource").length].join(";");
    </script></body>"""
    (tmp_path / "asked.html").write_text(text.replace("</body>", asks), encoding="utf-8")
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom")
    command = ["chromium", *options, (tmp_path / "asked.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    up, down, pictures, requests = re.search(r"<title>(.*?)</title>", done.stdout)[1].split(";")
    sizes = sorted(row.parameters for row in fisher.report().rows)
    assert up == " ".join(map(str, sizes)) and down == " ".join(map(str, reversed(sizes)))
    assert int(pictures) == text.count("<svg") and requests == "0"
    assert "CONSOLE" not in done.stderr
