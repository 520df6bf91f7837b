"""The command that traces predictions back to training data, and the studies that judge its scores."""

import base64
import json
import re
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import kronfisher as kf
from kronfisher.experiments import commands, data
from kronfisher.experiments.influence.concrete import ConcreteStudy
from kronfisher.experiments.influence.examples import shown
from kronfisher.experiments.influence.fits import make
from kronfisher.experiments.influence.language import LanguageStudy
from kronfisher.experiments.influence.logistic import LogisticStudy, Regression
from kronfisher.experiments.influence.page import page
from kronfisher.experiments.influence.retraining import Regressors, Trainer
from kronfisher.experiments.influence.subject import Subject
from kronfisher.experiments.influence.tracing import _named
from kronfisher.experiments.influence.wrong_labels import WrongLabelsStudy, with_wrong_labels
from tests.helpers.command_line import run

SCRIPT = """
import torch
import kronfisher as kf
torch.manual_seed(0)
net = torch.nn.Linear(4, 3)
x, y = torch.randn(30, 4), torch.randint(3, (30,))
batches, asked, likelihood = [(x[:20], y[:20]), (x[20:], y[20:])], [(x[:2], y[:2])], kf.Categorical()
"""


def test_the_page_shows_every_query_beside_the_examples_of_the_table(capsys, tmp_path):
    options = ("--network", "lenet5", "--train-size", 60, "--epochs", 1, "--queries", 2, "--top", 3)
    code, out, _ = run(capsys, "influence", *options, "--output", tmp_path)
    assert code == 0
    rows = json.loads((tmp_path / "influence.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 3 and {row["direction"] for row in rows} == {"helpful", "harmful"}
    text = (tmp_path / "influence.html").read_text()
    assert text.count("<h2>") == 2 and not re.search("https?:", text)
    for row in rows:
        assert f"{row['example']} ({row['score']:+.2g})" in out
        assert f"no. {row['example']}</small>" in text and f"{row['score']:+.3g}" in text
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert len(pictures) == 2 * (1 + 2 * 3) and all(base64.b64decode(p)[:4] == b"\x89PNG" for p in pictures)


def test_a_script_of_the_users_gives_the_scores_of_the_library(capsys, tmp_path):
    path, names = tmp_path / "mine.py", {}
    path.write_text(SCRIPT)
    words = ("--model", "net", "--train", "batches", "--queries-name", "asked")
    code, _, err = run(capsys, "influence", "--script", path, "--output", tmp_path / "a")
    assert code == 2 and "does not define model, train, queries" in err and not (tmp_path / "a").exists()
    options = (*words, "--fit", "kfac", "--measurement", "margin", "--top", 1, "--output", tmp_path / "b")
    assert run(capsys, "influence", "--script", path, *options)[0] == 0
    rows = json.loads((tmp_path / "b" / "influence.json").read_text())["rows"]
    exec(SCRIPT, names)
    fisher = kf.estimate(names["net"], names["batches"], kf.Categorical(), fit="kfac")
    scores = kf.Influence(names["net"], fisher, kf.Categorical()).scores(
        names["batches"], names["asked"], measurement="margin"
    )
    for q in range(2):
        own = {row["direction"]: (row["example"], row["score"]) for row in rows if row["query"] == q}
        for word, lowest in (("opposing", False), ("supporting", True)):
            top = scores.top(1, lowest=lowest)
            assert own[word] == (int(top.indices[q, 0]), pytest.approx(float(top.values[q, 0]), rel=1e-4))


BESIDE = """
import torch
words = ["harm", "help", "none"]
class Net(torch.nn.Linear):
    pass
"""
TEXTS = """
import argparse, sys
import torch
import kronfisher as kf
from beside import Net, words
argparse.ArgumentParser().parse_args()
torch.manual_seed(0)
net = Net(4, 3)
class Keyed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net
    def forward(self, inputs):
        return self.net(inputs)
model, likelihood = Keyed(), kf.Categorical()
x, y = torch.randn(30, 4), torch.randint(3, (30,))
train = [{"inputs": x[k : k + 10], "labels": y[k : k + 10]} for k in range(0, 30, 10)]
queries = [{"inputs": x[:2], "labels": y[:2]}]
"""
OWN = """
def picture(inputs, target):
    return inputs["inputs"].view(2, 2)
def text(inputs, target):
    return f"<{words[int(target)]}>"
"""


def test_a_script_finds_modules_beside_it_and_says_how_its_examples_look(capsys, tmp_path):
    (tmp_path / "beside.py").write_text(BESIDE)
    (path := tmp_path / "mine.py").write_text(TEXTS + OWN)
    before = list(sys.path), list(sys.argv)

    def page(*options):
        assert run(capsys, "influence", "--script", path, "--top", 2, "--output", tmp_path, *options)[0] == 0
        return (tmp_path / "influence.html").read_text()

    plain, pictures, texts = page(), page("--show", "picture"), page("--show", "text")
    assert "<pre>inputs: " in plain and "target " in plain and "predicted " in plain
    assert pictures.count("data:image/png") == 2 * (1 + 2 * 2) and "<pre>" not in pictures
    assert "&lt;harm&gt;" in texts or "&lt;help&gt;" in texts
    assert (list(sys.path), list(sys.argv)) == before


@pytest.mark.parametrize(
    ("code", "options", "message"),
    [
        ("x = {}\nx['a']", (), "line 2 of .*mine.py fails: KeyError: 'a'"),
        (f"{SCRIPT}\nbatches = iter(batches)", ("--train", "batches"), "batches is read several times"),
        (
            f"{SCRIPT}\nlikelihood = kf.Categorical",
            (),
            "instance of a likelihood of kf; they are Linear and Categorical",
        ),
        (
            f"{SCRIPT}\nfrom torch.utils.data import DataLoader, TensorDataset\n"
            "batches = DataLoader(TensorDataset(x, y), 10, shuffle=True)",
            (),
            "batches comes from a loader that shuffles",
        ),
        (SCRIPT, ("--epochs", 3), "a script has its own: leave out --epochs"),
        (SCRIPT, ("--show", "look"), "does not define look"),
        (f"{SCRIPT}\ndef look(x, y):\n    return 3", ("--show", "look"), "show gave int"),
    ],
)
def test_a_script_that_cannot_be_scored_is_one_line_before_any_estimate(
    capsys, tmp_path, monkeypatch, code, options, message
):
    (path := tmp_path / "mine.py").write_text(code)
    monkeypatch.setattr("kronfisher.experiments.influence.tracing.estimate", lambda *_, **__: pytest.fail("estimated"))
    words = ("--model", "net", "--train", "batches", "--queries-name", "asked")
    code, _, err = run(capsys, "influence", "--script", path, *words, "--output", tmp_path / "out", *options)
    assert code == 2 and len(err.splitlines()) == 1 and re.search(message, err)


def test_options_of_a_script_need_one(capsys, tmp_path):
    code, _, err = run(capsys, "influence", "--queries-name", "asked", "--output", tmp_path / "out")
    assert code == 2 and "leave out --queries-name" in err


def test_only_examples_of_the_right_sign_are_named():
    values = torch.tensor([[1.0, -2.0, 0.0], [1.0, 2.0, 3.0]])
    subject = Subject(
        "x", torch.nn.Linear(2, 2), (torch.zeros(3, 2), torch.zeros(3)), torch.zeros(2, 2), kf.Categorical()
    )
    rows, named = _named(
        subject, kf.Scores(values), shown(subject, subject.queries), 2, {True: "helpful", False: "harmful"}
    )
    assert [(row["query"], row["direction"], row["example"]) for row in rows] == [
        (0, "helpful", 0),
        (0, "harmful", 1),
        (1, "helpful", 2),
        (1, "helpful", 1),
    ]
    assert "none" in page("x", [], named)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--study", "imagenet"), "no study 'imagenet'; there are logistic"),
        (("--quick",), "--quick needs --study"),
        (("--full",), "--full needs --study"),
        (("--study", "logistic", "--quick", "--full"), "not both"),
        (("--study", "logistic", "--top", "3"), "leave out --top"),
        (("--measurement", "accuracy"), "there are loss, margin, logit"),
        (("--fit", "shampoo"), "no fit 'shampoo'"),
        (("--script", "nowhere.py"), "nowhere.py: no such file"),
        (("--queries", "0"), "at least 1"),
    ],
)
def test_what_cannot_be_done_is_one_line(capsys, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "influence", *options)
    assert code == 2 and not out and len(err.splitlines()) == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_the_study_of_regression_goes_on_where_it_was(tmp_path, monkeypatch):
    found = commands.influence_study("logistic", quick=True, folder=tmp_path)
    values = {(row["fit"], row["measure"]): row["value"] for row in found.rows}
    assert values["K-FAC", "linear datamodelling score"] > values["identity", "linear datamodelling score"]
    assert values["K-FAC, 4 steps", "leave-one-out correlation"] > 0.98
    assert values["conjugate gradients, 4 steps", "leave-one-out correlation"] < 0.98  # not there yet
    assert "nan" not in str(found) and found.draw(tmp_path)[0].stat().st_size > 5000
    monkeypatch.setattr(Regression, "__call__", lambda *_: pytest.fail("trained again"))
    assert commands.influence_study("logistic", quick=True, folder=tmp_path).rows[0]["value"] == found.rows[0]["value"]


