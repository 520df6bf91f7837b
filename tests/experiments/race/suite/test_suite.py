"""The suite: what is run, what is kept, and what the tables make of it."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.experiments import cli, data
from kronfisher.experiments.data import Dataset
from kronfisher.experiments.networks.feedforward import mlp
from kronfisher.experiments.networks.reconstructing import vae
from kronfisher.experiments.race.suite import PROBLEMS, Problem, half
from kronfisher.experiments.race.suite.contestants import BASELINES, CONTESTANTS
from kronfisher.experiments.race.suite.pictures import draw
from kronfisher.experiments.race.suite.plan import Plan
from kronfisher.experiments.race.suite.problem import Loaded
from kronfisher.experiments.race.suite.rates import RATES, Pairs
from kronfisher.experiments.race.suite.run import Run, carry_out
from kronfisher.experiments.race.suite.stability import WHOLE, Stability, Starts
from kronfisher.experiments.race.suite.suite import Suite
from kronfisher.experiments.race.suite.table import Results
from kronfisher.experiments.race.suite.tune import tune
from kronfisher.experiments.race.suite.whitening import Whitening
from tests.helpers.close import close


def digits(folder):
    return data.load("digits").reconstruction().head(200, 100)


TINY = Problem("tiny", "perceptron", digits, lambda d, seed: mlp(64, (8,), 64, seed=seed), batch=32, evaluated=50)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(PROBLEMS, "tiny", TINY)
    return TINY.load()


def run_of(problem="vit", name="natural", seed=0, losses=(2.0, 1.0), test=1.0, accuracy=0.5, failure=""):
    points = [{"seconds": 10.0 * k / (len(losses) - 1), "step": k, "train_loss": x} for k, x in enumerate(losses)]
    final = {"train_loss": losses[-1], "test_loss": test, "test_accuracy": accuracy}
    return Run(Plan(problem, name, name, {"lr": 1.0}, 32, seed, 10.0), points, final, final, failure)


def test_there_are_enough_problems_of_enough_families():
    assert len(PROBLEMS) >= 14 and len({problem.family for problem in PROBLEMS.values()}) >= 10


def test_halves_are_by_a_lot_that_does_not_change():
    first, second = half("development"), half("record")
    assert len(first) == len(second) == 9 and not {*first} & {*second} and {*first, *second} == {*half("")}
    drawn = {"vit", "gpt-tied", "lstm", "categories", "segmentation", "residual-mlp", "perceptron", "lora", "vae"}
    assert {*first} == drawn
    with pytest.raises(ValueError, match="there are development, record"):
        half("best")


def test_a_run_is_made_once_and_starts_from_the_same_weights(tiny, tmp_path):
    plans = [Plan("tiny", name, name, {"lr": 1e-2}, 32, 0, 0.05) for name in ("adamw", "muon", "soap")]
    plans.append(Plan("tiny", "natural", "natural", {}, 32, 0, 0.05))
    runs = [carry_out(plan, tiny, tmp_path) for plan in plans]
    for run in runs:
        assert not run.failure and run.steps > 0 and run.points[-1]["seconds"] >= 0.05
        assert run.final["train_loss"] < run.start == runs[0].start
    made = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert [carry_out(plan, tiny, tmp_path) for plan in plans] == runs
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == made
    other = carry_out(plans[0], tiny, tmp_path, again=True)
    assert other.machine != runs[0].machine


def test_a_horizon_ends_the_run_and_is_told(tiny, tmp_path, monkeypatch):
    told = []

    class Told(torch.optim.SGD):
        def __init__(self, model, likelihood, *, seed, total_steps=None):  # none in the step before the clock starts
            told.append(total_steps)
            self.model, self.likelihood = model, likelihood
            super().__init__(model.parameters(), lr=1e-3)

        def step(self, closure, targets):
            self.zero_grad()
            loss = -self.likelihood.log_prob(closure(), targets).mean()
            loss.backward()
            super().step()
            return loss

        def eval(self):
            with torch.no_grad():
                self.kept = [p.clone() for p in self.model.parameters()]
                for p in self.model.parameters():
                    p.zero_()

        def train(self):
            with torch.no_grad():
                for p, kept in zip(self.model.parameters(), self.kept, strict=True):
                    p.copy_(kept)

        def report(self):
            return "told"

    monkeypatch.setattr("kronfisher.optim.NaturalGradient", Told)
    run = carry_out(Plan("tiny", "natural-horizon", "natural", {}, 32, 0, 20.0, horizon=7), tiny, tmp_path)
    assert (told[-1], run.steps, run.report) == (7, 7, "told")
    zero = 64 * math.log(2)  # the loss of weights for evaluation, all zero here; training went on from the others
    assert run.final["train_loss"] == pytest.approx(zero) and abs(run.plain["train_loss"] - zero) > 1e-3


def test_an_optimizer_that_fails_has_no_value(tiny, tmp_path):
    run = carry_out(Plan("tiny", "adamw", "adamw", {"lr": 1e30}, 32, 0, 0.3), tiny, tmp_path)
    assert "not finite" in run.failure and run.value("train_loss") == math.inf and run.value("test_accuracy") == 0
    (path,) = tmp_path.rglob("*.json")
    assert Run.read(path).value("train_loss") == math.inf


def test_the_best_rate_is_inside_of_what_was_tried(tiny, tmp_path, monkeypatch):
    tried = []

    def trial(plan, loaded, folder):
        tried.append((plan.batch, plan.settings["lr"]))
        distance = abs(math.log(plan.settings["lr"] / 0.3)) if plan.batch == 32 else 0.5
        final = {"train_loss": distance}
        return Run(plan, [{"seconds": 0.0, "step": 0, "train_loss": 1.0}], final, final)

    monkeypatch.setattr("kronfisher.experiments.race.suite.tune.carry_out", trial)
    chosen = tune("adamw", tiny, 1.0, tmp_path, lambda line: None)
    assert (chosen["lr"], chosen["batch"]) == (0.3, 32)
    assert tried == [(32, rate) for rate in (3e-4, 1e-3, 3e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)] + [(128, 0.3)]
    assert tune("adamw", tiny, 1.0, tmp_path, lambda line: None) == chosen and len(tried) == 9


def test_times_are_interpolated_and_never_is_infinite():
    run = run_of(losses=(3.0, 2.0, 1.0))
    assert run.reach(1.5) == pytest.approx(7.5) and run.reach(1.0) == 10.0 and run.reach(0.9) == math.inf
    assert run_of(losses=(3.0, math.inf, 1.0)).reach(2.0) == 10.0


def test_verdicts_count_what_they_say():
    def others(problem, adamw, muon, soap, test=1.0):
        return [
            run_of(problem, name, seed, (4.0, loss), test)
            for name, loss in (("adamw", adamw), ("muon", muon), ("soap", soap))
            for seed in range(3)
        ]

    runs = others("vit", 2.0, 1.0, 3.0) + others("curves", 2.0, 1.0, 3.0)
    runs += [run_of("vit", "natural", k, (4.0, 1.0 - 0.5 * (k > 0)), test=1.0) for k in range(3)]
    runs += [run_of("curves", "natural", k, (4.0, 1.5), test=2.0, accuracy=0.6) for k in range(3)]
    results = Results(tuple(runs), 10.0)
    won, lost = results.verdict("vit", "natural"), results.verdict("curves", "natural")
    assert (won.below_adamw, won.below_all, won.test_adamw, won.test_all) == (True, True, True, True)
    assert won.share == pytest.approx(3 / 3.5) and won.share_adamw == pytest.approx(2 / 3.5)
    assert (lost.below_adamw, lost.below_all, lost.loss_adamw, lost.loss_all) == (True, False, False, False)
    assert (lost.metric_adamw, lost.metric_all, lost.test_adamw, lost.test_all) == (True, True, True, True)
    assert lost.share == math.inf and lost.share_adamw == pytest.approx(2 / 2.5)
    both = next(row for row in results.summary() if row["half"] == "both")
    counts = {key: value for key, value in both.items() if isinstance(value, int)}
    assert counts == {
        **{"problems": 2, "below_adamw": 2, "below_all": 1, "loss_adamw": 1, "loss_all": 1},
        **{"metric_adamw": 2, "metric_all": 2, "test_adamw": 2, "test_all": 2},
    }
    assert both["share"] == math.inf and "never" in str(results)


def test_the_command_line(tiny, tmp_path, capsys):
    small = ("--problems", "tiny", "--seconds", "0.02", "--tuning-seconds", "0.01", "--seeds", "0", "--no-horizon")
    arguments = ["race", "suite", *small, "--output", str(tmp_path), "--optimizers", "adamw,x", "--options"]
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, '{"x": {"lr": 0.5}}'])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "adamw" in out and "rate" in out
    runs = json.loads((tmp_path / "suite.json").read_text())["runs"]
    assert [(run["name"], run["settings"]) for run in runs if run["name"] == "x"] == [("x", {"lr": 0.5})]
    with pytest.raises(SystemExit) as caught:
        cli.main(["race", "suite", *small, "--output", str(tmp_path), "--show", "--optimizers", "natural"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "adamw" in out and " x " not in out  # baselines, and no other of ours
    with pytest.raises(SystemExit) as caught:
        cli.main(["race", "suite", "--optimizers", "nobody"])
    assert caught.value.code == 2 and "there is no optimizer 'nobody'" in capsys.readouterr().err


def test_what_is_pretrained_is_kept(tmp_path):
    made = []

    def weights(folder):
        made.append(folder)
        return {"weight": torch.ones(1, 1)}

    def network(dataset, seed, state):
        model = nn.Linear(1, 1, bias=False)
        model.load_state_dict(state)
        return model

    problem = Problem("tiny", "", digits, network, pretrain=weights)
    for _ in range(2):
        assert problem.load(None, tmp_path).model(0).weight.item() == 1
    assert made == [None]


def test_baselines_leave_frozen_parameters_alone(tiny, tmp_path, monkeypatch):
    models = []

    def network(dataset, seed):
        models.append(mlp(64, (8,), 64, seed=seed))
        models[-1][0].requires_grad_(False)
        return models[-1]

    loaded = Problem("tiny", "", digits, network, batch=32, evaluated=50).load()
    for name in ("adamw", "muon", "soap", "natural"):
        settings = {} if name == "natural" else {"lr": 1e-2}
        assert not carry_out(Plan("tiny", name, name, settings, 32, 0, 0.03), loaded, tmp_path).failure
        fresh = mlp(64, (8,), 64, seed=0)
        assert torch.equal(models[-1][0].weight, fresh[0].weight)
        assert not torch.equal(models[-1][2].weight, fresh[2].weight)


def test_settings_that_cannot_be():
    for settings, message in (
        ({"problems": ("x",)}, "no problem 'x'"),
        ({"problems": ()}, "at least one problem"),
        ({"baselines": ("x",)}, "no baseline 'x'"),
        ({"seeds": ()}, "one seed"),
        ({"seconds": 0.0}, "positive"),
        ({"ours": {"adamw": {}}}, "adamw is the name of a baseline"),
    ):
        with pytest.raises(ValueError, match=message):
            Suite(**{"problems": ("vit",), "folder": None, **settings}).check()


def test_fits_are_compared_with_kfac(tiny, tmp_path):
    arguments = ("--problems", "tiny", "--seconds", "0.1", "--seeds", "0", "--output", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        cli.main(["race", "suite", *arguments, "--fits", "inputs,ekfac"])
    assert caught.value.code == 0
    runs = {run["name"]: run for run in json.loads((tmp_path / "suite.json").read_text())["runs"]}
    assert runs.keys() == {"fit-kfac", "fit-ekfac", "fit-inputs"} and not any(r["failure"] for r in runs.values())


def test_a_fit_s_shares_are_of_kfac_s():
    runs = [run_of("vit", "fit-kfac", 0, (3.0, 2.0, 1.0)), run_of("vit", "fit-kfoc", 0, (3.0, 1.0, 0.5), test=0.5)]
    runs += [run_of("vit", "fit-ekfac", 0, (3.0, 2.0, math.inf), failure="x")]
    rows = {row[0]: row[1:] for row in Results(tuple(runs), 10.0).tables()[-1].rows}
    assert rows["kfac"] == ("1", "0", "0", "1.00", "1.00", "1.00", "0")
    assert rows["kfoc"] == ("1", "1", "1", "0.50", "0.50", "1.00", "0")
    assert rows["ekfac"] == ("1", "0", "0", "never", "never", "1.00", "1")


def test_whitening_has_kfac_s_input_factor_and_trace():
    layer, x = nn.Conv2d(2, 3, 2).double(), torch.rand(9, 2, 4, 4, dtype=torch.float64)
    kfac, inputs = (kf.estimate(layer, x, kf.Gaussian(), fit=fit, labels="exact") for fit in ("kfac", Whitening()))
    for name in ("weight",):
        truth, found = kfac[name], inputs[name]
        close(found.A, truth.A)
        close(found.B, torch.eye(3, dtype=torch.float64)[None] * truth.B.diagonal(dim1=1, dim2=2).mean())


def test_stability_says_which_runs_end_above_their_start(tiny, tmp_path, capsys):
    arguments = ("--problems", "tiny", "--seconds", "0.02", "--seeds", "0,1", "--output", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        cli.main(["race", "suite", "--stability", *arguments])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "of 6 runs end above their start" in out  # 8, 32 and 128 of 200 examples
    runs = json.loads((tmp_path / "stability-natural.json").read_text())["runs"]
    assert sorted((run["batch"], run["seed"]) for run in runs) == [(b, s) for b in (8, 32, 128) for s in (0, 1)]


def test_runs_that_end_above_their_start_are_worse():
    good, bad, failed = (run_of("vit", losses=losses) for losses in ((2.0, 1.0), (2.0, 3.0), (2.0, math.nan)))
    starts = Starts((good, bad, failed))
    assert starts.worse == [bad, failed] and "2 of 3 runs" in str(starts) and starts.to_json()["worse"] == 2


def test_all_data_are_a_batch_of_tables_and_coordinates():
    tables = [name for name, problem in PROBLEMS.items() if problem.family in WHOLE]
    assert tables == ["regression", "categories", "coordinates"]
    table = dataclasses.replace(TINY, family=WHOLE[0]).load()
    assert {plan.batch for plan in Stability(("tiny",), None).plans(table)} == {8, 32, 128, 200}


def test_figures(tmp_path):
    runs = [
        run_of(p, n, s, (4.0, 2.0, 1.0)) for p in ("vit", "curves") for n in (*BASELINES, "natural") for s in (0, 1)
    ]
    paths = draw(Results(tuple(runs), 10.0), tmp_path)
    names = ["suite-development.png", "suite-record.png", "suite-shares.png"]
    assert [path.name for path in paths] == names and all(path.stat().st_size > 5_000 for path in paths)


def test_a_model_s_penalty_is_part_of_the_loss():
    loaded = Problem("tiny", "", digits, lambda d, seed: vae(64, hidden=8, code=2, seed=seed), batch=32).load()
    model, x = loaded.model(0), loaded.dataset.train_inputs
    model.eval()
    likelihood = loaded.loss(model(x), x)
    assert loaded.evaluate(model)[0] == pytest.approx((likelihood + model.penalty).item(), rel=1e-4)
    model.train()
    contestant = CONTESTANTS["adamw"](model, loaded, Plan("tiny", "adamw", "adamw", {"lr": 0.0}, 32, 0, 1.0))
    loss = contestant.step(x[:32], x[:32], 1.0)
    assert model.encoder[0].weight.grad.norm() > 0 and loss > model.penalty > 0
    torch.manual_seed(0)
    first = contestant.step(x[:32], x[:32], 1.0)
    torch.manual_seed(0)
    close(first, loaded.loss(model(x[:32]), x[:32]) + model.penalty)


def test_losses_and_metrics_by_kind_of_target():
    def measured(task, outputs, targets):
        parts = torch.zeros(len(targets), 1), targets
        dataset = Dataset("tiny", *parts, *parts, task=task, outputs=1)

        class Fixed(nn.Module):
            def forward(self, x):
                return outputs

        return Loaded(TINY, dataset).evaluate(Fixed())

    logits, classes = torch.randn(4, 3, 5), torch.randint(5, (4, 3))
    loss, accuracy = measured("classes", logits, classes)
    assert accuracy == pytest.approx(float((logits.argmax(-1) == classes).double().mean()))
    truth = -logits.log_softmax(-1).gather(-1, classes[..., None]).sum() / 4
    assert loss == pytest.approx(float(truth), rel=1e-5)
    assert measured("classes", logits.movedim(-1, 1), classes) == pytest.approx((loss, accuracy), rel=1e-5)
    counts, logs = torch.randint(5, (4, 3)).float(), torch.randn(4, 3)
    loss, error = measured("counts", logs, counts)
    deviance = (torch.xlogy(counts, counts / logs.exp()) - counts + logs.exp()).sum() / 4
    assert loss == pytest.approx(float(deviance), rel=1e-5)
    more = counts + 1
    assert abs(measured("counts", more.log(), more)[0]) < 1e-5
    assert error == pytest.approx(float((logs.exp() - counts).square().sum() / 4), rel=1e-5)
    assert measured("values", logs, counts)[0] == pytest.approx(float((logs - counts).square().sum() / 8), rel=1e-5)


def test_the_preconditioner_is_compared_with_sgd_at_the_same_rate(tiny, tmp_path, capsys):
    arguments = ("--problems", "tiny", "--seconds", "0.05", "--seeds", "0", "--output", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        cli.main(["race", "suite", "--preconditioner", *arguments])
    assert caught.value.code == 0 and "runs are not finite after the preconditioner" in capsys.readouterr().out
    runs = json.loads((tmp_path / "rates.json").read_text())["runs"]
    assert {(run["optimizer"], run["lr"]) for run in runs} == {(o, r) for o in ("sgd", "preconditioner") for r in RATES}
    ends = {(run["optimizer"], run["lr"]): run["end"] for run in runs}
    assert ends["sgd", 1e-2] != ends["preconditioner", 1e-2] < runs[0]["start"] > ends["sgd", 1e-2]


def test_a_preconditioner_is_worse_where_sgd_alone_is_finite():
    def run(base, losses, seed):
        plan = Plan("vit", f"{base}-rates", base, {"lr": 0.1}, 32, seed, 3.0, brief=True)
        return dataclasses.replace(run_of(losses=losses), plan=plan)

    good, bad = (2.0, 1.0), (2.0, math.nan)
    runs = [run("sgd", good, 0), run("preconditioner", bad, 0), run("sgd", bad, 1), run("preconditioner", bad, 1)]
    runs += [run("sgd", good, 2), run("preconditioner", (2.0, 3.0), 2)]
    pairs = Pairs(tuple(runs))
    assert pairs.worse == [runs[1]] and "1 of 2 runs" in str(pairs)


def test_runs_on_a_busier_machine_are_named():
    def runs(name, wall):
        return [dataclasses.replace(run_of("vit", name, seed), machine={"wall": wall}) for seed in range(3)]

    even, uneven = Results((*runs("adamw", 10.0), *runs("x", 12.0)), 10.0), runs("adamw", 40.0) + runs("x", 10.0)
    assert "wall time" not in str(even)
    assert "wall time over CPU time: adamw 4.0, x 1.0" in str(Results(tuple(uneven), 10.0))
