"""The studies measure what they say: errors are those of the public interface, spectra those of dense matrices."""

import json
from dataclasses import replace

import pytest
import torch

from kronfisher import EKFAC, KFAC, Diagonal, Full, estimate
from kronfisher.errors import UnsupportedError
from kronfisher.estimation.recipe import Recipe
from kronfisher.experiments import data, networks
from kronfisher.experiments.studies import STUDIES, KFOCStudy, KPSVDStudy
from kronfisher.experiments.studies import kfoc as module
from kronfisher.experiments.studies.divergence import divergence, small_blocks
from kronfisher.experiments.studies.findings import Findings
from kronfisher.experiments.studies.kfoc import PLAIN, Entrant
from kronfisher.experiments.studies.kpsvd import QUICK
from kronfisher.experiments.studies.spectrum import leading_eigenvalues, spectra
from kronfisher.operators import KroneckerSum

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def errors():
    """The first study's quick form with three fits, one of which is said to depend on batches."""
    study = replace(
        KFOCStudy.quick(),
        entrants={"diagonal": Entrant(Diagonal()), "K-FAC": Entrant(KFAC(), batched=True), "full": Entrant(Full())},
    )
    return study, study.run()


def test_errors_are_those_of_an_estimate(errors):
    study, found = errors
    problem = study.problems[1]
    dataset, model = problem.load(1)
    problem.train(dataset, model, seed=1)
    fisher = estimate(model, dataset.batches(60, 60), dataset.likelihood, fit="kfac", seed=1)
    expected = fisher.error(dataset.batches(60, 60))
    for size in (5, None):
        (row,) = found.select(problem=problem.title, seed=1, fit="K-FAC", batch_size=size)
        assert row["error"] == pytest.approx(expected.relative, abs=1e-5)
        assert row["layers"] == {
            name.removesuffix(".weight"): pytest.approx(value, abs=1e-5) for name, value in expected.blocks.items()
        }
    assert max(max(row["layers"].values()) for row in found.select(fit="full")) < 1e-3  # noise of float32
    assert min(row["error"] for row in found.select(fit="K-FAC")) > 0.05


def test_every_size_is_measured_where_it_matters(errors):
    study, found = errors
    measured = {(row["problem"], row["seed"], row["fit"], row["batch_size"]) for row in found.rows}
    for problem in study.problems:
        for fit in ("K-FAC", "full", PLAIN):
            sizes = {size for title, seed, name, size in measured if (title, seed, name) == (problem.title, 1, fit)}
            assert sizes == ({5, None} if fit == "K-FAC" else {None})
            assert {(problem.title, 0, fit, 5), (problem.title, 0, fit, None)} <= measured
    assert len(found.rows) == len(measured) and all(row["seconds"] > 0 for row in found.rows)


def test_tables_and_json_hold_the_numbers(errors):
    _, found = errors
    read = json.loads(found.to_json())
    assert read["finished"] and read["settings"]["study"] == "kfoc"
    assert read["settings"]["fits"]["K-FAC"] == {"fit": repr(KFAC()), "batched": True}
    assert len(read["rows"]) == len(found.rows) and read["rows"][-1]["layers"] == found.rows[-1]["layers"]
    assert [network["seed"] for network in read["networks"]] == [0, 1, 0, 1]
    titles = {table.title.split(":")[0]: table for table in found.tables() if ": relative error" in table.title}
    first, second = (
        row["layers"]["conv1"] for row in found.select(fit="K-FAC", batch_size=5) if "conv1" in row["layers"]
    )
    (line,) = (row for row in titles["digits, convolutions, conv1"].rows if row[0] == "K-FAC")
    assert line[1] == f"{(first + second) / 2:.3f} ± {abs(first - second) / 2**0.5:.3f}"
    (line,) = (row for row in titles["digits, convolutions, conv1"].rows if row[0] == "full")
    assert line[1:] == ("same", "0.000 ± 0.000")
    assert "between batch sizes" in str(found)