def test_regressions_are_at_their_minimum():
    problem = LogisticStudy.quick()._problem()
    kept = torch.arange(0, 200, 2)
    theta = problem.solve(kept).requires_grad_()
    outputs = problem.x[kept] @ theta[:, :-1].T + theta[:, -1]
    loss = torch.nn.functional.cross_entropy(outputs, problem.y[kept], reduction="sum") / 200
    (gradient,) = torch.autograd.grad(loss + problem.decay / 2 * theta.square().sum(), theta)
    assert gradient.abs().max() < 2e-7


def test_wrong_labels_are_wrong_and_found():
    dataset = data.load("digits", train_size=300)
    changed, wrong = with_wrong_labels(dataset, 0.1)
    assert torch.equal(changed.train_targets != dataset.train_targets, wrong) and int(wrong.sum()) == 30
    found = WrongLabelsStudy.quick().run()
    shares = {(row["fit"], row["measure"]): row["value"] for row in found.rows}
    assert shares["K-FAC", "found in the first 20%"] > 0.6  # 0.2 by chance
    assert {fit for fit, _ in shares} == {"loss", "gradient norm", "K-FAC"}


def test_the_study_of_a_perceptron_averages_networks_and_goes_on_where_it_was(tmp_path, monkeypatch):
    found = commands.influence_study("perceptron", quick=True, folder=tmp_path)
    values = {(row["fit"], row["measure"].split(", ")[1]): row["value"] for row in found.rows}
    assert set(values) == {("identity", "one network"), ("EKFAC", "one network"), ("EKFAC", "2 networks")}
    assert values["EKFAC", "one network"] > 0.2 and "nan" not in str(found)
    assert found.draw(tmp_path)[0].stat().st_size > 5000
    trained, train = [], Trainer.train
    monkeypatch.setattr(
        Trainer, "train", lambda self, kept, seed: (trained.append(len(kept)), train(self, kept, seed))[1]
    )
    again = commands.influence_study("perceptron", quick=True, folder=tmp_path)
    assert trained == [300, 300] and [row["value"] for row in again.rows] == [row["value"] for row in found.rows]


