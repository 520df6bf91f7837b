"""The studies of uncertainty measure what they say."""

import json
import math
from dataclasses import replace

import pytest
import torch

import kronfisher as kf
from kronfisher.experiments import data, networks
from kronfisher.experiments.cli import main
from kronfisher.experiments.data.dataset import Dataset
from kronfisher.experiments.training import train
from kronfisher.experiments.uncertainty import Picture, UCIStudy, classification, ood, uci

torch.set_num_threads(1)


def toy(name, data_dir=None, split=0, **options):
    generator = torch.Generator().manual_seed(split)
    x = torch.randn(60, 3, generator=generator)
    y = x[:, :1].sin() + 0.1 * torch.randn(60, 1, generator=generator)
    return Dataset(name, x[:45], y[:45], x[45:], y[45:], "values", 1, scale=7.0)


@pytest.fixture
def study(monkeypatch):
    monkeypatch.setattr(data, "load", toy)
    return replace(UCIStudy.quick(), sets=("yacht",), splits=3, steps=60, peers=())


def test_log_likelihoods_are_of_the_targets_in_their_own_units(study):
    found = study.run()
    dataset = toy("yacht", split=1)
    model = study._train(dataset, 1)
    x, y = dataset.train_inputs.double(), dataset.train_targets.double()
    noise = float((model(x) - y).square().mean().detach())
    fisher = kf.estimate(model, [(x, y)], kf.Gaussian(noise), fit="full", labels="exact")
    posterior = kf.Laplace(model, fisher).optimize_prior(noise=True)
    new, targets = dataset.test_inputs.double(), dataset.test_targets.double()
    prediction = posterior.predict(new)
    normal = torch.distributions.Normal(7 * prediction.mean, 7 * prediction.variance.sqrt())
    (row,) = found.select(fit="exact blocks", split=1)
    assert row["marginal"]["log_likelihood"] == pytest.approx(float(normal.log_prob(7 * targets).mean()), rel=1e-6)
    (network,) = [one for one in found.networks if one["split"] == 1]
    assert network["rmse"] == pytest.approx(float((7 * (model(new) - targets)).square().mean().sqrt().detach()))
    assert row["marginal"]["evidence"] == pytest.approx(float(posterior.log_marginal_likelihood()), rel=1e-6)


def test_the_way_to_the_exact_blocks_is_what_it_says(study, tmp_path):
    found = study.run()
    text = str(found)
    assert "nan" not in text
    gaps = found._gaps("marginal")
    shares = {row[0]: row[1:] for row in gaps.rows}
    assert shares["K-FAC"] == ("0.00", "0.00")
    assert shares["exact blocks"] == ("1.00", "1.00")
    mean = {fit: sum(found.values("yacht", fit, "marginal")) for fit in ("K-FAC", "K-FOC", "exact blocks")}
    expected = (mean["K-FOC"] - mean["K-FAC"]) / (mean["exact blocks"] - mean["K-FAC"])
    assert float(shares["K-FOC"][0]) == pytest.approx(expected, abs=0.006)
    (path,) = found.draw(tmp_path)
    assert path.stat().st_size > 5000
    assert json.loads(found.to_json())["settings"]["splits"] == 3
    (truth,), (row,) = (found.select(fit=fit, split=2) for fit in ("exact blocks", "K-FAC"))
    for name in ("prior_precision", "noise"):
        assert row["borrowed"][name] == pytest.approx(truth["marginal"][name])
        assert row["borrowed"][name] != pytest.approx(row["marginal"][name])


def test_an_interrupt_keeps_what_is_finished(study, monkeypatch):
    calls = []

    def interrupted(self, fit):
        calls.append(fit)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return {"failure": "not tried"}

    monkeypatch.setattr(uci._Problem, "ours", interrupted)
    found = study.run()
    assert not found.finished
    assert len(found.rows) == 6