def test_divergences_are_those_of_dense_gaussians(errors):
    study, found = errors
    problem = study.problems[1]
    dataset, model = problem.load(0)
    problem.train(dataset, model, seed=0)
    truth = small_blocks(model, dataset.batches(60, 60), dataset.likelihood, seed=0)
    assert set(truth) == {"conv1.weight", "linear.weight"}  # the other has more than 800 rows
    fisher = estimate(model, dataset.batches(60, 60), dataset.likelihood, fit="kfac", seed=0)
    (row,) = found.select(problem=problem.title, seed=0, fit="K-FAC", batch_size=None)
    for name, block in truth.items():
        shift = 0.01 * block.trace() / len(block) * torch.eye(len(block), dtype=torch.double)
        zero = torch.zeros(len(block), dtype=torch.double)
        normal, other = (
            torch.distributions.MultivariateNormal(zero, matrix.double() + shift)
            for matrix in (block, fisher.blocks[name].to_dense())
        )
        expected = torch.distributions.kl_divergence(normal, other) / len(block)
        assert row["divergence"][name.removesuffix(".weight")] == pytest.approx(float(expected), rel=1e-3)
    (row,) = found.select(problem=problem.title, seed=0, fit="full", batch_size=None)
    assert max(row["divergence"].values()) < 1e-6
    assert divergence(torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, -0.5]))) == float("inf")


def test_networks_and_numbers_repeat(errors):
    study, found = errors
    again = replace(study, problems=study.problems[:1], seeds=1).run()
    old = {(row["fit"], row["batch_size"]): row.get("layers") for row in found.rows[: len(again.rows)]}
    assert {(row["fit"], row["batch_size"]): row.get("layers") for row in again.rows} == old
    assert again.networks[0]["test_loss"] == found.networks[0]["test_loss"]


def test_a_fit_that_fails_has_its_reason(errors, monkeypatch):
    def refuse(*arguments, fit, **options):
        if fit == KFAC():
            raise UnsupportedError("not today")
        return estimate(*arguments, fit=fit, **options)

    monkeypatch.setattr(module, "estimate", refuse)
    study, _ = errors
    found = replace(study, problems=study.problems[:1], seeds=1).run()
    assert {row["failure"] for row in found.rows if row["fit"] == "K-FAC"} == {"not today"}
    assert "digits, fully connected, K-FAC: not today" in found.notes() and "–" in str(found)
    others = [row for row in found.rows if row["fit"] != "K-FAC"]
    assert others and not any("failure" in row for row in others)


def test_an_interrupted_study_keeps_what_is_finished(errors):
    def stop(what, done, total):
        if done == 5:
            raise KeyboardInterrupt

    spectra_study = replace(KPSVDStudy.quick(), entrants={"K-FAC": KFAC()})
    for study, least in ((errors[0], 5), (spectra_study, 1)):
        found = study.run(step=stop)
        assert not found.finished and len(found.rows) >= least and "Interrupted" in str(found)
        assert not json.loads(found.to_json())["finished"]


def test_figures_are_pictures_of_every_layer(errors, tmp_path):
    from matplotlib.image import imread

    (path,) = errors[1].draw(tmp_path / "new")
    pixels = imread(path)
    assert path.name == "kfoc.png" and pixels.shape[0] > 600 and pixels[..., :3].std() > 0.02
    assert replace(errors[1], rows=()).draw(tmp_path) == []


@pytest.fixture(scope="module")
def autoencoder():
    dataset = data.load("digits").reconstruction()
    return (
        dataset,
        networks.for_data("autoencoder", dataset, activation="relu").double(),
        dataset.train_inputs[:12].double(),
    )