def test_networks_that_are_trained_side_by_side_are_those_trained_alone():
    dataset = data.load("digits", train_size=70, test_size=3)
    x, y = dataset.train_inputs.flatten(1), dataset.train_targets[:, None].float()
    values = data.Dataset("digits", x, y, dataset.test_inputs.flatten(1), dataset.test_targets[:, None], "values", 1)
    several = Regressors(values, (8,), seeds=3, epochs=2)
    kept = torch.arange(0, 70, 2)
    weights = several.train(kept)
    model = several.network(0)
    order = torch.Generator().manual_seed(1)  # that of seed 0, stream 1
    for _ in range(2):
        for some in [torch.randperm(35, generator=order)[:32]]:  # the last three would be a batch of their own
            loss = (model(x[kept][some]) - y[kept][some]).square().mean()
            for p, gradient in zip(
                model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
            ):
                p.data.mul_(1 - 0.03 * 1e-5).sub_(gradient, alpha=0.03)
    for ours, theirs in zip(weights, model.parameters(), strict=True):
        torch.testing.assert_close(ours[0], theirs.detach(), rtol=1e-4, atol=1e-6)
    assert not torch.equal(weights[0][0], weights[0][1])
    errors = (model(values.test_inputs) - values.test_targets).square()[:, 0]
    alone = Regressors(values, (8,), seeds=1, epochs=2)(kept, 0)
    torch.testing.assert_close(alone, errors.detach(), rtol=1e-3, atol=1e-4)