def test_measures_of_classification():
    p = torch.rand(4000, 5).pow(3)
    p /= p.sum(1, keepdim=True)
    targets = torch.distributions.Categorical(p).sample()
    assert classification.calibration_error(p, targets) < 0.03  # drawn from the very probabilities
    sharper = p.square() / p.square().sum(1, keepdim=True)
    assert classification.calibration_error(sharper, targets) > 0.08
    low, high = torch.randn(50), torch.randn(70) + 0.5
    pairs = (low[:, None] < high).double().mean()
    assert classification.auroc(low, high) == pytest.approx(float(pairs))
    assert classification.auroc(torch.ones(3), torch.ones(4)) == 0.5
    found = classification.judge(
        lambda x: p.log()[x.long().flatten()], torch.arange(100.0), torch.arange(100.0, 300.0), targets[:100]
    )
    assert found["nll"] == pytest.approx(-float(p[:100].gather(1, targets[:100, None]).log().mean()), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((p[:100].argmax(1) == targets[:100]).double().mean()))
    far = torch.tensor([[0.0, -1e3]]).expand(4, 2).log_softmax(1)
    assert classification.judge(lambda x: far, torch.ones(4), torch.ones(4), torch.ones(4).long())["nll"] == 1e3


def test_calibrated_predictions_are_those_of_the_best_prior_on_validation_data(monkeypatch, tmp_path):
    def images(name, data_dir=None):
        generator = torch.Generator().manual_seed(len(name))
        x, y = torch.randn(500, 1, 4, 4, generator=generator), torch.randint(3, (500,), generator=generator)
        x[:, 0, 0, 0] += y
        return Dataset(name, x[:300], y[:300], x[300:], y[300:], "classes", 3)

    monkeypatch.setattr(data, "load", images)
    sizes = {"train_size": 100, "validation_size": 200, "test_size": 200}
    study = replace(ood.OODStudy.quick(), network="mlp", **sizes, fits={"K-FAC": kf.KFAC()}, epochs=40)
    found = study.run()
    assert found.distinct("fit") == ["MAP", "K-FAC", f"K-FAC{ood.CALIBRATED}"]
    own, tuned = found.select()[1:]
    assert own["evidence"] > tuned["evidence"]  # the largest there is
    whole = images("fashion-mnist")
    model = networks.for_data("mlp", whole.head(100), seed=0)
    train(model, whole.head(100), epochs=40, seed=0)
    fisher = kf.estimate(model, whole.batches(500, 100), kf.Categorical(), fit="kfac", labels="exact")

    def score(precision):
        p = kf.Laplace(model, fisher, precision).predict(whole.train_inputs[100:]).mean
        return float(p.gather(1, whole.train_targets[100:, None]).log().mean())

    best = score(tuned["prior_precision"])
    assert best > score(own["prior_precision"])
    assert all(best >= score(tuned["prior_precision"] * factor) for factor in (0.3, 0.7, 1.5, 3.0))
    (path,) = found.draw(tmp_path)
    assert path.stat().st_size > 5000


def test_the_picture_shows_more_doubt_in_the_gap(tmp_path):
    found = Picture(data=60, epochs=100, fits={"exact": kf.Full(across_layers=True)}).run()
    (row,) = found.rows
    grid = found.settings["grid"]
    at, gap = (row["epistemic"][min(range(201), key=lambda k: abs(grid[k] - place))] for place in (2.0, 0.0))
    assert gap > at
    assert math.isfinite(row["evidence"])
    (path,) = found.draw(tmp_path)
    assert path.stat().st_size > 5000


def test_the_command(tmp_path, capsys):
    code = []
    for arguments in (["picture", "--quick"], ["nothing"], ["picture", "--splits", "2"]):
        with pytest.raises(SystemExit) as stopped:
            main(["uncertainty", *arguments, "--json", str(tmp_path / "x.json"), "--figures", str(tmp_path)])
        code.append(stopped.value.code)
    assert code == [0, 2, 2]
    out, err = capsys.readouterr()
    assert "log evidence" in out
    assert "there is no study" in err
    assert json.loads((tmp_path / "x.json").read_text())["settings"]["study"] == "picture"