def test_spectra_are_those_of_dense_matrices(autoencoder):
    dataset, model, batch = autoencoder
    recipe = Recipe(model, dataset.likelihood, seed=3)
    truth = spectra(recipe, batch, leading=8)
    dense = estimate(model, batch, dataset.likelihood, fit="full", seed=3)
    halves = spectra(recipe, [(batch[:5], batch[:5]), (batch[5:], batch[5:])], leading=8)
    assert truth.keys() == dense.blocks.keys()
    for name, spectrum in truth.items():
        if dense.blocks[name].dim > 700:
            continue
        expected = torch.linalg.eigvalsh(dense.blocks[name].to_dense()).flip(0)[:8]
        torch.testing.assert_close(spectrum.values, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(halves[name].values, expected, rtol=1e-9, atol=1e-12)
        assert spectrum.distance(dense.blocks[name]) < 1e-9 * spectrum.norm()


@pytest.mark.parametrize("fit", [KFAC(), EKFAC(), Diagonal()])
def test_leading_eigenvalues_of_estimates(autoencoder, fit):
    dataset, model, batch = autoencoder
    truth = spectra(Recipe(model, dataset.likelihood), batch, leading=8)
    fisher = estimate(model, batch, dataset.likelihood, fit=fit)
    checked = 0
    for name, operator in fisher.blocks.items():
        if operator.dim <= 700:
            expected = torch.linalg.eigvalsh(operator.to_dense()).flip(0)[:8]
            found = leading_eigenvalues(operator, 8, truth[name].a, truth[name].g)
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
            assert truth[name].distance(operator) == pytest.approx(
                float((expected - truth[name].values).norm()), rel=1e-6
            )
            checked += 1
    assert checked >= 2


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(9, 4), (40, 35)])  # written out; by Lanczos iterations
def test_leading_eigenvalues_of_sums(inputs, outputs, inside):
    """Whether or not the sides live in the span of the samples, and with a negative term."""
    random = torch.Generator().manual_seed(inputs)
    a, g = (torch.randn(30, size, generator=random, dtype=torch.double) for size in (inputs, outputs))
    weights = torch.randn(2, 2, 30, generator=random, dtype=torch.double)
    weights[:, 0] = weights[:, 0].abs()
    sides = [x.mT @ (w.unsqueeze(-1) * x) for x, w in zip((a, g), weights, strict=True)]
    if not inside:
        sides = [side + torch.eye(side.shape[-1], dtype=torch.double) for side in sides]
    operator = KroneckerSum(sides[0].unsqueeze(1), sides[1].unsqueeze(1), name="w")
    expected = torch.linalg.eigvalsh(operator.to_dense()).flip(0)[:6]
    torch.testing.assert_close(leading_eigenvalues(operator, 6, a, g), expected, rtol=1e-6, atol=0)
    shifted = operator.shifted(0.5)
    torch.testing.assert_close(leading_eigenvalues(shifted, 6, a, g), expected + 0.5, rtol=1e-6, atol=0)


def test_spectra_of_shared_positions_are_refused():
    digits = data.load("digits")
    model = networks.for_data("convnet", digits)
    with pytest.raises(UnsupportedError, match=r"conv\d.weight: spectra .* positions"):
        spectra(Recipe(model, digits.likelihood), digits.train_inputs[:4], leading=3)


def test_auto_encoders_are_measured_in_training(tmp_path):
    study = replace(KPSVDStudy.quick(), entrants={"K-FAC": KFAC(), "EKFAC on K-FAC": EKFAC()}, points=4)
    found = study.run()
    steps = found.distinct("step")
    assert steps[:2] == [0, 1] and len(steps) == 4 and steps[-1] == found.networks[0]["steps"]
    dataset, model = QUICK[0].load(0)
    (batch,) = dataset.batches(32, 32)
    expected = estimate(model, batch, dataset.likelihood, fit="kfac").error(batch).relative
    (row,) = found.select(step=0, fit="K-FAC")
    assert row["error"] == pytest.approx(expected, rel=1e-6) and 0 < row["spectrum"] < 1
    for step in steps:
        (kfac,), (ekfac,) = (found.select(step=step, fit=fit) for fit in ("K-FAC", "EKFAC on K-FAC"))
        assert ekfac["error"] <= kfac["error"] and set(kfac["spectrum_layers"]) == set(kfac["layers"])
    assert len(found.tables()) == 4 and [path.name for path in found.draw(tmp_path)] == ["kpsvd.png"]
    assert json.loads(found.to_json())["rows"][0]["step"] == 0


def test_missing_data_are_found_before_the_work(monkeypatch, tmp_path):
    monkeypatch.delenv("KRONFISHER_DATA", raising=False)
    for study in STUDIES.values():
        with pytest.raises(FileNotFoundError, match="data folder is known"):
            study().check()
        with pytest.raises(FileNotFoundError, match="does not exist"):
            study(data_dir=tmp_path).check()
        study.quick().check()


def test_selection_leaves_out_what_failed():
    rows = ({"fit": "a", "error": 1.0, "problem": "p"}, {"fit": "b", "failure": "too large", "problem": "p"})
    found = Findings({}, (), rows)
    assert found.select(fit="a") == [rows[0]] and found.select(fit="b") == [] and found.distinct("fit") == ["a"]
    assert found.notes() == ["p, b: too large"]