def test_the_study_of_removals_beats_chance_and_scores_a_network_that_is_not_trained_again(tmp_path, monkeypatch):
    scored, first = [], Regressors.first
    monkeypatch.setattr(Regressors, "first", lambda self, w: (scored.append(self.first_seed), first(self, w))[1])
    found = commands.influence_study("concrete", quick=True, folder=tmp_path)
    values = {(row["fit"], row["measure"]): row["value"] for row in found.rows}
    for measure in ("one query", "3 together", "each of 3"):
        assert values["K-FAC", f"{measure}, 20 removed"] > values["random", f"{measure}, 20 removed"] + 0.005
    assert len(values) == 2 * 3 * 2 and "inf" not in str(found)
    assert len(scored) == 1 and scored[0] >= ConcreteStudy.quick().seeds


def test_the_identity_of_the_studies_is_one():
    model, x, y = torch.nn.Linear(3, 2).double(), torch.randn(20, 3).double(), torch.randint(2, (20,))
    scores = make("identity", model, [(x, y)], kf.Categorical(), damping=0.5).scores((x, y), (x, y)).values
    rows = torch.cat([(model(x).softmax(1) - torch.eye(2)[y]).unsqueeze(2) * F.pad(x, (0, 1), value=1.0)[:, None]])
    torch.testing.assert_close(scores, rows.flatten(1) @ rows.flatten(1).T / 0.5 / 20)


def test_networks_of_all_seeds_are_trained_once_for_each_removal(monkeypatch):
    dataset = data.load("digits", train_size=70, test_size=3).flat()
    values = replace(dataset, train_targets=dataset.train_targets[:, None].float(), task="values", outputs=1)
    several = Regressors(replace(values, test_targets=values.test_targets[:, None].float()), (8,), seeds=3, epochs=1)
    trained, train = [], Regressors.train
    monkeypatch.setattr(Regressors, "train", lambda self, kept: (trained.append(len(kept)), train(self, kept))[1])
    scores = torch.randn(1, 70)
    curve = kf.attribution.removal(scores, lambda kept, seed: several(kept, seed)[:1], counts=(5, 9), seeds=3)
    assert trained == [70, 65, 61] and curve.intervals[0].low < curve.intervals[0].value < curve.intervals[0].high
    assert not torch.equal(several(torch.arange(61), 0), several(torch.arange(61), 1))
    later = replace(several, seeds=1, first_seed=2)
    torch.testing.assert_close(later(torch.arange(61), 0), several(torch.arange(61), 2), rtol=1e-4, atol=1e-6)


def test_scores_of_characters_add_up_to_those_of_their_text(tmp_path):
    text = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n"
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "input.txt").write_text(40 * text)
    study = LanguageStudy.quick(tmp_path)
    found = replace(study, folder=tmp_path / "kept").run()
    assert len(found.tokens) == 4 * 2 and {len(row["scores"]) for row in found.tokens} == {32}
    assert all(sum(row["scores"]) > 0 for row in found.tokens)  # the highest scores of a query
    assert [row["fit"] for row in found.rows] == ["EKFAC"]
    paths = found.draw(tmp_path / "figures")
    assert len(paths) == 2 and all(path.stat().st_size > 5000 for path in paths)
    assert len(json.loads(found.to_json())["tokens"]) == 8
