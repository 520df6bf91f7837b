"""The command line: what it prints and writes, what it refuses, and how it stops."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from kronfisher.experiments import cli, commands, doctor, study
from kronfisher.experiments.studies import kfoc, kpsvd
from tests.helpers.command_line import run
from tests.helpers.layout import ROOT
from tests.helpers.optional import require

COMMANDS = (
    ("demo",), ("compare",), ("coverage",), ("report",), ("uncertainty",), ("influence",), ("race",), ("race", "suite"),
    ("doctor",), ("schema",),
)  # fmt: skip
QUICK = ("--network", "mlp", "--limit", "40", "--epochs", "1", "--train-size", "100", "--fits", "kfac,diagonal")


def test_compare_prints_tables_and_writes_what_was_asked_for(capsys, tmp_path):
    file, folder = tmp_path / "new" / "result.json", tmp_path / "figures"
    code, out, err = run(capsys, "compare", *QUICK, "--json", file, "--figures", folder)
    assert code == 0
    found = json.loads(file.read_text())
    assert found["finished"] and [row["fit"] for row in found["rows"]] == ["kfac", "diagonal"]
    assert found["settings"]["limit"] == found["rows"][0]["count"] == 40 and found["settings"]["data"] == "digits"
    for row in found["rows"]:  # the table shows the numbers of the file
        line = next(line for line in out.splitlines() if line.startswith(row["fit"] + " "))
        assert f"{row['relative_error']:.3f}" in line and f"{row['trace_ratio']:.3f}" in line
    assert sorted(path.name for path in folder.iterdir()) == ["mlp-block.png", "mlp.png"]
    assert all(str(path) in out for path in (file, folder / "mlp.png", folder / "mlp-block.png"))
    assert "trained" in err and "kfac: relative error" in err
    settings = {"network": "mlp", "limit": 40, "epochs": 1, "train_size": 100, "fits": ("kfac", "diagonal")}
    assert [row.error for row in commands.compare(**settings).rows] == [row["relative_error"] for row in found["rows"]]


def test_the_same_seed_gives_the_same_numbers(capsys, tmp_path):
    errors = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(capsys, "compare", *QUICK, "--seed", seed, "--json", tmp_path / name)
        errors.append([row["relative_error"] for row in json.loads((tmp_path / name).read_text())["rows"]])
    assert errors[0] == errors[1] != errors[2]


def test_the_autoencoder_learns_the_inputs(capsys, tmp_path):
    code, _, _ = run(capsys, "compare", *QUICK, "--network", "autoencoder", "--json", tmp_path / "a.json")
    assert code == 0 and "test_accuracy" not in json.loads((tmp_path / "a.json").read_text())["settings"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "cifar"), "no data set 'cifar'"),
        (("--data", "mnist", "--data-dir", "/nonexistent"), "LeCun"),
        (("--network", "vgg"), "no network 'vgg'"),
        (("--fits", "kfac,shampoo"), "no fit 'shampoo'"),
        (("--fits", ","), "at least one fit"),
        (("--labels", "true"), "no kind of labels 'true'"),
        (("--samples", "0"), "samples is 0"),
        (("--limit", "0"), "limit is 0"),
        (("--batch-size", "-1"), "batch-size is -1"),
        (("--lr", "0"), "lr is 0"),
        (("--epochs", "many"), "--epochs"),
        (("--memory-budget", "lots"), "'lots' is not a size"),
        (("--nonsense", "1"), "--nonsense"),
        (
            ("--data", "curves", "--train-size", "5", "--limit", "5", "--network", "alexnet", "--fits", ""),
            "at least one",
        ),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(capsys, tmp_path, options, message):
    code, out, err = run(capsys, "compare", *options, "--json", tmp_path / "x.json", "--figures", tmp_path / "x")
    assert code == 2 and not out and list(tmp_path.iterdir()) == []
    assert len(err.splitlines()) == 1 and message in err and err.startswith("kronfisher: ")


def test_places_that_cannot_be_written_are_refused_before_the_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "train", lambda *a, **k: pytest.fail("trained before the options were checked"))
    (tmp_path / "file").write_text("")
    for options in (
        ("--json", tmp_path),
        ("--json", tmp_path / "file" / "x.json"),
        ("--figures", tmp_path / "file"),
    ):
        code, _, err = run(capsys, "compare", *QUICK, *options)
        assert code == 2 and str(tmp_path) in err and len(err.splitlines()) == 1


def test_what_cannot_be_computed_exits_with_one_and_the_reason(capsys):
    code, _, err = run(capsys, "compare", *QUICK, "--memory-budget", "1kB")
    assert code == 1 and "bytes" in err.splitlines()[-1]


def test_interrupted_while_comparing_writes_what_is_finished(capsys, tmp_path, monkeypatch):
    real = study.measure

    def interrupted(*arguments, **options):
        rows = real(*arguments, **options)
        yield next(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "measure", interrupted)
    code, out, err = run(capsys, "compare", *QUICK, "--json", tmp_path / "x.json", "--figures", tmp_path)
    found = json.loads((tmp_path / "x.json").read_text())
    assert code == 130 and not found["finished"] and [row["fit"] for row in found["rows"]] == ["kfac"]
    assert "Interrupted" in out and "interrupted after 1 of 2 fits" in err and (tmp_path / "mlp.png").exists()


def test_interrupted_while_training_writes_nothing(capsys, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "train", interrupted)
    code, _, err = run(capsys, "compare", *QUICK, "--json", tmp_path / "x.json")
    assert code == 130 and "nothing was written" in err and not (tmp_path / "x.json").exists()


def test_a_real_interrupt_ends_a_real_process(tmp_path):
    command = [
        sys.executable,
        "-m",
        "kronfisher",
        "compare",
        "--epochs",
        "100000",
        "--json",
        str(tmp_path / "x.json"),
    ]
    # Shells start background jobs with interrupts ignored, which children inherit; a user's terminal does not.
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        try:
            assert "examples to train on" in process.stderr.readline()
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("module", [kfoc, kpsvd], ids=["kfoc", "kpsvd"])
def test_a_study_writes_tables_figures_and_json(capsys, tmp_path, monkeypatch, module):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "QUICK", (replace(module.QUICK[0], epochs=1, limit=10),))
    name = module.__name__.split(".")[-1]
    code, out, err = run(capsys, "compare", "--study", name, "--quick")
    assert code == 0 and sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        f"{name}.json",
        f"{name}.png",
    ]
    found = json.loads((tmp_path / "results" / f"{name}.json").read_text())
    assert found["finished"] and not any("failure" in row for row in found["rows"])
    assert {row["fit"] for row in found["rows"]} >= set(found["settings"]["fits"]) and "test loss" in err
    for fit in found["settings"]["fits"]:
        assert any(line.startswith(fit) for line in out.splitlines())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--study", "kfoc", "--network", "mlp"), "leave out --network"),
        (("--study", "kfoc", "--data", "mnist", "--seed", "1"), "leave out --data, --seed"),
        (("--study", "psvd"), "no study 'psvd'; there are kfoc, kpsvd"),
        (("--quick",), "--quick needs --study"),
        (("--study", "kpsvd", "--data-dir", "/nonexistent"), "/nonexistent"),
    ],
)
def test_a_study_that_cannot_be_run_is_one_line(capsys, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "compare", *options)
    assert code == 2 and not out and list(tmp_path.iterdir()) == []
    assert len(err.splitlines()) == 1 and message in err


def test_coverage_names_every_parameter(capsys):
    code, out, _ = run(capsys, "coverage", "--network", "resnet")
    assert code == 0 and "stage1.body.0.weight" in out and "linear.bias" in out and "100.0 %" in out


def test_without_the_extra_the_command_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)  # importing it raises ImportError
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo"])
    assert 'pip install "kronfisher[cli]"' in caught.value.code  # printed to standard error, exit code 1


def test_every_command_is_a_function(capsys):
    functions = set(commands.__all__) - {"DEMO"}
    _, out, _ = run(capsys)
    table = out.split("Commands:")[1].split("Example:")[0]
    listed = {line.split()[0] for line in table.splitlines() if line.strip()}
    options = {"study", "influence_study", "suite", "stability", "rates"}
    assert listed == functions - options and len(listed) == len(COMMANDS) - 1  # "race suite" begins as "race" does
    assert all("Returns:" in getattr(commands, name).__doc__ for name in functions)


def test_functions_leave_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        findings = commands.uncertainty("picture", quick=True)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert "log evidence" in str(findings)


def test_help(capsys):
    code, out, _ = run(capsys)
    assert code == 0 and all(command in out for command in ("demo", "compare", "coverage"))
    code, out, _ = run(capsys, "compare", "--help")
    assert code == 0 and all(
        option in out for option in ("--data", "--fits", "--labels", "--memory-budget", "--figures")
    )


@pytest.mark.parametrize("command", ((), *COMMANDS), ids=" ".join)
def test_the_help_of_every_command_ends_with_an_example_that_has_only_options_of_the_command(command, capsys):
    code, out, _ = run(capsys, *command, "--help")
    *_, example = out.split("Example:")
    words = example.split()
    assert code == 0 and words[: 1 + len(command)] == ["kronfisher", *command]
    for word in words:
        assert not word.startswith("--") or f"{word} " in out.split("Example:")[0]


def test_every_command_is_among_those_with_an_example_and_on_its_page(capsys):
    _, out, _ = run(capsys)
    listed = out.split("Commands")[1]
    page = (ROOT / "docs" / "command-line.md").read_text()
    for command in map(" ".join, COMMANDS):
        assert f" {command} " in listed and f"`kronfisher {command}`" in page


def test_the_doctor_names_what_is_missing_and_what_is_wrong(capsys, tmp_path, monkeypatch):
    asked = ["torch>=2", 'absent>=3; extra == "one"', 'numpy>=1; extra == "one"', 'kronfisher[one]; extra == "two"']
    monkeypatch.setattr(doctor, "requires", lambda name: [*asked, 'numpy>=1000; extra == "three"'])
    assert doctor.missing_packages() == {"one": ("absent>=3",), "two": ("absent>=3",), "three": ("numpy>=1000",)}
    code, out, _ = run(capsys, "doctor", "--json", tmp_path / "doctor.json")
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert code == bool(found["problems"]) and found["facts"]["torch"] == torch.__version__
    assert 'pip install "kronfisher[two]"' in out
    torch.set_flush_denormal(True)
    try:
        code, out, _ = run(capsys, "doctor")
    finally:
        torch.set_flush_denormal(False)
    assert code == 1 and "subnormal numbers are flushed to zero" in " ".join(out.split())


def test_files_follow_their_schema(capsys, tmp_path):
    jsonschema = require("jsonschema")
    for command, options in (("compare", QUICK), ("doctor", ())):
        path = tmp_path / f"{command}.json"
        run(capsys, command, *options, "--json", path)
        code, out, _ = run(capsys, "schema", command)
        found = json.loads(path.read_text())
        jsonschema.validate(found, json.loads(out))
        assert code == 0
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({key: value for key, value in found.items() if key != "versions"}, json.loads(out))
    code, _, error = run(capsys, "schema", "coverage")
    assert code == 2 and "writes no JSON" in error


@pytest.mark.parametrize(
    ("text", "number"), [("500MB", 500_000_000), ("2 GiB", 2 << 30), ("1.5kb", 1500), ("123", 123), ("7B", 7)]
)
def test_sizes(text, number):
    assert cli.options.byte_size(text) == number


def test_demo(capsys, tmp_path, monkeypatch):
    smaller = {network: replace(study, limit=100) for network, study in commands.DEMO.items()}
    monkeypatch.setattr(commands, "DEMO", smaller)
    code, out, err = run(capsys, "demo", "--output", tmp_path)
    assert code == 0
    names = ["convnet-block.png", "convnet.json", "convnet.png", "mlp-block.png", "mlp.json", "mlp.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(str(tmp_path / name) in out for name in names)
    for network in ("convnet", "mlp"):
        found = json.loads((tmp_path / f"{network}.json").read_text())
        assert found["settings"]["test_accuracy"] > 0.9
        errors = {row["fit"]: row["relative_error"] for row in found["rows"]}
        assert errors["full"] < 1e-3 < errors["ekfac"] <= errors["kfac"] < errors["diagonal"] < 1
    assert "relative error" in out and "trained" in err
